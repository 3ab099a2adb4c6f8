//! What travels on edges: prompts, samples, pairs, batches, handles to weights, and metrics.
//!
//! Records are plain data without tensors, so that they can be stored in a checkpoint and exchanged between timely
//! workers. Weights are the exception that proves it: a record names a model and a version, and carries a handle that
//! only this process can follow.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::values::Values;

/// A token's index in the vocabulary.
pub type TokenId = u32;

/// The type of a port: which records an edge carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PortType {
    /// Tokenized conversations: a prompt and its answer ([`Prompt`]).
    Prompts,
    /// Responses to prompts, to be scored and compared ([`Sample`]).
    Samples,
    /// Chosen and rejected responses to a prompt ([`Pair`]).
    Pairs,
    /// Pairs gathered for one update ([`Batch`]).
    Batches,
    /// Versions of a model's weights ([`Weights`]).
    Weights,
    /// Named numbers, one set a step ([`Metrics`]).
    Metrics,
    /// Insertions into and removals from a collection ([`Change`]).
    Changes,
}

impl fmt::Display for PortType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One record on an edge.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Record {
    /// On [`PortType::Prompts`] edges.
    Prompt(Arc<Prompt>),
    /// On [`PortType::Samples`] edges.
    Sample(Arc<Sample>),
    /// On [`PortType::Pairs`] edges.
    Pair(Arc<Pair>),
    /// On [`PortType::Batches`] edges.
    Batch(Arc<Batch>),
    /// On [`PortType::Weights`] edges.
    Weights(Weights),
    /// On [`PortType::Metrics`] edges.
    Metrics(Arc<Metrics>),
    /// On [`PortType::Changes`] edges.
    Change(Change),
    /// On edges of prompts, samples and pairs: something that was emitted there before is taken back.
    Retraction(Retraction),
}

impl Record {
    /// The type of port that carries this record.
    pub fn port_type(&self) -> PortType {
        match self {
            Record::Prompt(_) => PortType::Prompts,
            Record::Sample(_) => PortType::Samples,
            Record::Pair(_) => PortType::Pairs,
            Record::Batch(_) => PortType::Batches,
            Record::Weights(_) => PortType::Weights,
            Record::Metrics(_) => PortType::Metrics,
            Record::Change(_) => PortType::Changes,
            Record::Retraction(retraction) => retraction.port_type,
        }
    }
}

impl Record {
    /// The source and the index of the data row that this stems from, where it is a prompt, a sample or a pair.
    pub fn row(&self) -> Option<(&str, u64)> {
        match self {
            Record::Prompt(prompt) => Some((&prompt.source, prompt.row)),
            Record::Sample(sample) => Some((&sample.source, sample.row)),
            Record::Pair(pair) => Some((&pair.source, pair.row)),
            _ => None,
        }
    }

    /// By which a retraction names this one record: origin, step and position of a sample or pair.
    pub fn identity(&self) -> Option<(&str, u64, u32)> {
        match self {
            Record::Sample(sample) => Some((&sample.origin, sample.step, sample.position)),
            Record::Pair(pair) => Some((&pair.origin, pair.step, pair.position)),
            _ => None,
        }
    }
}

/// A tokenized row of a data set: a prompt and the answer to learn from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Prompt {
    /// The source (node name) that read the row.
    pub source: String,
    /// The row's index in the data set, counted over all its files before any shuffle.
    pub row: u64,
    /// The pass over the data that this occurrence belongs to, from 0.
    pub epoch: u64,
    /// The conversation before the answer, rendered and tokenized, generation prompt included.
    pub prompt_ids: Vec<TokenId>,
    /// The answer, ending in EOS.
    pub chosen_ids: Vec<TokenId>,
    /// A worse answer from the data set, ending in EOS, where rows have one.
    pub rejected_ids: Option<Vec<TokenId>>,
    /// Numbers and texts of the row by name: what it brought along, and what operators have added.
    pub values: Values,
}

/// A response to a prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Sample {
    /// The step at which the sample came to be.
    pub step: u64,
    /// Position among the samples that its operator emitted at that step.
    pub position: u32,
    /// The operator (node name) that made it.
    pub origin: String,
    /// The source (node name) of the data row it stems from.
    pub source: String,
    /// The data row it stems from.
    pub row: u64,
    /// The prompt's tokens.
    pub prompt_ids: Vec<TokenId>,
    /// The response, ending in EOS unless truncated.
    pub response_ids: Vec<TokenId>,
    /// Version of the weights that generated the response; absent where no model of this run did.
    pub weights_version: Option<u64>,
    /// Seed of the random stream the response was generated with; absent where no model of this run did.
    pub seed: Option<u64>,
    /// Numbers and texts of the sample by name: its prompt's, and what operators have added, such as a score.
    pub values: Values,
}

/// Something emitted at an earlier step is taken back: downstream, nothing shall stem from it any more.
///
/// It never concerns records of its own step, so that a consumer applies a step's retractions first. It concerns what
/// came on the same edge; consumers that take several edges need not tell them apart, since a record is taken back on an
/// edge only after it was emitted there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Retraction {
    /// The type of the edge it travels on: that of the records it concerns.
    pub port_type: PortType,
    /// What is taken back.
    pub of: Retracted,
    /// For people: what led to it, such as a line removed from a file; absent where that is an operator's daily work.
    pub because: Option<String>,
}

/// What a [`Retraction`] concerns.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Retracted {
    /// A data row, and every record that stems from it. This is how prompts are taken back.
    Row {
        /// The source (node name) that read it.
        source: String,
        /// Its index there.
        row: u64,
    },
    /// One record that `origin` emitted at `step`, as its `position`-th: a sample or a pair. Where it came several times,
    /// one of them.
    Record {
        /// The operator (node name) that made it.
        origin: String,
        /// The step at which it came to be.
        step: u64,
        /// Position among the records that its operator emitted at that step.
        position: u32,
    },
}

impl Retracted {
    /// Whether this is about a prompt, a sample or a pair.
    pub fn concerns(&self, record: &Record) -> bool {
        match self {
            Retracted::Row { source, row } => record.row() == Some((source, *row)),
            Retracted::Record { origin, step, position } => record.identity() == Some((origin, *step, *position)),
        }
    }

    /// Whether this is about a pair.
    pub fn concerns_pair(&self, pair: &Pair) -> bool {
        match self {
            Retracted::Row { source, row } => (source, *row) == (&pair.source, pair.row),
            Retracted::Record { origin, step, position } => {
                (origin, *step, *position) == (&pair.origin, pair.step, pair.position)
            }
        }
    }

    /// Whether this is about a sample.
    pub fn concerns_sample(&self, sample: &Sample) -> bool {
        match self {
            Retracted::Row { source, row } => (source, *row) == (&sample.source, sample.row),
            Retracted::Record { origin, step, position } => {
                (origin, *step, *position) == (&sample.origin, sample.step, sample.position)
            }
        }
    }
}

/// The part of a response that a sampler wrote, in tokens of the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Segment {
    /// First generated token of the rejected response.
    pub start: usize,
    /// Number of generated tokens kept in the rejected response.
    pub len: usize,
    /// Whether the sampler emitted EOS, so that nothing of the original tail follows.
    pub ended: bool,
}

/// A chosen and a rejected response to one prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Pair {
    /// The step at which the pair came to be.
    pub step: u64,
    /// Position among the pairs that its operator emitted at that step.
    pub position: u32,
    /// The operator (node name) that made it.
    pub origin: String,
    /// The source (node name) of the data row it stems from.
    pub source: String,
    /// The data row it stems from.
    pub row: u64,
    /// The prompt's tokens.
    pub prompt_ids: Vec<TokenId>,
    /// The better response, ending in EOS unless truncated.
    pub chosen_ids: Vec<TokenId>,
    /// The worse response; absent in data that has only good answers (supervised fine-tuning).
    pub rejected_ids: Option<Vec<TokenId>>,
    /// Where the rejected response was rewritten; absent for pairs from a data set.
    pub segment: Option<Segment>,
    /// Version of the weights that generated the rejected response; absent for pairs from a data set.
    pub weights_version: Option<u64>,
    /// Seed of the random stream the response was generated with; absent for pairs from a data set.
    pub seed: Option<u64>,
    /// Numbers and texts of the pair by name: its prompt's or samples', and what operators have added.
    pub values: Values,
}

/// Summed log-probabilities of a pair's responses under a reference model, in nats.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ReferenceLogps {
    /// Of the chosen response.
    pub chosen: f32,
    /// Of the rejected response; 0 where the pair has none.
    pub rejected: f32,
}

/// Pairs for one update, or for a part of one where a step has several batches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Batch {
    /// The pairs, each within the batcher's max_length.
    pub pairs: Vec<Arc<Pair>>,
    /// One entry a pair, once a `reference` operator has been passed.
    pub reference: Option<Vec<ReferenceLogps>>,
}

/// A handle to something that lives in this process only, such as a set of tensors.
pub type Handle = Arc<dyn Any + Send + Sync>;

/// One version of a model's weights.
///
/// The tensors do not travel: `handle` points at them while the record stays in this process, and keeps the version
/// readable for as long as the record lives. In a checkpoint the handle is absent and the operator that emitted the
/// record supplies it again ([`Operator::reattach`](crate::operator::Operator::reattach)).
#[derive(Clone, Serialize, Deserialize)]
pub struct Weights {
    /// Name of the node whose model this is.
    pub model: String,
    /// How many updates these weights have had.
    pub version: u64,
    /// The tensors.
    #[serde(skip)]
    pub handle: Option<Handle>,
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Weights {{ {} version {} }}", self.model, self.version)
    }
}

/// Named numbers of one step. Names are TRL's where TRL has one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Values by name, such as `rewards/margins`; units in the operator's docs.
    #[serde(with = "crate::number::by_name")]
    pub values: BTreeMap<String, f64>,
}

/// A change to a collection: differential dataflow's (data, diff), at the step of the record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Change {
    /// The element, as numbers whose meaning the emitting operator documents.
    pub element: Vec<u64>,
    /// +1 for an insertion, -1 for a removal.
    pub diff: i64,
}
