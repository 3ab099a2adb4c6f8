//! Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7).

use tch::Tensor;

use super::math::log1mexp;
use super::{PairLogps, PairLosses};
use crate::Result;

/// Closest to 0 that a mean log-probability is let come: odds of a certain response are infinite, and so is their
/// gradient.
const LARGEST_LOGP: f64 = -1e-12;

/// log odds(chosen) - log odds(rejected), with odds(y) = p / (1 - p) of the mean token probability; (pairs,).
///
/// `chosen` and `rejected` are log-probabilities per token, (pairs,) f32.
pub fn log_odds(chosen: &Tensor, rejected: &Tensor) -> Result<Tensor> {
    let chosen = chosen.f_clamp_max(LARGEST_LOGP)?;
    let rejected = rejected.f_clamp_max(LARGEST_LOGP)?;
    Ok(chosen.f_sub(&rejected)?.f_sub(&log1mexp(&chosen)?.f_sub(&log1mexp(&rejected)?)?)?)
}

/// The odds ratio term, -beta log sigmoid(log_odds); (pairs,).
pub fn odds_ratio_losses(log_odds: &Tensor, beta: f64) -> Result<Tensor> {
    Ok(log_odds.f_log_sigmoid()?.f_mul_scalar(-beta)?)
}

/// The odds ratio term of every pair, without the NLL, and TRL's metrics: rewards are beta times the log-probability
/// per token.
pub(super) fn pair_losses(pairs: &PairLogps, beta: f64) -> Result<PairLosses> {
    let chosen = pairs.chosen.logps.f_div(&pairs.chosen.tokens)?;
    let rejected = pairs.rejected.logps.f_div(&pairs.rejected.tokens)?;
    let log_odds = log_odds(&chosen, &rejected)?;
    Ok(PairLosses {
        losses: odds_ratio_losses(&log_odds, beta)?,
        chosen_rewards: chosen.f_mul_scalar(beta)?,
        rejected_rewards: rejected.f_mul_scalar(beta)?,
        chosen_logps: chosen,
        rejected_logps: rejected,
        details: vec![("log_odds_ratio", log_odds.f_log_sigmoid()?), ("log_odds_chosen", log_odds)],
    })
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::{log_odds, odds_ratio_losses};

    #[test]
    fn a_certain_response_gives_finite_losses_and_gradients() {
        let chosen = Tensor::from_slice(&[0.0f32, -3.0, -0.0, -50.0]).set_requires_grad(true);
        let rejected = Tensor::from_slice(&[-3.0f32, 0.0, -0.0, -1e-9]).set_requires_grad(true);
        let losses = odds_ratio_losses(&log_odds(&chosen, &rejected).unwrap(), 0.1).unwrap();
        losses.sum(Kind::Float).backward();
        for tensor in [&losses, &chosen.grad(), &rejected.grad()] {
            assert!(bool::try_from(tensor.isfinite().all()).unwrap(), "{tensor:?}");
        }
    }
}
