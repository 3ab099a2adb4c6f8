//! Optimizers with the semantics of PyTorch's, their gradients' norm, and learning rate schedules.
//!
//! | file | what it holds |
//! |---|---|
//! | `rule` | update rules, their settings, and what they keep |
//! | `span` | part of a parameter, and what a rule does to it |
//! | `adamw`, `rmsprop`, `sgd` | the rules |
//! | `adamw_8bit`, `quantised` | AdamW with its state in 8 bits |
//! | `fused` | AdamW by ATen's kernel |
//! | `clip` | norms of gradients |
//! | [`schedule`] | learning rates |
//!
//! An update works through memory once: by ATen's fused kernel where there is one for the rule and the
//! parameters' type, else in blocks of libtorch's operators, which is also what plain kernels stand for.

mod adamw;
mod adamw_8bit;
mod clip;
mod fused;
mod quantised;
mod rmsprop;
mod rule;
pub mod schedule;
mod sgd;
mod span;

use std::path::Path;

use tch::{Device, Kind, Tensor, no_grad};

pub use clip::{clip_scale, global_norm, joined_norm, norm};
pub use rule::Rule;
pub use schedule::{Schedule, ScheduleKind, Warmup};

use crate::blocks::in_blocks;
use crate::generate::random;
use crate::model::Kernels;
use crate::parameters::ParameterSet;
use crate::rounding::Rounding;
use crate::{Error, Result};
use adamw_8bit::Maps;
use quantised::Codes;
use span::{Span, Update};

/// An optimizer's running state for a list of parameters.
pub struct Optimizer {
    rule: Rule,
    kernels: Kernels,
    names: Vec<String>,
    /// For every parameter, one tensor per slot.
    state: Vec<Vec<Tensor>>,
    steps: u64,
    maps: Option<Maps>,
    seed: u64,
    /// For the update that is under way, where parameters are bfloat16.
    rounding: Option<Rounding>,
}

/// A parameter's part in an update.
pub struct Part {
    /// Its place in the list that the optimizer was made for.
    pub index: usize,
    /// Changed in place.
    pub parameter: Tensor,
    /// Used up.
    pub gradient: Tensor,
}

impl Optimizer {
    /// An optimizer for these parameters, which every later call must pass in the same order. How parameters in bfloat16
    /// are rounded follows from `seed`; others are f32 or f64.
    pub fn new(rule: Rule, kernels: Kernels, parameters: &[(String, Tensor)], seed: u64) -> Result<Self> {
        rule.check()?;
        let mut state = Vec::with_capacity(parameters.len());
        for (_, parameter) in parameters {
            let slots = rule.slots(parameter.numel() as i64);
            state.push(slots.iter().map(|slot| slot.zeros(parameter)).collect::<Result<_>>()?);
        }
        let device = parameters.first().map_or(Device::Cpu, |(_, parameter)| parameter.device());
        let maps = match rule {
            Rule::Adamw8bit { .. } => {
                Some(Maps { mean: Codes::signed(device)?, mean_square: Codes::unsigned(device)? })
            }
            _ => None,
        };
        let names = parameters.iter().map(|(name, _)| name.clone()).collect();
        Ok(Optimizer { rule, kernels, names, state, steps: 0, maps, seed, rounding: None })
    }

    /// Updates done so far, or begun.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Update the parameters in place with `gradient_scale` times the gradients, which are used up.
    pub fn step(
        &mut self,
        parameters: &[(String, Tensor)],
        gradients: Vec<Tensor>,
        learning_rate: f64,
        gradient_scale: f64,
    ) -> Result<()> {
        let part = |(index, ((_, parameter), gradient)): (usize, (&(String, Tensor), Tensor))| Part {
            index,
            parameter: parameter.shallow_clone(),
            gradient,
        };
        self.begin();
        self.update(parameters.iter().zip(gradients).enumerate().map(part).collect(), learning_rate, gradient_scale)
    }

    /// Begin an update that is done in several calls of [`update`](Self::update), each for some of the parameters.
    pub fn begin(&mut self) {
        self.steps += 1;
        self.rounding = None;
    }

    /// What [`step`](Self::step) does, to some of the parameters.
    pub fn update(&mut self, parts: Vec<Part>, learning_rate: f64, gradient_scale: f64) -> Result<()> {
        let Some(device) = parts.first().map(|part| part.parameter.device()) else { return Ok(()) };
        let is_rounded = parts.iter().any(|part| part.parameter.kind() == Kind::BFloat16);
        if is_rounded && self.rounding.is_none() {
            self.rounding = Some(Rounding::new(random::derive(self.seed, &[self.steps]), device)?);
        }
        let spans = parts.iter().map(|part| self.span(part)).collect::<Result<Vec<_>>>()?;
        drop(parts);
        let update = Update {
            rule: self.rule,
            learning_rate,
            gradient_scale,
            step: self.steps,
            maps: self.maps.as_ref(),
            rounding: self.rounding.as_ref().filter(|_| is_rounded),
        };
        match self.rule {
            Rule::Adamw { beta1, beta2, eps, weight_decay }
                if self.kernels == Kernels::Fused && fused::takes(&spans) =>
            {
                no_grad(|| fused::adamw(spans, &update, [beta1, beta2], eps, weight_decay))
            }
            _ => in_blocks(device, spans, |span| span.update(&update)),
        }
    }

    /// A whole parameter.
    fn span(&self, part: &Part) -> Result<Span> {
        let flat = |tensor: &Tensor| tensor.f_view([-1]);
        Ok(Span {
            parameter: flat(&part.parameter.f_detach()?)?,
            gradient: flat(&part.gradient.f_contiguous()?)?,
            state: self.state[part.index].iter().map(flat).collect::<std::result::Result<_, _>>()?,
            slots: self.rule.slots(part.parameter.numel() as i64),
            decays: part.parameter.dim() >= 2,
            index: part.index as u64,
            first: 0,
        })
    }

    /// Names and tensors of the state.
    fn named_state(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.names.iter().zip(&self.state).flat_map(|(name, state)| {
            let elements = state.first().map_or(0, Tensor::numel) as i64;
            let named = self.rule.slots(elements).iter().zip(state);
            named.map(move |(slot, tensor)| (format!("{name}.{}", slot.name), tensor))
        })
    }

    /// Write the state into a safetensors file.
    pub fn save(&self, path: &Path) -> Result<()> {
        let steps = ("step".to_owned(), Tensor::f_from_slice(&[self.steps as i64])?);
        let state = self.named_state().map(|(name, tensor)| (name, tensor.shallow_clone()));
        std::iter::once(steps).chain(state).collect::<ParameterSet>().write(path, None)
    }

    /// Take up the state that [`save`](Self::save) wrote for the same rule and parameters.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let stored = ParameterSet::read(path, Device::Cpu)?;
        let take = |name: &str| stored.get(name).map_err(|_| Error::invalid(path, format!("`{name}` is missing")));
        let step = take("step")?;
        if step.kind() != Kind::Int64 || step.numel() != 1 {
            let message = format!("`step`: expected one i64, found {:?} {:?}", step.kind(), step.size());
            return Err(Error::invalid(path, message));
        }
        let mut expected = 1;
        for (name, tensor) in self.named_state() {
            let found = take(&name)?;
            if found.size() != tensor.size() || found.kind() != tensor.kind() {
                let (expected, found) = ((tensor.kind(), tensor.size()), (found.kind(), found.size()));
                let message = format!("`{name}`: expected {expected:?}, found {found:?}");
                return Err(Error::invalid(path, message));
            }
            tensor.shallow_clone().f_copy_(found)?;
            expected += 1;
        }
        if stored.len() != expected {
            let message = format!("expected {expected} tensors, found {}: another optimizer's state", stored.len());
            return Err(Error::invalid(path, message));
        }
        self.steps = step.f_int64_value(&[])? as u64;
        Ok(())
    }
}
