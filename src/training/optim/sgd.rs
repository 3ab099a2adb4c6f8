//! Stochastic gradient descent without momentum.

use super::span::{Span, Update};
use crate::Result;

/// p -= lr g, with weight decay as part of g.
pub(super) fn update(span: &mut Span, update: &Update, weight_decay: f64) -> Result<()> {
    span.add_weight_decay(weight_decay)?;
    let _ = span.gradient.f_mul_scalar_(update.learning_rate)?;
    let _ = span.parameter.f_sub_(&span.gradient)?;
    Ok(())
}
