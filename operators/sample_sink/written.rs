//! The pairs that `sample_sink` has written, found by what a retraction names.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sapo_flow_engine::{Pair, Retracted};
use serde::{Deserialize, Serialize};

/// What a pair is known by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Written {
    source: String,
    row: u64,
    origin: String,
    made_at_step: u64,
    position: u32,
}

impl Written {
    /// Of a pair.
    pub fn of(pair: &Pair) -> Self {
        let Pair { source, row, origin, step, position, .. } = pair;
        let (source, origin) = (source.clone(), origin.clone());
        Written { source, row: *row, origin, made_at_step: *step, position: *position }
    }

    /// What may be taken back that concerns it.
    fn concerned_by(&self) -> [Retracted; 2] {
        let (source, origin) = (self.source.clone(), self.origin.clone());
        let (step, position) = (self.made_at_step, self.position);
        [Retracted::Row { source, row: self.row }, Retracted::Record { origin, step, position }]
    }
}

/// The pairs written, as far as they have not been taken back. There are more and more of them, and any may be taken
/// back: a retraction looks at those alone that it concerns.
#[derive(Debug, Default)]
pub struct WrittenPairs {
    /// In the order in which they were written.
    pairs: BTreeMap<u64, Written>,
    /// Their numbers.
    by_retraction: HashMap<Retracted, BTreeSet<u64>>,
}

impl WrittenPairs {
    /// Add one.
    pub fn add(&mut self, written: Written) {
        let number = self.pairs.last_key_value().map_or(0, |(last, _)| last + 1);
        for of in written.concerned_by() {
            self.by_retraction.entry(of).or_default().insert(number);
        }
        self.pairs.insert(number, written);
    }

    /// Take out those that a retraction concerns, in the order in which they were written.
    pub fn take(&mut self, of: &Retracted) -> Vec<Written> {
        let mut taken = Vec::new();
        for number in self.by_retraction.get(of).cloned().unwrap_or_default() {
            let Some(written) = self.pairs.remove(&number) else { continue };
            for of in written.concerned_by() {
                let numbers = self.by_retraction.entry(of.clone()).or_default();
                numbers.remove(&number);
                if numbers.is_empty() {
                    self.by_retraction.remove(&of);
                }
            }
            taken.push(written);
        }
        taken
    }

    /// All, in the order in which they were written.
    pub fn to_vec(&self) -> Vec<Written> {
        self.pairs.values().cloned().collect()
    }
}

impl From<Vec<Written>> for WrittenPairs {
    fn from(all: Vec<Written>) -> Self {
        let mut pairs = WrittenPairs::default();
        all.into_iter().for_each(|written| pairs.add(written));
        pairs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retraction_takes_what_it_concerns_and_leaves_nothing_of_it() {
        let written = |row, made_at_step, position| {
            let (source, origin) = ("data".to_owned(), "sampler".to_owned());
            Written { source, row, origin, made_at_step, position }
        };
        // Row 4 was written twice, of which one was drawn again.
        let all = [written(4, 0, 0), written(5, 0, 1), written(4, 2, 0), written(4, 0, 0)];
        let row = |row| Retracted::Row { source: "data".into(), row };
        let record = |step, position| Retracted::Record { origin: "sampler".into(), step, position };

        let mut pairs = WrittenPairs::from(all.to_vec());
        assert_eq!(pairs.take(&row(4)), [written(4, 0, 0), written(4, 2, 0), written(4, 0, 0)]);
        assert_eq!((pairs.take(&row(4)), pairs.take(&record(2, 0))), (vec![], vec![]));
        assert_eq!((pairs.to_vec(), pairs.by_retraction.len()), (vec![written(5, 0, 1)], 2));

        let mut pairs = WrittenPairs::from(all.to_vec());
        assert_eq!(pairs.take(&record(0, 0)), [written(4, 0, 0), written(4, 0, 0)]);
        assert_eq!(pairs.take(&Retracted::Row { source: "other".into(), row: 4 }), []);
        assert_eq!(pairs.take(&row(4)), [written(4, 2, 0)]);
        assert_eq!(pairs.take(&row(5)), [written(5, 0, 1)]);
        assert_eq!((pairs.pairs.len(), pairs.by_retraction.len()), (0, 0));
    }
}
