//! `replay_buffer`: keeps the newest pairs and draws from them.
//!
//! SAPO (arXiv 2405.20830), section 3.3: first in, first out; pairs drawn often are drawn less, p proportional to
//! 1 / (1 + times drawn).

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use indexmap::IndexMap;
use sapo_flow_engine::operator::{ConfigIssue, Define, View};
use sapo_flow_engine::plan::{Emits, NodePlan, PlanContext};
use sapo_flow_engine::record::{Change, Pair, PortType, Record, Retracted, Retraction};
use sapo_flow_engine::runtime::event::{Event, EventSender};
use sapo_flow_engine::{BuildContext, Inputs, Operator, OperatorError, Outputs, PortSpec};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::draws::Draws;
use crate::replay_statistics::{retracted_change, statistics};
use crate::shares::{Shares, inverse_count};

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

/// What a snapshot holds.
#[derive(Serialize, Deserialize)]
struct State {
    entries: VecDeque<Entry>,
    retracted: u64,
}

/// See the [module](self).
pub struct ReplayBuffer {
    config: ReplayBufferConfig,
    random: Draws,
    entries: VecDeque<Entry>,
    /// The weights of the entries where draws depend on them.
    shares: Option<Shares>,
    /// Pairs taken back so far.
    retracted: u64,
    node: String,
    events: EventSender,
    /// Whether the view has yet to learn of what a checkpoint brought.
    unannounced: bool,
}

impl ReplayBuffer {
    /// Indices of the pairs to draw at a step.
    fn draw(&self, step: u64) -> Vec<usize> {
        let count = self.config.draws.min(self.entries.len());
        let pair = |draw: usize| match (&self.shares, self.config.sampling) {
            (_, Sampling::Fifo) => draw,
            (Some(shares), _) => shares.at(self.random.uniform(step, draw as u64)),
            (None, _) => self.random.below(step, draw as u64, self.entries.len()),
        };
        (0..count).map(pair).collect()
    }

    /// Weigh all entries anew.
    fn weigh(&mut self) {
        let inverse = self.config.sampling == Sampling::InverseCount;
        self.shares = inverse.then(|| Shares::new(self.entries.iter().map(|entry| inverse_count(entry.drawn))));
    }

    /// The probability of each pair in one draw, oldest first.
    #[cfg(test)]
    fn probabilities(&self) -> Vec<f64> {
        self.shares.iter().flat_map(Shares::fractions).collect()
    }

    /// Add a pair; the oldest one leaves if there is no room.
    fn insert(&mut self, step: u64, pair: Arc<Pair>, outputs: &mut Outputs) {
        let entry = Entry { pair, inserted: step, drawn: 0 };
        outputs.push(View::CHANGES, entry.change(1));
        self.entries.push_back(entry);
        self.shares.iter_mut().for_each(|shares| shares.push(inverse_count(0)));
        if self.entries.len() > self.config.capacity
            && let Some(oldest) = self.entries.pop_front()
        {
            outputs.push(View::CHANGES, oldest.change(-1));
            self.shares.iter_mut().for_each(Shares::pop);
        }
    }

    /// Drop what a step's retractions concern, in one pass: of one pair that came several times, the newest; of a row, all
    /// pairs. How many pairs each of them took. (Drawing looks at every entry at each step, too.)
    fn retract(&mut self, retractions: &[Retraction], outputs: &mut Outputs) -> Vec<usize> {
        let mut rows: HashMap<(&str, u64), usize> = HashMap::new();
        let mut records: HashMap<(&str, u64, u32), usize> = HashMap::new();
        let mut queues: Vec<VecDeque<usize>> = Vec::new();
        for (index, retraction) in retractions.iter().enumerate() {
            match &retraction.of {
                Retracted::Row { source, row } => {
                    rows.entry((source.as_str(), *row)).or_insert(index);
                }
                Retracted::Record { origin, step, position } => {
                    let queue = *records.entry((origin.as_str(), *step, *position)).or_insert(queues.len());
                    queues.resize_with(queues.len().max(queue + 1), VecDeque::new);
                    queues[queue].push_back(index);
                }
            }
        }
        let mut taken = vec![0; retractions.len()];
        let mut kept = VecDeque::with_capacity(self.entries.len());
        while let Some(entry) = self.entries.pop_back() {
            let pair = &entry.pair;
            let row = rows.get(&(pair.source.as_str(), pair.row)).copied();
            let queue = records.get(&(pair.origin.as_str(), pair.step, pair.position)).map(|queue| &mut queues[*queue]);
            // Of two that concern a pair, the first one takes it.
            let comes_first = |of: &&mut VecDeque<usize>| of.front().is_some_and(|at| row.is_none_or(|row| *at < row));
            let taker = match queue.filter(comes_first) {
                Some(queue) => queue.pop_front(),
                None => row,
            };
            match taker {
                Some(taker) => {
                    taken[taker] += 1;
                    outputs.push(View::CHANGES, entry.change(-1));
                }
                None => kept.push_front(entry),
            }
        }
        self.entries = kept;
        if taken.iter().any(|count| *count > 0) {
            self.weigh();
        }
        taken
    }

    /// Honour a step's retractions, and tell people of those that have a reason: how many pairs left because of it.
    fn honour(&mut self, retractions: Vec<Retraction>, outputs: &mut Outputs) {
        let mut reasons: IndexMap<String, usize> = IndexMap::new();
        if retractions.is_empty() {
            return;
        }
        let taken = self.retract(&retractions, outputs);
        for (Retraction { because, .. }, left) in retractions.into_iter().zip(taken) {
            self.retracted += left as u64;
            outputs.push(View::CHANGES, retracted_change(left as u64));
            if let Some(because) = because {
                *reasons.entry(because).or_default() += left;
            }
        }
        for (because, pairs) in reasons {
            let pairs = if pairs == 1 { "1 pair".into() } else { format!("{pairs} pairs") };
            let message = format!("{pairs} left the buffer: {because}");
            self.events.send(Event::Note { node: self.node.clone(), message });
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
            self.shares.iter_mut().for_each(|shares| shares.set(index, inverse_count(entry.drawn)));
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
            outputs.push(View::CHANGES, retracted_change(self.retracted));
        }
        self.honour(inputs.retractions("pairs"), &mut outputs);
        for pair in inputs.pairs("pairs") {
            self.insert(step, pair, &mut outputs);
        }
        let drawn = self.draw(step);
        self.emit(drawn, &mut outputs);
        Ok(outputs)
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let path = directory.join(ENTRIES);
        let state = State { entries: self.entries.clone(), retracted: self.retracted };
        Ok(fs::write(&path, serde_json::to_vec(&state)?).map_err(Error::io(&path))?)
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let path = directory.join(ENTRIES);
        let text = fs::read(&path).map_err(Error::io(&path))?;
        State { entries: self.entries, retracted: self.retracted } = serde_json::from_slice(&text)?;
        self.weigh();
        self.unannounced = true;
        Ok(())
    }
}

impl Define for ReplayBuffer {
    const NAME: &'static str = "replay_buffer";
    const SUMMARY: &'static str = "Keeps the newest pairs and draws from them at every step.";
    const DOCS: &'static str = "\
Pairs enter first in, first out. At each step, after that step's pairs have entered, `draws` pairs are drawn (fewer
while the buffer holds fewer): with replacement, p proportional to 1 / (1 + times drawn) for `inverse_count`; with
replacement, all alike, for `uniform`; the oldest, which then leave, for `fifo`.

When a pair is taken back, or the row that it stems from, it leaves the buffer at once, its draws with it; people are told how \
many pairs left where an edit of the data is the reason. What has been drawn before is not called back.

State: the pairs, the step each came in, and how often each was drawn; all of it is in checkpoints.
Metrics: buffer/size, buffer/retracted (pairs taken back so far), buffer/age_mean and buffer/age_max (steps), buffer/drawn_mean, and histograms of draw counts
(buffer/drawn/...) and ages (buffer/age/...), after the step's draws. They are maintained incrementally from the
insertions and removals, by differential dataflow.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat_pairs.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8, max_prompt_tokens: 1792}}
replay:
  op: replay_buffer
  in: prompts.pairs
  with: {capacity: 2000, sampling: inverse_count, draws: 8}
";
    const INPUTS: &'static [PortSpec] =
        &[PortSpec::new("pairs", &[PortType::Pairs], "Pairs to keep.").many().honouring_retractions()];
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
        let mut buffer = ReplayBuffer {
            config,
            random,
            entries: VecDeque::new(),
            shares: None,
            retracted: 0,
            node: context.node.into(),
            events: context.events.clone(),
            unannounced: false,
        };
        buffer.weigh();
        Ok(buffer)
    }
}

#[cfg(test)]
mod tests;
