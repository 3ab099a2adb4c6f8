//! Update rules, their settings, and what they keep for every parameter.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::quantised::{self, BLOCK};
use crate::{Error, Result};

/// An optimizer and its settings.
///
/// Weight decay applies to matrices only, not to norms and biases, as in Hugging Face's Trainer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Adam with decoupled weight decay.
    Adamw {
        /// Decay of the running mean of gradients.
        beta1: f64,
        /// Decay of the running mean of squared gradients.
        beta2: f64,
        /// Added to the denominator.
        eps: f64,
        /// Fraction of a weight taken off per step, times the learning rate.
        weight_decay: f64,
    },
    /// The same with both running means in 8 bits, a quarter of the memory: torchao's AdamW8bit.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit {
        /// Decay of the running mean of gradients.
        beta1: f64,
        /// Decay of the running mean of squared gradients.
        beta2: f64,
        /// Added to the denominator.
        eps: f64,
        /// Fraction of a weight taken off per step, times the learning rate.
        weight_decay: f64,
    },
    /// RMSprop without momentum.
    Rmsprop {
        /// Decay of the running mean of squared gradients.
        alpha: f64,
        /// Added to the denominator.
        eps: f64,
        /// Fraction of a weight added to its gradient.
        weight_decay: f64,
    },
    /// Gradient descent without momentum.
    Sgd {
        /// Fraction of a weight added to its gradient.
        weight_decay: f64,
    },
}

/// One tensor that a rule keeps for a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// PyTorch's name for it.
    pub name: &'static str,
    /// u8 for codes; absent: as the parameter, and f32 for bfloat16.
    pub kind: Option<Kind>,
    /// Elements of the parameter that one of its numbers stands for.
    pub elements: i64,
}

const fn plain(name: &'static str) -> Slot {
    Slot { name, kind: None, elements: 1 }
}

const fn codes(name: &'static str) -> Slot {
    Slot { name, kind: Some(Kind::Uint8), elements: 1 }
}

const fn scales(name: &'static str) -> Slot {
    Slot { name, kind: Some(Kind::Float), elements: BLOCK }
}

const ADAMW: &[Slot] = &[plain("exp_avg"), plain("exp_avg_sq")];
const ADAMW_8BIT: &[Slot] =
    &[codes("exp_avg.codes"), scales("exp_avg.scale"), codes("exp_avg_sq.codes"), scales("exp_avg_sq.scale")];
const RMSPROP: &[Slot] = &[plain("square_avg")];

impl Rule {
    /// The tensors kept for a parameter of so many elements.
    pub(super) fn slots(&self, elements: i64) -> &'static [Slot] {
        match self {
            Rule::Adamw8bit { .. } if quantised::takes(elements) => ADAMW_8BIT,
            Rule::Adamw { .. } | Rule::Adamw8bit { .. } => ADAMW,
            Rule::Rmsprop { .. } => RMSPROP,
            Rule::Sgd { .. } => &[],
        }
    }

    /// Bytes kept for a parameter of so many elements.
    pub fn state_bytes(&self, elements: u64) -> u64 {
        let bytes = |slot: &Slot| {
            let kind = slot.kind.unwrap_or(Kind::Float);
            elements / slot.elements as u64 * kind.elt_size_in_bytes() as u64
        };
        self.slots(elements as i64).iter().map(bytes).sum()
    }

    /// Bytes that an update on a GPU has in memory besides for each element of a block, of weights of this kind.
    pub(crate) fn working_bytes(&self, weights: Kind) -> u64 {
        const NUMBER: u64 = 4;
        let rule = match self {
            // The fused kernel has none, and the operators work in place.
            Rule::Adamw { .. } => 0,
            // Both means, and indices or magnitudes.
            Rule::Adamw8bit { .. } => 3 * NUMBER,
            // The squares or the denominator, and a second while one is made from the other.
            Rule::Rmsprop { .. } => 2 * NUMBER,
            // The weight decay.
            Rule::Sgd { .. } => NUMBER,
        };
        // Weight and gradient in f32, and the random bits that the weight is rounded by.
        rule + if weights == Kind::BFloat16 { 4 * NUMBER } else { 0 }
    }

    /// The settings' names, values, and least and largest values allowed (the largest excluded).
    fn settings(&self) -> Vec<(&'static str, f64, f64, f64)> {
        let unbounded = f64::INFINITY;
        match *self {
            Rule::Adamw { beta1, beta2, eps, weight_decay } | Rule::Adamw8bit { beta1, beta2, eps, weight_decay } => {
                vec![
                    ("beta1", beta1, 0.0, 1.0),
                    ("beta2", beta2, 0.0, 1.0),
                    ("eps", eps, 0.0, unbounded),
                    ("weight_decay", weight_decay, 0.0, unbounded),
                ]
            }
            Rule::Rmsprop { alpha, eps, weight_decay } => vec![
                ("alpha", alpha, 0.0, 1.0),
                ("eps", eps, 0.0, unbounded),
                ("weight_decay", weight_decay, 0.0, unbounded),
            ],
            Rule::Sgd { weight_decay } => vec![("weight_decay", weight_decay, 0.0, unbounded)],
        }
    }

    /// What is wrong with the settings, if anything.
    pub fn check(&self) -> Result<()> {
        for (name, value, least, bound) in self.settings() {
            if !(least..bound).contains(&value) {
                return Err(Error::Argument(format!(
                    "{name}: expected a number from {least} to below {bound}, found {value}"
                )));
            }
        }
        Ok(())
    }
}

impl Slot {
    /// What a parameter begins with.
    pub fn zeros(&self, parameter: &Tensor) -> Result<Tensor> {
        let kind = self.kind.unwrap_or(match parameter.kind() {
            Kind::BFloat16 => Kind::Float,
            kind => kind,
        });
        let shape = match self.elements {
            1 => parameter.size(),
            elements => vec![parameter.numel() as i64 / elements],
        };
        Ok(Tensor::f_zeros(shape, (kind, parameter.device()))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_kept_by_hand() {
        let (beta1, beta2, eps, weight_decay) = (0.9, 0.999, 1e-8, 0.0);
        assert_eq!(Rule::Adamw { beta1, beta2, eps, weight_decay }.state_bytes(1000), 8000);
        assert_eq!(Rule::Rmsprop { alpha: 0.9, eps, weight_decay }.state_bytes(1000), 4000);
        assert_eq!(Rule::Sgd { weight_decay }.state_bytes(1000), 0);
        // Two codes an element, two scales for every 256; f32 where there are few or no whole blocks.
        let bytes = |elements| Rule::Adamw8bit { beta1, beta2, eps, weight_decay }.state_bytes(elements);
        assert_eq!([4096, 3840, 4097].map(bytes), [2 * 4096 + 2 * 16 * 4, 8 * 3840, 8 * 4097]);
    }
}
