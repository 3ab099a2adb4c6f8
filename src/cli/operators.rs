//! `sapo-flow operators`: the reference, from the list that pipelines are checked against.

use sapo_flow_engine::docs::{OperatorDoc, operators_table};
use sapo_flow_engine::pipeline::closest;

use super::args::{OperatorsArgs, PageFormat};
use super::{Failure, Outcome, terminal};

/// Show all operators, or one in full.
pub fn operators(args: &OperatorsArgs) -> Outcome {
    let registry = sapo_flow_operators::registry();
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
