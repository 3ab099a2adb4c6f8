//! Run directories as they are found: how the run came to be, what became of it, and its last numbers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use sapo_flow_engine::number::Number;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cli::directory::{EVALUATIONS, PIPELINE};
use crate::cli::lock;
use crate::cli::manifest::{self, Ended, Ending, Manifest};
use crate::cli::settings::{self, Settings};
use crate::cli::sweep::jobs;
use crate::cli::sweep::queue::{Job, Queue};
use crate::cli::{explained, terminal};

const METRICS: &str = "metrics.jsonl";

/// What became of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// A process works on it.
    Running,
    /// All its steps are done.
    Finished,
    /// Stopped or killed; it can go on.
    Interrupted,
    /// Ended by an error.
    Failed,
}

impl State {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            State::Running => "running",
            State::Finished => "finished",
            State::Interrupted => "interrupted",
            State::Failed => "failed",
        }
    }
}

/// A run directory.
#[derive(Debug)]
pub struct Run {
    /// The directory.
    pub directory: PathBuf,
    /// How the run came to be.
    pub manifest: Manifest,
    /// What became of it.
    pub state: State,
    /// Steps done, as far as is known.
    pub steps: Option<u64>,
    /// The last value of each metric; held-out ones as evaluated last.
    pub metrics: BTreeMap<String, f64>,
}

impl Run {
    /// The run in a directory.
    ///
    /// # Errors
    /// When it is none, or its files cannot be read.
    pub fn read(directory: &Path) -> anyhow::Result<Self> {
        if !manifest::is_there(directory) {
            bail!("{} is no run directory: it has no manifest.json", directory.display());
        }
        // Looked at first: a run that ends meanwhile is told as one that was at work.
        let is_running = lock::is_taken(directory)?;
        let manifest = Manifest::read(directory)?;
        let ended = manifest.processes.last().and_then(|process| process.ended.clone());
        let state = match ended.as_ref().map(|ended| ended.outcome) {
            _ if is_running => State::Running,
            Some(Ending::Finished) => State::Finished,
            Some(Ending::Failed) => State::Failed,
            Some(Ending::Interrupted) | None => State::Interrupted,
        };
        let (last_step, mut metrics) = last_metrics(&directory.join(METRICS))?;
        metrics.extend(evaluations(&directory.join(EVALUATIONS))?);
        let steps = ended.and_then(|ended: Ended| ended.steps).or(last_step.map(|step| step + 1));
        Ok(Run { directory: directory.to_owned(), manifest, state, steps, metrics })
    }

    /// Whether all its steps are done.
    pub fn is_finished(&self) -> bool {
        self.state == State::Finished
    }

    /// The values of the pipeline that ran, by dotted key.
    ///
    /// # Errors
    /// When its `pipeline.yaml` cannot be read.
    pub fn settings(&self) -> anyhow::Result<Settings> {
        settings::stored(&self.directory)
    }

    /// The directory, as text.
    pub fn name(&self) -> String {
        self.directory.display().to_string()
    }
}

/// What there is in some directories.
#[derive(Debug, Default)]
pub struct Found {
    /// The runs.
    pub runs: Vec<Run>,
    /// Those that something is wrong with: one damaged file does not hide the other runs.
    pub unreadable: Vec<Unreadable>,
}

/// A run, or a sweep, that cannot be read.
#[derive(Debug)]
pub struct Unreadable {
    /// Its directory.
    pub directory: PathBuf,
    /// Why.
    pub error: anyhow::Error,
}

impl Found {
    /// Tell people of what cannot be read, and why.
    pub fn warn(&self) {
        for Unreadable { error, .. } in &self.unreadable {
            terminal::message(&format!("warning: {}", explained(error)));
        }
    }

    /// Take finished runs whose pipeline is there, and damaged, for unreadable: they can be listed, and not compared.
    pub fn with_settings(self) -> Self {
        let mut found = Found { runs: Vec::new(), unreadable: self.unreadable };
        for run in self.runs {
            let is_damaged = run.is_finished() && run.directory.join(PIPELINE).is_file();
            match run.settings().err().filter(|_| is_damaged) {
                Some(error) => found.unreadable.push(Unreadable { directory: run.directory, error }),
                None => found.runs.push(run),
            }
        }
        found
    }

    fn add(&mut self, directory: &Path, run: anyhow::Result<Option<Run>>) {
        match run {
            Ok(run) => self.runs.extend(run),
            Err(error) => self.unreadable.push(Unreadable { directory: directory.to_owned(), error }),
        }
    }
}

/// All runs in these directories: run directories, and directories of such within two levels, as sweeps are.
///
/// # Errors
/// When a directory is not there, or cannot be listed.
pub fn find(directories: &[PathBuf]) -> anyhow::Result<Found> {
    let mut found = Found::default();
    for directory in directories {
        collect(directory, 2, &mut found)?;
    }
    Ok(found)
}

fn collect(directory: &Path, levels: usize, found: &mut Found) -> anyhow::Result<()> {
    if manifest::is_there(directory) {
        found.add(directory, Run::read(directory).map(Some));
        return Ok(());
    }
    if Queue::is_there(directory) {
        match Queue::read(directory) {
            Ok(queue) => {
                for job in queue.jobs {
                    found.add(&job.directory(directory), never_begun(directory, &job));
                }
            }
            Err(error) => found.add(directory, Err(error)),
        }
    }
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let mut inner: Vec<PathBuf> = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read {}", directory.display()))?.path();
        if path.is_dir() {
            inner.push(path);
        }
    }
    inner.sort();
    if levels > 0 {
        inner.iter().try_for_each(|inner| collect(inner, levels - 1, found))?;
    }
    Ok(())
}

/// A run of a sweep that failed before it had a manifest: all that is left of it is what it said.
fn never_begun(sweep: &Path, job: &Job) -> anyhow::Result<Option<Run>> {
    let (directory, log) = (job.directory(sweep), job.log(sweep));
    let Some(error) = jobs::last_line(&log).filter(|_| !manifest::is_there(&directory)) else { return Ok(None) };
    // It may be about to begin.
    if directory.is_dir() && lock::is_taken(&directory)? {
        return Ok(None);
    }
    let queue = Queue::read(sweep)?;
    let fixed = queue.fixed.into_iter().filter(|(name, _)| !job.params.contains_key(name));
    let params = fixed.chain(job.params.clone()).collect();
    let said = fs::metadata(&log).and_then(|file| file.modified());
    let said = said.with_context(|| format!("cannot read {}", log.display()))?;
    let manifest = Manifest::of_failure(queue.pipeline, params, job.seed, said, error);
    Ok(Some(Run { directory, manifest, state: State::Failed, steps: None, metrics: BTreeMap::new() }))
}

/// The last step that was written, and the last value of each metric. A last line that is not whole is left out: the
/// run is writing it, or was killed at it.
fn last_metrics(path: &Path) -> anyhow::Result<(Option<u64>, BTreeMap<String, f64>)> {
    let mut metrics = BTreeMap::new();
    let mut last_step = None;
    if !path.exists() {
        return Ok((last_step, metrics));
    }
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        if !line.ends_with('\n') {
            break;
        }
        let values: serde_json::Map<String, Value> =
            serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), index + 1))?;
        for (name, value) in values {
            match (name.as_str(), value.as_u64()) {
                ("step", Some(step)) => last_step = Some(step),
                _ => {
                    let Number(value) = serde_json::from_value(value)
                        .with_context(|| format!("{}:{}: `{name}`", path.display(), index + 1))?;
                    metrics.insert(name, value);
                }
            }
        }
    }
    Ok((last_step, metrics))
}

/// The newest evaluation's values: under their own names, and under their node's where several nodes evaluate.
fn evaluations(path: &Path) -> anyhow::Result<BTreeMap<String, f64>> {
    let mut newest: BTreeMap<String, (u64, BTreeMap<String, f64>)> = BTreeMap::new();
    if path.exists() {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let stored: Vec<Value> = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        for evaluation in stored {
            let version = evaluation["version"].as_u64().unwrap_or(0);
            let node = evaluation["node"].as_str().unwrap_or_default().to_owned();
            let values = evaluation["values"].as_object().into_iter().flatten();
            let number = |value: &Value| Number::deserialize(value).ok();
            let values = values.filter_map(|(name, value)| Some((name.clone(), number(value)?.0))).collect();
            if newest.get(&node).is_none_or(|(other, _)| *other <= version) {
                newest.insert(node, (version, values));
            }
        }
    }
    let several = newest.len() > 1;
    let named = newest.into_iter().flat_map(|(node, (_, values))| {
        values.into_iter().map(move |(name, value)| (if several { format!("{node}/{name}") } else { name }, value))
    });
    Ok(named.collect())
}
