//! The graph as a timely dataflow.
//!
//! The timestamp is the training step. Every node holds the capability of the step it has not finished yet, runs a
//! step when all its inputs are complete for it, and emits in step order; so what flows where is a function of the
//! graph alone. A feedback edge delays its records by 1 + max_staleness steps.
//!
//! | module | what it holds |
//! |---|---|
//! | [`executor`] | an operator, on the worker or on a device thread, behind one interface |
//! | [`node`] | a node's steps in order: what to wait for, run, emit and snapshot |
//! | [`render`] | nodes and edges to timely operators |
//! | [`control`] | what all nodes share: pacing, the last step, failure, busy times |
//! | [`checkpoint`] | consistent cuts on disk |
//! | [`disk`] | files that survive a power cut, and their hashes |
//! | [`relation`] | operators that are dataflow: records to collections, and changes back |
//! | [`view`] | building blocks of views, on differential dataflow |
//! | [`event`] | what a run tells those who watch it |
//! | [`timeline`] | which node worked when, for those who ask |
//! | [`processor`] | processor time of threads |

pub mod checkpoint;
pub mod control;
pub mod disk;
pub mod event;
pub mod executor;
pub mod node;
pub mod openmp;
pub mod processor;
pub mod relation;
pub mod render;
pub mod timeline;
pub mod view;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::graph::{Graph, Node};
use crate::operator::{BuildContext, Built, Inputs, OperatorError, Outputs, Placement};
use crate::record::Record;
use checkpoint::{Checkpointer, LoadedCheckpoint};
use control::Control;
use event::{Event, EventSender};
use executor::{Answer, Executor, Job};
use node::NodeRunner;
use timeline::{Timeline, Track, Work};

/// What a run is given besides its graph.
pub struct RunOptions {
    /// Where everything a run writes goes; exists.
    pub run_directory: PathBuf,
    /// Take up this checkpoint instead of starting afresh.
    pub resume: Option<LoadedCheckpoint>,
    /// Set from outside to finish the steps under way, store a checkpoint and stop.
    pub interrupt: Arc<AtomicBool>,
    /// Where events go.
    pub events: EventSender,
    /// Where to note when each node works; absent: nowhere, and at no cost.
    pub timeline: Option<Arc<Timeline>>,
    /// Timely workers. Any number gives the same result; each node lives on one of them.
    pub workers: usize,
}

impl RunOptions {
    /// A fresh run in a directory, watched by nobody.
    pub fn new(run_directory: impl Into<PathBuf>) -> Self {
        RunOptions {
            run_directory: run_directory.into(),
            resume: None,
            interrupt: Arc::new(AtomicBool::new(false)),
            events: EventSender::sink(),
            timeline: None,
            workers: 1,
        }
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Completed,
    /// Stopped from outside with a checkpoint after this many steps.
    Interrupted {
        /// Steps done.
        step: u64,
    },
}

/// What a run did.
#[derive(Clone, Debug)]
pub struct RunReport {
    /// How it ended.
    pub outcome: Outcome,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Steps done by this process.
    pub steps_done: u64,
    /// Time each node worked in this process, in graph order.
    pub busy: Vec<(String, Duration)>,
    /// Processor time that the dataflow itself took: building it, tracking progress, moving records, waking operators
    /// on other threads, and views and relations, which are dataflow. Counted are the timely workers' threads, without
    /// the operators called on them; not the threads that complete checkpoints, nor those of whoever watches.
    pub engine: Duration,
    /// From the first step's start to the end of the last.
    pub elapsed: Duration,
}

/// What ends a run early.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A node failed.
    #[error("node `{node}`{at}: {message}", at = match step { Some(step) => format!(" at step {step}"), None => String::new() })]
    Node {
        /// Its name.
        node: String,
        /// The step, where it had begun one.
        step: Option<u64>,
        /// What it said.
        message: String,
    },
    /// A checkpoint cannot be written or taken up.
    #[error("checkpoint {path}: {message}", path = path.display())]
    Checkpoint {
        /// The checkpoint, or the file in it.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// A checkpoint is not one of this pipeline.
    #[error(
        "checkpoint {path}: it was written by a different pipeline: nodes, wiring or settings have changed",
        path = path.display()
    )]
    OtherPipeline {
        /// Its manifest.
        path: PathBuf,
    },
    /// The pipeline says nothing that ends a run.
    #[error("no source tells how many steps an epoch has: give `run: {{steps: N}}` instead of `epochs`")]
    EndlessRun,
    /// timely could not start its workers.
    #[error("cannot start the dataflow's workers: {0}")]
    Workers(String),
}

impl RunError {
    /// A node's failure outside its steps.
    pub(crate) fn node(node: &str, error: OperatorError) -> Self {
        RunError::Node { node: node.into(), step: None, message: error.to_string() }
    }
}

/// Run a graph to its end, to an interrupt, or to the first error.
///
/// # Errors
/// [`RunError`]: the first node that failed, panicked or lost its thread; a checkpoint that could not be written.
pub fn run(graph: &Graph, options: RunOptions) -> Result<RunReport, RunError> {
    let (executors, total_steps) = build(graph, &options)?;
    let first_step = options.resume.as_ref().map_or(0, |checkpoint| checkpoint.step);
    let control = Arc::new(Control::new(graph, first_step, total_steps));
    let checkpointer = Arc::new(Checkpointer::new(graph, &options)?);
    let runners = start(graph, executors, &options, &control, &checkpointer)?;
    match &options.resume {
        Some(checkpoint) => {
            let checkpoint = checkpoint.directory.display();
            tracing::debug!(first_step, total_steps, %checkpoint, "run resumed");
        }
        None => tracing::debug!(total_steps, "run started"),
    }
    options.events.send(Event::RunStarted { first_step, total_steps });

    let started = Instant::now();
    let runners: Arc<Vec<Mutex<Option<NodeRunner>>>> =
        Arc::new(runners.into_iter().map(|runner| Mutex::new(Some(runner))).collect());
    let finished = render::execute(graph, &options, &control, &runners)?;
    let elapsed = started.elapsed();
    checkpointer.wait(&control);
    tracing::debug!(steps = control.completed() - first_step, seconds = elapsed.as_secs_f64(), "steps ended");
    if let Some(error) = control.failure() {
        return Err(error);
    }

    let outcome = match control.interrupted_at() {
        Some(step) => Outcome::Interrupted { step },
        None => {
            for mut runner in finished {
                let name = runner.name.clone();
                runner.executor.call(Job::Finish).map_err(|error| RunError::node(&name, error))?;
            }
            Outcome::Completed
        }
    };
    let steps_done = control.completed() - first_step;
    Ok(RunReport { outcome, total_steps, steps_done, busy: control.busy(), engine: control.engine(), elapsed })
}

/// Build all operators: those without inputs first, since they decide how many steps there are.
fn build(graph: &Graph, options: &RunOptions) -> Result<(Vec<Executor>, u64), RunError> {
    let mut operators: Vec<Option<Built>> = graph.nodes.iter().map(|_| None).collect();
    let mut total_steps = 0;
    for sources in [true, false] {
        for (index, node) in graph.nodes.iter().enumerate() {
            if node.op.inputs.is_empty() != sources {
                continue;
            }
            let ports = |outgoing: bool| {
                let edges =
                    graph.edges.iter().filter(|edge| (if outgoing { edge.from_node } else { edge.to_node }) == index);
                let mut names: Vec<&'static str> = edges
                    .map(|edge| {
                        if outgoing { node.op.outputs[edge.from_port].name } else { node.op.inputs[edge.to_port].name }
                    })
                    .collect();
                names.sort_unstable();
                names.dedup();
                names
            };
            let context = BuildContext {
                node: &node.name,
                run: &graph.run,
                total_steps,
                run_directory: &options.run_directory,
                resumed: options.resume.is_some(),
                retained_versions: graph.retained_versions(index),
                threads: threads(graph),
                overlaps: graph.overlaps(),
                connected_inputs: ports(false),
                connected_outputs: ports(true),
                events: options.events.clone(),
            };
            let began = Instant::now();
            let built = (node.op.build)(&node.config, &context);
            Track::new(options.timeline.as_ref(), index).note(Some(Work::Build), began, began.elapsed());
            operators[index] = Some(built.map_err(|error| RunError::node(&node.name, error))?);
        }
        if sources {
            total_steps =
                count_steps(graph, operators.iter().flatten().filter_map(|built| built.steps_per_epoch).max())?;
        }
    }
    Ok((executors(graph, operators.into_iter().flatten(), options)?, total_steps))
}

/// The operators, where they are to run.
fn executors(
    graph: &Graph,
    operators: impl Iterator<Item = Built>,
    options: &RunOptions,
) -> Result<Vec<Executor>, RunError> {
    let place = |((index, node), built): ((usize, &Node), Built)| {
        let track = Track::new(options.timeline.as_ref(), index);
        match node.op.placement {
            Placement::Worker => Ok(Executor::on_worker(built.operator, track)),
            Placement::Device => Executor::on_thread(&node.name, built.operator, track),
        }
    };
    // Validation and building may have left one.
    openmp::release_team();
    graph.nodes.iter().enumerate().zip(operators).map(place).collect()
}

/// Threads for one node's tensor work.
fn threads(graph: &Graph) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    graph.run.threads.unwrap_or(if graph.overlaps() { cores.div_ceil(2) } else { cores })
}

/// Steps of the whole run.
fn count_steps(graph: &Graph, steps_per_epoch: Option<u64>) -> Result<u64, RunError> {
    match (graph.run.steps, steps_per_epoch) {
        (Some(steps), _) => Ok(steps),
        (None, Some(per_epoch)) => Ok(per_epoch.saturating_mul(graph.run.epochs.unwrap_or(1))),
        (None, None) => Err(RunError::EndlessRun),
    }
}

/// Restore and start every node in dependency order, and hand each its share of what is in flight on feedback edges.
fn start(
    graph: &Graph,
    executors: Vec<Executor>,
    options: &RunOptions,
    control: &Arc<Control>,
    checkpointer: &Arc<Checkpointer>,
) -> Result<Vec<NodeRunner>, RunError> {
    let mut started: Vec<Outputs> = Vec::new();
    let mut runners: Vec<NodeRunner> = Vec::new();
    for (index, (node, mut executor)) in graph.nodes.iter().zip(executors).enumerate() {
        let began = Instant::now();
        let fail = |error| RunError::node(&node.name, error);
        if let Some(checkpoint) = &options.resume {
            executor.call(Job::Restore(checkpoint.node_directory(&node.name))).map_err(fail)?;
        }
        let inputs = start_inputs(graph, index, &started);
        let Answer::Started(outputs) = executor.call(Job::Start(inputs)).map_err(fail)? else {
            return Err(fail("start gave no outputs".into()));
        };
        started.push(outputs);
        let mut runner = NodeRunner::new(graph, index, executor, control.clone(), checkpointer.clone());
        runner.recall_elements()?;
        runners.push(runner);
        let seconds = began.elapsed().as_secs_f64();
        tracing::debug!(node = node.name, seconds, resumed = options.resume.is_some(), "node started");
        options.events.send(Event::NodeStarted { node: node.name.clone(), took: began.elapsed() });
    }
    for (edge_index, edge) in graph.edges.iter().enumerate() {
        let Some(feedback) = edge.feedback else { continue };
        let emitter = &graph.nodes[edge.from_node];
        let in_flight = match &options.resume {
            None => {
                let port = emitter.op.outputs[edge.from_port].name;
                vec![emitted_on(&started[edge.from_node], port); feedback.max_staleness as usize + 1]
            }
            Some(checkpoint) => {
                let mut in_flight = checkpoint.in_flight(graph, edge_index)?;
                for record in in_flight.iter_mut().flatten() {
                    runners[edge.from_node].reattach(record)?;
                }
                in_flight
            }
        };
        runners[edge.from_node].remember_emissions(edge_index, &in_flight);
        runners[edge.to_node].preload(edge_index, in_flight);
    }
    Ok(runners)
}

/// What the nodes before `index` emitted at start, by input port.
fn start_inputs(graph: &Graph, index: usize, started: &[Outputs]) -> Inputs {
    let mut ports: Vec<(&'static str, Vec<Record>)> =
        graph.nodes[index].op.inputs.iter().map(|port| (port.name, Vec::new())).collect();
    for edge in graph.edges.iter().filter(|edge| edge.to_node == index && edge.feedback.is_none()) {
        let port = graph.nodes[edge.from_node].op.outputs[edge.from_port].name;
        ports[edge.to_port].1.extend(emitted_on(&started[edge.from_node], port));
    }
    Inputs::new(ports)
}

/// The records emitted on one port.
fn emitted_on(outputs: &Outputs, port: &str) -> Vec<Record> {
    outputs.records.iter().filter(|(name, _)| *name == port).map(|(_, record)| record.clone()).collect()
}
