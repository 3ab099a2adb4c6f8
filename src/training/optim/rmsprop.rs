//! RMSprop (Hinton's lecture 6e), uncentered and without momentum, with PyTorch's placing of eps.

use super::span::{Span, Update};
use crate::Result;

/// v = lerp(v, g^2, 1 - alpha); p -= lr g / (sqrt(v) + eps), with weight decay as part of g.
pub(super) fn update(span: &mut Span, update: &Update, alpha: f64, eps: f64, weight_decay: f64) -> Result<()> {
    span.add_weight_decay(weight_decay)?;
    let Span { parameter, gradient, state, .. } = span;
    let [mean_square] = state.as_mut_slice() else { unreachable!("RMSprop keeps one tensor a parameter") };
    let _ = mean_square.f_lerp_(&gradient.f_square()?, 1.0 - alpha)?;
    let _ = gradient.f_div_(&mean_square.f_sqrt()?.f_add_scalar_(eps)?)?;
    let _ = gradient.f_mul_scalar_(update.learning_rate)?;
    let _ = parameter.f_sub_(gradient)?;
    Ok(())
}
