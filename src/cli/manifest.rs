//! `manifest.json` in a run directory: what it takes to get the same results again.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use chrono::{SecondsFormat, Utc};
use sapo_flow_engine::Graph;
use sapo_flow_engine::runtime::disk::length_and_sha256;
use sapo_flow_engine::runtime::{Outcome, RunReport};
use sapo_flow_training::text;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::directory::write_whole;
use super::explained;

const FILE: &str = "manifest.json";

/// How a run's results came to be.
#[derive(Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// The pipeline's file, as given.
    pub pipeline: PathBuf,
    /// The pipeline's parameters with their values; absent in runs of versions that did not note them.
    #[serde(default)]
    pub params: Option<Map<String, Value>>,
    /// Seed of every random draw.
    pub seed: u64,
    /// The device meant where a node names none.
    pub device: String,
    /// The type tensor work is done in.
    pub dtype: String,
    /// Processors used.
    pub threads: usize,
    /// The threads that the command line gave, if any: a resumed run takes as many, for the same sums to the last bit.
    #[serde(default)]
    pub given_threads: Option<usize>,
    /// Where the run began: what relative paths of the pipeline are relative to.
    #[serde(default)]
    pub working_directory: Option<PathBuf>,
    /// Models and data, by path as the pipeline has it.
    pub files: BTreeMap<String, FileHash>,
    /// The processes that worked on the run: the first, and each that resumed it.
    pub processes: Vec<Process>,
}

/// A file's contents.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHash {
    /// Its size.
    pub bytes: u64,
    /// Its hash, in hexadecimal.
    pub sha256: String,
}

/// A process that worked on a run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Process {
    /// When it began, in UTC.
    pub started: String,
    /// Its arguments.
    pub command_line: Vec<String>,
    /// The first step that it did.
    pub first_step: u64,
    /// Version of sapo-flow.
    pub sapo_flow: String,
    /// Version of libtorch.
    pub libtorch: String,
    /// Operating system and processor.
    pub platform: String,
    /// How it ended; absent while it works, and where it was killed.
    #[serde(default)]
    pub ended: Option<Ended>,
}

/// How a process ended its work on a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    /// When, in UTC.
    pub at: String,
    /// What became of the run.
    pub outcome: Ending,
    /// Steps done, by all processes; where it failed, it is not known.
    #[serde(default)]
    pub steps: Option<u64>,
    /// Steps of the whole run.
    #[serde(default)]
    pub total_steps: Option<u64>,
    /// What failed.
    #[serde(default)]
    pub error: Option<String>,
}

/// What became of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// All steps are done.
    Finished,
    /// Stopped from outside, after a checkpoint.
    Interrupted,
    /// Ended by an error.
    Failed,
}

impl Manifest {
    /// The manifest in a run directory.
    pub fn read(directory: &Path) -> anyhow::Result<Self> {
        let path = directory.join(FILE);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| path.display().to_string())
    }

    /// What is known of a run that failed before it could write one.
    pub fn of_failure(
        pipeline: PathBuf,
        params: Map<String, Value>,
        seed: u64,
        at: std::time::SystemTime,
        error: String,
    ) -> Self {
        let at = chrono::DateTime::<Utc>::from(at).to_rfc3339_opts(SecondsFormat::Secs, true);
        let (steps, total_steps, error) = (None, None, Some(error));
        let ended = Ended { at: at.clone(), outcome: Ending::Failed, steps, total_steps, error };
        Manifest {
            pipeline,
            params: Some(params),
            seed,
            device: String::new(),
            dtype: String::new(),
            threads: 0,
            given_threads: None,
            working_directory: None,
            files: BTreeMap::new(),
            processes: vec![Process { started: at, command_line: Vec::new(), ended: Some(ended), ..Process::this(0) }],
        }
    }
}

impl Manifest {
    /// A chat template may write the date: that of the run's beginning, for as long as the run goes on.
    fn stop_the_clock(&self) -> anyhow::Result<()> {
        let began = self.processes.first().map(|process| chrono::DateTime::parse_from_rfc3339(&process.started));
        if let Some(began) = began.transpose()? {
            text::stop_the_clock(began.into());
        }
        Ok(())
    }
}

/// Whether a directory is that of a run.
pub fn is_there(directory: &Path) -> bool {
    directory.join(FILE).is_file()
}

/// Write the manifest of a fresh run.
pub fn create(
    directory: &Path,
    graph: &Graph,
    pipeline: &Path,
    device: String,
    given_threads: Option<usize>,
) -> anyhow::Result<()> {
    let manifest = Manifest {
        pipeline: pipeline.to_owned(),
        params: Some(params(graph)),
        seed: graph.run.seed,
        device,
        dtype: graph.run.dtype.to_string(),
        threads: graph.run.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)),
        given_threads,
        working_directory: std::env::current_dir().ok(),
        files: hashes(graph)?,
        processes: vec![Process::this(0)],
    };
    manifest.stop_the_clock()?;
    write(directory, &manifest)
}

/// Note in a run's manifest that this process goes on with it. Models and data must be what they were.
pub fn resume(directory: &Path, graph: &Graph, first_step: u64) -> anyhow::Result<()> {
    let mut manifest = Manifest::read(directory)?;
    manifest.stop_the_clock()?;
    let files = hashes(graph)?;
    for (name, before) in &manifest.files {
        match files.get(name) {
            Some(now) if now == before => {}
            Some(now) => bail!(
                "{name} has changed since the run began (SHA-256 {}, now {}): start a fresh run",
                before.sha256,
                now.sha256
            ),
            None => bail!("{name} was read when the run began, and is gone: start a fresh run"),
        }
    }
    manifest.processes.push(Process::this(first_step));
    write(directory, &manifest)
}

/// Note in a run's manifest how this process ended its work.
pub fn end(directory: &Path, outcome: Result<&RunReport, &anyhow::Error>) -> anyhow::Result<()> {
    let mut manifest = Manifest::read(directory)?;
    let at = now();
    let ended = match outcome {
        Ok(RunReport { outcome, total_steps, .. }) => {
            let (outcome, steps) = match outcome {
                Outcome::Completed => (Ending::Finished, *total_steps),
                Outcome::Interrupted { step } => (Ending::Interrupted, *step),
            };
            Ended { at, outcome, steps: Some(steps), total_steps: Some(*total_steps), error: None }
        }
        Err(error) => {
            let error = Some(explained(error));
            Ended { at, outcome: Ending::Failed, steps: None, total_steps: None, error }
        }
    };
    if let Some(process) = manifest.processes.last_mut() {
        process.ended = Some(ended);
    }
    write(directory, &manifest)
}

/// The values of a pipeline's parameters. What YAML can say and JSON cannot, such as not-a-number, is null.
pub fn params(graph: &Graph) -> Map<String, Value> {
    let value = |value| serde_json::to_value(value).unwrap_or_default();
    graph.params.iter().map(|(name, given)| (name.clone(), value(given))).collect()
}

fn now() -> String {
    Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true)
}

fn write(directory: &Path, manifest: &Manifest) -> anyhow::Result<()> {
    write_whole(&directory.join(FILE), &(serde_json::to_string_pretty(manifest)? + "\n"))
}

impl Process {
    fn this(first_step: u64) -> Self {
        Process {
            started: now(),
            command_line: std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect(),
            first_step,
            sapo_flow: env!("CARGO_PKG_VERSION").to_owned(),
            libtorch: env!("SAPO_FLOW_LIBTORCH").to_owned(),
            platform: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            ended: None,
        }
    }
}

/// Hashes of the models and data that the nodes name; of directories, those of the files directly in them.
fn hashes(graph: &Graph) -> anyhow::Result<BTreeMap<String, FileHash>> {
    let mut readers: BTreeMap<PathBuf, &str> = BTreeMap::new();
    for node in &graph.nodes {
        for path in (node.op.files)(&node.config) {
            let files = files(&path).with_context(|| format!("node `{}`: {}", node.name, path.display()))?;
            readers.extend(files.into_iter().map(|file| (file, node.name.as_str())));
        }
    }
    let hash_one = |(file, node): (PathBuf, &str)| {
        let name = file.display().to_string();
        let hash = hash(&file).with_context(|| format!("node `{node}`: {name}"))?;
        Ok((name, hash))
    };
    readers.into_iter().map(hash_one).collect()
}

fn files(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        if !hidden && entry.path().is_file() {
            files.push(entry.path());
        }
    }
    Ok(files)
}

fn hash(path: &Path) -> std::io::Result<FileHash> {
    let (bytes, sha256) = length_and_sha256(fs::File::open(path)?)?;
    Ok(FileHash { bytes, sha256 })
}
