//! Preference objectives: what a learner minimises, as pure functions of log-probabilities.
//!
//! [`Objective`] says which objective, with its settings, and what it needs; the formulas are in one file each. A new
//! objective is one file with its formula, a variant here, and its arms in the three matches below.

pub mod dpo;
pub mod math;
pub mod orpo;
pub mod sft;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{Error, Result};

/// What a learner minimises.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// Odds ratio preference optimization: NLL of the chosen answer plus a weighted odds ratio term; no reference.
    Orpo {
        /// Weight of the odds ratio term.
        beta: f64,
        /// Which tokens the NLL covers.
        nll: NllScope,
    },
    /// Direct preference optimization against a reference model.
    Dpo {
        /// Strength of the pull towards the reference: rewards are beta times the log-ratio to it.
        beta: f64,
        /// The function of the margin that is minimised.
        loss: DpoLoss,
    },
    /// Supervised fine-tuning: NLL of the chosen answer; rejected answers are not looked at.
    Sft {
        /// Which tokens the NLL covers.
        nll: NllScope,
    },
}

/// Which tokens of prompt and chosen answer a negative log-likelihood covers. Padding never counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NllScope {
    /// Prompt and response, all but the very first token, as TRL's ORPO does.
    Sequence,
    /// The response alone.
    Response,
}

/// DPO's losses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DpoLoss {
    /// The original; with label smoothing cDPO.
    Sigmoid {
        /// Assumed probability that a pair's labels are swapped, at least 0 and below 0.5.
        label_smoothing: f64,
    },
    /// SLiC's hinge on the margin.
    Hinge,
    /// IPO on summed log-ratios, as in the paper.
    Ipo,
    /// IPO on log-ratios divided by the response's length, as TRL's trainer computes it.
    IpoPerToken,
}

/// Summed log-probabilities of one response for every pair.
pub struct Responses {
    /// Under the policy, in nats; (pairs,) f32.
    pub logps: Tensor,
    /// Tokens summed over; (pairs,) f32.
    pub tokens: Tensor,
}

/// What a pair loss is computed from.
pub struct PairLogps {
    /// The better responses.
    pub chosen: Responses,
    /// The worse responses.
    pub rejected: Responses,
    /// Summed log-probabilities of both under the reference model: chosen, rejected; (pairs,) f32 each.
    pub reference: Option<(Tensor, Tensor)>,
}

/// A pair loss and what is reported with it; (pairs,) f32 each. Only `losses` is meant to be differentiated.
pub struct PairLosses {
    /// The loss, without an NLL term.
    pub losses: Tensor,
    /// Implicit reward of the chosen response.
    pub chosen_rewards: Tensor,
    /// Implicit reward of the rejected response.
    pub rejected_rewards: Tensor,
    /// Log-probability of the chosen response as TRL reports it: summed for DPO, per token for ORPO.
    pub chosen_logps: Tensor,
    /// Log-probability of the rejected response, likewise.
    pub rejected_logps: Tensor,
    /// Further values by TRL's metric name.
    pub details: Vec<(&'static str, Tensor)>,
}

impl Objective {
    /// Whether examples must have a rejected response.
    pub fn needs_rejected(&self) -> bool {
        !matches!(self, Objective::Sft { .. })
    }

    /// Whether examples must come with a reference model's log-probabilities.
    pub fn needs_reference(&self) -> bool {
        matches!(self, Objective::Dpo { .. })
    }

    /// What the negative log-likelihood term (of weight 1) covers; none where the objective has no such term.
    pub fn nll(&self) -> Option<NllScope> {
        match self {
            Objective::Orpo { nll, .. } | Objective::Sft { nll } => Some(*nll),
            Objective::Dpo { .. } => None,
        }
    }

    /// What is wrong with the settings, if anything.
    pub fn check(&self) -> Result<()> {
        if let Objective::Orpo { beta, .. } | Objective::Dpo { beta, .. } = self
            && !(beta.is_finite() && *beta > 0.0)
        {
            return Err(Error::Argument(format!("beta: expected a number above 0, found {beta}")));
        }
        if let Objective::Dpo { loss: DpoLoss::Sigmoid { label_smoothing }, .. } = self
            && !(0.0..0.5).contains(label_smoothing)
        {
            let message = format!("label_smoothing: expected at least 0 and below 0.5, found {label_smoothing}");
            return Err(Error::Argument(message));
        }
        Ok(())
    }

    /// The loss of every pair; none for objectives that do not compare responses.
    pub fn pair_losses(&self, pairs: &PairLogps) -> Result<Option<PairLosses>> {
        match self {
            Objective::Orpo { beta, .. } => orpo::pair_losses(pairs, *beta).map(Some),
            Objective::Dpo { beta, loss } => dpo::pair_losses(pairs, *beta, *loss).map(Some),
            Objective::Sft { .. } => Ok(None),
        }
    }
}
