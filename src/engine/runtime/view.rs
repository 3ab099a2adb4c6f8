//! Building blocks of views: changes as a differential collection, and its running state as one record a step.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use differential_dataflow::{AsCollection, ExchangeData, VecCollection};
use timely::dataflow::channels::pact::{Exchange, Pipeline};
use timely::dataflow::operators::generic::operator::Operator;

use crate::operator::RecordStream;
use crate::record::Record;

/// The collection that a stream of [`Change`](crate::record::Change)s describes, each change at its step.
/// A change with diff 0 is none; it marks a step, for [`running`].
pub fn collection(changes: RecordStream<'_>) -> VecCollection<'_, u64, Vec<u64>, isize> {
    let updates = changes.unary(Pipeline, "Changes", |_, _| {
        |input, output| {
            input.for_each(|capability, records| {
                let Some(step) = capability.least().copied() else { return };
                let Some(capability) = capability.retain_least(0) else { return };
                let mut session = output.session(&capability);
                for record in records.drain(..) {
                    match record {
                        Record::Change(change) if change.diff != 0 => {
                            session.give((change.element, step, change.diff as isize));
                        }
                        _ => {}
                    }
                }
            });
        }
    });
    updates.as_collection()
}

/// One record for each step that `ticks` has a record of: a summary of the step and of the
/// collection accumulated up to it.
pub fn running<'scope, D: ExchangeData>(
    ticks: RecordStream<'scope>,
    collection: VecCollection<'scope, u64, D, isize>,
    summarise: impl Fn(u64, &BTreeMap<D, isize>) -> Record + 'static,
) -> RecordStream<'scope> {
    // The whole state is summed up on one worker.
    let (first, also_first) = (Exchange::new(|_: &Record| 0), Exchange::new(|_: &(D, u64, isize)| 0));
    ticks.binary_frontier(collection.inner, first, also_first, "Running", move |_, _| {
        let mut pending = BTreeMap::new();
        let mut deltas: BTreeMap<u64, Vec<(D, isize)>> = BTreeMap::new();
        let mut state: BTreeMap<D, isize> = BTreeMap::new();
        move |(ticks, ticks_frontier), (updates, updates_frontier), output| {
            ticks.for_each(|capability, _| {
                if let (Some(step), Some(capability)) = (capability.least().copied(), capability.retain_least(0)) {
                    pending.entry(step).or_insert(capability);
                }
            });
            updates.for_each(|_, changes| {
                for (data, step, diff) in changes.drain(..) {
                    deltas.entry(step).or_default().push((data, diff));
                }
            });
            while let Some(entry) = pending.first_entry() {
                let step = *entry.key();
                if ticks_frontier.less_equal(&step) || updates_frontier.less_equal(&step) {
                    break;
                }
                let capability = entry.remove();
                let later = deltas.split_off(&(step + 1));
                for (data, diff) in std::mem::replace(&mut deltas, later).into_values().flatten() {
                    add(&mut state, data, diff);
                }
                output.session(&capability).give(summarise(step, &state));
            }
        }
    })
}

/// Count one element of the state, in time that hardly depends on how many there are.
fn add<D: Ord>(state: &mut BTreeMap<D, isize>, data: D, diff: isize) {
    match state.entry(data) {
        Entry::Vacant(entry) if diff != 0 => {
            entry.insert(diff);
        }
        Entry::Occupied(entry) if *entry.get() == -diff => {
            entry.remove();
        }
        Entry::Occupied(mut entry) => *entry.get_mut() += diff,
        Entry::Vacant(_) => {}
    }
}
