//! A node's steps, in order: what it waits for, runs, emits and snapshots.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::RunError;
use super::checkpoint::Checkpointer;
use super::control::Control;
use super::executor::{Answer, Executor, Job};
use super::relation::Beginning;
use crate::graph::Graph;
use crate::operator::{Inputs, OperatorError, Outputs};
use crate::record::Record;
use crate::relation::Relation;

/// An edge that ends at a node.
struct Incoming {
    /// Its index in the graph; none for those that carry the changes of a relation.
    edge: Option<usize>,
    port: usize,
}

/// The last emissions on an outgoing feedback edge: what is in flight there.
struct Outgoing {
    edge: usize,
    port: &'static str,
    emissions: VecDeque<Vec<Record>>,
}

/// Drives one operator through its steps.
pub struct NodeRunner {
    /// The node's name.
    pub name: String,
    /// Its operator.
    pub executor: Executor,
    index: usize,
    ports: Vec<&'static str>,
    incoming: Vec<Incoming>,
    outgoing_feedback: Vec<Outgoing>,
    paced: bool,
    /// What the dataflow of a relation begins with, until it is built.
    beginning: Option<Beginning>,
    stash: BTreeMap<u64, Vec<Vec<Record>>>,
    next_submit: u64,
    next_emit: u64,
    outstanding: usize,
    control: Arc<Control>,
    checkpointer: Arc<Checkpointer>,
}

impl NodeRunner {
    /// A node before its first step.
    pub fn new(
        graph: &Graph,
        index: usize,
        executor: Executor,
        control: Arc<Control>,
        checkpointer: Arc<Checkpointer>,
    ) -> Self {
        let node = &graph.nodes[index];
        let incoming = graph.edges.iter().enumerate().filter(|(_, edge)| edge.to_node == index);
        let outgoing = graph.edges.iter().enumerate().filter(|(_, edge)| edge.from_node == index);
        let first_step = control.completed();
        let mut ports: Vec<&'static str> = node.op.inputs.iter().map(|port| port.name).collect();
        let mut edges: Vec<Incoming> =
            incoming.clone().map(|(edge, to)| Incoming { edge: Some(edge), port: to.to_port }).collect();
        if node.op.relation.is_some() {
            for hidden in [Relation::ELEMENTS, Relation::RESULTS] {
                edges.push(Incoming { edge: None, port: ports.len() });
                ports.push(hidden);
            }
        }
        NodeRunner {
            name: node.name.clone(),
            executor,
            index,
            ports,
            incoming: edges,
            outgoing_feedback: outgoing
                .filter(|(_, edge)| edge.feedback.is_some())
                .map(|(edge, from)| Outgoing {
                    edge,
                    port: node.op.outputs[from.from_port].name,
                    emissions: VecDeque::new(),
                })
                .collect(),
            paced: incoming.clone().all(|(_, edge)| edge.feedback.is_some()),
            beginning: node.op.relation.is_some().then(|| Beginning { first_step, ..Beginning::default() }),
            stash: BTreeMap::new(),
            next_submit: first_step,
            next_emit: first_step,
            outstanding: 0,
            control,
            checkpointer,
        }
    }

    /// The node's place in the graph.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The first step whose outputs are still to come.
    pub fn next_emit(&self) -> u64 {
        self.next_emit
    }

    /// The first step that waits for its inputs.
    pub fn next_submit(&self) -> u64 {
        self.next_submit
    }

    /// Whether nothing within a step makes the node wait: it is told how far it may run ahead of others.
    pub fn is_paced(&self) -> bool {
        self.paced
    }

    /// Whether the node has done its last step, and the snapshot that may follow it.
    pub fn is_done(&self) -> bool {
        self.next_emit >= self.control.end() && self.outstanding == 0
    }

    /// Keep records that arrived on the node's n-th edge for their step.
    pub fn receive(&mut self, step: u64, incoming: usize, records: impl IntoIterator<Item = Record>) {
        // What feedback delivers beyond the last step is for nobody.
        if step < self.next_submit || step >= self.control.end() {
            return;
        }
        let edges = self.incoming.len();
        self.stash.entry(step).or_insert_with(|| vec![Vec::new(); edges])[incoming].extend(records);
    }

    /// Records in flight on a feedback edge when the run begins: the n-th entry is for the n-th step.
    pub fn preload(&mut self, edge: usize, in_flight: Vec<Vec<Record>>) {
        if let Some(position) = self.incoming.iter().position(|incoming| incoming.edge == Some(edge)) {
            for (step, records) in (self.next_submit..).zip(in_flight) {
                if let Some(beginning) = &mut self.beginning {
                    beginning.in_flight.push((position, step, records.clone()));
                }
                self.receive(step, position, records);
            }
        }
    }

    /// For a node with a relation: ask its operator for the elements that a checkpoint brought.
    ///
    /// # Errors
    /// The operator's own.
    pub fn recall_elements(&mut self) -> Result<(), RunError> {
        let Some(beginning) = &mut self.beginning else { return Ok(()) };
        match self.executor.call(Job::Elements).map_err(|error| RunError::node(&self.name, error))? {
            Answer::Elements(elements) => beginning.elements = elements,
            answer => return Err(RunError::node(&self.name, format!("elements gave {answer:?}").into())),
        }
        Ok(())
    }

    /// What the dataflow of the node's relation begins with, once.
    pub fn take_beginning(&mut self) -> Option<Beginning> {
        self.beginning.take()
    }

    /// What is in flight on one of the node's outgoing feedback edges when the run begins.
    pub fn remember_emissions(&mut self, edge: usize, in_flight: &[Vec<Record>]) {
        if let Some(outgoing) = self.outgoing_feedback.iter_mut().find(|outgoing| outgoing.edge == edge) {
            outgoing.emissions = in_flight.iter().map(|records| detached(records)).collect();
        }
    }

    /// Give a record that was stored in a checkpoint its process-local parts back.
    ///
    /// # Errors
    /// The operator's own.
    pub fn reattach(&mut self, record: &mut Record) -> Result<(), RunError> {
        let answer = self.executor.call(Job::Reattach(record.clone()));
        match answer.map_err(|error| RunError::node(&self.name, error))? {
            Answer::Reattached(attached) => *record = attached,
            answer => return Err(RunError::node(&self.name, format!("reattach gave {answer:?}").into())),
        }
        Ok(())
    }

    /// Submit every step whose inputs are complete. `complete(n, step)` tells whether nothing more can arrive on the
    /// n-th edge for a step.
    pub fn submit_ready(&mut self, complete: impl Fn(usize, u64) -> bool) {
        while self.next_submit < self.control.end()
            && (!self.paced || self.next_submit < self.control.granted())
            && (0..self.incoming.len()).all(|incoming| complete(incoming, self.next_submit))
        {
            let step = self.next_submit;
            self.next_submit += 1;
            let inputs = self.inputs(step);
            self.submit(Job::Step(step, inputs));
            if self.control.checkpoint_due(step + 1) {
                match self.checkpointer.node_directory(step + 1, &self.name) {
                    Ok(directory) => self.submit(Job::Snapshot(step + 1, directory)),
                    Err(error) => return self.control.fail(error),
                }
            }
        }
    }

    fn submit(&mut self, job: Job) {
        self.outstanding += 1;
        self.executor.submit(job);
    }

    /// The records of a step, by port, each port's in the order of its edges.
    fn inputs(&mut self, step: u64) -> Inputs {
        let mut ports: Vec<(&'static str, Vec<Record>)> = self.ports.iter().map(|port| (*port, Vec::new())).collect();
        for (incoming, records) in self.incoming.iter().zip(self.stash.remove(&step).unwrap_or_default()) {
            ports[incoming.port].1.extend(records);
        }
        Inputs::new(ports)
    }

    /// The outputs of the next step, if they are there. Failures go to the run's control.
    pub fn take_outputs(&mut self) -> Option<(u64, Outputs)> {
        while let Some(answer) = self.executor.take_answer() {
            self.outstanding -= 1;
            match answer {
                Ok(Answer::Stepped(step, outputs, took)) => {
                    tracing::trace!(node = self.name, step, seconds = took.as_secs_f64(), "node stepped");
                    self.control.add_busy(self.index, took);
                    self.next_emit = step + 1;
                    for outgoing in &mut self.outgoing_feedback {
                        let records = super::emitted_on(&outputs, outgoing.port);
                        outgoing.emissions.pop_front();
                        outgoing.emissions.push_back(detached(&records));
                    }
                    return Some((step, outputs));
                }
                Ok(Answer::Snapshotted(step)) => {
                    let in_flight = self
                        .outgoing_feedback
                        .iter()
                        .map(|outgoing| (outgoing.edge, Vec::from(outgoing.emissions.clone())));
                    if let Err(error) =
                        self.checkpointer.node_done(step, &self.name, in_flight.collect(), &self.control)
                    {
                        self.control.fail(error);
                    }
                }
                Ok(answer) => self.fail(self.next_emit, format!("unexpected answer {answer:?}").into()),
                Err(error) => self.fail(self.next_emit, error),
            }
            if self.control.has_failed() {
                return None;
            }
        }
        None
    }

    /// End the run with this node's error at a step.
    pub fn fail(&self, step: u64, error: OperatorError) {
        let (node, message) = (self.name.clone(), error.to_string());
        self.control.fail(RunError::Node { node, step: Some(step), message });
    }
}

/// Records without handles: kept for checkpoints, they must not keep tensors alive.
fn detached(records: &[Record]) -> Vec<Record> {
    let detach = |record: &Record| match record {
        Record::Weights(weights) => Record::Weights(crate::record::Weights { handle: None, ..weights.clone() }),
        record => record.clone(),
    };
    records.iter().map(detach).collect()
}
