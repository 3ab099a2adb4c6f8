//! Negative log-likelihood as a token mean: supervised fine-tuning, and a term of other objectives.

use tch::{Kind, Tensor};

use crate::Result;

/// -sum(logps) / total_tokens, a scalar.
///
/// `logps` are the log-probabilities of the tokens that count, (tokens,) f32. `total_tokens` is their number in the
/// whole batch, so that the terms of its parts add up to the batch's mean.
pub fn nll(logps: &Tensor, total_tokens: f64) -> Result<Tensor> {
    Ok(logps.f_sum(Kind::Float)?.f_mul_scalar(-1.0 / total_tokens)?)
}
