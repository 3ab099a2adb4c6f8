//! Nodes and edges to timely operators, and the loop that drives them.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use timely::container::CapacityContainerBuilder;
use timely::dataflow::Scope;
use timely::dataflow::channels::pact::Exchange;
use timely::dataflow::operators::generic::OutputBuilder;
use timely::dataflow::operators::generic::builder_rc::OperatorBuilder;
use timely::dataflow::operators::probe::{Handle as ProbeHandle, Probe};
use timely::dataflow::operators::{Capability, ConnectLoop, Feedback};
use timely::scheduling::Activator;
use timely::worker::Worker;

use super::control::Control;
use super::event::Event;
use super::node::NodeRunner;
use super::{RunError, RunOptions};
use super::{processor, relation};
use crate::graph::{Graph, Node};
use crate::operator::{Outputs, RecordStream, View};
use crate::record::Record;

/// Nodes not yet taken by the worker they live on.
type Runners = Arc<Vec<Mutex<Option<NodeRunner>>>>;
/// A worker's own nodes.
type SharedRunner = Rc<RefCell<NodeRunner>>;
type RecordOutput = OutputBuilder<u64, CapacityContainerBuilder<Vec<Record>>>;

/// How often the loop looks up when nothing wakes it, for interrupts and failures elsewhere.
const IDLE: Duration = Duration::from_millis(50);

/// Up to so many inputs all are looked at whenever there is news at one of them.
const FEW_INPUTS: usize = 8;

/// Run the graph on timely workers. The nodes come back in graph order when all is done; the first failure is in
/// `control`.
pub fn execute(
    graph: &Graph,
    options: &RunOptions,
    control: &Arc<Control>,
    runners: &Runners,
) -> Result<Vec<NodeRunner>, RunError> {
    let config = timely::Config {
        communication: match options.workers {
            0 | 1 => timely::CommunicationConfig::Thread,
            workers => timely::CommunicationConfig::Process(workers),
        },
        worker: timely::WorkerConfig::default().idle_spin(Duration::ZERO),
    };
    let (graph, events) = (graph.clone(), options.events.clone());
    let (interrupt, shared, runners) = (options.interrupt.clone(), control.clone(), runners.clone());
    let finished = Arc::new(Mutex::new(Vec::new()));
    let collected = finished.clone();
    let guards = timely::execute(config, move |worker| {
        let nodes = work(worker, &graph, &runners, &shared, &interrupt, &events);
        collected.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).extend(nodes);
    })
    .map_err(RunError::Workers)?;
    for outcome in guards.join() {
        outcome.map_err(RunError::Workers)?;
    }
    let mut finished = std::mem::take(&mut *finished.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    finished.sort_by_key(NodeRunner::index);
    Ok(finished)
}

/// Build this worker's share of the dataflow and drive it to its end.
fn work(
    worker: &mut Worker,
    graph: &Graph,
    runners: &Runners,
    control: &Control,
    interrupt: &std::sync::atomic::AtomicBool,
    events: &super::event::EventSender,
) -> Vec<NodeRunner> {
    let began = processor::thread_time();
    let probe = ProbeHandle::new();
    let dataflow = worker.next_dataflow_index();
    let rendered = worker.dataflow::<u64, _, _>(|scope| render(scope, graph, runners, &probe));
    let (mut granted, mut ended) = (0, Instant::now());
    loop {
        let completed = probe.with_frontier(|frontier| frontier.first().copied());
        // An empty frontier: all nodes have given up their capabilities, after the last step.
        let news = control.advance(completed.unwrap_or(u64::MAX));
        for step in news.clone() {
            // Of steps that end together, all but the first took no time of their own.
            let seconds = std::mem::replace(&mut ended, Instant::now()).elapsed().as_secs_f64();
            tracing::debug!(step, seconds, "step done");
            events.send(Event::StepCompleted { step, busy: control.busy() });
        }
        if control.has_failed() || completed.is_none() {
            break;
        }
        if interrupt.load(SeqCst) {
            control.interrupt();
        }
        // All others are woken by their inputs, or by their threads.
        if granted != control.granted() {
            granted = control.granted();
            rendered.paced.iter().for_each(Activator::activate);
        }
        worker.step_or_park(Some(IDLE));
    }
    worker.drop_dataflow(dataflow);
    let runners = rendered.runners.into_iter().filter_map(|runner| Rc::into_inner(runner).map(RefCell::into_inner));
    let runners: Vec<NodeRunner> = runners.collect();
    let operators: Duration = runners.iter().map(|runner| runner.executor.taken_of_worker()).sum();
    control.add_engine((processor::thread_time() - began).saturating_sub(operators));
    runners
}

/// A worker's share of the dataflow.
struct Rendered {
    runners: Vec<SharedRunner>,
    /// Of the nodes that may go on when steps are granted.
    paced: Vec<Activator>,
}

/// One timely operator for each node, one feedback for each feedback edge.
fn render<'scope>(scope: Scope<'scope, u64>, graph: &Graph, runners: &Runners, probe: &ProbeHandle<u64>) -> Rendered {
    let mut rendered = Rendered { runners: Vec::new(), paced: Vec::new() };
    let mut loops = Vec::new();
    let mut streams: Vec<Vec<RecordStream<'scope>>> = Vec::new();
    for (index, node) in graph.nodes.iter().enumerate() {
        let (mut inputs, mut ports) = (Vec::new(), Vec::new());
        for edge in graph.edges.iter().filter(|edge| edge.to_node == index) {
            ports.push(edge.to_port as u32);
            match edge.feedback {
                None => inputs.push(streams[edge.from_node][edge.from_port].clone()),
                Some(feedback) => {
                    let (handle, stream) = scope.feedback::<Vec<Record>>(1 + feedback.max_staleness);
                    loops.push((edge, handle));
                    inputs.push(stream);
                }
            }
        }
        let home = index % scope.peers();
        let mut runner = (home == scope.index()).then(|| take(&runners[index])).flatten();
        if let Some(relation) = &node.op.relation {
            let edges = ports.into_iter().zip(inputs.iter().cloned()).collect();
            let beginning = runner.as_mut().and_then(NodeRunner::take_beginning);
            inputs.extend(relation::render(scope, node, relation, edges, home, beginning));
        }
        streams.push(render_node(scope, node, home, inputs, runner, probe, &mut rendered));
    }
    for (edge, handle) in loops {
        streams[edge.from_node][edge.from_port].clone().connect_loop(handle);
    }
    rendered
}

/// The node, unless another call took it.
fn take(slot: &Mutex<Option<NodeRunner>>) -> Option<NodeRunner> {
    slot.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take()
}

/// A node as a timely operator: its outputs by port, views applied. Records are routed to the worker it lives on;
/// the others only pass progress on.
fn render_node<'scope>(
    scope: Scope<'scope, u64>,
    node: &Node,
    home: usize,
    inputs: Vec<RecordStream<'scope>>,
    runner: Option<NodeRunner>,
    probe: &ProbeHandle<u64>,
    rendered: &mut Rendered,
) -> Vec<RecordStream<'scope>> {
    let mut builder = OperatorBuilder::new(node.name.clone(), scope);
    let mut inputs: Vec<_> = inputs
        .into_iter()
        .map(|stream| builder.new_input(stream, Exchange::new(move |_: &Record| home as u64)))
        .collect();
    let ports: Vec<&'static str> = node.op.outputs.iter().map(|port| port.name).chain([View::CHANGES]).collect();
    let (mut outputs, mut streams): (Vec<RecordOutput>, Vec<RecordStream>) = ports
        .iter()
        .map(|_| builder.new_output())
        .map(|(output, stream)| (OutputBuilder::from(output), stream))
        .unzip();

    let address = builder.operator_info().address;
    let runner = runner.map(|runner| {
        runner.executor.set_activator(scope.worker().sync_activator_for(address.to_vec()));
        if runner.is_paced() {
            rendered.paced.push(scope.activator_for(address));
        }
        let runner = Rc::new(RefCell::new(runner));
        rendered.runners.push(runner.clone());
        runner
    });
    builder.build(move |capabilities| {
        let mut capabilities = runner.as_ref().map(|_| capabilities).unwrap_or_default();
        if let Some(runner) = &runner {
            capabilities.iter_mut().for_each(|capability| capability.downgrade(&runner.borrow().next_emit()));
        }
        // An input that the next step waits for. There is news at each of many inputs at every step, and to look at all of
        // them each time would take time that grows with their square. As long as this one is incomplete the others can
        // wait, and what has come there stays in its channel.
        let mut awaited = 0;
        move |frontiers| {
            let Some(runner) = &runner else { return };
            let mut runner = runner.borrow_mut();
            let mut receive = |runner: &mut NodeRunner, places: Range<usize>| {
                for (incoming, input) in places.clone().zip(&mut inputs[places]) {
                    input.for_each(|capability, records| {
                        if let Some(step) = capability.least() {
                            runner.receive(*step, incoming, records.drain(..));
                        }
                    });
                }
            };
            let complete = |incoming: usize, step: u64| !frontiers[incoming].less_equal(&step);
            let all = 0..frontiers.len();
            let waits = all.len() > FEW_INPUTS && !capabilities.is_empty() && !complete(awaited, runner.next_submit());
            receive(&mut runner, if waits { awaited..awaited + 1 } else { all.clone() });
            if capabilities.is_empty() {
                return;
            }
            loop {
                if !waits {
                    runner.submit_ready(complete);
                }
                let Some((step, emitted)) = runner.take_outputs() else { break };
                emit(&runner, step, emitted, &ports, &mut outputs, &mut capabilities);
            }
            if runner.is_done() {
                capabilities.clear();
                receive(&mut runner, all);
            } else if !waits {
                awaited = all.clone().find(|incoming| !complete(*incoming, runner.next_submit())).unwrap_or(0);
            }
        }
    });

    let changes: RecordStream = streams.pop().expect("the hidden port was added last");
    if let Some(view) = &node.op.view {
        let port = node.op.outputs.iter().position(|port| port.name == view.port);
        let port = port.expect("a view names a declared output");
        streams[port] = (view.build)(changes).probe_with(probe);
    } else {
        changes.probe_with(probe);
    }
    streams
}

/// Send a step's records and move on to the next step.
fn emit(
    runner: &NodeRunner,
    step: u64,
    emitted: Outputs,
    ports: &[&'static str],
    outputs: &mut [RecordOutput],
    capabilities: &mut [Capability<u64>],
) {
    let mut by_port: Vec<Vec<Record>> = ports.iter().map(|_| Vec::new()).collect();
    for (port, record) in emitted.records {
        match ports.iter().position(|name| *name == port) {
            Some(position) => by_port[position].push(record),
            None => {
                return runner.fail(step, format!("emitted a record on port `{port}`, which it does not have").into());
            }
        }
    }
    for ((records, output), capability) in by_port.into_iter().zip(outputs).zip(capabilities.iter_mut()) {
        if !records.is_empty() {
            output.activate().session(&*capability).give_iterator(records.into_iter());
        }
        capability.downgrade(&(step + 1));
    }
}
