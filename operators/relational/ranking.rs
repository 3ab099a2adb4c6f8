//! The first of each group, maintained in levels.
//!
//! A group is divided into buckets, these into larger ones, and so on; each level keeps the first of its buckets. A change
//! makes differential dataflow look at one bucket a level again, and never at a whole large group (the way databases on
//! differential dataflow maintain top-k: Materialize, "TopK", with buckets of sixteen).

use std::sync::atomic::{AtomicU64, Ordering};

use differential_dataflow::VecCollection;
use sapo_flow_engine::relation::{Arrival, Element, Elements};
use serde::{Deserialize, Serialize};

use super::key::Key;

/// Bits that tell buckets apart, level by level: up to 4096 of them, then 256, 16, and the whole group.
const LEVELS: [u32; 4] = [12, 8, 4, 0];

static TOUCHED: AtomicU64 = AtomicU64::new(0);

/// Records that our functions have been handed so far.
pub fn records_touched() -> u64 {
    TOUCHED.load(Ordering::Relaxed)
}

/// Count records that are handed to a function of ours.
pub fn touch(records: usize) {
    TOUCHED.fetch_add(records as u64, Ordering::Relaxed);
}

/// A member of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Where it comes in its group, the smallest first.
    pub rank: [u64; 2],
    /// The element, and of several with the same rank the order: see [`Arrival::to_numbers`].
    pub arrival: [u64; 2],
    /// Its score, where it has one: see [`sortable`](super::key::sortable).
    pub score: u64,
}

impl Member {
    /// An element that comes by its arrival, the first first.
    pub fn in_order(element: &Element) -> Self {
        Member { rank: [0, 0], arrival: element.arrival.to_numbers(), score: 0 }
    }

    /// Which bucket it falls into: the finalizer of splitmix64, so that neighbours part.
    fn bucket(&self) -> u64 {
        let mut z = self.arrival[0].wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.arrival[1];
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Groups with their members.
pub type Groups<'scope> = VecCollection<'scope, u64, (Key, Member), isize>;

/// The elements of an input.
pub fn at_input(elements: Elements<'_>, port: u32) -> Elements<'_> {
    elements.filter(move |element: &Element| element.arrival.port == port)
}

/// The `most` members that come first in each group.
pub fn first(groups: Groups<'_>, most: usize) -> Groups<'_> {
    LEVELS.into_iter().fold(groups, |groups, bits| {
        let buckets = groups.map(move |(key, member)| ((key, member.bucket() & ((1 << bits) - 1)), member));
        let kept = buckets.reduce(move |_, members, kept| {
            touch(members.len());
            kept.extend(members.iter().take(most).map(|(member, _)| (**member, 1)));
        });
        kept.map(|((key, _), member)| (key, member))
    })
}

/// Newer before older.
pub fn newest_first(arrival: Arrival) -> [u64; 2] {
    arrival.to_numbers().map(|number| !number)
}
