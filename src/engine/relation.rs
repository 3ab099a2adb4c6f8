//! Operators that are dataflow: differential collections of the records that have arrived, and of what follows from them.
//!
//! What arrives at the node becomes a collection of [`Element`]s over steps: a record is inserted at the step at which it
//! arrives, and removed where a retraction takes it back. The operator's [`Relation`] is a function from that collection
//! to another one, of results, which differential dataflow keeps up to date with work proportional to the change. Once
//! all changes of a step are known, the operator's `step` is given them, and emits what they mean: records for insertions,
//! retractions for removals. So an operator that is dataflow is a function of a step like any other, and a checkpoint of
//! it is a cut at a step: its snapshot holds the elements, from which a resumed run builds the collections again.

use std::cmp::Ordering;
use std::hash::{Hash, Hasher};

use differential_dataflow::VecCollection;
use serde::{Deserialize, Serialize};

use crate::record::{Change, Record};

/// When and where a record arrived at a node: what tells the elements of its collections apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Arrival {
    /// The step.
    pub step: u64,
    /// Index of the input among the operator's inputs.
    pub port: u32,
    /// Position among the records, retractions left out, that arrived there at that step.
    pub index: u32,
}

impl Arrival {
    /// As numbers, for [`Results`].
    pub fn to_numbers(self) -> [u64; 2] {
        [self.step, u64::from(self.port) << 32 | u64::from(self.index)]
    }

    /// From [`to_numbers`](Self::to_numbers).
    pub fn from_numbers([step, place]: [u64; 2]) -> Self {
        Arrival { step, port: (place >> 32) as u32, index: place as u32 }
    }
}

/// A record that has arrived. Compared and hashed by its arrival alone, which no other element of the node shares.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Element {
    /// When and where.
    pub arrival: Arrival,
    /// What.
    pub record: Record,
}

impl PartialEq for Element {
    fn eq(&self, other: &Self) -> bool {
        self.arrival == other.arrival
    }
}

impl Eq for Element {}

impl PartialOrd for Element {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Element {
    fn cmp(&self, other: &Self) -> Ordering {
        self.arrival.cmp(&other.arrival)
    }
}

impl Hash for Element {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.arrival.hash(state);
    }
}

/// All that is at a node: every input's records, as they come and go.
pub type Elements<'scope> = VecCollection<'scope, u64, Element, isize>;

/// What follows from it, as numbers whose meaning the operator knows: arrivals of the elements it is made of, counts.
/// Each result is there once or not at all.
pub type Results<'scope> = VecCollection<'scope, u64, Vec<u64>, isize>;

/// What makes an operator dataflow.
#[derive(Clone, Copy)]
pub struct Relation {
    /// For how many steps an element stays, the one it arrives at included; absent: until it is taken back.
    pub stays: fn(&serde_yaml::Value) -> Option<u64>,
    /// The results, for the node's `with` block.
    pub build: for<'scope> fn(&serde_yaml::Value, Elements<'scope>) -> Results<'scope>,
}

impl Relation {
    /// The hidden input on which `step` is given the changes of [`Elements`], as [`Change`]s of numbered arrivals.
    pub const ELEMENTS: &'static str = "(elements)";
    /// The hidden input on which `step` is given the changes of [`Results`].
    pub const RESULTS: &'static str = "(results)";
}

/// Changes of a step added up, in order, those that cancel out left out.
pub fn consolidate(records: Vec<Record>) -> Vec<(Vec<u64>, i64)> {
    let mut sums = std::collections::BTreeMap::new();
    for record in records {
        if let Record::Change(Change { element, diff }) = record {
            *sums.entry(element).or_insert(0) += diff;
        }
    }
    sums.into_iter().filter(|(_, diff)| *diff != 0).collect()
}
