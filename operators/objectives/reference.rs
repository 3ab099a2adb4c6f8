//! The page about objectives: what there is, and what formulas are written with.

use std::collections::BTreeMap;
use std::fmt::Write;

use sapo_flow_training::objectives::PairTensor;

use super::built_in;
use super::definition::{Param, text};
use super::formula::{RECORD_NUMBERS, VALUES};
use super::tensors::FUNCTIONS;

/// All objectives with their params, then the names and functions of formulas, in markdown.
pub fn page() -> String {
    let mut page = String::from("Objectives, with params and defaults:\n\n");
    for name in built_in::names() {
        let Some(Ok(definition)) = built_in::definition(name).map(|definition| definition.whole()) else { continue };
        let params: Vec<String> = definition.params_read().map(|(name, param)| in_words(name, param)).collect();
        let _ = writeln!(page, "- `{name}`: {} Params: {}.", definition.description, params.join(", "));
    }
    page.push_str("\nWhat the params mean:\n\n");
    let meanings = meanings();
    for (meaning, objectives) in &meanings {
        // Where a name means one thing, it need not be said where.
        let several = meanings.keys().filter(|(name, _)| *name == meaning.0).count() > 1;
        let of = if several { format!(" ({})", objectives.join(", ")) } else { String::new() };
        let _ = writeln!(page, "- `{}`{of}: {}", meaning.0, meaning.1);
    }
    page.push_str("\nNumbers of every pair that formulas may name:\n\n");
    for tensor in PairTensor::ALL {
        let _ = writeln!(page, "- `{}`: {}.", tensor.name(), tensor.description());
    }
    for (name, what) in RECORD_NUMBERS {
        let _ = writeln!(page, "- `{name}`: {what}.");
    }
    let _ = writeln!(page, "- `{VALUES}.NAME`: a number that the pair has by that name, such as a score.");
    let functions: Vec<String> = FUNCTIONS.iter().map(|name| format!("`{name}`")).collect();
    let _ = write!(
        page,
        "\nFunctions: {}; `min` and `max` of one argument, `mean`, `sum` and `sort` go over all pairs of the step. \
         Operators: + - * / ** < <= > >= == != (1 or 0 for each pair); `if` and `switch` over params.",
        functions.join(", ")
    );
    page
}

/// Names of params with what they take and mean, and the objectives where that is so.
fn meanings() -> BTreeMap<(String, String), Vec<&'static str>> {
    let mut meanings: BTreeMap<(String, String), Vec<&str>> = BTreeMap::new();
    for objective in built_in::names() {
        let Some(Ok(definition)) = built_in::definition(objective).map(|definition| definition.whole()) else {
            continue;
        };
        for (name, param) in definition.params_read() {
            let meaning = format!("{}. {}", takes(param), param.description);
            meanings.entry((name.clone(), meaning.trim_end().to_owned())).or_default().push(objective);
        }
    }
    meanings
}

/// What a param takes, in words.
fn takes(param: &Param) -> String {
    if !param.choices.is_empty() {
        let choices: Vec<String> = param.choices.iter().map(text).collect();
        return format!("one of {}", choices.join(", "));
    }
    let kind = if param.default.is_number() { "a number" } else { "a text" };
    format!("{kind} {}", param.bounds()).trim_end().to_owned()
}

/// All objectives in a markdown table, each with the params that are its own.
pub fn table() -> String {
    let shared = built_in::definition("log_ratios").unwrap_or_default().params;
    let mut table = String::from("| objective | what it is | params and defaults |\n|---|---|---|\n");
    for name in built_in::names() {
        let Some(Ok(definition)) = built_in::definition(name).map(|definition| definition.whole()) else { continue };
        let own =
            |(name, param): &(&String, &Param)| shared.get(*name).is_none_or(|other| other.default != param.default);
        let params: Vec<String> =
            definition.params_read().filter(own).map(|(name, param)| in_words(name, param)).collect();
        let what = definition.description.trim_end_matches('.');
        let _ = writeln!(table, "| [`{name}`](operators/objectives/{name}.yaml) | {what} | {} |", params.join(", "));
    }
    table
}

fn in_words(name: &str, param: &Param) -> String {
    let choices: Vec<String> = param.choices.iter().filter(|choice| **choice != param.default).map(text).collect();
    let or = if choices.is_empty() { String::new() } else { format!(" or {}", choices.join(", ")) };
    format!("`{name}` {}{or}", text(&param.default))
}
