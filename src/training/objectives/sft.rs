//! Negative log-likelihood as a token mean: supervised fine-tuning, and a term of other objectives.

use tch::Tensor;

use crate::Result;

/// -sum(logps * counted) / total_tokens, a scalar.
///
/// `logps` are log-probabilities of tokens, (tokens,) f32; `counted` is 1 for those that count, else 0. `total_tokens`
/// is how many count in the whole batch, so that the terms of its parts add up to the batch's mean.
pub fn nll(logps: &Tensor, counted: &Tensor, total_tokens: f64) -> Result<Tensor> {
    Ok(logps.f_dot(counted)?.f_mul_scalar(-1.0 / total_tokens)?)
}
