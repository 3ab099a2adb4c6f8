//! `sapo-flow runs`: what there is of runs on disk, one by one and side by side.
//!
//! | module | what it holds |
//! |---|---|
//! | [`found`] | run directories as they are found |
//! | [`diff`] | two runs side by side |
//! | [`table`] | mean and standard deviation over seeds |
//! | [`page`] | tables as text and as markdown |

use serde_json::{Value, json};

use super::args::{PageFormat, RunsArgs, RunsLsArgs, RunsShowArgs, RunsTableArgs, RunsVerb};
use super::report::number;
use super::{Outcome, count, explained, terminal};
use found::{Run, Unreadable};

mod diff;
pub mod found;
mod page;
pub mod table;

/// Tell about runs.
pub fn runs(args: &RunsArgs) -> Outcome {
    match &args.verb {
        RunsVerb::Ls(args) => ls(args),
        RunsVerb::Show(args) => show(args),
        RunsVerb::Diff(args) => diff::diff(args),
        RunsVerb::Table(args) => compare(args),
    }
}

fn ls(args: &RunsLsArgs) -> Outcome {
    let mut found = found::find(&args.directories)?;
    found.warn();
    let (runs, unreadable) = (&mut found.runs, &found.unreadable);
    let began = |run: &Run| run.manifest.processes.first().map(|process| process.started.clone()).unwrap_or_default();
    runs.sort_by_key(|run| (began(run), run.name()));
    let text = match args.format {
        PageFormat::Json => {
            let damaged = |run: &Unreadable| {
                let error = explained(&run.error);
                json!({"run": run.directory.display().to_string(), "state": "unreadable", "error": error})
            };
            let runs: Vec<Value> = runs.iter().map(summary).chain(unreadable.iter().map(damaged)).collect();
            serde_json::to_string_pretty(&runs)? + "\n"
        }
        format => {
            let heads = ["run", "pipeline", "state", "steps", "loss", "began"];
            let mut rows = vec![heads.map(str::to_owned).to_vec()];
            for run in runs.iter() {
                rows.push(vec![
                    run.name(),
                    run.manifest.pipeline.display().to_string(),
                    run.state.word().to_owned(),
                    run.steps.map_or("-".to_owned(), |steps| steps.to_string()),
                    run.metrics.get("loss").map_or("-".to_owned(), |loss| number(*loss)),
                    began(run),
                ]);
            }
            for Unreadable { directory, .. } in unreadable {
                let name = directory.display().to_string();
                rows.push([&name, "-", "unreadable", "-", "-", "-"].map(str::to_owned).to_vec());
            }
            page::rows(&rows, format)
        }
    };
    terminal::print(&text)?;
    Ok(())
}

fn summary(run: &Run) -> Value {
    let last = run.manifest.processes.last();
    json!({
        "run": run.name(),
        "pipeline": run.manifest.pipeline,
        "state": run.state,
        "steps": run.steps,
        "total_steps": last.and_then(|process| process.ended.as_ref()).and_then(|ended| ended.total_steps),
        "error": last.and_then(|process| process.ended.as_ref()).and_then(|ended| ended.error.clone()),
        "seed": run.manifest.seed,
        "device": run.manifest.device,
        "dtype": run.manifest.dtype,
        "threads": run.manifest.threads,
        "began": run.manifest.processes.first().map(|process| &process.started),
        "ended": last.and_then(|process| process.ended.as_ref()).map(|ended| &ended.at),
        "params": run.manifest.params,
        "metrics": run.metrics,
    })
}

fn show(args: &RunsShowArgs) -> Outcome {
    let run = Run::read(&args.run)?;
    let mut summary = summary(&run);
    let text = match args.format {
        PageFormat::Json => serde_json::to_string_pretty(&summary)? + "\n",
        format => {
            let (params, metrics) = (summary["params"].take(), summary["metrics"].take());
            let facts = table_of("", "", &summary, page::plain);
            let values =
                table_of("metric", "last value", &metrics, |value| value.as_f64().map_or("-".to_owned(), number));
            let tables = [facts, table_of("parameter", "value", &params, page::plain), values];
            let tables = tables.iter().filter(|rows| rows.len() > 1);
            tables.map(|rows| page::rows(rows, format)).collect::<Vec<_>>().join("\n")
        }
    };
    terminal::print(&text)?;
    Ok(())
}

/// Two columns: keys and values. Without heads, the first entry is the first row.
fn table_of(key: &str, value: &str, entries: &Value, text: impl Fn(&Value) -> String) -> Vec<Vec<String>> {
    let heads = (!key.is_empty()).then(|| vec![key.to_owned(), value.to_owned()]);
    let entries = entries.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    heads.into_iter().chain(entries.map(|(name, value)| vec![name.clone(), text(value)])).collect()
}

fn compare(args: &RunsTableArgs) -> Outcome {
    let found = found::find(&args.directories)?.with_settings();
    found.warn();
    let unfinished = found.runs.iter().filter(|run| !run.is_finished()).count();
    terminal::print(&table::written(&found.runs, &args.metrics, args.format)?)?;
    if unfinished > 0 {
        terminal::message(&format!("left out, since not finished: {}", count(unfinished, "run")));
    }
    Ok(())
}
