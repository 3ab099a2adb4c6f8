//! What an update works on at a time.

use tch::{Kind, Tensor};

use super::adamw_8bit::Maps;
use super::rule::{Rule, Slot};
use super::{adamw, adamw_8bit, rmsprop, sgd};
use crate::Result;
use crate::blocks::Blockwise;
use crate::rounding::Rounding;

/// Flat, contiguous views: of a parameter, its gradient, and what the rule keeps for it.
pub(super) struct Span {
    pub parameter: Tensor,
    /// Used up: a rule may write into it.
    pub gradient: Tensor,
    pub state: Vec<Tensor>,
    pub slots: &'static [Slot],
    /// Whether weight decay applies.
    pub decays: bool,
    /// The parameter's number.
    pub index: u64,
    /// Where in the flat parameter the span begins.
    pub first: i64,
}

/// What is the same for all spans of an update.
pub(super) struct Update<'a> {
    pub rule: Rule,
    pub learning_rate: f64,
    /// What gradients are multiplied by first.
    pub gradient_scale: f64,
    /// Updates including this one.
    pub step: u64,
    /// For the rule with 8-bit state.
    pub maps: Option<&'a Maps>,
    /// For parameters in bfloat16.
    pub rounding: Option<&'a Rounding>,
}

impl Blockwise for Span {
    fn elements(&self) -> i64 {
        self.parameter.numel() as i64
    }

    fn narrow(&self, start: i64, length: i64) -> Result<Self> {
        let part = |tensor: &Tensor| tensor.f_narrow(0, start, length);
        let of_state = |(tensor, slot): (&Tensor, &Slot)| {
            // Spans begin at whole blocks of 256, and only tensors of whole blocks are kept in blocks.
            tensor.f_narrow(0, start / slot.elements, length / slot.elements)
        };
        Ok(Span {
            parameter: part(&self.parameter)?,
            gradient: part(&self.gradient)?,
            state: self.state.iter().zip(self.slots).map(of_state).collect::<std::result::Result<_, _>>()?,
            first: self.first + start,
            ..*self
        })
    }
}

impl Span {
    /// Apply the rule. A parameter in bfloat16 is updated in f32 and then rounded stochastically, so that small updates
    /// are not lost.
    pub fn update(mut self, update: &Update) -> Result<()> {
        let Some(rounding) = update.rounding else { return self.apply(update) };
        let mut kept = std::mem::replace(&mut self.parameter, Tensor::new());
        self.parameter = kept.f_to_kind(Kind::Float)?;
        self.gradient = self.gradient.f_to_kind(Kind::Float)?;
        self.apply(update)?;
        kept.f_copy_(&rounding.round(&self.parameter, self.index, self.first)?)?;
        Ok(())
    }

    fn apply(&mut self, update: &Update) -> Result<()> {
        if update.gradient_scale != 1.0 {
            let _ = self.gradient.f_mul_scalar_(update.gradient_scale)?;
        }
        match (update.rule, update.maps) {
            (Rule::Adamw8bit { beta1, beta2, eps, weight_decay }, Some(maps)) => {
                adamw_8bit::update(self, update, maps, [beta1, beta2], eps, weight_decay)
            }
            (
                Rule::Adamw { beta1, beta2, eps, weight_decay } | Rule::Adamw8bit { beta1, beta2, eps, weight_decay },
                _,
            ) => adamw::update(self, update, [beta1, beta2], eps, weight_decay),
            (Rule::Rmsprop { alpha, eps, weight_decay }, _) => rmsprop::update(self, update, alpha, eps, weight_decay),
            (Rule::Sgd { weight_decay }, _) => sgd::update(self, update, weight_decay),
        }
    }

    /// L2 regularisation, where weight decay is not decoupled: gradient += weight_decay * parameter.
    pub fn add_weight_decay(&mut self, weight_decay: f64) -> Result<()> {
        if self.decays && weight_decay != 0.0 {
            let _ = self.gradient.f_add_(&self.parameter.f_mul_scalar(weight_decay)?)?;
        }
        Ok(())
    }
}
