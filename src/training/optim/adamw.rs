//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2), with bias correction as in PyTorch.

use super::span::{Span, Update};
use crate::Result;

/// m = lerp(m, g, 1 - beta1); v = lerp(v, g^2, 1 - beta2);
/// p = (1 - lr weight_decay) p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps).
pub(super) fn update(
    span: &mut Span,
    update: &Update,
    [beta1, beta2]: [f64; 2],
    eps: f64,
    weight_decay: f64,
) -> Result<()> {
    let (exponent, learning_rate) = (update.step as f64, update.learning_rate);
    let (correction1, correction2) = (1.0 - beta1.powf(exponent), 1.0 - beta2.powf(exponent));
    let Span { parameter, gradient, state, decays, .. } = span;
    let [mean, mean_square] = state.as_mut_slice() else { unreachable!("AdamW keeps two tensors a parameter") };
    if *decays && weight_decay != 0.0 {
        let _ = parameter.f_mul_scalar_(1.0 - learning_rate * weight_decay)?;
    }
    let _ = mean.f_lerp_(gradient, 1.0 - beta1)?;
    let _ = gradient.f_square_()?;
    let _ = mean_square.f_lerp_(gradient, 1.0 - beta2)?;
    // The gradient's memory becomes the denominator, then the update.
    let _ = mean_square.f_sqrt_out(gradient)?;
    let _ = gradient.f_div_scalar_(correction2.sqrt())?;
    let _ = gradient.f_add_scalar_(eps)?;
    let _ = mean.f_div_out(gradient, gradient)?;
    let _ = gradient.f_mul_scalar_(learning_rate / correction1)?;
    let _ = parameter.f_sub_(gradient)?;
    Ok(())
}
