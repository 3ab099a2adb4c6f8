//! `metrics_sink`: the numbers of every step as JSON Lines and TensorBoard events.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapo_flow_engine::number::Number;
use sapo_flow_engine::operator::{ConfigIssue, Connections, Source};
use sapo_flow_engine::runtime::event::{Event, EventSender};
use sapo_flow_engine::{BuildContext, Define, Inputs, Metrics, Operator, OperatorError, Outputs, PortSpec, PortType};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Error;
use crate::batcher::Batcher;
use crate::evaluator::Evaluator;
use crate::log_file::{LogFile, check_file_name};
use crate::preference_learner::PreferenceLearner;
use crate::replay_buffer::ReplayBuffer;
use crate::state;
use crate::tensorboard::EventFile;

/// Configuration of [`MetricsSink`].
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Steps a line stands for: values are averaged over the steps that reported them.
    pub every: u64,
    /// Name of the JSON Lines file in the run directory. Each sink needs its own.
    pub file: String,
    /// Whether to write TensorBoard events too, into `tensorboard/` of the run directory.
    pub tensorboard: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config { every: 1, file: "metrics.jsonl".into(), tensorboard: true }
    }
}

impl Config {
    /// Where TensorBoard's events go in the run directory.
    fn events_folder(&self) -> PathBuf {
        Path::new("tensorboard").join(Path::new(&self.file).file_stem().unwrap_or_default())
    }
}

/// Writes metrics where people look for them.
pub struct MetricsSink {
    node: String,
    every: u64,
    lines: LogFile,
    events_file: Option<EventFile>,
    window: Window,
    events: EventSender,
}

/// Values seen since the last line.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Window {
    /// Steps taken in.
    steps: u64,
    /// The newest step taken in.
    last_step: u64,
    /// Sum and number of values, by name.
    sums: BTreeMap<String, (Number, u64)>,
}

/// What a checkpoint keeps.
#[derive(Serialize, Deserialize)]
struct State {
    lines_bytes: u64,
    events_bytes: Option<u64>,
    window: Window,
}

const STATE_FILE: &str = "metrics_sink.json";

impl Define for MetricsSink {
    const NAME: &'static str = "metrics_sink";
    const SUMMARY: &'static str = "Writes metrics as JSON Lines and TensorBoard events.";
    const DOCS: &'static str = "\
Merges the metrics that reach it in a step, shows them as progress, and writes them to the run directory: \
`metrics.jsonl`, one object a line with `step` and every value by name, and `tensorboard/metrics/events.out.tfevents.0` \
for TensorBoard. JSON numbers are exact; values that are not finite are the strings `NaN`, `Infinity`, `-Infinity`. \
With `every: n` a line holds means over n steps, each value's over the steps that reported it; `step` is the last.

State: the lengths of the files, and the sums since the last line. A resumed run cuts the files back to the checkpoint, so \
that they end as those of a run that was never interrupted.

Errors: another node writes the same file, before the run; two inputs report the same name in one step (give each its own \
sink, with its own `file`); on resuming, a file is shorter than it was.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat.jsonl, tokenizer: models/smollm2, batch_size: 8}}
batches: {op: batcher, in: prompts, with: {batch_size: 8, max_length: 1024}}
metrics: {op: metrics_sink, in: batches.metrics, with: {every: 10}}
";
    const INPUTS: &'static [PortSpec] =
        &[PortSpec::new("metrics", &[PortType::Metrics], "what to write; any number of nodes").many()];
    const OUTPUTS: &'static [PortSpec] = &[];
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        if config.every == 0 {
            issues.push(ConfigIssue::new("every", "expected 1 or more, found 0"));
        }
        issues.extend(check_file_name(&config.file).map(|message| ConfigIssue::new("file", message)));
        issues
    }

    fn check_connections(_: &Config, connections: &Connections) -> Vec<ConfigIssue> {
        // Other operators put their node's name before those of their metrics, or let users choose them.
        let same = [PreferenceLearner::NAME, Batcher::NAME, Evaluator::NAME, ReplayBuffer::NAME];
        let mut issues = Vec::new();
        for op in same {
            let nodes: Vec<String> = connections.sources.iter().filter(|source| source.op == op).map(node).collect();
            if nodes.len() > 1 {
                let message = format!(
                    "{} report the same names, as every `{op}` does: give each its own metrics_sink, with its own `file`",
                    nodes.join(" and ")
                );
                issues.push(ConfigIssue::new("", message));
            }
        }
        issues
    }

    fn writes(config: &Config, _: &str) -> Vec<PathBuf> {
        let events = config.tensorboard.then(|| config.events_folder());
        [config.file.clone().into()].into_iter().chain(events).collect()
    }

    fn build(config: Config, context: &BuildContext) -> Result<Self, OperatorError> {
        let lines = LogFile::open(context.run_directory.join(&config.file), context.resumed)?;
        let events_file = if config.tensorboard {
            let directory = context.run_directory.join(config.events_folder());
            Some(EventFile::open(directory.join("events.out.tfevents.0"), context.resumed)?)
        } else {
            None
        };
        Ok(MetricsSink {
            node: context.node.to_string(),
            every: config.every,
            lines,
            events_file,
            window: Window::default(),
            events: context.events.clone(),
        })
    }
}

impl Operator for MetricsSink {
    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let merged = merge(&inputs.metrics("metrics"))?;
        self.window.add(step, &merged);
        self.events.send(Event::Metrics { node: self.node.clone(), step, metrics: Arc::new(merged) });
        if self.window.steps == self.every {
            self.write_window()?;
        }
        Ok(Outputs::new())
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let state = State {
            lines_bytes: self.lines.sync()?,
            events_bytes: self.events_file.as_mut().map(EventFile::sync).transpose()?,
            window: std::mem::take(&mut self.window),
        };
        state::write(directory, STATE_FILE, &state)?;
        self.window = state.window;
        Ok(())
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let state: State = state::read(directory, STATE_FILE)?;
        self.lines.cut_back(state.lines_bytes)?;
        if let (Some(file), Some(bytes)) = (&mut self.events_file, state.events_bytes) {
            file.cut_back(bytes)?;
        }
        self.window = state.window;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), OperatorError> {
        if self.window.steps > 0 {
            self.write_window()?;
        }
        self.lines.sync()?;
        self.events_file.as_mut().map(EventFile::sync).transpose()?;
        Ok(())
    }
}

impl MetricsSink {
    /// Write the window's means, unless nothing was reported, and begin a new one.
    fn write_window(&mut self) -> Result<(), Error> {
        let window = std::mem::take(&mut self.window);
        if window.sums.is_empty() {
            return Ok(());
        }
        let means: BTreeMap<String, f64> =
            window.sums.into_iter().map(|(name, (Number(sum), count))| (name, sum / count as f64)).collect();
        self.lines.append(json_line(window.last_step, &means).as_bytes())?;
        if let Some(file) = &mut self.events_file {
            file.scalars(window.last_step, &means)?;
        }
        Ok(())
    }
}

impl Window {
    fn add(&mut self, step: u64, metrics: &Metrics) {
        self.steps += 1;
        self.last_step = step;
        for (name, value) in &metrics.values {
            let (Number(sum), count) = self.sums.entry(name.clone()).or_insert((Number(0.0), 0));
            *sum += value;
            *count += 1;
        }
    }
}

fn node(source: &Source) -> String {
    format!("`{}`", source.node)
}

/// All sets of a step as one.
fn merge(sets: &[Arc<Metrics>]) -> Result<Metrics, Error> {
    let mut merged = Metrics::default();
    for (name, value) in sets.iter().flat_map(|set| &set.values) {
        match merged.values.entry(name.clone()) {
            Entry::Vacant(entry) => _ = entry.insert(*value),
            Entry::Occupied(_) => {
                let message =
                    format!("two inputs report `{name}`: give each its own metrics_sink, with its own `file`");
                return Err(Error::Input(message));
            }
        }
    }
    Ok(merged)
}

fn json_line(step: u64, values: &BTreeMap<String, f64>) -> String {
    let mut object = Map::new();
    object.insert("step".into(), step.into());
    for (name, value) in values {
        object.insert(name.clone(), Number(*value).into());
    }
    Value::Object(object).to_string() + "\n"
}

#[cfg(test)]
mod tests {
    use sapo_flow_engine::Record;

    use std::fs;

    use super::*;
    use crate::testing::{Harness, metrics};

    fn inputs(sets: &[&[(&str, f64)]]) -> Inputs {
        Inputs::new(vec![("metrics", sets.iter().map(|set| Record::Metrics(metrics(set))).collect())])
    }

    #[test]
    fn sets_of_a_step_become_one_line() {
        let harness = Harness::new();
        let mut sink = harness.build::<MetricsSink>("{}").unwrap();
        sink.step(0, inputs(&[&[("loss", 0.1 + 0.2), ("b", f64::NEG_INFINITY)], &[("a", 3.0)]])).unwrap();
        sink.step(1, inputs(&[])).unwrap();
        sink.step(2, inputs(&[&[("loss", f64::NAN)]])).unwrap();
        let expected = "{\"step\":0,\"a\":3.0,\"b\":\"-Infinity\",\"loss\":0.30000000000000004}\n\
                        {\"step\":2,\"loss\":\"NaN\"}\n";
        assert_eq!(harness.read("metrics.jsonl"), expected);
        let shown: Vec<u64> = harness
            .events()
            .into_iter()
            .filter_map(|event| if let Event::Metrics { step, .. } = event { Some(step) } else { None })
            .collect();
        assert_eq!(shown, [0, 1, 2]);
    }

    #[test]
    fn the_same_name_twice_is_an_error() {
        let harness = Harness::new();
        let mut sink = harness.build::<MetricsSink>("{tensorboard: false}").unwrap();
        let error = sink.step(0, inputs(&[&[("loss", 1.0)], &[("loss", 2.0)]])).unwrap_err();
        assert!(error.to_string().contains("two inputs report `loss`"), "{error}");
        assert!(!harness.path("tensorboard").exists());
    }

    #[test]
    fn every_averages_and_finish_writes_the_rest() {
        let harness = Harness::new();
        let mut sink = harness.build::<MetricsSink>("{every: 2}").unwrap();
        sink.step(0, inputs(&[&[("loss", 1.0), ("eval_nll", 7.0)]])).unwrap();
        sink.step(1, inputs(&[&[("loss", 2.0)]])).unwrap();
        sink.step(2, inputs(&[&[("loss", 5.0)]])).unwrap();
        sink.finish().unwrap();
        let expected = "{\"step\":1,\"eval_nll\":7.0,\"loss\":1.5}\n{\"step\":2,\"loss\":5.0}\n";
        assert_eq!(harness.read("metrics.jsonl"), expected);
    }

    #[test]
    fn a_resumed_run_writes_what_an_uninterrupted_one_does() {
        // The checkpoint is taken within a window, whose sum is no number that JSON has.
        let values = [0.1, 0.7, f64::NEG_INFINITY, 5.0, 6.5];
        let at = |step: usize| inputs(&[&[("loss", values[step])]]);
        let whole = Harness::new();
        let mut sink = whole.build::<MetricsSink>("{every: 2}").unwrap();
        (0..5).for_each(|step| _ = sink.step(step as u64, at(step)).unwrap());
        sink.finish().unwrap();

        let cut = Harness::new();
        let mut sink = cut.build::<MetricsSink>("{every: 2}").unwrap();
        (0..3).for_each(|step| _ = sink.step(step as u64, at(step)).unwrap());
        sink.snapshot(&cut.checkpoint()).unwrap();
        (3..5).for_each(|step| _ = sink.step(step as u64, at(step)).unwrap());
        drop(sink);
        let mut sink = cut.resume::<MetricsSink>("{every: 2}").unwrap();
        sink.restore(&cut.checkpoint()).unwrap();
        (3..5).for_each(|step| _ = sink.step(step as u64, at(step)).unwrap());
        sink.finish().unwrap();

        assert_eq!(cut.read("metrics.jsonl"), whole.read("metrics.jsonl"));
        assert!(cut.read("metrics.jsonl").contains("{\"step\":3,\"loss\":\"-Infinity\"}\n"));
        let events = "tensorboard/metrics/events.out.tfevents.0";
        let length = |harness: &Harness| fs::metadata(harness.path(events)).unwrap().len();
        assert_eq!(length(&cut), length(&whole));
    }

    #[test]
    fn ranges_are_checked() {
        let config: Config = serde_yaml::from_str("{every: 0, file: ../m.jsonl}").unwrap();
        let keys: Vec<String> = MetricsSink::check(&config).into_iter().map(|issue| issue.key).collect();
        assert_eq!(keys, ["every", "file"]);
    }
}
