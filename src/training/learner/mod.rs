//! The learner: one update of a policy from a batch of examples.
//!
//! | file | what it holds |
//! |---|---|
//! | `example` | what is learned from |
//! | `layout` | how examples stand in a forward pass |
//! | `numbers` | what an objective asks for, from the log-probabilities of a pass |
//! | `pass` | forward and backward on a part of the batch |
//! | `together` | the same for objectives that see the whole step at once |
//! | `release` | a step whose gradients are freed layer by layer |
//! | `report` | what passes report, read and checked |
//! | `frozen` | parameters that are not trained |
//! | `scoring` | log-probabilities under a model that is not trained |
//!
//! A step reads its numbers from the device once, after the backward pass: should the loss or the gradients not be
//! finite, the step is an error and no weight has changed. Where gradients are released, the loss is read before the
//! backward pass, and the gradients' norm after the update.

mod example;
mod frozen;
mod layout;
mod numbers;
mod pass;
mod passes;
mod release;
mod report;
mod scoring;
mod sums;
mod together;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

pub use example::Example;
pub use layout::LayoutKind;
pub use passes::Passes;
pub use scoring::{ExampleScore, ResponseScore, reference_logps, score};

use crate::logps::{Head, Limits};
use crate::model::{Compute, Decoder};
use crate::native::stream;
use crate::objectives::Objective;
use crate::optim::{Optimizer, Rule, Schedule, clip_scale, global_norm};
use crate::parameters::{ParameterSet, WEIGHTS_FILE};
use crate::{Error, Result};
use pass::{Outcome, Pass, Totals};
use report::{check_finite, read_metrics};
use sums::Sums;

const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const STATE_FILE: &str = "learner.json";

/// A step's metrics by TRL's names: means over the batch, and `num_tokens` seen since the first step.
///
/// `logits/*` and `mean_token_accuracy` are means over response tokens; `grad_norm` is that before clipping.
pub type StepMetrics = BTreeMap<String, f64>;

/// How a learner learns.
#[derive(Clone, Debug)]
pub struct LearnerSettings {
    /// What is minimised.
    pub objective: Arc<dyn Objective>,
    /// How gradients become updates.
    pub optimizer: Rule,
    /// The learning rate at the schedule's height.
    pub learning_rate: f64,
    /// Its course.
    pub schedule: Schedule,
    /// The largest global norm of gradients that is let through; none: any.
    pub max_grad_norm: Option<f64>,
    /// How examples stand in a forward pass. Changes memory and speed, not the update.
    pub layout: LayoutKind,
    /// Compute activations again in the backward pass, one layer at a time, instead of keeping them.
    pub gradient_checkpointing: bool,
    /// Let each layer's gradients go into the optimizer and free them before the next layer's are computed. It takes
    /// gradient checkpointing, no clipping, and steps of one pass. Changes memory, not the update.
    pub release_gradients: bool,
    /// Name patterns of parameters that stay as they are; `*` stands for any text.
    pub freeze: Vec<String>,
    /// Kind of the matrix products.
    pub compute: Compute,
    /// How many logits there are at a time. Changes memory and speed, not the update.
    pub logits: Limits,
    /// Of the rounding of weights that are bfloat16.
    pub seed: u64,
}

/// A policy in training.
pub struct Learner {
    /// The policy's architecture.
    pub decoder: Arc<Decoder>,
    settings: LearnerSettings,
    /// Master weights, f32 or bfloat16, without gradients: leaves of a step's graph share their memory.
    parameters: ParameterSet,
    frozen: Vec<bool>,
    optimizer: Optimizer,
    tokens_seen: u64,
    /// What the objective carries from step to step.
    objective_state: BTreeMap<String, f64>,
}

/// What a learner keeps besides tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    steps: u64,
    tokens_seen: u64,
    #[serde(default)]
    objective: BTreeMap<String, f64>,
}

impl Learner {
    /// A learner that starts from these weights, which it will change.
    pub fn new(decoder: Arc<Decoder>, parameters: ParameterSet, settings: LearnerSettings) -> Result<Self> {
        check_positive("learning_rate", Some(settings.learning_rate))?;
        check_positive("max_grad_norm", settings.max_grad_norm)?;
        check_kinds(&parameters)?;
        if settings.release_gradients && (settings.max_grad_norm.is_some() || !settings.gradient_checkpointing) {
            let message = "release_gradients: expected gradient checkpointing, and no clipping";
            return Err(Error::Argument(message.into()));
        }
        let frozen = frozen::frozen(&parameters, &settings.freeze)?;
        let kernels = settings.compute.kernels;
        let optimizer = Optimizer::new(settings.optimizer, kernels, &trained(&parameters, &frozen), settings.seed)?;
        let objective_state = settings.objective.needs().state.clone();
        Ok(Learner { decoder, settings, parameters, frozen, optimizer, tokens_seen: 0, objective_state })
    }

    /// The policy's weights, which the next step changes in place.
    pub fn parameters(&self) -> &ParameterSet {
        &self.parameters
    }

    /// Continue with a copy of the weights, and leave those handed out so far as they are: for when somebody may still
    /// read them during the next step.
    pub fn leave_weights(&mut self) {
        self.parameters = self.parameters.deep_copy();
    }

    /// Updates done so far.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    /// One update from all examples, by these forward and backward passes. `step` is where the schedule of the learning rate
    /// stands: steps of a run that come without examples count, too.
    pub fn step(&mut self, step: u64, examples: &[Example], passes: impl Into<Passes>) -> Result<StepMetrics> {
        self.check(examples)?;
        let totals = Totals::of(examples, self.settings.objective.needs());
        let parts = passes.into().divide(examples);
        let learning_rate = self.settings.learning_rate * self.settings.schedule.multiplier(step);
        let (mut metrics, state) = match self.settings.release_gradients {
            true => self.update_by_layers(step, &parts, &totals, learning_rate)?,
            false => self.update_at_once(step, &parts, &totals, learning_rate)?,
        };
        self.tokens_seen += totals.input_tokens;
        self.objective_state.extend(state);
        metrics.insert("learning_rate".into(), learning_rate);
        metrics.insert("num_tokens".into(), self.tokens_seen as f64);
        Ok(metrics)
    }

    /// Update the weights with all gradients; the step's metrics, and what the objective carries into the next one.
    fn update_at_once(
        &mut self,
        step: u64,
        parts: &[&[Example]],
        totals: &Totals,
        learning_rate: f64,
    ) -> Result<(StepMetrics, Vec<(String, f64)>)> {
        let (gradients, outcomes) = self.gradients(parts, totals)?;
        // Only whoever asks for times waits for what is timed.
        let wait = || match tracing::enabled!(tracing::Level::DEBUG) {
            true => stream::wait_for(self.decoder.device),
            false => Ok(()),
        };
        wait()?;
        let began = Instant::now();
        let metrics = read_metrics(&outcomes, Some(&global_norm(&gradients)?))?;
        let state = check_finite(step, parts, &outcomes, &metrics)?;
        let scale = self.settings.max_grad_norm.map_or(1.0, |max_norm| clip_scale(metrics["grad_norm"], max_norm));
        self.optimizer.step(&trained(&self.parameters, &self.frozen), gradients, learning_rate, scale)?;
        wait()?;
        tracing::debug!(step, seconds = began.elapsed().as_secs_f64(), "gradients clipped, weights updated");
        Ok((metrics, state))
    }

    /// The gradients of the batch's loss, for every parameter that is trained, by name, and its metrics.
    ///
    /// The policy stays as it is.
    pub fn loss_gradients(
        &self,
        examples: &[Example],
        passes: impl Into<Passes>,
    ) -> Result<(StepMetrics, Vec<(String, Tensor)>)> {
        self.check(examples)?;
        let totals = Totals::of(examples, self.settings.objective.needs());
        let (gradients, outcomes) = self.gradients(&passes.into().divide(examples), &totals)?;
        let metrics = read_metrics(&outcomes, Some(&global_norm(&gradients)?))?;
        let names = trained(&self.parameters, &self.frozen).into_iter().map(|(name, _)| name);
        Ok((metrics, names.zip(gradients).collect()))
    }

    fn check(&self, examples: &[Example]) -> Result<()> {
        if examples.is_empty() {
            return Err(Error::Argument("a step needs at least one example, found none".into()));
        }
        for example in examples {
            example.check_tokens(&self.decoder)?;
            example.check_for(self.settings.objective.needs())?;
        }
        Ok(())
    }

    /// The gradients of the parameters that are trained, and what each part of the batch reports.
    fn gradients(&self, parts: &[&[Example]], totals: &Totals) -> Result<(Vec<Tensor>, Vec<Outcome>)> {
        let leaves = self.leaves()?;
        let head = Head::new(&self.decoder, &leaves, &self.settings.compute, self.settings.logits)?;
        let mut head_gradient = head_gradient(&self.decoder, &leaves)?;
        let pass = pass(&self.decoder, &self.settings, &self.objective_state, &leaves, &head, totals);
        let mut sums = Sums::of(&leaves, parts.len());
        let mut run = |part: &[Example], known: Option<&Tensor>| {
            let outcome = pass.run(part, head_gradient.as_mut(), known)?;
            sums.as_mut().map_or(Ok(()), Sums::take)?;
            Ok(outcome)
        };
        let outcomes = match self.settings.objective.needs().whole_step && parts.len() > 1 {
            true => pass.run_together(parts, run)?,
            false => parts.iter().map(|part| run(part, None)).collect::<Result<Vec<_>>>()?,
        };
        let mut gradients = Vec::with_capacity(leaves.len());
        for (index, (name, leaf)) in leaves.iter().enumerate().filter(|(_, (_, leaf))| leaf.requires_grad()) {
            let sum = sums.as_ref().and_then(|sums| sums.of_leaf(index)).map(Tensor::shallow_clone);
            let mut gradient = sum.map_or_else(|| leaf.f_grad(), Ok)?;
            if name == self.decoder.head_name()
                && let Some(mut of_head) = head_gradient.take()
            {
                // Tied to the embedding, the weight has a gradient from there too.
                gradient = if gradient.defined() { of_head.f_add_(&gradient)? } else { of_head };
            }
            gradients.push(if gradient.defined() { gradient } else { leaf.f_detach()?.f_zeros_like()? });
        }
        Ok((gradients, outcomes))
    }

    /// The parameters as leaves of a new graph. Fresh leaves have no gradient yet, so the first backward pass need not
    /// add to one.
    fn leaves(&self) -> Result<ParameterSet> {
        let leaf = |((name, tensor), &frozen): ((&str, &Tensor), &bool)| {
            Ok((name.to_owned(), tensor.f_detach()?.f_set_requires_grad(!frozen)?))
        };
        self.parameters.iter().zip(&self.frozen).map(leaf).collect()
    }

    /// Write everything a later [`load`](Self::load) needs; the weights in Hugging Face's layout.
    pub fn save(&self, directory: &Path) -> Result<()> {
        self.parameters.write(&directory.join(WEIGHTS_FILE), None)?;
        self.optimizer.save(&directory.join(OPTIMIZER_FILE))?;
        let path = directory.join(STATE_FILE);
        let objective = self.objective_state.clone();
        let state = State { steps: self.steps(), tokens_seen: self.tokens_seen, objective };
        let text = serde_json::to_string_pretty(&state).map_err(|error| Error::invalid(&path, error.to_string()))?;
        std::fs::write(&path, text).map_err(Error::io(&path))
    }

    /// Take up the state of a learner with the same model and settings, so that the steps to come give the same bytes
    /// as if it had gone on.
    pub fn load(&mut self, directory: &Path) -> Result<()> {
        let path = directory.join(STATE_FILE);
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let state: State = serde_json::from_str(&text).map_err(|error| Error::invalid(&path, error.to_string()))?;
        let expected = self.decoder.expected_parameters();
        let weights = directory.join(WEIGHTS_FILE);
        let parameters = ParameterSet::load_file(&weights, &expected, self.decoder.device)?;
        let kind = |set: &ParameterSet| set.iter().next().map(|(_, tensor)| tensor.kind());
        if kind(&parameters) != kind(&self.parameters) {
            let (expected, found) = (kind(&self.parameters), kind(&parameters));
            return Err(Error::invalid(&weights, format!("expected weights of kind {expected:?}, found {found:?}")));
        }
        self.parameters = parameters;
        self.optimizer.load(&directory.join(OPTIMIZER_FILE))?;
        if state.steps != self.steps() {
            let message = format!("expected {} steps, as the optimizer has, found {}", self.steps(), state.steps);
            return Err(Error::invalid(&path, message));
        }
        if !state.objective.keys().eq(self.objective_state.keys()) {
            let names = |state: &BTreeMap<String, f64>| state.keys().cloned().collect::<Vec<_>>();
            let (expected, found) = (names(&self.objective_state), names(&state.objective));
            return Err(Error::invalid(&path, format!("expected the objective's {expected:?}, found {found:?}")));
        }
        self.tokens_seen = state.tokens_seen;
        self.objective_state = state.objective;
        Ok(())
    }
}

/// Handles to the parameters that are not frozen.
fn trained(parameters: &ParameterSet, frozen: &[bool]) -> Vec<(String, Tensor)> {
    let kept = parameters.iter().zip(frozen).filter(|(_, frozen)| !**frozen);
    kept.map(|((name, tensor), _)| (name.to_owned(), tensor.shallow_clone())).collect()
}

/// What all passes of a step share.
fn pass<'a>(
    decoder: &'a Decoder,
    settings: &'a LearnerSettings,
    state: &'a BTreeMap<String, f64>,
    leaves: &'a ParameterSet,
    head: &'a Head,
    totals: &'a Totals,
) -> Pass<'a> {
    Pass {
        decoder,
        objective: settings.objective.as_ref(),
        state,
        compute: settings.compute,
        layout: settings.layout,
        checkpointing: settings.gradient_checkpointing,
        leaves,
        head,
        totals,
    }
}

/// Zeros for the gradient that the head's weight gets as the head, (vocab_size, hidden_size) f32, if one is wanted.
fn head_gradient(decoder: &Decoder, leaves: &ParameterSet) -> Result<Option<Tensor>> {
    let weight = leaves.get(decoder.head_name())?;
    match weight.requires_grad() {
        true => Ok(Some(Tensor::f_zeros(weight.size(), (Kind::Float, weight.device()))?)),
        false => Ok(None),
    }
}

/// All weights are f32, or all bfloat16.
fn check_kinds(parameters: &ParameterSet) -> Result<()> {
    let kinds = || parameters.iter().map(|(_, tensor)| tensor.kind());
    let expected = if kinds().next() == Some(Kind::BFloat16) { Kind::BFloat16 } else { Kind::Float };
    match parameters.iter().find(|(_, tensor)| tensor.kind() != expected) {
        Some((name, tensor)) => Err(Error::Argument(format!(
            "weights to train: expected f32, or bfloat16 for all, found `{name}` of kind {:?}",
            tensor.kind()
        ))),
        None => Ok(()),
    }
}

fn check_positive(name: &str, value: Option<f64>) -> Result<()> {
    match value {
        Some(value) if !(value.is_finite() && value > 0.0) => {
            Err(Error::Argument(format!("{name}: expected a finite number above 0, found {value}")))
        }
        _ => Ok(()),
    }
}
