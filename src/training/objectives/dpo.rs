//! Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7) and its relatives.

use tch::Tensor;

use super::{DpoLoss, PairLogps, PairLosses};
use crate::{Error, Result};

/// -log sigmoid(beta D), or with label smoothing e (cDPO) -(1-e) log sigmoid(beta D) - e log sigmoid(-beta D).
///
/// `margins` D are log-ratios of the chosen responses minus those of the rejected ones, (pairs,) f32.
pub fn sigmoid_losses(margins: &Tensor, beta: f64, label_smoothing: f64) -> Result<Tensor> {
    let scaled = margins.f_mul_scalar(beta)?;
    let kept = scaled.f_log_sigmoid()?.f_mul_scalar(label_smoothing - 1.0)?;
    if label_smoothing == 0.0 {
        return Ok(kept);
    }
    Ok(kept.f_sub(&scaled.f_neg()?.f_log_sigmoid()?.f_mul_scalar(label_smoothing)?)?)
}

/// max(0, 1 - beta D) (SLiC, Zhao et al. 2023, arXiv 2305.10425).
pub fn hinge_losses(margins: &Tensor, beta: f64) -> Result<Tensor> {
    Ok(margins.f_mul_scalar(-beta)?.f_add_scalar(1.0)?.f_relu()?)
}

/// (D - 1/(2 beta))^2 (IPO, Azar et al. 2023, arXiv 2310.12036, equation 17).
pub fn ipo_losses(margins: &Tensor, beta: f64) -> Result<Tensor> {
    Ok(margins.f_sub_scalar(1.0 / (2.0 * beta))?.f_square()?)
}

/// The loss of every pair, and TRL's metrics: rewards are beta times the log-ratio to the reference.
pub(super) fn pair_losses(pairs: &PairLogps, beta: f64, loss: DpoLoss) -> Result<PairLosses> {
    let (reference_chosen, reference_rejected) = pairs.reference.as_ref().ok_or_else(|| {
        Error::Argument("objective dpo: expected a reference model's log-probabilities, found none".into())
    })?;
    let chosen = pairs.chosen.logps.f_sub(reference_chosen)?;
    let rejected = pairs.rejected.logps.f_sub(reference_rejected)?;
    let losses = match loss {
        DpoLoss::Sigmoid { label_smoothing } => sigmoid_losses(&chosen.f_sub(&rejected)?, beta, label_smoothing)?,
        DpoLoss::Hinge => hinge_losses(&chosen.f_sub(&rejected)?, beta)?,
        DpoLoss::Ipo => ipo_losses(&chosen.f_sub(&rejected)?, beta)?,
        DpoLoss::IpoPerToken => {
            let per_token = chosen.f_div(&pairs.chosen.tokens)?.f_sub(&rejected.f_div(&pairs.rejected.tokens)?)?;
            ipo_losses(&per_token, beta)?
        }
    };
    Ok(PairLosses {
        losses,
        chosen_rewards: chosen.f_mul_scalar(beta)?,
        rejected_rewards: rejected.f_mul_scalar(beta)?,
        chosen_logps: pairs.chosen.logps.shallow_clone(),
        rejected_logps: pairs.rejected.logps.shallow_clone(),
        details: Vec::new(),
    })
}
