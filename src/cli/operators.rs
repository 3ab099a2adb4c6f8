//! `sapo-flow operators`: the reference, from the list that pipelines are checked against.

use std::path::Path;

use anyhow::Context;
use sapo_flow_engine::Registry;
use sapo_flow_engine::docs::{OperatorDoc, operators_table};
use sapo_flow_engine::pipeline::{self, CompositeDoc, closest};

use super::args::{NewArgs, OperatorsArgs, PageFormat};
use super::{Failure, Outcome, terminal, validate};

/// Show all operators, or one in full.
pub fn operators(args: &OperatorsArgs) -> Outcome {
    let registry = sapo_flow_operators::registry();
    if let Some(pipeline) = &args.pipeline {
        return composites(pipeline, args, &registry);
    }
    let text = match (&args.name, args.format) {
        (None, PageFormat::Text) => list(&registry),
        (None, PageFormat::Markdown) => operators_table(&registry),
        (None, PageFormat::Json) => {
            let pages: Vec<OperatorDoc> = registry.iter().map(|spec| OperatorDoc::of(spec)).collect();
            serde_json::to_string_pretty(&pages)?
        }
        (Some(name), format) => {
            match (registry.get(name), nearby(&registry).into_iter().find(|page| page.name == *name)) {
                (Some(spec), _) => {
                    let page = OperatorDoc::of(spec);
                    match format {
                        PageFormat::Text => page.to_text(),
                        PageFormat::Markdown => page.to_markdown(),
                        PageFormat::Json => serde_json::to_string_pretty(&page)?,
                    }
                }
                (None, Some(page)) => match format {
                    PageFormat::Text => page.to_text(),
                    PageFormat::Markdown => page.to_markdown(),
                    PageFormat::Json => serde_json::to_string_pretty(&page)?,
                },
                (None, None) => return Err(Failure::Usage(unknown(name, &registry))),
            }
        }
    };
    terminal::print(&text)?;
    Ok(())
}

/// All operators in a line each: built-in ones, and composite ones that are at hand.
fn list(registry: &Registry) -> String {
    let composites = nearby(registry);
    let names = registry.iter().map(|spec| spec.name).chain(composites.iter().map(|page| page.name.as_str()));
    let width = names.map(str::len).max().unwrap_or(0);
    let mut text: String = registry.iter().map(|spec| format!("{:width$}  {}\n", spec.name, spec.summary)).collect();
    if !composites.is_empty() {
        text += &format!("\nMade of these, in {COMPOSITES}/*.yaml:\n\n");
        text.extend(composites.iter().map(|page| format!("{:width$}  {}\n", page.name, page.summary)));
    }
    text
}

/// Where composite operators are looked for that no pipeline was named for.
const COMPOSITES: &str = "operators";

/// The composite operators in that folder of the working directory, by file. Files that define none that are right are left
/// out: this is no place to tell what is wrong with them.
fn nearby(registry: &Registry) -> Vec<CompositeDoc> {
    let entries = std::fs::read_dir(COMPOSITES).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<_> = entries.filter(|path| path.extension().is_some_and(|found| found == "yaml")).collect();
    files.sort();
    let mut pages: Vec<CompositeDoc> = Vec::new();
    for file in files {
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        let found = pipeline::composites(&file.display().to_string(), &text, registry).unwrap_or_default();
        // One file may include another.
        let is_new = |page: &CompositeDoc| pages.iter().all(|other| other.name != page.name);
        let new: Vec<CompositeDoc> = found.into_iter().filter(is_new).collect();
        pages.extend(new);
    }
    pages
}

fn unknown(name: &str, registry: &Registry) -> String {
    let composites = nearby(registry);
    let names = registry.iter().map(|spec| spec.name).chain(composites.iter().map(|page| page.name.as_str()));
    match closest(name, names) {
        Some(near) => format!("there is no operator `{name}`; did you mean `{near}`?"),
        None => format!(
            "there is no operator `{name}`, built in or in {COMPOSITES}/*.yaml; those of a pipeline, and of what it \
             includes, are told by `sapo-flow operators --pipeline FILE`"
        ),
    }
}

/// Print a first pipeline of some operators.
pub fn new(args: &NewArgs) -> Outcome {
    let text = pipeline::scaffold(&args.operators, &sapo_flow_operators::registry()).map_err(Failure::Usage)?;
    terminal::print(&text)?;
    Ok(())
}

/// Print the JSON Schema of pipelines.
pub fn schema() -> Outcome {
    let schema = pipeline::json_schema(&sapo_flow_operators::registry());
    terminal::print(&(serde_json::to_string_pretty(&schema)? + "\n"))?;
    Ok(())
}

/// Show the composite operators of a pipeline, or one in full.
fn composites(path: &Path, args: &OperatorsArgs, registry: &Registry) -> Outcome {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?;
    let mut pages =
        pipeline::composites(&name, &text, registry).map_err(|diagnostics| validate::invalid(path, &diagnostics))?;
    if let Some(wanted) = &args.name {
        if pages.iter().all(|page| page.name != *wanted) {
            let near = closest(wanted, pages.iter().map(|page| page.name.as_str()));
            let hint = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
            return Err(Failure::Usage(format!("{name} has no operator `{wanted}` of its own{hint}")));
        }
        pages.retain(|page| page.name == *wanted);
    }
    let text = match args.format {
        PageFormat::Json => serde_json::to_string_pretty(&pages)?,
        PageFormat::Markdown => pages.iter().map(CompositeDoc::to_markdown).collect::<Vec<_>>().join("\n"),
        PageFormat::Text if args.name.is_some() => pages.iter().map(CompositeDoc::to_text).collect(),
        PageFormat::Text => {
            let width = pages.iter().map(|page| page.name.len()).max().unwrap_or(0);
            pages.iter().map(|page| format!("{:width$}  {}\n", page.name, page.summary)).collect()
        }
    };
    terminal::print(&text)?;
    Ok(())
}
