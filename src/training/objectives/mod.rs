//! Objectives: what a learner minimises, as a pure function of numbers of every pair.
//!
//! The learner computes the numbers that an [`Objective`] asks for, differentiates its losses and reports what it has
//! to say. Which function it is the learner does not know: pipelines write it as a formula, which the operators crate
//! evaluates.

pub mod math;
mod tensors;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use tch::Tensor;

pub use tensors::PairTensor;

use crate::Result;

/// What a learner minimises: the mean of a loss over the pairs of a step.
pub trait Objective: fmt::Debug + Send + Sync {
    /// What it is computed from.
    fn needs(&self) -> &Needs;

    /// The losses of some pairs: of all pairs of a step if it [needs](Needs::whole_step) them together, else of any
    /// part.
    fn losses(&self, pairs: &PairNumbers) -> Result<PairLosses>;
}

/// What an objective is computed from. What is not named here is not computed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Needs {
    /// What the models say of the pairs.
    pub tensors: BTreeSet<PairTensor>,
    /// Numbers that examples bring along, by name.
    pub numbers: BTreeSet<String>,
    /// Whether a pair's loss depends on the step's other pairs.
    pub whole_step: bool,
    /// Numbers that the objective carries from step to step, with what they are before the first.
    pub state: BTreeMap<String, f64>,
}

impl Needs {
    /// Whether examples must have a rejected response.
    pub fn rejected(&self) -> bool {
        self.tensors.iter().any(|tensor| tensor.is_of_rejected())
    }

    /// Whether examples must come with a reference model's log-probabilities.
    pub fn reference(&self) -> bool {
        self.tensors.iter().any(|tensor| tensor.is_of_reference())
    }

    /// Whether the prompt's tokens are scored too.
    pub fn prompt(&self) -> bool {
        self.tensors.contains(&PairTensor::SequenceNll)
    }

    /// Whether the distributions over the vocabulary are looked at, and not the responses' tokens alone.
    pub(crate) fn collision_entropy(&self) -> bool {
        self.tensors.iter().any(|tensor| tensor.is_collision_entropy())
    }
}

/// Numbers of some pairs; what an objective [needs](Needs) is there.
#[derive(Debug, Default)]
pub struct PairNumbers {
    /// What the models say of them; (pairs,) f32 each.
    pub tensors: BTreeMap<PairTensor, Tensor>,
    /// What examples bring along; (pairs,) f32 each.
    pub numbers: BTreeMap<String, Tensor>,
    /// What the objective carries from step to step.
    pub state: BTreeMap<String, f64>,
}

/// Losses, and what is reported with them.
#[derive(Debug)]
pub struct PairLosses {
    /// The loss of every pair, (pairs,) f32; what is differentiated.
    pub losses: Tensor,
    /// Metrics by name: (pairs,) f32 for a mean over the step's pairs, or where the objective sees the whole step, a
    /// number (a scalar tensor).
    pub report: Vec<(String, Tensor)>,
    /// What the objective carries into the next step: a scalar for each name in [`Needs::state`].
    pub state: Vec<(String, Tensor)>,
}
