//! What a learner can compute of every pair, by the names that formulas use.

/// A number of every pair that a model has to be asked for; (pairs,) f32 as a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PairTensor {
    /// `chosen_logps`
    ChosenLogps,
    /// `rejected_logps`
    RejectedLogps,
    /// `ref_chosen_logps`
    RefChosenLogps,
    /// `ref_rejected_logps`
    RefRejectedLogps,
    /// `chosen_avg_logps`
    ChosenAvgLogps,
    /// `rejected_avg_logps`
    RejectedAvgLogps,
    /// `chosen_len`
    ChosenLen,
    /// `rejected_len`
    RejectedLen,
    /// `chosen_nll`
    ChosenNll,
    /// `sequence_nll`
    SequenceNll,
    /// `chosen_tail_logps`
    ChosenTailLogps,
    /// `rejected_tail_logps`
    RejectedTailLogps,
    /// `chosen_collision_entropy`
    ChosenCollisionEntropy,
    /// `rejected_collision_entropy`
    RejectedCollisionEntropy,
}

use PairTensor::*;

impl PairTensor {
    /// All of them.
    pub const ALL: [PairTensor; 14] = [
        ChosenLogps,
        RejectedLogps,
        RefChosenLogps,
        RefRejectedLogps,
        ChosenAvgLogps,
        RejectedAvgLogps,
        ChosenLen,
        RejectedLen,
        ChosenNll,
        SequenceNll,
        ChosenTailLogps,
        RejectedTailLogps,
        ChosenCollisionEntropy,
        RejectedCollisionEntropy,
    ];

    /// The name in formulas.
    pub fn name(self) -> &'static str {
        match self {
            ChosenLogps => "chosen_logps",
            RejectedLogps => "rejected_logps",
            RefChosenLogps => "ref_chosen_logps",
            RefRejectedLogps => "ref_rejected_logps",
            ChosenAvgLogps => "chosen_avg_logps",
            RejectedAvgLogps => "rejected_avg_logps",
            ChosenLen => "chosen_len",
            RejectedLen => "rejected_len",
            ChosenNll => "chosen_nll",
            SequenceNll => "sequence_nll",
            ChosenTailLogps => "chosen_tail_logps",
            RejectedTailLogps => "rejected_tail_logps",
            ChosenCollisionEntropy => "chosen_collision_entropy",
            RejectedCollisionEntropy => "rejected_collision_entropy",
        }
    }

    /// What it is, for people.
    pub fn description(self) -> &'static str {
        match self {
            ChosenLogps | RejectedLogps => {
                "log-probability of the response under the policy, summed over its tokens (nats)"
            }
            RefChosenLogps | RefRejectedLogps => "the same under the reference model",
            ChosenAvgLogps | RejectedAvgLogps => "log-probability per token under the policy",
            ChosenLen | RejectedLen => "tokens of the response",
            ChosenNll => {
                "the pair's share of the chosen responses' negative log-likelihood: its mean over the step's pairs is the \
                 mean over the step's tokens"
            }
            SequenceNll => "the same over prompt and chosen response, all but the first token",
            ChosenTailLogps | RejectedTailLogps => {
                "the part of the summed log-probability that lies past the length of the shorter response"
            }
            ChosenCollisionEntropy | RejectedCollisionEntropy => {
                "-log sum p^2 over the vocabulary, mean over the response's tokens; without a gradient, and the head is \
                 computed once more for it"
            }
        }
    }

    pub(super) fn is_of_rejected(self) -> bool {
        let of_rejected = [
            RejectedLogps,
            RefRejectedLogps,
            RejectedAvgLogps,
            RejectedLen,
            RejectedTailLogps,
            RejectedCollisionEntropy,
        ];
        // The chosen response's tail begins where the rejected one ends.
        of_rejected.contains(&self) || self == ChosenTailLogps
    }

    /// Whether a reference model has to be asked for it.
    pub fn is_of_reference(self) -> bool {
        matches!(self, RefChosenLogps | RefRejectedLogps)
    }

    pub(super) fn is_collision_entropy(self) -> bool {
        matches!(self, ChosenCollisionEntropy | RejectedCollisionEntropy)
    }
}
