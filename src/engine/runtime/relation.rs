//! The dataflow of a [`Relation`]: from the records that arrive at a node to the changes that its operator is given.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use differential_dataflow::AsCollection;
use timely::dataflow::channels::pact::{Exchange, Pipeline};
use timely::dataflow::operators::Concatenate;
use timely::dataflow::operators::generic::operator::Operator;
use timely::dataflow::operators::vec::Map;
use timely::dataflow::{Scope, StreamVec};

use crate::graph::Node;
use crate::operator::RecordStream;
use crate::record::{Change, Record, Retracted};
use crate::relation::{Arrival, Element, Elements, Relation};

/// What a node's collections begin with.
#[derive(Default)]
pub struct Beginning {
    /// The first step of the run.
    pub first_step: u64,
    /// The elements that a checkpoint brought.
    pub elements: Vec<Element>,
    /// What is in flight on feedback edges: the node's n-th edge, the step it arrives at, and the records.
    pub in_flight: Vec<(usize, u64, Vec<Record>)>,
}

/// The streams of changes that a node with a relation reads besides its edges: of its elements and of its results.
/// `edges` are the node's incoming edges, each with its input; `beginning` is there on the node's home worker.
pub fn render<'scope>(
    scope: Scope<'scope, u64>,
    node: &Node,
    relation: &Relation,
    edges: Vec<(u32, RecordStream<'scope>)>,
    home: usize,
    beginning: Option<Beginning>,
) -> [RecordStream<'scope>; 2] {
    let elements = collect(scope, edges, home, (relation.stays)(&node.config), beginning);
    let results = (relation.build)(&node.config, elements.clone());
    let numbers = elements.map(|element| element.arrival.to_numbers().to_vec());
    [changes(numbers.inner), changes(results.inner)]
}

/// An update of a collection.
type Update<D> = (D, u64, isize);

/// Records as a collection. All of them are kept on one worker, since a retraction may concern any.
fn collect<'scope>(
    scope: Scope<'scope, u64>,
    edges: Vec<(u32, RecordStream<'scope>)>,
    home: usize,
    stays: Option<u64>,
    beginning: Option<Beginning>,
) -> Elements<'scope> {
    let ports: Vec<u32> = edges.iter().map(|(port, _)| *port).collect();
    let numbered = edges.into_iter().enumerate().map(|(edge, (_, stream))| stream.map(move |record| (edge, record)));
    let arriving = scope.concatenate(numbered.collect::<Vec<_>>());
    let home = Exchange::new(move |_: &(usize, Record)| home as u64);
    let updates: StreamVec<'scope, u64, Update<Element>> = arriving.unary_frontier(home, "Collect", move |first, _| {
        let mut collector = Collector { ports, stays, ..Collector::default() };
        let mut waiting = BTreeMap::new();
        let mut restored = None;
        if let Some(beginning) = beginning {
            for (edge, step, records) in beginning.in_flight {
                let entry = waiting.entry(step).or_insert_with(|| (first.delayed(&step), Vec::new()));
                entry.1.extend(records.into_iter().map(|record| (edge, record)));
            }
            // Before the first step, so that what follows from them is news to nobody.
            let before = beginning.first_step.saturating_sub(1);
            let elements = beginning.elements;
            restored = (!elements.is_empty()).then(|| (first.delayed(&before), before, elements));
        }
        drop(first);
        move |(input, frontier), output| {
            if let Some((capability, step, elements)) = restored.take() {
                let updates = elements.into_iter().flat_map(|element| collector.insert(step, element));
                output.session(&capability).give_iterator(updates.collect::<Vec<_>>().into_iter());
            }
            input.for_each(|capability, records| {
                if let (Some(step), Some(capability)) = (capability.least().copied(), capability.retain_least(0)) {
                    waiting.entry(step).or_insert_with(|| (capability, Vec::new())).1.append(records);
                }
            });
            while let Some(entry) = waiting.first_entry() {
                let step = *entry.key();
                if frontier.less_equal(&step) {
                    break;
                }
                let (capability, records) = entry.remove();
                output.session(&capability).give_iterator(collector.step(step, records).into_iter());
            }
        }
    });
    updates.as_collection()
}

/// What is at a node, by what retractions name.
#[derive(Default)]
struct Collector {
    /// The input that each edge ends at.
    ports: Vec<u32>,
    stays: Option<u64>,
    present: BTreeMap<Arrival, Record>,
    by_row: HashMap<(u32, String, u64), BTreeSet<Arrival>>,
    by_identity: HashMap<(u32, String, u64, u32), BTreeSet<Arrival>>,
}

impl Collector {
    /// The updates of a step.
    fn step(&mut self, step: u64, mut records: Vec<(usize, Record)>) -> Vec<Update<Element>> {
        self.forget_expired(step);
        // Edges may be heard in any order; within an edge the order is the emitter's.
        records.sort_by_key(|(edge, _)| *edge);
        let mut updates = Vec::new();
        for (edge, record) in &records {
            if let Record::Retraction(retraction) = record {
                for arrival in self.concerned(self.ports[*edge], &retraction.of) {
                    updates.extend(self.remove(step, arrival));
                }
            }
        }
        let mut arrived: HashMap<u32, u32> = HashMap::new();
        for (edge, record) in records {
            if !matches!(record, Record::Retraction(_)) {
                let port = self.ports[edge];
                let index = arrived.entry(port).or_default();
                let arrival = Arrival { step, port, index: *index };
                *index += 1;
                updates.extend(self.insert(step, Element { arrival, record }));
            }
        }
        updates
    }

    fn insert(&mut self, step: u64, element: Element) -> impl Iterator<Item = Update<Element>> + use<> {
        let Element { arrival, record } = &element;
        self.index(*arrival, record, |arrivals| arrivals.insert(*arrival));
        self.present.insert(*arrival, record.clone());
        self.updates(step, element, 1)
    }

    fn remove(&mut self, step: u64, arrival: Arrival) -> Vec<Update<Element>> {
        let Some(record) = self.present.remove(&arrival) else { return Vec::new() };
        self.index(arrival, &record, |arrivals| arrivals.remove(&arrival));
        self.updates(step, Element { arrival, record }, -1).collect()
    }

    /// An element's coming or going, and the undoing of it when its time is up.
    fn updates(&self, step: u64, element: Element, diff: isize) -> impl Iterator<Item = Update<Element>> + use<> {
        let end =
            self.stays.map(|steps| (element.clone(), step.max(element.arrival.step.saturating_add(steps)), -diff));
        std::iter::once((element, step, diff)).chain(end)
    }

    /// Drop what has left the collection in the meantime.
    fn forget_expired(&mut self, step: u64) {
        let Some(stays) = self.stays else { return };
        while let Some((arrival, _)) =
            self.present.first_key_value().filter(|(at, _)| at.step.saturating_add(stays) <= step)
        {
            let arrival = *arrival;
            if let Some(record) = self.present.remove(&arrival) {
                self.index(arrival, &record, |arrivals| arrivals.remove(&arrival));
            }
        }
    }

    fn index(&mut self, arrival: Arrival, record: &Record, change: impl Fn(&mut BTreeSet<Arrival>) -> bool) {
        if let Some((source, row)) = record.row() {
            let key = (arrival.port, source.to_owned(), row);
            let arrivals = self.by_row.entry(key.clone()).or_default();
            change(arrivals);
            if arrivals.is_empty() {
                self.by_row.remove(&key);
            }
        }
        if let Some((origin, step, position)) = record.identity() {
            let key = (arrival.port, origin.to_owned(), step, position);
            let arrivals = self.by_identity.entry(key.clone()).or_default();
            change(arrivals);
            if arrivals.is_empty() {
                self.by_identity.remove(&key);
            }
        }
    }

    /// What a retraction concerns at an input: all that stems from a row, or the newest arrival of a record.
    fn concerned(&self, port: u32, of: &Retracted) -> Vec<Arrival> {
        match of {
            Retracted::Row { source, row } => {
                self.by_row.get(&(port, source.clone(), *row)).into_iter().flatten().copied().collect()
            }
            Retracted::Record { origin, step, position } => {
                let arrivals = self.by_identity.get(&(port, origin.clone(), *step, *position));
                arrivals.and_then(BTreeSet::last).copied().into_iter().collect()
            }
        }
    }
}

/// Updates as records, each at its own step.
fn changes(updates: StreamVec<'_, u64, Update<Vec<u64>>>) -> RecordStream<'_> {
    updates.unary(Pipeline, "Changes", |_, _| {
        |input, output| {
            input.for_each(|capability, updates| {
                let mut by_step: BTreeMap<u64, Vec<Record>> = BTreeMap::new();
                for (element, step, diff) in updates.drain(..) {
                    let change = Change { element, diff: diff as i64 };
                    by_step.entry(step).or_default().push(Record::Change(change));
                }
                for (step, records) in by_step {
                    output.session(&capability.delayed(&step, 0)).give_iterator(records.into_iter());
                }
            });
        }
    })
}
