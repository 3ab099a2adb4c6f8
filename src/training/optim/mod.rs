//! Optimizers with the semantics of PyTorch's, their gradients' norm, and learning rate schedules.
//!
//! On a CPU an update works through memory once: threads share out the elements, and each takes its own in blocks that
//! stay in its core's cache while the update's elementwise operations pass over them, in place.

mod adamw;
mod clip;
mod rmsprop;
pub mod schedule;
mod sgd;

use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

pub use clip::{clip_scale, global_norm};
pub use schedule::{Schedule, ScheduleKind, Warmup};

use crate::parameters::ParameterSet;
use crate::{Error, Result};

/// Elements that a thread works on at a time: four such blocks of f32 fit a core's cache, and libtorch, which divides
/// longer ones among threads of its own, leaves them whole.
const BLOCK: i64 = 1 << 15;

type TorchResult<T> = std::result::Result<T, tch::TchError>;

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

impl Rule {
    /// Names of the tensors kept for every parameter; PyTorch's.
    fn slots(&self) -> &'static [&'static str] {
        match self {
            Rule::Adamw { .. } => &["exp_avg", "exp_avg_sq"],
            Rule::Rmsprop { .. } => &["square_avg"],
            Rule::Sgd { .. } => &[],
        }
    }

    /// Bytes kept for every parameter, in f32.
    pub fn state_bytes_per_parameter(&self) -> u64 {
        4 * self.slots().len() as u64
    }

    /// The settings' names, values, and least and largest values allowed (the largest excluded).
    fn settings(&self) -> Vec<(&'static str, f64, f64, f64)> {
        let unbounded = f64::INFINITY;
        match *self {
            Rule::Adamw { beta1, beta2, eps, weight_decay } => vec![
                ("beta1", beta1, 0.0, 1.0),
                ("beta2", beta2, 0.0, 1.0),
                ("eps", eps, 0.0, unbounded),
                ("weight_decay", weight_decay, 0.0, unbounded),
            ],
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

/// What an update works on: flat, contiguous views of equal length.
struct Span {
    parameter: Tensor,
    /// Used up: a rule may write into it.
    gradient: Tensor,
    state: Vec<Tensor>,
    /// Whether weight decay applies.
    decays: bool,
    learning_rate: f64,
    /// Updates including this one.
    step: u64,
    rule: Rule,
}

/// An optimizer's running state for a list of parameters.
pub struct Optimizer {
    rule: Rule,
    names: Vec<String>,
    /// For every parameter, one tensor per slot.
    state: Vec<Vec<Tensor>>,
    steps: u64,
}

impl Optimizer {
    /// An optimizer for these parameters, which every later call must pass in the same order.
    pub fn new(rule: Rule, parameters: &[(String, Tensor)]) -> Result<Self> {
        rule.check()?;
        let mut state = Vec::with_capacity(parameters.len());
        for (_, parameter) in parameters {
            let zeros = || Tensor::f_zeros(parameter.size(), (parameter.kind(), parameter.device()));
            state.push(rule.slots().iter().map(|_| zeros()).collect::<TorchResult<_>>()?);
        }
        Ok(Optimizer { rule, names: parameters.iter().map(|(name, _)| name.clone()).collect(), state, steps: 0 })
    }

    /// Updates done so far.
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
        self.steps += 1;
        let on_cpu = parameters.iter().all(|(_, parameter)| parameter.device() == Device::Cpu);
        let threads = if on_cpu { tch::get_num_threads().max(1) as i64 } else { 1 };
        let mut shares: Vec<Vec<Span>> = (0..threads).map(|_| Vec::new()).collect();
        for ((index, (_, parameter)), gradient) in parameters.iter().enumerate().zip(gradients) {
            let whole = Span {
                parameter: parameter.f_detach()?.f_view([-1])?,
                gradient: gradient.f_contiguous()?.f_view([-1])?,
                state: self.state[index].iter().map(|tensor| tensor.f_view([-1])).collect::<TorchResult<_>>()?,
                decays: parameter.dim() >= 2,
                learning_rate,
                step: self.steps,
                rule: self.rule,
            };
            let elements = parameter.numel() as i64;
            for (share, (start, length)) in shares.iter_mut().zip(spans(elements, (elements + threads - 1) / threads)) {
                share.push(whole.narrow(start, length)?);
            }
        }
        in_parallel(shares, |share| {
            for span in share {
                let block = if on_cpu { BLOCK } else { i64::MAX };
                for (start, length) in spans(span.parameter.numel() as i64, block) {
                    span.narrow(start, length)?.update(gradient_scale)?;
                }
            }
            Ok(())
        })
    }

    /// Write the state into a safetensors file.
    pub fn save(&self, path: &Path) -> Result<()> {
        let steps = ("step".to_owned(), Tensor::f_from_slice(&[self.steps as i64])?);
        let slots = self.names.iter().zip(&self.state).flat_map(|(name, state)| {
            let named = self.rule.slots().iter().zip(state);
            named.map(move |(slot, tensor)| (format!("{name}.{slot}"), tensor.shallow_clone()))
        });
        std::iter::once(steps).chain(slots).collect::<ParameterSet>().write(path, None)
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
        for (name, state) in self.names.iter().zip(&mut self.state) {
            for (slot, tensor) in self.rule.slots().iter().zip(state) {
                let name = format!("{name}.{slot}");
                let found = take(&name)?;
                if found.size() != tensor.size() || found.kind() != tensor.kind() {
                    let (expected, found) = ((tensor.kind(), tensor.size()), (found.kind(), found.size()));
                    let message = format!("`{name}`: expected {expected:?}, found {found:?}");
                    return Err(Error::invalid(path, message));
                }
                tensor.f_copy_(found)?;
                expected += 1;
            }
        }
        if stored.len() != expected {
            let message = format!("expected {expected} tensors, found {}: another optimizer's state", stored.len());
            return Err(Error::invalid(path, message));
        }
        self.steps = step.f_int64_value(&[])? as u64;
        Ok(())
    }
}

impl Span {
    fn narrow(&self, start: i64, length: i64) -> Result<Self> {
        let part = |tensor: &Tensor| tensor.f_narrow(0, start, length);
        Ok(Span {
            parameter: part(&self.parameter)?,
            gradient: part(&self.gradient)?,
            state: self.state.iter().map(part).collect::<TorchResult<_>>()?,
            ..*self
        })
    }

    fn update(&mut self, gradient_scale: f64) -> Result<()> {
        if gradient_scale != 1.0 {
            let _ = self.gradient.f_mul_scalar_(gradient_scale)?;
        }
        match self.rule {
            Rule::Adamw { beta1, beta2, eps, weight_decay } => adamw::update(self, beta1, beta2, eps, weight_decay),
            Rule::Rmsprop { alpha, eps, weight_decay } => rmsprop::update(self, alpha, eps, weight_decay),
            Rule::Sgd { weight_decay } => sgd::update(self, weight_decay),
        }
    }

    /// L2 regularisation, where weight decay is not decoupled: gradient += weight_decay * parameter.
    fn add_weight_decay(&mut self, weight_decay: f64) -> Result<()> {
        if self.decays && weight_decay != 0.0 {
            let _ = self.gradient.f_add_(&self.parameter.f_mul_scalar(weight_decay)?)?;
        }
        Ok(())
    }
}

/// Start and length of every span of at most `length` among so many elements.
fn spans(elements: i64, length: i64) -> impl Iterator<Item = (i64, i64)> {
    let length = length.clamp(1, elements.max(1));
    (0..elements).step_by(length as usize).map(move |start| (start, length.min(elements - start)))
}

/// Do the work on every share without gradients, each on a thread of its own; a single one on this thread.
fn in_parallel(shares: Vec<Vec<Span>>, work: impl Fn(Vec<Span>) -> Result<()> + Sync) -> Result<()> {
    let work = |share| no_grad(|| work(share));
    if shares.len() == 1 {
        return shares.into_iter().try_for_each(work);
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = shares.into_iter().map(|share| scope.spawn(|| work(share))).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
