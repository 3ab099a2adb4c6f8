//! Pairs as the training core takes them.

use std::collections::BTreeMap;

use sapo_flow_engine::record::{Pair, ReferenceLogps};
use sapo_flow_training::learner::Example;
use sapo_flow_training::objectives::Needs;

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
    let own = pair.values.numbers().map(|(name, value)| (format!("{VALUES}.{name}"), value));
    let known = RECORD_NUMBERS.iter().map(|(name, _)| (*name).to_owned());
    known.zip([staleness as f64, age as f64, segment_tokens as f64]).chain(own).collect()
}

/// Refuses a pair whose value an objective computes with, and which is a text: those are for expressions over records.
pub fn check_values(pair: &Pair, needs: &Needs) -> Result<(), String> {
    let mut own = needs.numbers.iter().filter_map(|name| name.strip_prefix(VALUES)?.strip_prefix('.'));
    match own.find(|name| pair.values.text(name).is_some()) {
        None => Ok(()),
        Some(name) => {
            let pair = label(pair);
            Err(format!("{pair}: `{VALUES}.{name}` is a text, and the objective computes with it"))
        }
    }
}

/// How messages name a pair.
pub fn label(pair: &Pair) -> String {
    format!("row {} (pair {} of `{}` at step {})", pair.row, pair.position, pair.origin, pair.step)
}

#[cfg(test)]
mod tests {
    use sapo_flow_engine::Segment;

    use sapo_flow_training::objectives::Needs;

    use super::{check_values, example};
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

    #[test]
    fn formulas_refuse_texts() {
        let mut given = pair(3, &[1], &[2], None);
        given.values.insert("score".into(), 0.5);
        given.values.insert_text("category".into(), "math".into());
        let needs = |name: &str| Needs { numbers: [name.to_owned()].into(), ..Needs::default() };
        assert_eq!(check_values(&given, &needs("values.score")), Ok(()));
        let error = check_values(&given, &needs("values.category")).unwrap_err();
        let pair = "row 3 (pair 3 of `data` at step 0)";
        assert_eq!(error, format!("{pair}: `values.category` is a text, and the objective computes with it"));
    }
}
