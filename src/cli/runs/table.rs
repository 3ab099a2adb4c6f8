//! `sapo-flow runs table`: finished runs, those that differ in nothing but their seed taken together.

use std::collections::BTreeSet;

use anyhow::bail;
use sapo_flow_engine::pipeline::closest;
use serde::Serialize;
use serde_json::{Map, Value};

use super::found::Run;
use super::page;
use crate::cli::args::PageFormat;
use crate::cli::report::number;

/// Metrics that are shown where none is asked for.
const USUAL: [&str; 4] = ["loss", "eval_nll", "eval_accuracy", "eval_margin"];

/// Runs of one pipeline with the same parameters.
#[derive(Debug, Serialize)]
pub struct Group {
    /// The pipeline's file.
    pipeline: String,
    /// The parameters that differ between groups.
    params: Map<String, Value>,
    /// Seeds of the runs.
    seeds: Vec<u64>,
    /// Their directories.
    runs: Vec<String>,
    /// By metric.
    metrics: Map<String, Value>,
}

/// Mean and spread of a metric over runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// How many runs have the metric.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// The sample standard deviation (by n - 1); none for one run.
    pub std: Option<f64>,
}

/// Mean and sample standard deviation.
pub fn spread(values: &[f64]) -> Option<Spread> {
    let n = values.len();
    let mean = values.iter().sum::<f64>() / n as f64;
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    let std = (n > 1).then(|| (squares / (n - 1) as f64).sqrt());
    (n > 0).then_some(Spread { n, mean, std })
}

impl Spread {
    fn to_text(self) -> String {
        match self.std {
            Some(std) => format!("{} ± {}", number(self.mean), number(std)),
            None => number(self.mean),
        }
    }
}

/// The table for a terminal.
pub fn text(runs: &[Run], metrics: &[String]) -> anyhow::Result<String> {
    written(runs, metrics, PageFormat::Text)
}

/// The table in some form.
///
/// # Errors
/// When no run is finished, or none has a metric that is asked for.
pub fn written(runs: &[Run], metrics: &[String], format: PageFormat) -> anyhow::Result<String> {
    let runs: Vec<&Run> = runs.iter().filter(|run| run.is_finished()).collect();
    if runs.is_empty() {
        bail!("no run is finished");
    }
    let metrics = chosen(&runs, metrics)?;
    let groups = groups(&runs, &metrics);
    if matches!(format, PageFormat::Json) {
        return Ok(serde_json::to_string_pretty(&groups)? + "\n");
    }
    let several_pipelines = groups.iter().any(|group| group.pipeline != groups[0].pipeline);
    let names: BTreeSet<&String> = groups.iter().flat_map(|group| group.params.keys()).collect();
    let named = several_pipelines || names.is_empty();
    let heads = named.then(|| "pipeline".to_owned()).into_iter().chain(names.iter().map(|name| (*name).clone()));
    let mut rows = vec![heads.chain(["n".to_owned()]).chain(metrics.iter().cloned()).collect::<Vec<_>>()];
    for group in &groups {
        let params = names.iter().map(|name| group.params.get(*name).map_or("-".to_owned(), page::plain));
        let values = metrics.iter().map(|metric| match spread(&values(&runs, group, metric)) {
            Some(spread) => spread.to_text(),
            None => "-".to_owned(),
        });
        let pipeline = named.then(|| group.pipeline.clone()).into_iter();
        rows.push(pipeline.chain(params).chain([group.runs.len().to_string()]).chain(values).collect());
    }
    Ok(page::rows(&rows, format))
}

/// The metrics asked for, or else those of the usual ones that there are.
fn chosen(runs: &[&Run], metrics: &[String]) -> anyhow::Result<Vec<String>> {
    let known: BTreeSet<&str> = runs.iter().flat_map(|run| run.metrics.keys().map(String::as_str)).collect();
    if metrics.is_empty() {
        return Ok(USUAL.iter().filter(|name| known.contains(**name)).map(|name| (*name).to_owned()).collect());
    }
    if let Some(metric) = metrics.iter().find(|metric| !known.contains(metric.as_str())) {
        let near = closest(metric, known.iter().copied());
        let hint = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
        bail!("no run has the metric `{metric}`{hint}");
    }
    Ok(metrics.to_vec())
}

fn groups(runs: &[&Run], metrics: &[String]) -> Vec<Group> {
    let params = |run: &Run| {
        let mut params = run.manifest.params.clone().unwrap_or_default();
        params.shift_remove("seed");
        params
    };
    // Parameters that all runs share say nothing about what sets these apart.
    let first = params(runs[0]);
    let differs = |name: &String| runs.iter().any(|run| params(run).get(name) != first.get(name));
    let mut groups: Vec<(Map<String, Value>, Group)> = Vec::new();
    for run in runs {
        let (pipeline, params) = (run.manifest.pipeline.display().to_string(), params(run));
        let same = |group: &&mut (Map<String, Value>, Group)| {
            // What is not known of a run may set it apart.
            run.manifest.params.is_some() && group.1.pipeline == pipeline && group.0 == params
        };
        let group = match groups.iter_mut().find(same) {
            Some((_, group)) => group,
            None => {
                let shown = params.iter().filter(|(name, _)| differs(name));
                let shown = shown.map(|(name, value)| (name.clone(), value.clone())).collect();
                let (seeds, names, metrics) = (Vec::new(), Vec::new(), Map::new());
                groups.push((params, Group { pipeline, params: shown, seeds, runs: names, metrics }));
                let last = groups.len() - 1;
                &mut groups[last].1
            }
        };
        group.seeds.push(run.manifest.seed);
        group.runs.push(run.name());
    }
    let mut groups: Vec<Group> = groups.into_iter().map(|(_, group)| group).collect();
    for group in &mut groups {
        for metric in metrics {
            if let Some(spread) = spread(&values(runs, group, metric)) {
                group.metrics.insert(metric.clone(), serde_json::to_value(spread).unwrap_or_default());
            }
        }
    }
    groups
}

/// The values of a metric in a group's runs.
fn values(runs: &[&Run], group: &Group, metric: &str) -> Vec<f64> {
    let members = runs.iter().filter(|run| group.runs.contains(&run.name()));
    members.filter_map(|run| run.metrics.get(metric)).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_by_hand() {
        // Mean 4; squares of the differences 4 + 0 + 4 = 8, over n - 1 = 2.
        let three = spread(&[2.0, 4.0, 6.0]).unwrap();
        assert_eq!(three, Spread { n: 3, mean: 4.0, std: Some(2.0) });
        assert_eq!(three.to_text(), "4.0000 ± 2.0000");
        assert_eq!(spread(&[1.5]).unwrap(), Spread { n: 1, mean: 1.5, std: None });
        assert_eq!(spread(&[1.5]).unwrap().to_text(), "1.5000");
        assert_eq!(spread(&[]), None);
    }
}
