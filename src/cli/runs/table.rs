//! `sapo-flow runs table`: finished runs, those that differ in nothing but their seed taken together.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::bail;
use sapo_flow_engine::pipeline::closest;
use serde::Serialize;
use serde_json::{Map, Value};

use super::found::Run;
use super::page;
use crate::cli::args::PageFormat;
use crate::cli::directory::PIPELINE;
use crate::cli::report::number;

/// Metrics that are shown where none is asked for.
const USUAL: [&str; 4] = ["loss", "eval_nll", "eval_accuracy", "eval_margin"];

/// Runs that differ in their seed alone: the same pipeline with all parameters filled in, on the same files, in the
/// same arithmetic.
#[derive(Debug, Serialize)]
pub struct Group {
    /// The pipeline's file.
    pipeline: String,
    /// The parameters that differ between groups.
    params: Map<String, Value>,
    /// What else sets groups apart whose parameters do not: a key of the pipeline, a file's hash, the device.
    settings: Map<String, Value>,
    /// Seeds of the runs, each as often as it ran.
    seeds: Vec<u64>,
    /// Seeds with more than one run.
    repeated_seeds: Vec<u64>,
    /// Their directories.
    runs: Vec<String>,
    /// By metric.
    metrics: Map<String, Value>,
    #[serde(skip)]
    experiment: Option<Experiment>,
}

/// All that a run's results follow from, but for its seed.
type Experiment = BTreeMap<String, Value>;

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
    let groups = groups(&runs, &metrics)?;
    if matches!(format, PageFormat::Json) {
        return Ok(serde_json::to_string_pretty(&groups)? + "\n");
    }
    Ok(format!("{}{}", page::rows(&rows(&groups, &runs, &metrics), format), notes(&groups, format)))
}

/// A row for each group, after the heads.
fn rows(groups: &[Group], runs: &[&Run], metrics: &[String]) -> Vec<Vec<String>> {
    let several_pipelines = groups.iter().any(|group| group.pipeline != groups[0].pipeline);
    let params: BTreeSet<&String> = groups.iter().flat_map(|group| group.params.keys()).collect();
    let settings: BTreeSet<&String> = groups.iter().flat_map(|group| group.settings.keys()).collect();
    let named = several_pipelines || params.is_empty();
    let repeated = groups.iter().any(|group| !group.repeated_seeds.is_empty());
    let mut heads: Vec<String> = Vec::new();
    heads.extend(named.then(|| "pipeline".to_owned()));
    heads.extend(params.iter().chain(&settings).map(|name| (*name).clone()));
    heads.push("n".to_owned());
    heads.extend(repeated.then(|| "seeds".to_owned()));
    heads.extend(metrics.iter().cloned());
    let mut rows = vec![heads];
    for group in groups {
        let text = |value: Option<&Value>| value.filter(|value| !value.is_null()).map_or("-".to_owned(), page::plain);
        let mut row: Vec<String> = Vec::new();
        row.extend(named.then(|| group.pipeline.clone()));
        row.extend(params.iter().map(|name| text(group.params.get(*name))));
        row.extend(settings.iter().map(|name| text(group.settings.get(*name))));
        row.push(group.runs.len().to_string());
        row.extend(repeated.then(|| group.seeds_with_counts()));
        row.extend(metrics.iter().map(|metric| match spread(&values(runs, group, metric)) {
            Some(spread) => spread.to_text(),
            None => "-".to_owned(),
        }));
        rows.push(row);
    }
    rows
}

/// What a reader of the table must not take for more than it is.
fn notes(groups: &[Group], format: PageFormat) -> String {
    if groups.iter().all(|group| group.repeated_seeds.is_empty()) {
        return String::new();
    }
    let separator = if matches!(format, PageFormat::Markdown) { "\n" } else { "" };
    format!("{separator}note: runs with the same seed are repetitions, no further samples; n counts every run\n")
}

impl Group {
    /// `1 (2 runs), 3`
    fn seeds_with_counts(&self) -> String {
        let seeds: BTreeSet<u64> = self.seeds.iter().copied().collect();
        let texts = seeds.iter().map(|seed| match self.seeds.iter().filter(|other| *other == seed).count() {
            1 => seed.to_string(),
            times => format!("{seed} ({times} runs)"),
        });
        texts.collect::<Vec<_>>().join(", ")
    }

    /// What the tables show of it so far.
    fn shown(&self) -> (&String, &Map<String, Value>, &Map<String, Value>) {
        (&self.pipeline, &self.params, &self.settings)
    }
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

fn groups(runs: &[&Run], metrics: &[String]) -> anyhow::Result<Vec<Group>> {
    let params = |run: &Run| {
        let mut params = run.manifest.params.clone().unwrap_or_default();
        params.shift_remove("seed");
        params
    };
    // Parameters that all runs share say nothing about what sets these apart.
    let first = params(runs[0]);
    let differs = |name: &String| runs.iter().any(|run| params(run).get(name) != first.get(name));
    let mut groups: Vec<Group> = Vec::new();
    for run in runs {
        let experiment = experiment(run)?;
        // What is not known of a run may set it apart.
        let same = |group: &&mut Group| experiment.is_some() && group.experiment == experiment;
        let group = match groups.iter_mut().find(same) {
            Some(group) => group,
            None => {
                let shown = params(run).into_iter().filter(|(name, _)| differs(name)).collect();
                groups.push(Group {
                    pipeline: run.manifest.pipeline.display().to_string(),
                    params: shown,
                    settings: Map::new(),
                    seeds: Vec::new(),
                    repeated_seeds: Vec::new(),
                    runs: Vec::new(),
                    metrics: Map::new(),
                    experiment,
                });
                let last = groups.len() - 1;
                &mut groups[last]
            }
        };
        if group.seeds.contains(&run.manifest.seed) && !group.repeated_seeds.contains(&run.manifest.seed) {
            group.repeated_seeds.push(run.manifest.seed);
        }
        group.seeds.push(run.manifest.seed);
        group.runs.push(run.name());
    }
    tell_apart(&mut groups);
    for group in &mut groups {
        for metric in metrics {
            if let Some(spread) = spread(&values(runs, group, metric)) {
                group.metrics.insert(metric.clone(), serde_json::to_value(spread).unwrap_or_default());
            }
        }
    }
    Ok(groups)
}

/// All that a run's results follow from, but for its seed; None where its pipeline was not kept.
fn experiment(run: &Run) -> anyhow::Result<Option<Experiment>> {
    if !run.directory.join(PIPELINE).is_file() {
        return Ok(None);
    }
    let mut experiment = run.settings()?;
    // Where runs are written decides nothing.
    for key in ["run.seed", "run.directory"] {
        experiment.remove(key);
    }
    for (path, file) in &run.manifest.files {
        experiment.insert(format!("sha256 of {path}"), Value::from(file.sha256.as_str()));
    }
    experiment.insert("device".to_owned(), Value::from(run.manifest.device.as_str()));
    experiment.insert("dtype".to_owned(), Value::from(run.manifest.dtype.as_str()));
    Ok(Some(experiment))
}

/// Let groups that look alike show a setting in which they differ, until none do.
fn tell_apart(groups: &mut [Group]) {
    while let Some(name) = first_hidden_difference(groups) {
        for group in groups.iter_mut() {
            let value = group.experiment.as_ref().and_then(|experiment| experiment.get(&name)).cloned();
            group.settings.insert(name.clone(), value.unwrap_or_default());
        }
    }
}

/// A setting in which two groups differ that look the same.
fn first_hidden_difference(groups: &[Group]) -> Option<String> {
    for (index, group) in groups.iter().enumerate() {
        for other in groups[..index].iter().filter(|other| other.shown() == group.shown()) {
            let (Some(ours), Some(theirs)) = (&group.experiment, &other.experiment) else { continue };
            let mut names = theirs.keys().chain(ours.keys());
            if let Some(name) = names.find(|name| ours.get(*name) != theirs.get(*name)) {
                return Some(name.clone());
            }
        }
    }
    None
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
