//! `sweep` in a pipeline, and `-S name=a,b` of the command line: the values that parameters take in turn.
//!
//! A sweep is every combination of the values in `grid`, with every entry of `list`, with every seed.

use serde_yaml::Value;

use super::declaration;
use super::diagnostic::{Diagnostic, Report, Severity, Span};
use super::document::{self, check_keys};
use super::overrides::{self, Override};
use super::testing::Source;
use super::yaml::{Content, Entry, Yaml};
use crate::graph::Graph;
use crate::operator::Registry;

/// Most combinations of one sweep.
const MOST_COMBINATIONS: usize = 10_000;

/// The runs of a sweep, but for their seeds.
#[derive(Default)]
pub struct Sweep {
    /// Values for parameters, each with the pipeline that has them.
    pub combinations: Vec<Combination>,
    /// Parameters that were given one value on the command line.
    pub fixed: Vec<(String, Value)>,
    /// Seeds that each combination is run with; none: the pipeline's own.
    pub seeds: Vec<u64>,
}

/// One choice of values.
pub struct Combination {
    /// The parameters that the sweep sets, in the order written.
    pub params: Vec<(String, Value)>,
    /// The pipeline with them.
    pub graph: Graph,
}

/// A parameter and the values that it takes.
struct Dimension {
    name: String,
    span: Span,
    values: Vec<Override>,
}

/// Where the values of a sweep come from.
pub(super) enum Values {
    /// From the block alone. Where the pipeline itself is not right, what it would be with other values is not asked.
    InFile { is_right: bool },
    /// From the block, and from overrides of several values.
    OnCommandLine,
}

/// The sweep of a pipeline, by its `sweep` block and by values given in lists; None where there is neither.
pub(super) fn read(
    root: &Yaml,
    source: &Source,
    registry: &Registry,
    values: Values,
) -> Result<Option<Sweep>, Vec<Diagnostic>> {
    let mut report = source.report();
    let (fixed, mut grid) = match values {
        Values::OnCommandLine => from_command_line(source.overrides, &mut report),
        Values::InFile { .. } => (overrides::from_command_line(source.overrides, &mut source.report()), Vec::new()),
    };
    let block = root.get("sweep");
    if block.is_none() && matches!(values, Values::InFile { .. }) {
        return Ok(None);
    }
    let nothing = Yaml::new(Span::default(), Content::Mapping(Vec::new()));
    let block = block.map_or(&nothing, |entry| &entry.value);
    if !matches!(block.content, Content::Mapping(_)) {
        report
            .error(block.span, format!("`sweep` is a mapping, found {}", block.found()))
            .help("it has the keys `grid`, `list` and `seeds`");
    }
    check_keys(block, &["grid", "list", "seeds"], "`sweep`", &mut report);
    let mut list = read_list(block.get("list"), &mut report);
    for dimension in read_grid(block.get("grid"), &mut report) {
        // What the command line gives goes before what the file does.
        let is_given = grid.iter().any(|other| other.name == dimension.name)
            || fixed.iter().any(|other| other.name == dimension.name);
        if !is_given {
            grid.push(dimension);
        }
    }
    for dimension in &grid {
        if let Some(twice) = list.iter().flatten().find(|given| given.name == dimension.name) {
            let note = format!("its values are at {}", report.place(dimension.span));
            report.error(twice.name_span, format!("`{}` is in the grid and in the list", twice.name)).note(note);
        }
    }
    if let Values::OnCommandLine = values {
        let on_command_line = |given: &Override| fixed.iter().find(|other| other.name == given.name);
        if let Some((given, other)) = list.iter().flatten().find_map(|given| Some((given, on_command_line(given)?))) {
            let message = format!("`{}` has its values in the list of `sweep`, and is {}", given.name, other.given);
            report.error(given.name_span, message).help("leave it out of the list, or off the command line");
        }
    }
    let seeds = read_seeds(block.get("seeds"), &mut report);
    // Names that are not there are told once, and the other values are looked at without them.
    let names = declared_names(root, source);
    grid.retain(|dimension| overrides::is_known(&dimension.name, dimension.span, &names, &mut report));
    for given in &mut list {
        given.retain(|given| overrides::is_known(&given.name, given.name_span, &names, &mut report));
    }
    let combinations = combine(&grid, &list, &mut report);
    if matches!(values, Values::InFile { is_right: false }) {
        return if report.has_errors() { Err(report.finish().list) } else { Ok(None) };
    }
    let had_errors = report.has_errors();
    let combinations = match lower(root, source, &fixed, combinations, registry, !had_errors) {
        Ok(combinations) if !had_errors => combinations,
        Ok(_) => return Err(report.finish().list),
        Err(wrong) => return Err(report.finish_with(wrong).list),
    };
    let graph = combinations.first().map(|combination| &combination.graph);
    let fixed = fixed.into_iter().map(|given| (given.name.clone(), value_in(graph, &given))).collect();
    Ok(Some(Sweep { combinations, fixed, seeds }))
}

/// The names of the pipeline's parameters.
fn declared_names(root: &Yaml, source: &Source) -> Vec<String> {
    let declared = declaration::read(root.get("params").map(|entry| &entry.value), &mut source.report());
    declared.into_iter().map(|declared| declared.name).collect()
}

/// Overrides of one value, and those of several.
fn from_command_line(overrides: &[(String, String)], report: &mut Report) -> (Vec<Override>, Vec<Dimension>) {
    let (mut fixed, mut grid) = (Vec::new(), Vec::new());
    let bracketed: Vec<(String, String)> =
        overrides.iter().map(|(name, text)| (name.clone(), format!("[{text}]"))).collect();
    for (given, (name, text)) in overrides::from_command_line(&bracketed, report).into_iter().zip(overrides) {
        let Content::Sequence(values) = given.value.content else { continue };
        let said = format!("-S {name}={text}");
        let one = |(value, text): (Yaml, Option<String>)| Override {
            value,
            text,
            given: said.clone(),
            ..given_name(&given.name, given.name_span)
        };
        let texts = overrides::item_texts(text).into_iter().chain(std::iter::repeat(None));
        let mut values: Vec<Override> = values.into_iter().zip(texts).map(one).collect();
        match values.len() {
            // `-S name=` gives no value: a parameter that is text takes it as such.
            0 => fixed.push(one((Yaml::new(given.name_span, Content::Scalar(Value::Null)), Some(String::new())))),
            1 => fixed.append(&mut values),
            _ => grid.push(Dimension { name: given.name, span: given.name_span, values }),
        }
    }
    (fixed, grid)
}

fn given_name(name: &str, name_span: Span) -> Override {
    let value = Yaml::new(name_span, Content::Invalid);
    Override { name: name.to_owned(), name_span, value, text: None, given: String::new() }
}

fn given_by(entry: &Entry, value: &Yaml, report: &Report) -> Override {
    let given = format!("given at {}", report.place(value.span));
    Override { value: value.clone(), given, ..given_name(&entry.key, entry.key_span) }
}

fn read_grid(entry: Option<&Entry>, report: &mut Report) -> Vec<Dimension> {
    let Some(entry) = entry else { return Vec::new() };
    if !matches!(entry.value.content, Content::Mapping(_)) {
        let message = format!("`grid` is a mapping from parameters to lists of values, found {}", entry.value.found());
        report.error(entry.value.span, message);
    }
    let mut grid = Vec::new();
    for entry in entry.value.entries() {
        match &entry.value.content {
            Content::Sequence(items) if !items.is_empty() => {
                let values = items.iter().map(|item| given_by(entry, item, report)).collect();
                grid.push(Dimension { name: entry.key.clone(), span: entry.key_span, values });
            }
            _ => {
                let message = format!("expected a list of values for `{}`, found {}", entry.key, entry.value.found());
                report.error(entry.value.span, message).help("what has one value in all runs belongs into `params`");
            }
        }
    }
    grid
}

fn read_list(entry: Option<&Entry>, report: &mut Report) -> Vec<Vec<Override>> {
    let Some(entry) = entry else { return Vec::new() };
    let items = match &entry.value.content {
        Content::Sequence(items) if !items.is_empty() => items.as_slice(),
        _ => {
            let message = format!("`list` is a list of mappings with values, found {}", entry.value.found());
            report.error(entry.value.span, message).help("write `- {name: value}`");
            &[]
        }
    };
    let mut list = Vec::new();
    for item in items {
        if !matches!(item.content, Content::Mapping(_)) {
            report.error(item.span, format!("an entry of `list` is a mapping, found {}", item.found()));
        }
        list.push(item.entries().iter().map(|entry| given_by(entry, &entry.value, report)).collect());
    }
    list
}

fn read_seeds(entry: Option<&Entry>, report: &mut Report) -> Vec<u64> {
    let Some(entry) = entry else { return Vec::new() };
    let mut seeds = Vec::new();
    let items = match &entry.value.content {
        Content::Sequence(items) if !items.is_empty() => items.as_slice(),
        _ => {
            report.error(entry.value.span, format!("`seeds` is a list of numbers, found {}", entry.value.found()));
            &[]
        }
    };
    for item in items {
        match item.to_value().as_u64() {
            Some(seed) if seeds.contains(&seed) => {
                report.error(item.span, format!("the seed {seed} is given twice"));
            }
            Some(seed) => seeds.push(seed),
            None => {
                report.error(item.span, format!("a seed is a whole number, 0 or more, found {}", item.found()));
            }
        }
    }
    seeds
}

/// Every choice of one value for each parameter of the grid, with every entry of the list.
fn combine(grid: &[Dimension], list: &[Vec<Override>], report: &mut Report) -> Vec<Vec<Override>> {
    let count = grid.iter().map(|dimension| dimension.values.len()).chain([list.len().max(1)]);
    if count.fold(1usize, usize::saturating_mul) > MOST_COMBINATIONS {
        report.error(Span::default(), format!("a sweep has at most {MOST_COMBINATIONS} combinations"));
        return Vec::new();
    }
    let mut combinations = if list.is_empty() { vec![Vec::new()] } else { list.to_vec() };
    for dimension in grid {
        let with_each = |combination: Vec<Override>| {
            let with = move |value: &Override| [combination.as_slice(), std::slice::from_ref(value)].concat();
            dimension.values.iter().map(with).collect::<Vec<_>>()
        };
        combinations = combinations.into_iter().flat_map(with_each).collect();
    }
    combinations
}

/// A value as it stands for the parameter: text, where that is text.
fn value_in(graph: Option<&Graph>, given: &Override) -> Value {
    let taken = graph.and_then(|graph| graph.params.get(&given.name));
    match (given.value.to_value(), taken) {
        (Value::Null | Value::Bool(_) | Value::Number(_), Some(Value::String(text))) => Value::String(text.clone()),
        (value, _) => value,
    }
}

/// The pipeline with each combination of values; whether one that is there twice is an error.
fn lower(
    root: &Yaml,
    source: &Source,
    fixed: &[Override],
    combinations: Vec<Vec<Override>>,
    registry: &Registry,
    each_once: bool,
) -> Result<Vec<Combination>, Vec<Diagnostic>> {
    let mut wrong: Vec<Diagnostic> = Vec::new();
    let mut lowered: Vec<Combination> = Vec::new();
    for combination in combinations {
        let mut report = source.report();
        let mut given = fixed.to_vec();
        given.retain(|other| combination.iter().all(|value| value.name != other.name));
        given.extend(combination.iter().cloned());
        let found = document::lower(root, &given, registry, &mut report);
        let graph = found.as_ref().map(|found| &found.graph);
        let params: Vec<(String, Value)> =
            combination.iter().map(|value| (value.name.clone(), value_in(graph, value))).collect();
        if each_once && lowered.iter().any(|other| other.params == params) {
            let span = combination.first().map_or(Span::default(), |value| value.value.span);
            report.error(span, "the sweep has this combination of values twice");
        }
        let mut diagnostics = report.finish();
        diagnostics.list.retain(|found| found.severity == Severity::Error);
        // What is wrong with the pipeline, or with one value, shows in many combinations.
        diagnostics.list.retain(|found| wrong.iter().all(|told| !told.tells_what(found)));
        wrong.extend(diagnostics.list);
        lowered.extend(found.map(|found| Combination { params, graph: found.graph }));
    }
    if wrong.is_empty() { Ok(lowered) } else { Err(wrong) }
}
