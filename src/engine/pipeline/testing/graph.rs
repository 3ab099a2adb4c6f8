//! The part of a pipeline that a test is about, as a graph of its own: feeds in the place of what it reads, and captures
//! of what it emits. It is run as any other.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::graph::{CheckpointSettings, Edge, Graph, Node, RunSettings};
use crate::operator::{
    BuildContext, Built, Inputs, Operator, OperatorError, OperatorSpec, Outputs, Placement, PortSpec,
};
use crate::plan::NodePlan;
use crate::record::{PortType, Record};

/// Records that stand for what a node's output emits.
pub(super) struct Feed {
    /// The node, and its output.
    pub node: usize,
    pub port: usize,
    /// A step an entry.
    pub steps: Vec<Vec<Record>>,
}

/// Everything that decides what is emitted on `outputs` (a list for each capture) once the fed nodes are replaced; and
/// the feeds by index that nothing of it reads.
pub(super) fn part(
    graph: &Graph,
    feeds: &[Feed],
    outputs: &[Vec<(usize, usize)>],
    also: &[usize],
    steps: u64,
) -> (Graph, Vec<usize>) {
    let fed = |node: usize| feeds.iter().any(|feed| feed.node == node);
    let mut reached: BTreeSet<usize> = BTreeSet::new();
    let mut ahead: Vec<usize> = outputs.iter().flatten().map(|(node, _)| *node).chain(also.iter().copied()).collect();
    while let Some(node) = ahead.pop() {
        if reached.insert(node) && !fed(node) {
            ahead.extend(graph.edges.iter().filter(|edge| edge.to_node == node).map(|edge| edge.from_node));
        }
    }
    let unread = (0..feeds.len()).filter(|index| !reached.contains(&feeds[*index].node)).collect();
    // The order of the nodes stays what it was, so that edges still lead from lower to higher.
    let kept: Vec<usize> = reached.into_iter().collect();
    let place = |node: usize| kept.binary_search(&node).ok();
    let mut nodes: Vec<Node> = kept
        .iter()
        .map(
            |index| {
                if fed(*index) { feeding(&graph.nodes[*index], *index, feeds) } else { graph.nodes[*index].clone() }
            },
        )
        .collect();
    let mut edges: Vec<Edge> = graph
        .edges
        .iter()
        .filter(|edge| !fed(edge.to_node))
        .filter_map(|edge| {
            Some(Edge { from_node: place(edge.from_node)?, to_node: place(edge.to_node)?, ..edge.clone() })
        })
        .collect();
    for (index, outputs) in outputs.iter().enumerate() {
        let Some((first, _)) = outputs.first() else { continue };
        for (node, port) in outputs {
            let Some(from_node) = place(*node) else { continue };
            let port_type = graph.emitted_type(*node, *port);
            edges.push(Edge {
                from_node,
                from_port: *port,
                to_node: nodes.len(),
                to_port: 0,
                port_type,
                feedback: None,
            });
        }
        nodes.push(capture(index, &graph.nodes[*first].op));
    }
    let run = RunSettings {
        steps: Some(steps),
        epochs: None,
        checkpoint: CheckpointSettings { every: None, ..graph.run.checkpoint.clone() },
        ..graph.run.clone()
    };
    (Graph { nodes, edges, run, ..graph.clone() }, unread)
}

/// A node that emits what the feeds of `node` say.
fn feeding(node: &Node, index: usize, feeds: &[Feed]) -> Node {
    let of_node = feeds.iter().filter(|feed| feed.node == index);
    let ports = of_node.map(|feed| (node.op.outputs[feed.port].name.to_owned(), feed.steps.clone())).collect();
    let op =
        OperatorSpec { inputs: &[], view: None, placement: Placement::Worker, build: build_feeder, ..bare(&node.op) };
    Node { op: Arc::new(op), config: config_of(&Feeding { ports }), ..node.clone() }
}

/// The operator without what only a pipeline as it was written has.
fn bare(op: &OperatorSpec) -> OperatorSpec {
    OperatorSpec { check: |_| Vec::new(), plan: |_, _| Ok(NodePlan::default()), files: |_| Vec::new(), ..op.clone() }
}

/// A config of a node made here. A test's records are numbers and texts, which can be written.
fn config_of(config: &impl Serialize) -> serde_yaml::Value {
    serde_yaml::Value::String(serde_json::to_string(config).unwrap_or_default())
}

fn read_config<'c, C: Deserialize<'c>>(config: &'c serde_yaml::Value) -> Result<C, OperatorError> {
    Ok(serde_json::from_str(config.as_str().unwrap_or_default())?)
}

/// By port, the records of each step.
#[derive(Serialize, Deserialize)]
struct Feeding {
    ports: Vec<(String, Vec<Vec<Record>>)>,
}

struct Feeder {
    ports: Vec<(&'static str, Vec<Vec<Record>>)>,
}

fn build_feeder(config: &serde_yaml::Value, _: &BuildContext) -> Result<Built, OperatorError> {
    let Feeding { ports } = read_config(config)?;
    // Names of ports live as long as the program: there are as many as the tests of one process have feeds.
    let ports = ports.into_iter().map(|(name, steps)| (&*name.leak(), steps)).collect();
    Ok(Built { operator: Box::new(Feeder { ports }), steps_per_epoch: None })
}

impl Operator for Feeder {
    fn step(&mut self, step: u64, _: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        for (port, steps) in &mut self.ports {
            let records = steps.get_mut(step as usize).map(std::mem::take).unwrap_or_default();
            records.into_iter().for_each(|record| outputs.push(port, record));
        }
        Ok(outputs)
    }
}

const CAPTURED: &[PortSpec] = &[PortSpec::new(
    "records",
    &[
        PortType::Prompts,
        PortType::Samples,
        PortType::Pairs,
        PortType::Batches,
        PortType::Weights,
        PortType::Metrics,
        PortType::Changes,
    ],
    "what a test looks at",
)
.many()];

/// The node behind the outputs of an expectation; `op` is any operator.
fn capture(index: usize, op: &OperatorSpec) -> Node {
    let op = OperatorSpec {
        name: "capture",
        summary: "Keeps what a test looks at.",
        inputs: CAPTURED,
        outputs: &[],
        placement: Placement::Worker,
        view: None,
        config_schema: || schemars::json_schema!({}),
        build: build_capture,
        ..bare(op)
    };
    // No node of a pipeline can have such a name.
    Node { name: format!("(expected {index})"), op: Arc::new(op), config: config_of(&index) }
}

struct Capture {
    path: PathBuf,
    steps: Vec<Vec<Record>>,
}

fn build_capture(config: &serde_yaml::Value, context: &BuildContext) -> Result<Built, OperatorError> {
    let path = captured(context.run_directory, read_config(config)?);
    Ok(Built { operator: Box::new(Capture { path, steps: Vec::new() }), steps_per_epoch: None })
}

impl Operator for Capture {
    fn step(&mut self, _: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        self.steps.push(inputs.take("records"));
        Ok(Outputs::new())
    }

    fn finish(&mut self) -> Result<(), OperatorError> {
        Ok(fs::write(&self.path, serde_json::to_vec(&self.steps)?)?)
    }
}

/// Where the n-th capture of a run leaves its records.
fn captured(run_directory: &Path, index: usize) -> PathBuf {
    run_directory.join(format!("captured-{index}.json"))
}

/// What the n-th capture of a completed run saw, a step an entry.
pub(super) fn read_captured(run_directory: &Path, index: usize) -> Result<Vec<Vec<Record>>, OperatorError> {
    Ok(serde_json::from_slice(&fs::read(captured(run_directory, index))?)?)
}
