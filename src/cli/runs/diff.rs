//! `sapo-flow runs diff`: two runs side by side.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::found::Run;
use super::page;
use crate::cli::args::{PageFormat, RunsDiffArgs};
use crate::cli::report::number;
use crate::cli::settings::differences;
use crate::cli::{Outcome, terminal};

/// Compare two runs.
pub fn diff(args: &RunsDiffArgs) -> Outcome {
    let (first, second) = (Run::read(&args.first)?, Run::read(&args.second)?);
    let params = |run: &Run| -> BTreeMap<String, Value> {
        run.manifest.params.clone().unwrap_or_default().into_iter().collect()
    };
    let params = differences(&params(&first), &params(&second));
    let pipeline = differences(&first.settings()?, &second.settings()?);
    let metrics: Vec<(String, [Option<f64>; 2])> = first
        .metrics
        .keys()
        .chain(second.metrics.keys())
        .collect::<BTreeSet<_>>()
        .into_iter()
        .map(|name| (name.clone(), [&first, &second].map(|run| run.metrics.get(name).copied())))
        .collect();
    let text = match args.format {
        PageFormat::Json => {
            serde_json::to_string_pretty(&json!({
                "runs": [first.name(), second.name()],
                "params": as_json(&params),
                "pipeline": as_json(&pipeline),
                "metrics": metrics.iter().map(|(name, values)| (name.clone(), json!(values))).collect::<Map<_, _>>(),
            }))? + "\n"
        }
        format => {
            let names = [first.name(), second.name()];
            let settings = |what: &str, found: &[(String, [Option<Value>; 2])]| {
                let mut rows = vec![vec![what.to_owned(), names[0].clone(), names[1].clone()]];
                let text = |value: &Option<Value>| value.as_ref().map_or("-".to_owned(), page::plain);
                rows.extend(found.iter().map(|(name, [a, b])| vec![name.clone(), text(a), text(b)]));
                if found.is_empty() {
                    rows.push(vec!["(no differences)".to_owned()]);
                }
                page::rows(&rows, format)
            };
            let mut rows = vec![vec!["metric".to_owned(), names[0].clone(), names[1].clone(), "difference".to_owned()]];
            for (name, [a, b]) in &metrics {
                let text = |value: Option<f64>| value.map_or("-".to_owned(), number);
                rows.push(vec![name.clone(), text(*a), text(*b), text(a.zip(*b).map(|(a, b)| b - a))]);
            }
            let (params, pipeline) = (settings("parameter", &params), settings("pipeline", &pipeline));
            format!("{params}\n{pipeline}\n{}", page::rows(&rows, format))
        }
    };
    terminal::print(&text)?;
    Ok(())
}

fn as_json(found: &[(String, [Option<Value>; 2])]) -> Map<String, Value> {
    found.iter().map(|(name, values)| (name.clone(), json!(values))).collect()
}
