//! `replay_buffer`: keeps the newest pairs and draws from them.
//!
//! SAPO (arXiv 2405.20830), section 3.3: first in, first out; pairs drawn often are drawn less, p proportional to
//! 1 / (1 + times drawn).

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use differential_dataflow::operators::count::CountTotal;
use sapo_flow_engine::operator::{ConfigIssue, Define, RecordStream, View};
use sapo_flow_engine::plan::{Emits, NodePlan, PlanContext};
use sapo_flow_engine::record::{Change, Metrics, Pair, PortType, Record};
use sapo_flow_engine::runtime::view;
use sapo_flow_engine::{BuildContext, Inputs, Operator, OperatorError, Outputs, PortSpec};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::draws::Draws;

/// How pairs are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// With replacement, p proportional to 1 / (1 + times drawn): SAPO's rule.
    InverseCount,
    /// With replacement, all alike.
    Uniform,
    /// The oldest first, each once: a queue.
    Fifo,
}

/// What `replay_buffer` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReplayBufferConfig {
    /// Pairs kept; the oldest leave first.
    #[serde(default = "default_capacity")]
    pub capacity: usize,
    /// How pairs are drawn: inverse_count (SAPO's), uniform or fifo.
    #[serde(default = "default_sampling")]
    pub sampling: Sampling,
    /// Pairs drawn at each step; fewer while the buffer holds fewer.
    pub draws: usize,
}

fn default_capacity() -> usize {
    2000
}

fn default_sampling() -> Sampling {
    Sampling::InverseCount
}

/// A pair and how often it was drawn.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    pair: Arc<Pair>,
    inserted: u64,
    drawn: u64,
}

impl Entry {
    /// As an element of the collection that the view sums up.
    fn change(&self, diff: i64) -> Record {
        Record::Change(Change { element: vec![self.inserted, self.drawn], diff })
    }
}

/// See the [module](self).
pub struct ReplayBuffer {
    config: ReplayBufferConfig,
    random: Draws,
    entries: VecDeque<Entry>,
    /// Whether the view has yet to learn of what a checkpoint brought.
    unannounced: bool,
}

impl ReplayBuffer {
    /// Indices of the pairs to draw at a step.
    fn draw(&self, step: u64) -> Vec<usize> {
        let count = self.config.draws.min(self.entries.len());
        let weight = |entry: &Entry| match self.config.sampling {
            Sampling::InverseCount => 1.0 / (1 + entry.drawn) as f64,
            Sampling::Uniform | Sampling::Fifo => 1.0,
        };
        if self.config.sampling == Sampling::Fifo {
            return (0..count).collect();
        }
        let mut cumulative = Vec::with_capacity(self.entries.len());
        let mut total = 0.0;
        for entry in &self.entries {
            total += weight(entry);
            cumulative.push(total);
        }
        (0..count as u64)
            .map(|draw| {
                let target = self.random.uniform(step, draw) * total;
                cumulative.partition_point(|sum| *sum <= target).min(self.entries.len() - 1)
            })
            .collect()
    }

    /// The probability of each pair in one draw, oldest first.
    #[cfg(test)]
    fn probabilities(&self) -> Vec<f64> {
        let weights: Vec<f64> = self.entries.iter().map(|entry| 1.0 / (1 + entry.drawn) as f64).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / total).collect()
    }

    /// Add a pair; the oldest one leaves if there is no room.
    fn insert(&mut self, step: u64, pair: Arc<Pair>, outputs: &mut Outputs) {
        let entry = Entry { pair, inserted: step, drawn: 0 };
        outputs.push(View::CHANGES, entry.change(1));
        self.entries.push_back(entry);
        if self.entries.len() > self.config.capacity
            && let Some(oldest) = self.entries.pop_front()
        {
            outputs.push(View::CHANGES, oldest.change(-1));
        }
    }

    /// Emit the drawn pairs and count the draws.
    fn emit(&mut self, drawn: Vec<usize>, outputs: &mut Outputs) {
        for &index in &drawn {
            outputs.push("pairs", Record::Pair(self.entries[index].pair.clone()));
        }
        for &index in &drawn {
            let entry = &mut self.entries[index];
            outputs.push(View::CHANGES, entry.change(-1));
            entry.drawn += 1;
            if self.config.sampling != Sampling::Fifo {
                outputs.push(View::CHANGES, entry.change(1));
            }
        }
        if self.config.sampling == Sampling::Fifo {
            self.entries.drain(..drawn.len());
        }
    }
}

const ENTRIES: &str = "entries.json";

impl Operator for ReplayBuffer {
    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        // Marks the step, so that the view reports even where nothing changes.
        outputs.push(View::CHANGES, Record::Change(Change { element: Vec::new(), diff: 0 }));
        if std::mem::take(&mut self.unannounced) {
            for entry in &self.entries {
                outputs.push(View::CHANGES, entry.change(1));
            }
        }
        for pair in inputs.pairs("pairs") {
            self.insert(step, pair, &mut outputs);
        }
        let drawn = self.draw(step);
        self.emit(drawn, &mut outputs);
        Ok(outputs)
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let path = directory.join(ENTRIES);
        Ok(fs::write(&path, serde_json::to_vec(&self.entries)?).map_err(Error::io(&path))?)
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let path = directory.join(ENTRIES);
        self.entries = serde_json::from_slice(&fs::read(&path).map_err(Error::io(&path))?)?;
        self.unannounced = true;
        Ok(())
    }
}

/// Ages and draw counts of the buffer's pairs, counted by differential dataflow and summed up once a step.
fn statistics(changes: RecordStream<'_>) -> RecordStream<'_> {
    let entries = view::collection(changes.clone());
    let by_step =
        entries.clone().map(|entry| entry[0]).count_total().map(|(step, count)| (Histogram::Inserted, step, count));
    let by_draws = entries.map(|entry| entry[1]).count_total().map(|(drawn, count)| (Histogram::Drawn, drawn, count));
    view::running(changes, by_step.concat(by_draws), |step, bars| Record::Metrics(Arc::new(summary(step, bars))))
}

/// The two histograms kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
enum Histogram {
    /// Pairs by the step they came in.
    Inserted,
    /// Pairs by how often they were drawn.
    Drawn,
}

/// The histograms as metrics. Ages are in steps.
fn summary(step: u64, bars: &BTreeMap<(Histogram, u64, isize), isize>) -> Metrics {
    let mut metrics = Metrics::default();
    let mut set = |name: String, value: f64| metrics.values.insert(format!("buffer/{name}"), value);
    let bars_of = |wanted: Histogram| {
        bars.keys().filter(move |(histogram, ..)| *histogram == wanted).map(|(_, value, count)| (*value, *count as u64))
    };
    let size: u64 = bars_of(Histogram::Inserted).map(|(_, count)| count).sum();
    set("size".into(), size as f64);
    if size > 0 {
        let mean = |histogram| bars_of(histogram).map(|(value, count)| value * count).sum::<u64>() as f64 / size as f64;
        let oldest = bars_of(Histogram::Inserted).map(|(inserted, _)| inserted).min().unwrap_or(step);
        set("age_mean".into(), step as f64 - mean(Histogram::Inserted));
        set("age_max".into(), (step - oldest) as f64);
        set("drawn_mean".into(), mean(Histogram::Drawn));
    }
    // A histogram with bars for 0, 1, 2 and 3 or more draws, and for ages by powers of two.
    for (name, from, to) in [("0", 0, 0), ("1", 1, 1), ("2", 2, 2), ("3_or_more", 3, u64::MAX)] {
        let count: u64 =
            bars_of(Histogram::Drawn).filter(|(drawn, _)| (from..=to).contains(drawn)).map(|bar| bar.1).sum();
        set(format!("drawn/{name}"), count as f64);
    }
    for (name, from, to) in [("0", 0, 0), ("1_to_7", 1, 7), ("8_to_63", 8, 63), ("64_or_more", 64, u64::MAX)] {
        let bars = bars_of(Histogram::Inserted).filter(|(inserted, _)| (from..=to).contains(&(step - inserted)));
        set(format!("age/{name}"), bars.map(|bar| bar.1).sum::<u64>() as f64);
    }
    metrics
}

impl Define for ReplayBuffer {
    const NAME: &'static str = "replay_buffer";
    const SUMMARY: &'static str = "Keeps the newest pairs and draws from them at every step.";
    const DOCS: &'static str = "\
Pairs enter first in, first out. At each step, after that step's pairs have entered, `draws` pairs are drawn (fewer
while the buffer holds fewer): with replacement, p proportional to 1 / (1 + times drawn) for `inverse_count`; with
replacement, all alike, for `uniform`; the oldest, which then leave, for `fifo`.

State: the pairs, the step each came in, and how often each was drawn; all of it is in checkpoints.
Metrics: buffer/size, buffer/age_mean and buffer/age_max (steps), buffer/drawn_mean, and histograms of draw counts
(buffer/drawn/...) and ages (buffer/age/...), after the step's draws. They are maintained incrementally from the
insertions and removals, by differential dataflow.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat_pairs.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8, max_prompt_tokens: 1792}}
replay:
  op: replay_buffer
  in: prompts.pairs
  with: {capacity: 2000, sampling: inverse_count, draws: 8}
";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new("pairs", &[PortType::Pairs], "Pairs to keep.").many()];
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("pairs", &[PortType::Pairs], "The pairs drawn."),
        PortSpec::new("metrics", &[PortType::Metrics], "buffer/*: size, ages, draw counts."),
    ];
    const VIEW: Option<View> = Some(View { port: "metrics", build: statistics });
    type Config = ReplayBufferConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        for (key, value) in [("capacity", config.capacity), ("draws", config.draws)] {
            if value == 0 {
                issues.push(ConfigIssue::new(key, "expected a number above 0, found 0"));
            }
        }
        issues
    }

    fn plan(config: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        let emits = Emits { rows: Some(config.draws as u64), ..context.input("pairs") };
        Ok(NodePlan { emits, ..NodePlan::default() })
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        let random = Draws::new(context.run.seed, context.node);
        Ok(ReplayBuffer { config, random, entries: VecDeque::new(), unannounced: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::golden;

    fn buffer(capacity: usize, sampling: Sampling, draws: usize) -> ReplayBuffer {
        let config = ReplayBufferConfig { capacity, sampling, draws };
        ReplayBuffer { config, random: Draws::new(1, "replay"), entries: VecDeque::new(), unannounced: false }
    }

    fn pair(id: u64) -> Arc<Pair> {
        Arc::new(Pair {
            step: 0,
            position: 0,
            origin: "test".into(),
            source: "data".into(),
            row: id,
            prompt_ids: vec![1],
            chosen_ids: vec![2],
            rejected_ids: Some(vec![3]),
            segment: None,
            weights_version: None,
            seed: None,
            values: Default::default(),
        })
    }

    #[test]
    fn contents_and_probabilities_are_the_authors_own() {
        let golden = golden("replay_buffer.json");
        let capacity = golden["capacity"].as_u64().expect("a number") as usize;
        let trace = golden["trace"].as_array().expect("a list");
        assert!(!trace.is_empty());
        let mut buffer = buffer(capacity, Sampling::InverseCount, 1);
        let mut next = 0;
        let mut outputs = Outputs::new();
        for moment in trace {
            for _ in 0..moment["add"].as_u64().expect("a number") {
                buffer.insert(0, pair(next), &mut outputs);
                next += 1;
            }
            let contents: Vec<u64> = buffer.entries.iter().map(|entry| entry.pair.row).collect();
            assert_eq!(serde_json::json!(contents), moment["contents"]);
            let expected: Vec<f64> = serde_json::from_value(moment["probabilities"].clone()).expect("numbers");
            for (ours, theirs) in buffer.probabilities().iter().zip(&expected) {
                assert!((ours - theirs).abs() < 1e-12, "{ours} {theirs}");
            }
            let sampled: Vec<u64> = serde_json::from_value(moment["sampled"].clone()).expect("ids");
            let index = |id: &u64| contents.iter().position(|kept| kept == id).expect("drawn from the contents");
            buffer.emit(sampled.iter().map(index).collect(), &mut outputs);
        }
    }

    #[test]
    fn draws_follow_the_rule() {
        // Pair 0 drawn nine times before: weights 1/10, 1, 1, so shares 1/21, 10/21, 10/21.
        let mut buffer = buffer(10, Sampling::InverseCount, 3);
        (0..3).for_each(|id| buffer.insert(0, pair(id), &mut Outputs::new()));
        buffer.entries[0].drawn = 9;
        let mut counts = [0; 3];
        for step in 0..7000 {
            buffer.draw(step).into_iter().for_each(|index| counts[index] += 1);
        }
        for (count, share) in counts.iter().zip([1.0, 10.0, 10.0]) {
            let (expected, deviation) = (1000.0 * share, (1000.0f64 * share).sqrt());
            assert!((f64::from(*count) - expected).abs() < 5.0 * deviation, "{counts:?}");
        }
    }

    #[test]
    fn fifo_is_a_queue() {
        let mut buffer = buffer(10, Sampling::Fifo, 2);
        (0..5).for_each(|id| buffer.insert(0, pair(id), &mut Outputs::new()));
        let rows = |buffer: &mut ReplayBuffer, step| -> Vec<u64> {
            let outputs = buffer.step(step, Inputs::default()).expect("it cannot fail");
            let mut inputs =
                Inputs::new(vec![("pairs", outputs.records.into_iter().map(|(_, record)| record).collect())]);
            inputs.pairs("pairs").iter().map(|pair| pair.row).collect()
        };
        assert_eq!(rows(&mut buffer, 0), [0, 1]);
        assert_eq!(rows(&mut buffer, 1), [2, 3]);
        assert_eq!(rows(&mut buffer, 2), [4]);
        assert_eq!(rows(&mut buffer, 3), [0; 0]);
    }

    #[test]
    fn restored_buffers_draw_alike() {
        let mut original = buffer(4, Sampling::InverseCount, 3);
        (0..6).for_each(|id| original.insert(id, pair(id), &mut Outputs::new()));
        original.step(6, Inputs::default()).expect("it cannot fail");
        let directory = tempfile::tempdir().expect("a temporary directory");
        original.snapshot(directory.path()).expect("writable");
        let mut restored = buffer(4, Sampling::InverseCount, 3);
        restored.restore(directory.path()).expect("readable");
        assert_eq!(restored.draw(7), original.draw(7));
        assert_eq!(restored.probabilities(), original.probabilities());
    }

    #[test]
    fn histograms_sum_up_by_hand() {
        // At step 10: two pairs from step 10, drawn 0 times; one from step 4, drawn 5 times; one from step 0, twice.
        let bars = [
            (Histogram::Inserted, 0, 1),
            (Histogram::Inserted, 4, 1),
            (Histogram::Inserted, 10, 2),
            (Histogram::Drawn, 0, 2),
            (Histogram::Drawn, 2, 1),
            (Histogram::Drawn, 5, 1),
        ];
        let metrics = summary(10, &bars.into_iter().map(|bar| (bar, 1)).collect());
        for (name, value) in [
            ("size", 4.0),
            ("age_mean", 4.0),
            ("age_max", 10.0),
            ("drawn_mean", 1.75),
            ("drawn/0", 2.0),
            ("drawn/2", 1.0),
            ("drawn/3_or_more", 1.0),
            ("age/0", 2.0),
            ("age/1_to_7", 1.0),
            ("age/8_to_63", 1.0),
        ] {
            assert_eq!(metrics.values[&format!("buffer/{name}")], value, "{name}");
        }
    }
}
