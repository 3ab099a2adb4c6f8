//! What a run will take, told before anything heavy is loaded.
//!
//! Each operator plans its node from its settings and from what the nodes that it reads from will emit. Nodes are
//! planned in dependency order; those at the end of a feedback edge once more, when the edge's other end is known.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use petgraph::algo::dinics;

use crate::graph::{Dtype, Graph, RunSettings};

/// What a node will take, as far as can be told without loading anything heavy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodePlan {
    /// Sources: steps in one pass over the data.
    pub steps_per_epoch: Option<u64>,
    /// Parameters of the model that the node loads or keeps a copy of, counted.
    pub parameters: Option<u64>,
    /// What it takes on the device it works on.
    pub memory: Option<Memory>,
    /// What it emits.
    pub emits: Emits,
    /// Notes for people, such as what the figures assume.
    pub notes: Vec<String>,
}

/// Bytes that a node takes on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// From its start to the end of the run.
    pub kept: u64,
    /// Besides, while it works on a step: the most, where every sequence is as long as may be.
    pub working: u64,
    /// The same at the step that is expected to take the most, by the lengths of the data's rows.
    pub working_expected: u64,
    /// Whether its work takes but a moment of a step, so that it is not expected just when others take the most.
    pub brief: bool,
}

/// What a node emits at a step, for the plans of the nodes after it. Absent: unknown, or nothing of the kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Emits {
    /// Directory of the model whose weights these are.
    pub model: Option<PathBuf>,
    /// Where the weights are.
    pub device: Option<String>,
    /// Their type.
    pub dtype: Option<Dtype>,
    /// Most prompts or pairs at a step.
    pub rows: Option<u64>,
    /// Most pairs in one batch.
    pub batch_size: Option<u64>,
    /// Most tokens of a prompt and a response together.
    pub max_length: Option<u64>,
    /// Some rows of the data; none: unknown.
    pub sample: Arc<[Lengths]>,
}

/// Tokens of a row of the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lengths {
    /// What both sequences of a pair begin with: the prompt, and more where a rejected answer begins as the chosen one.
    pub prompt: u64,
    /// How many tokens of these are the answers'.
    pub shared_answer: u64,
    /// What comes after that, of each sequence.
    pub response: u64,
}

impl Lengths {
    /// Tokens of one sequence.
    pub fn tokens(&self) -> u64 {
        self.prompt + self.response
    }

    /// Tokens of a pair that share their beginning.
    pub fn of_pair(&self) -> u64 {
        self.prompt + 2 * self.response
    }
}

/// What [`Define::plan`](crate::Define::plan) may look at.
pub struct PlanContext<'a> {
    /// The node's name.
    pub node: &'a str,
    /// The pipeline's `run` block.
    pub run: &'a RunSettings,
    /// Steps of the run; none where its source has not been planned, or cannot tell.
    pub steps: Option<u64>,
    /// See [`BuildContext`](crate::BuildContext::retained_versions).
    pub retained_versions: u64,
    /// For each edge that ends here: the input's name, and the plan of the node that it comes from.
    pub inputs: Vec<(&'static str, &'a NodePlan)>,
}

impl PlanContext<'_> {
    /// What arrives at an input: of several edges the largest numbers, added up where they are rows, and all rows of the
    /// data.
    pub fn input(&self, port: &str) -> Emits {
        let mut arrives = Emits::default();
        for (_, plan) in self.inputs.iter().filter(|(name, _)| *name == port) {
            let emits = plan.emits.clone();
            arrives = Emits {
                model: arrives.model.or(emits.model),
                device: arrives.device.or(emits.device),
                dtype: arrives.dtype.or(emits.dtype),
                rows: arrives.rows.map_or(emits.rows, |rows| Some(rows + emits.rows.unwrap_or(0))),
                batch_size: arrives.batch_size.max(emits.batch_size),
                max_length: arrives.max_length.max(emits.max_length),
                sample: arrives.sample.iter().chain(emits.sample.iter()).copied().collect(),
            };
        }
        arrives
    }
}

/// The plans of all nodes, in the graph's order.
///
/// # Errors
/// One sentence for each node that cannot tell.
pub fn plan(graph: &Graph) -> Result<Vec<NodePlan>, Vec<String>> {
    let mut plans: Vec<Option<NodePlan>> = vec![None; graph.nodes.len()];
    let mut errors = Vec::new();
    for again in [false, true] {
        for index in 0..graph.nodes.len() {
            let incoming = || graph.edges.iter().filter(|edge| edge.to_node == index);
            if again && !incoming().any(|edge| edge.feedback.is_some()) {
                continue;
            }
            let node = &graph.nodes[index];
            let per_epoch = plans.iter().flatten().filter_map(|plan| plan.steps_per_epoch).max();
            let context = PlanContext {
                node: &node.name,
                run: &graph.run,
                steps: graph.run.steps.or_else(|| Some(graph.run.epochs?.saturating_mul(per_epoch?))),
                retained_versions: graph.retained_versions(index),
                inputs: incoming()
                    .filter_map(|edge| Some((graph.input(edge).name, plans[edge.from_node].as_ref()?)))
                    .collect(),
            };
            match (node.op.plan)(&node.config, &context) {
                Ok(plan) => plans[index] = Some(plan),
                Err(error) => errors.push(format!("node `{}`: {error}", node.name)),
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
    }
    Ok(plans.into_iter().flatten().collect())
}

/// Bytes in use at a time, for each device: the most, and what is expected.
///
/// Nodes that a path connects take turns at a step. With staleness above 0 several steps are under way, and any nodes
/// may work at the same time; of those whose work is brief one alone is expected to, or all the others.
pub fn peak_memory(graph: &Graph, plans: &[NodePlan]) -> BTreeMap<String, (u64, u64)> {
    let mut devices: BTreeMap<String, Vec<(usize, &Memory)>> = BTreeMap::new();
    for (index, memory) in plans.iter().enumerate().filter_map(|(index, plan)| Some((index, plan.memory.as_ref()?))) {
        devices.entry(memory.device.clone()).or_default().push((index, memory));
    }
    let peaks = |memories: &[(usize, &Memory)]| {
        let kept: u64 = memories.iter().map(|(_, memory)| memory.kept).sum();
        let (most, expected) = if graph.overlaps() { at_once(memories) } else { in_turn(graph, memories) };
        (kept + most, kept + expected)
    };
    devices.into_iter().map(|(device, memories)| (device, peaks(&memories))).collect()
}

/// What nodes work with, any of them at the same time: at the most, and as is expected.
fn at_once(memories: &[(usize, &Memory)]) -> (u64, u64) {
    let most = memories.iter().map(|(_, memory)| memory.working).sum();
    let expected = |brief: bool| {
        let those = memories.iter().filter(move |(_, memory)| memory.brief == brief);
        those.map(|(_, memory)| memory.working_expected)
    };
    (most, expected(false).sum::<u64>().max(expected(true).max().unwrap_or(0)))
}

/// What nodes work with where those that a path connects take turns: at the most, and as is expected.
fn in_turn(graph: &Graph, memories: &[(usize, &Memory)]) -> (u64, u64) {
    let heaviest = |working: fn(&Memory) -> u64| {
        let working: Vec<(usize, u64)> = memories.iter().map(|(index, memory)| (*index, working(memory))).collect();
        heaviest(graph, &working)
    };
    (heaviest(|memory| memory.working), heaviest(|memory| memory.working_expected))
}

/// The largest sum over nodes no two of which a path connects.
///
/// Dilworth's theorem, with as many copies of a node as it has bytes: the sum of all, less the largest flow in which each
/// node passes at most its bytes to nodes that it leads to, and these take at most theirs.
fn heaviest(graph: &Graph, nodes: &[(usize, u64)]) -> u64 {
    let sum = nodes.iter().map(|(_, bytes)| bytes).sum();
    let mut network = petgraph::Graph::<(), u64>::new();
    let (source, sink) = (network.add_node(()), network.add_node(()));
    let ends: Vec<_> = nodes.iter().map(|_| (network.add_node(()), network.add_node(()))).collect();
    for ((index, bytes), (passes, takes)) in nodes.iter().zip(&ends) {
        network.add_edge(source, *passes, *bytes);
        network.add_edge(*takes, sink, *bytes);
        let reached = graph.reached_from(*index);
        for (_, (_, takes)) in nodes.iter().zip(&ends).filter(|((other, _), _)| reached[*other]) {
            network.add_edge(*passes, *takes, sum);
        }
    }
    sum - dinics(&network, source, sink).0
}
