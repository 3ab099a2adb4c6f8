//! Stochastic gradient descent without momentum.

use super::Block;
use crate::Result;

/// p -= lr g, with weight decay as part of g.
pub(super) fn update(block: &mut Block, weight_decay: f64) -> Result<()> {
    block.add_weight_decay(weight_decay)?;
    let _ = block.gradient.f_mul_scalar_(block.learning_rate)?;
    let _ = block.parameter.f_sub_(&block.gradient)?;
    Ok(())
}
