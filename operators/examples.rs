//! Pairs as the training core takes them.

use std::collections::BTreeMap;

use sapo_flow_engine::record::{Pair, ReferenceLogps};
use sapo_flow_training::learner::Example;

use crate::objectives::formula::{RECORD_NUMBERS, VALUES};

/// A pair as a training example at a step.
pub fn example(pair: &Pair, step: u64, reference: Option<ReferenceLogps>) -> Example {
    Example {
        prompt_ids: pair.prompt_ids.clone(),
        chosen_ids: pair.chosen_ids.clone(),
        rejected_ids: pair.rejected_ids.clone(),
        reference: reference.map(|logps| (logps.chosen, logps.rejected)),
        numbers: numbers(pair, step),
        label: label(pair),
    }
}

/// What formulas may name of a pair besides what models say of it: see `objectives::formula`.
fn numbers(pair: &Pair, step: u64) -> BTreeMap<String, f64> {
    let staleness = pair.weights_version.map_or(0, |version| pair.step.saturating_sub(version));
    let age = step.saturating_sub(pair.step);
    let segment_tokens = pair.segment.map_or(0, |segment| segment.len);
    let own = pair.values.iter().map(|(name, value)| (format!("{VALUES}.{name}"), *value));
    let known = RECORD_NUMBERS.iter().map(|(name, _)| (*name).to_owned());
    known.zip([staleness as f64, age as f64, segment_tokens as f64]).chain(own).collect()
}

/// How messages name a pair.
pub fn label(pair: &Pair) -> String {
    format!("row {} (pair {} of `{}` at step {})", pair.row, pair.position, pair.origin, pair.step)
}

#[cfg(test)]
mod tests {
    use sapo_flow_engine::Segment;

    use super::example;
    use crate::testing::pair;

    #[test]
    fn formulas_find_what_pairs_bring_along() {
        let numbers = |pair: &_| example(pair, 9, None).numbers.into_iter().collect::<Vec<_>>();
        let named = |values: [f64; 4]| {
            let names = ["age", "segment_tokens", "staleness", "values.score"];
            names.map(str::to_owned).into_iter().zip(values).collect::<Vec<_>>()
        };
        let mut generated = pair(3, &[1], &[2, 3, 4], Some(&[2, 5, 4]));
        generated.values.insert("score".into(), 0.5);
        (generated.step, generated.weights_version) = (7, Some(5));
        generated.segment = Some(Segment { start: 1, len: 2, ended: false });
        assert_eq!(numbers(&generated), named([2.0, 2.0, 2.0, 0.5]));
        // From a data set: as old as its step, nothing written, nothing stale.
        (generated.weights_version, generated.segment) = (None, None);
        assert_eq!(numbers(&generated), named([2.0, 0.0, 0.0, 0.5]));
    }
}
