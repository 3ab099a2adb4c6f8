//! Toy operators: a source of rows, a sampler and a learner that mix hashes, a sink that writes what it saw.
//! A sample is a hash of its prompt and of the weights that made it, so every mix-up of versions changes the end.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sapo_flow_engine::graph::{Edge, Feedback, Graph, Node, RunSettings};
use sapo_flow_engine::operator::Define;
use sapo_flow_engine::record::{Metrics, Pair, PortType, Prompt, Record, Weights};
use sapo_flow_engine::runtime::{RunError, RunOptions, RunReport, run};
use sapo_flow_engine::{BuildContext, Inputs, Operator, OperatorError, OperatorSpec, Outputs, Placement, PortSpec};
use schemars::JsonSchema;
use serde::Deserialize;

pub fn mix(values: impl Hash) -> u64 {
    // SipHash with fixed keys: the same on every machine and in every run.
    let mut hasher = DefaultHasher::new();
    values.hash(&mut hasher);
    hasher.finish()
}

/// Milliseconds that a step takes, different at every step and, by `salt`, in every run.
fn dawdle(salt: u64, step: u64) {
    std::thread::sleep(Duration::from_millis(if salt == 0 { 0 } else { mix((salt, step)) % 4 }));
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(deny_unknown_fields, default)]
pub struct ToyConfig {
    /// Makes device threads slow in a way of its own.
    salt: u64,
    /// The step at which to fail.
    fail_at: Option<u64>,
    /// How to fail: `error`, `panic`, `die` or `port`.
    fail_how: String,
}

pub struct Rows;

impl Operator for Rows {
    fn step(&mut self, step: u64, _: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        for row in 0..3 {
            let prompt = Prompt {
                source: "rows".into(),
                row,
                epoch: step,
                prompt_ids: vec![step as u32, row as u32],
                chosen_ids: vec![2],
                rejected_ids: None,
                values: Default::default(),
            };
            outputs.push("prompts", Record::Prompt(Arc::new(prompt)));
        }
        Ok(outputs)
    }
}

impl Define for Rows {
    const NAME: &'static str = "rows";
    const SUMMARY: &'static str = "Three rows a step.";
    const DOCS: &'static str = "";
    const EXAMPLE: &'static str = "";
    const INPUTS: &'static [PortSpec] = &[];
    const OUTPUTS: &'static [PortSpec] = &[PortSpec::new("prompts", &[PortType::Prompts], "")];
    type Config = ToyConfig;

    fn steps_per_epoch(&self) -> Option<u64> {
        Some(10)
    }

    fn build(_: ToyConfig, _: &BuildContext) -> Result<Self, OperatorError> {
        Ok(Rows)
    }
}

pub struct Sampler(ToyConfig);

impl Operator for Sampler {
    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        dawdle(self.0.salt, step);
        let weights = inputs.weights("weights").ok_or("no weights arrived")?;
        let handle = weights.handle.clone().ok_or("the weights have no handle")?;
        let value = *handle.downcast_ref::<u64>().ok_or("not a toy's weights")?;
        let mut outputs = Outputs::new();
        for (position, prompt) in inputs.prompts("prompts").iter().enumerate() {
            let sample = mix((value, &prompt.prompt_ids)) as u32;
            let pair = Pair {
                step,
                position: position as u32,
                origin: "sampler".into(),
                source: prompt.source.clone(),
                row: prompt.row,
                prompt_ids: prompt.prompt_ids.clone(),
                chosen_ids: prompt.chosen_ids.clone(),
                rejected_ids: Some(vec![sample]),
                segment: None,
                weights_version: Some(weights.version),
                seed: None,
                values: Default::default(),
            };
            outputs.push("pairs", Record::Pair(Arc::new(pair)));
        }
        Ok(outputs)
    }
}

impl Define for Sampler {
    const NAME: &'static str = "sampler";
    const SUMMARY: &'static str = "Hashes prompts with weights.";
    const DOCS: &'static str = "";
    const EXAMPLE: &'static str = "";
    const INPUTS: &'static [PortSpec] =
        &[PortSpec::new("prompts", &[PortType::Prompts], ""), PortSpec::new("weights", &[PortType::Weights], "")];
    const OUTPUTS: &'static [PortSpec] = &[PortSpec::new("pairs", &[PortType::Pairs], "")];
    const PLACEMENT: Placement = Placement::Device;
    type Config = ToyConfig;

    fn build(config: ToyConfig, _: &BuildContext) -> Result<Self, OperatorError> {
        Ok(Sampler(config))
    }
}

/// A panic that panics once more when it is dropped: past everything that catches the first, so that its thread ends
/// without a word.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("out of luck twice");
        }
    }
}

pub struct Learner {
    config: ToyConfig,
    value: u64,
    version: u64,
    retained: std::collections::VecDeque<(u64, u64)>,
    retained_versions: usize,
}

impl Learner {
    fn publish(&mut self) -> Record {
        self.retained.push_back((self.version, self.value));
        while self.retained.len() > self.retained_versions {
            self.retained.pop_front();
        }
        Record::Weights(Weights { model: "learner".into(), version: self.version, handle: Some(Arc::new(self.value)) })
    }
}

impl Operator for Learner {
    fn start(&mut self, _: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        if self.version == 0 {
            let weights = self.publish();
            outputs.push("weights", weights);
        }
        Ok(outputs)
    }

    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        dawdle(self.config.salt.wrapping_mul(7), step);
        let mut outputs = Outputs::new();
        if self.config.fail_at == Some(step) {
            match self.config.fail_how.as_str() {
                "panic" => panic!("out of luck"),
                "die" => std::panic::panic_any(Bomb),
                "port" => outputs.push("nowhere", Record::Metrics(Arc::default())),
                _ => return Err("loss is not finite".into()),
            }
        }
        let pairs = inputs.pairs("pairs");
        let versions: Vec<u64> = pairs.iter().filter_map(|pair| pair.weights_version).collect();
        let samples: Vec<_> = pairs.iter().map(|pair| pair.rejected_ids.clone()).collect();
        self.value = mix((self.value, samples));
        let staleness = versions.iter().map(|version| self.version - version).max().unwrap_or(0);
        self.version += 1;
        let weights = self.publish();
        outputs.push("weights", weights);
        let mut metrics = Metrics::default();
        metrics.values.insert("staleness".into(), staleness as f64);
        metrics.values.insert("value".into(), (self.value >> 12) as f64);
        outputs.push("metrics", Record::Metrics(Arc::new(metrics)));
        Ok(outputs)
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let state = (self.value, self.version, &self.retained);
        Ok(fs::write(directory.join("state.json"), serde_json::to_vec(&state)?)?)
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let state = fs::read(directory.join("state.json"))?;
        (self.value, self.version, self.retained) = serde_json::from_slice(&state)?;
        Ok(())
    }

    fn reattach(&mut self, record: &mut Record) -> Result<(), OperatorError> {
        if let Record::Weights(weights) = record {
            let kept = self.retained.iter().find(|(version, _)| *version == weights.version);
            weights.handle = Some(Arc::new(kept.ok_or("a version that is no longer kept")?.1));
        }
        Ok(())
    }
}

impl Define for Learner {
    const NAME: &'static str = "learner";
    const SUMMARY: &'static str = "Hashes samples into its weights.";
    const DOCS: &'static str = "";
    const EXAMPLE: &'static str = "";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new("pairs", &[PortType::Pairs], "")];
    const OUTPUTS: &'static [PortSpec] =
        &[PortSpec::new("weights", &[PortType::Weights], ""), PortSpec::new("metrics", &[PortType::Metrics], "")];
    const PLACEMENT: Placement = Placement::Device;
    type Config = ToyConfig;

    fn build(config: ToyConfig, context: &BuildContext) -> Result<Self, OperatorError> {
        let retained_versions = context.retained_versions as usize;
        Ok(Learner { config, value: 1, version: 0, retained: Default::default(), retained_versions })
    }
}

/// Writes one line a step to `seen.txt`; a resumed run goes on where the checkpoint was.
pub struct Sink {
    path: PathBuf,
    lines: Vec<String>,
}

impl Operator for Sink {
    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        for metrics in inputs.metrics("metrics") {
            self.lines.push(format!("{step} {}", serde_json::to_string(&metrics.values)?));
        }
        Ok(Outputs::new())
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        Ok(fs::write(directory.join("lines.json"), serde_json::to_vec(&self.lines)?)?)
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        self.lines = serde_json::from_slice(&fs::read(directory.join("lines.json"))?)?;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), OperatorError> {
        Ok(fs::write(&self.path, self.lines.join("\n"))?)
    }
}

impl Define for Sink {
    const NAME: &'static str = "sink";
    const SUMMARY: &'static str = "Writes metrics.";
    const DOCS: &'static str = "";
    const EXAMPLE: &'static str = "";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new("metrics", &[PortType::Metrics], "").many()];
    const OUTPUTS: &'static [PortSpec] = &[];
    type Config = ToyConfig;

    fn build(_: ToyConfig, context: &BuildContext) -> Result<Self, OperatorError> {
        Ok(Sink { path: context.run_directory.join("seen.txt"), lines: Vec::new() })
    }
}

pub fn node(name: &str, op: OperatorSpec, config: &str) -> Node {
    Node { name: name.into(), op: Arc::new(op), config: serde_yaml::from_str(config).expect("a test's own YAML") }
}

pub fn edge(from: (usize, usize), to: (usize, usize), port_type: PortType, feedback: Option<u64>) -> Edge {
    Edge {
        from_node: from.0,
        from_port: from.1,
        to_node: to.0,
        to_port: to.1,
        port_type,
        feedback: feedback.map(|max_staleness| Feedback { max_staleness }),
    }
}

/// rows -> sampler -> learner -> sink, and the learner's weights back to the sampler.
pub fn self_play(max_staleness: u64, salt: u64, learner_config: &str) -> Graph {
    Graph {
        nodes: vec![
            node("rows", OperatorSpec::of::<Rows>(), "{}"),
            node("sampler", OperatorSpec::of::<Sampler>(), &format!("salt: {salt}")),
            node("learner", OperatorSpec::of::<Learner>(), &format!("salt: {salt}\n{learner_config}")),
            node("sink", OperatorSpec::of::<Sink>(), "{}"),
        ],
        edges: vec![
            edge((0, 0), (1, 0), PortType::Prompts, None),
            edge((2, 0), (1, 1), PortType::Weights, Some(max_staleness)),
            edge((1, 0), (2, 0), PortType::Pairs, None),
            edge((2, 1), (3, 0), PortType::Metrics, None),
        ],
        run: RunSettings { epochs: Some(2), ..RunSettings::default() },
        resolved: serde_yaml::Value::Null,
        params: Default::default(),
        warnings: Default::default(),
    }
}

/// Run in a fresh directory: the report, and what the sink saw.
pub fn run_fresh(graph: &Graph, workers: usize) -> Result<(RunReport, String), RunError> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let options = RunOptions { workers, ..RunOptions::new(directory.path()) };
    let report = run(graph, options)?;
    Ok((report, fs::read_to_string(directory.path().join("seen.txt")).expect("the sink wrote it")))
}

/// The hand calculation of [`self_play`]: the values after each step when the sampler at step t reads version
/// max(0, t - max_staleness).
pub fn expected(max_staleness: u64, steps: u64) -> String {
    let mut values = vec![1u64];
    let mut lines = Vec::new();
    for step in 0..steps {
        let version = step.saturating_sub(max_staleness);
        let weights = values[version as usize];
        let samples: Vec<_> = (0..3u32).map(|row| Some(vec![mix((weights, vec![step as u32, row])) as u32])).collect();
        let value = mix((values[step as usize], samples));
        values.push(value);
        let metrics = format!("{{\"staleness\":{:?},\"value\":{:?}}}", (step - version) as f64, (value >> 12) as f64);
        lines.push(format!("{step} {metrics}"));
    }
    lines.join("\n")
}
