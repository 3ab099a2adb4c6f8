//! `sweep.json` in a sweep's directory: the runs there are to be, so that a sweep that was stopped can go on.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use sapo_flow_engine::Graph;
use sapo_flow_engine::pipeline::{self, Sweep};
use sapo_flow_engine::runtime::disk::sha256;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::cli::directory::write_whole;
use crate::cli::{Failure, validate};

const FILE: &str = "sweep.json";

/// The runs of a sweep, in the order in which they are begun.
#[derive(Debug, Serialize, Deserialize)]
pub struct Queue {
    /// The pipeline's file, as given.
    pub pipeline: PathBuf,
    /// `-S` as given, lists of values included.
    pub overrides: Vec<(String, String)>,
    /// Parameters that have one value in all runs, because `-S` says so.
    pub fixed: Map<String, Value>,
    /// Where the pipeline wants its runs.
    pub parent: PathBuf,
    /// The runs.
    pub jobs: Vec<Job>,
}

/// One run of a sweep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Its directory within the sweep's, made of what sets it apart.
    pub name: String,
    /// The parameters that the sweep sets.
    pub params: Map<String, Value>,
    /// Seed of its random draws.
    pub seed: u64,
    /// Hash of its pipeline with all parameters filled in.
    pub pipeline_sha256: String,
}

impl Job {
    /// Where its run is, within the sweep's directory.
    pub fn directory(&self, sweep: &Path) -> PathBuf {
        sweep.join(&self.name)
    }

    /// What its process said, beside that.
    pub fn log(&self, sweep: &Path) -> PathBuf {
        sweep.join(format!("{}.log", self.name))
    }
}

impl Queue {
    /// The runs of a pipeline: by its `sweep` block, by lists of values, and by how many seeds are asked for.
    pub fn of(pipeline: &Path, overrides: &[(String, String)], repeat: Option<u64>) -> Result<Self, Failure> {
        let name = pipeline.display().to_string();
        let text = fs::read_to_string(pipeline).with_context(|| format!("cannot read {name}"))?;
        let registry = sapo_flow_operators::registry();
        let sweep = pipeline::sweep(&name, &text, overrides, &registry)
            .map_err(|diagnostics| validate::invalid(pipeline, &diagnostics))?;
        let parent = sweep.combinations.first().map(|first| PathBuf::from(&first.graph.run.directory));
        Ok(Queue {
            pipeline: pipeline.to_owned(),
            overrides: overrides.to_vec(),
            fixed: json(&sweep.fixed),
            parent: parent.unwrap_or_default(),
            jobs: jobs(&sweep, repeat)?,
        })
    }

    /// Whether a directory is that of a sweep.
    pub fn is_there(directory: &Path) -> bool {
        directory.join(FILE).is_file()
    }

    /// The queue in a sweep's directory, as it was written.
    pub fn read(directory: &Path) -> anyhow::Result<Self> {
        let path = directory.join(FILE);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| path.display().to_string())
    }

    /// The queue in a sweep's directory, if its pipeline is what it was.
    pub fn resume(directory: &Path) -> Result<Self, Failure> {
        let queue = Queue::read(directory)?;
        let now = Queue::of(&queue.pipeline, &queue.overrides, None)?;
        // Seeds that the command line asked for are not in the pipeline: what counts is what each run is made of.
        for job in &queue.jobs {
            let same = now.jobs.iter().find(|other| other.params == job.params);
            if same.is_none_or(|other| other.pipeline_sha256 != job.pipeline_sha256) {
                let (pipeline, name) = (queue.pipeline.display(), &job.name);
                return Err(Failure::Failed(anyhow::anyhow!(
                    "{pipeline} has changed since the sweep in {} began: the run {name} would be another one. Restore \
                     the pipeline, or begin a new sweep",
                    directory.display()
                )));
            }
        }
        Ok(queue)
    }

    /// Write it into the sweep's directory.
    pub fn write(&self, directory: &Path) -> anyhow::Result<()> {
        write_whole(&directory.join(FILE), &(serde_json::to_string_pretty(self)? + "\n"))
    }
}

/// Values as JSON, which is YAML too.
fn json(params: &[(String, serde_yaml::Value)]) -> Map<String, Value> {
    params.iter().map(|(name, given)| (name.clone(), serde_json::to_value(given).unwrap_or_default())).collect()
}

fn jobs(sweep: &Sweep, repeat: Option<u64>) -> anyhow::Result<Vec<Job>> {
    if repeat.is_some() && !sweep.seeds.is_empty() {
        bail!("the pipeline's `sweep` block has `seeds`, so that `--repeat` has nothing to say");
    }
    let mut jobs: Vec<Job> = Vec::new();
    for combination in &sweep.combinations {
        let graph = &combination.graph;
        let own = graph.run.seed;
        let seeds = match repeat {
            Some(count) => (own..own + count).collect(),
            None if sweep.seeds.is_empty() => vec![own],
            None => sweep.seeds.clone(),
        };
        let params = json(&combination.params);
        for seed in &seeds {
            let seed_part = (seeds.len() > 1 || params.is_empty()).then_some(*seed);
            let name = unique(name(&params, seed_part), &jobs);
            jobs.push(Job { name, params: params.clone(), seed: *seed, pipeline_sha256: hash(graph)? });
        }
    }
    Ok(jobs)
}

/// `ema_decay=0.5,seed=42`, in letters that a file's name may have.
fn name(params: &Map<String, Value>, seed: Option<u64>) -> String {
    const LONGEST: usize = 120;
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let given = params.iter().map(|(name, value)| format!("{name}={}", text(value)));
    let parts: Vec<String> = given.chain(seed.map(|seed| format!("seed={seed}"))).collect();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._=,+-".contains(c) { c } else { '-' };
    parts.join(",").chars().map(plain).take(LONGEST).collect()
}

fn unique(name: String, jobs: &[Job]) -> String {
    let is_taken = |name: &str| jobs.iter().any(|job| job.name == name);
    let numbered = (2..).map(|number| format!("{name}-{number}"));
    std::iter::once(name.clone()).chain(numbered).find(|name| !is_taken(name)).unwrap_or(name)
}

/// A hash of what a graph is made of, its seed left out.
fn hash(graph: &Graph) -> anyhow::Result<String> {
    let mut resolved = graph.resolved.clone();
    if let Some(run) = resolved.get_mut("run").and_then(|run| run.as_mapping_mut()) {
        run.remove("seed");
    }
    let text = serde_yaml::to_string(&resolved)?;
    Ok(sha256(text.as_bytes()))
}
