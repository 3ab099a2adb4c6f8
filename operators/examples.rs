//! Pairs as the training core takes them.

use sapo_flow_engine::OperatorError;
use sapo_flow_engine::record::{Pair, ReferenceLogps};
use sapo_flow_training::learner::Example;
use std::sync::Arc;

/// A pair as a training example.
pub fn example(pair: &Pair, reference: Option<ReferenceLogps>) -> Example {
    Example {
        prompt_ids: pair.prompt_ids.clone(),
        chosen_ids: pair.chosen_ids.clone(),
        rejected_ids: pair.rejected_ids.clone(),
        reference: reference.map(|logps| (logps.chosen, logps.rejected)),
        label: label(pair),
    }
}

/// How messages name a pair.
pub fn label(pair: &Pair) -> String {
    format!("row {} (pair {} of `{}` at step {})", pair.row, pair.position, pair.origin, pair.step)
}

/// Refuse pairs without a rejected response.
///
/// # Errors
/// Names the first such pair, and who needs the response.
pub fn needs_rejected(who: &str, pairs: &[Arc<Pair>]) -> Result<(), OperatorError> {
    match pairs.iter().find(|pair| pair.rejected_ids.is_none()) {
        Some(pair) => Err(format!("{who} compares two responses, but {} has no rejected one", label(pair)).into()),
        None => Ok(()),
    }
}
