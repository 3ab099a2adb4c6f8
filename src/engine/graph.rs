//! The lowered pipeline: nodes in dependency order, typed edges, feedback edges told apart.

use std::sync::Arc;

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::operator::{OperatorSpec, PortSpec};
use crate::pipeline::Diagnostics;
use crate::record::PortType;

/// A validated pipeline.
#[derive(Clone)]
pub struct Graph {
    /// Nodes in dependency order: every edge that is not feedback goes from a lower index to a higher one.
    pub nodes: Vec<Node>,
    /// Edges in the order of their consumers, and for one consumer in the order written.
    pub edges: Vec<Edge>,
    /// The `run` block.
    pub run: RunSettings,
    /// The parameters by name, in the order declared, with the values that they have.
    pub params: IndexMap<String, serde_yaml::Value>,
    /// The pipeline with every parameter filled in: what a run directory stores, and what runs again as it is.
    pub resolved: serde_yaml::Value,
    /// What is legal but looks like a mistake.
    pub warnings: Diagnostics,
}

impl Graph {
    /// The edges whose records arrive at later steps.
    pub fn feedback_edges(&self) -> impl Iterator<Item = &Edge> {
        self.edges.iter().filter(|edge| edge.feedback.is_some())
    }

    /// Whether feedback lets generation and learning run at the same time: some of it arrives more than a step later.
    pub fn overlaps(&self) -> bool {
        self.feedback_edges().any(|edge| edge.feedback.is_some_and(|feedback| feedback.max_staleness > 0))
    }

    /// How many versions of what a node emits may still be read, the newest included: 1 + the largest max_staleness
    /// among its feedback edges, and 1 where there is none.
    pub fn retained_versions(&self, node: usize) -> u64 {
        let outgoing = self.feedback_edges().filter(|edge| edge.from_node == node);
        1 + outgoing.filter_map(|edge| edge.feedback).map(|feedback| feedback.max_staleness).max().unwrap_or(0)
    }

    /// For each node, whether a path leads to it from `start` within a step: without feedback edges. `start` itself counts
    /// as not reached.
    pub fn reached_from(&self, start: usize) -> Vec<bool> {
        let mut reached = vec![false; self.nodes.len()];
        // Nodes are in dependency order, so that one pass over them is enough.
        for node in start + 1..self.nodes.len() {
            let mut incoming = self.edges.iter().filter(|edge| edge.to_node == node && edge.feedback.is_none());
            reached[node] = incoming.any(|edge| edge.from_node == start || reached[edge.from_node]);
        }
        reached
    }

    /// The output port that an edge begins at.
    pub fn output(&self, edge: &Edge) -> &'static PortSpec {
        &self.nodes[edge.from_node].op.outputs[edge.from_port]
    }

    /// What a node's output carries: as its edges say, or where nothing reads it, the one of its types that arrives at the
    /// node.
    pub fn emitted_type(&self, node: usize, port: usize) -> PortType {
        let read = self.edges.iter().find(|edge| (edge.from_node, edge.from_port) == (node, port));
        let types = self.nodes[node].op.outputs[port].types;
        let arriving = self.edges.iter().find(|edge| edge.to_node == node && types.contains(&edge.port_type));
        match types {
            [only] => *only,
            _ => read.or(arriving).map_or(types[0], |edge| edge.port_type),
        }
    }

    /// The input port that an edge ends at.
    pub fn input(&self, edge: &Edge) -> &'static PortSpec {
        &self.nodes[edge.to_node].op.inputs[edge.to_port]
    }
}

/// One use of an operator.
#[derive(Clone)]
pub struct Node {
    /// Its key under `nodes`.
    pub name: String,
    /// The operator.
    pub op: Arc<OperatorSpec>,
    /// The `with` block, validated.
    pub config: serde_yaml::Value,
}

/// A connection from an output to an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edge {
    /// Index of the emitting node.
    pub from_node: usize,
    /// Index of the output port in its operator's `outputs`.
    pub from_port: usize,
    /// Index of the consuming node.
    pub to_node: usize,
    /// Index of the input port in its operator's `inputs`.
    pub to_port: usize,
    /// What it carries.
    pub port_type: PortType,
    /// For feedback edges, how many steps the consumer may run ahead of the emitter.
    pub feedback: Option<Feedback>,
}

/// The mark that makes a cycle legal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feedback {
    /// 0: the consumer's step t sees what was emitted at step t - 1. k: what was emitted at step t - 1 - k.
    pub max_staleness: u64,
}

impl Feedback {
    /// The largest `max_staleness` that pipelines may ask for: what is in flight is kept step by step.
    pub const MAX_STALENESS: u64 = 10_000;
}

/// The `run` block: what holds for the whole run.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RunSettings {
    /// Seed of every random draw.
    pub seed: u64,
    /// Passes over the data. A run ends after `steps` or `epochs`, whichever is given; one of them must be, not both.
    #[schemars(range(min = 1))]
    pub epochs: Option<u64>,
    /// Number of steps (optimizer updates).
    #[schemars(range(min = 1))]
    pub steps: Option<u64>,
    /// `auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes the first GPU if there is one.
    pub device: String,
    /// Compute type: `float32`, `bfloat16`, or `auto`: bfloat16 where the device has instructions for it, else float32.
    /// Master weights are float32 in all cases, but where a learner's `weights` says otherwise.
    pub dtype: DtypeChoice,
    /// What computes norms, gates, rotations, attention, float32 products and log-probabilities on a CPU, and updates and
    /// averages float32 weights on any device: `fused`, in few passes over memory and by the faster library, or `plain`, in
    /// libtorch's operators. With `plain` everything else goes the plain way too unless its own key says otherwise: there are
    /// all logits at once, and their gradient is autograd's, on any device; pairs are padded and prompts not shared, nothing is
    /// kept or laid out anew. Both give the same numbers but for the last bits.
    pub kernels: Kernels,
    /// Threads for tensor work; absent: all cores, shared by nodes that may run at the same time.
    #[schemars(range(min = 1))]
    pub threads: Option<usize>,
    /// When to store a state that a run can resume from.
    pub checkpoint: CheckpointSettings,
    /// Parent of run directories.
    pub directory: String,
}

impl Default for RunSettings {
    fn default() -> Self {
        RunSettings {
            seed: 42,
            epochs: None,
            steps: None,
            device: "auto".into(),
            dtype: DtypeChoice::Float32,
            kernels: Kernels::Fused,
            threads: None,
            checkpoint: CheckpointSettings::default(),
            directory: "runs".into(),
        }
    }
}

/// The type tensor work is done in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit IEEE floating point.
    Float32,
    /// 16 bits: float32's range, 8 bits of precision.
    Bfloat16,
}

/// What a run says of its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DtypeChoice {
    /// 32-bit IEEE floating point.
    Float32,
    /// 16 bits: float32's range, 8 bits of precision.
    Bfloat16,
    /// The faster of the two on the run's device. What it came to be is noted in the run directory.
    Auto,
}

impl From<Dtype> for DtypeChoice {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Float32 => DtypeChoice::Float32,
            Dtype::Bfloat16 => DtypeChoice::Bfloat16,
        }
    }
}

impl std::fmt::Display for DtypeChoice {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        formatter.write_str(match self {
            DtypeChoice::Float32 => "float32",
            DtypeChoice::Bfloat16 => "bfloat16",
            DtypeChoice::Auto => "auto",
        })
    }
}

/// What computes between matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kernels {
    /// Single passes over memory.
    Fused,
    /// Compositions of the library's operators.
    Plain,
}

/// When to store a state that a run can resume from.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSettings {
    /// Steps between checkpoints; absent: only when interrupted.
    #[schemars(range(min = 1))]
    pub every: Option<u64>,
    /// How many to keep, the newest first.
    #[schemars(range(min = 1))]
    pub keep: usize,
}

impl Default for CheckpointSettings {
    fn default() -> Self {
        CheckpointSettings { every: None, keep: 2 }
    }
}
