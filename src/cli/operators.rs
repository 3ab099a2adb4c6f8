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
        (None, PageFormat::Text) => {
            let width = registry.iter().map(|spec| spec.name.len()).max().unwrap_or(0);
            registry.iter().map(|spec| format!("{:width$}  {}\n", spec.name, spec.summary)).collect()
        }
        (None, PageFormat::Markdown) => operators_table(&registry),
        (None, PageFormat::Json) => {
            let pages: Vec<OperatorDoc> = registry.iter().map(|spec| OperatorDoc::of(spec)).collect();
            serde_json::to_string_pretty(&pages)?
        }
        (Some(name), format) => {
            let Some(spec) = registry.get(name) else {
                let near = closest(name, registry.iter().map(|spec| spec.name));
                let hint = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
                return Err(Failure::Usage(format!("there is no operator `{name}`{hint}")));
            };
            let page = OperatorDoc::of(spec);
            match format {
                PageFormat::Text => page.to_text(),
                PageFormat::Markdown => page.to_markdown(),
                PageFormat::Json => serde_json::to_string_pretty(&page)?,
            }
        }
    };
    terminal::print(&text)?;
    Ok(())
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
