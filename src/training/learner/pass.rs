//! The forward and backward pass of one micro-batch.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::Example;
use super::example::Sequence;
use super::layout::{Layout, LayoutKind, lay_out};
use super::numbers::{Scored, numbers};
use crate::Result;
use crate::logps::Head;
use crate::model::checkpointing::send_back;
use crate::model::{Compute, Decoder};
use crate::objectives::{Needs, Objective, PairLosses, PairNumbers};
use crate::parameters::ParameterSet;

/// What the means of a whole batch divide by. Every part divides by these, so that the parts' losses and gradients add
/// up to the batch's, however it is divided.
pub(super) struct Totals {
    pub examples: f64,
    /// Tokens of prompts and chosen responses, where prompts are scored.
    pub sequence_tokens: f64,
    pub chosen_tokens: f64,
    rejected_tokens: f64,
    /// Tokens that go into the model.
    pub input_tokens: u64,
}

impl Totals {
    pub fn of(examples: &[Example], needs: &Needs) -> Self {
        let chosen: Vec<Sequence> = examples.iter().map(|example| example.chosen(needs.prompt())).collect();
        let rejected: Vec<Sequence> = rejected(examples, needs).into_iter().flatten().collect();
        let response_tokens =
            |sequences: &[Sequence]| -> usize { sequences.iter().map(|sequence| sequence.response_tokens()).sum() };
        Totals {
            examples: examples.len() as f64,
            sequence_tokens: chosen.iter().map(|sequence| sequence.scored_tokens()).sum::<usize>() as f64,
            chosen_tokens: response_tokens(&chosen) as f64,
            rejected_tokens: response_tokens(&rejected) as f64,
            input_tokens: chosen.iter().chain(&rejected).map(|sequence| sequence.len() as u64).sum(),
        }
    }
}

/// Each example's rejected response, if the objective looks at them.
fn rejected<'a>(examples: &'a [Example], needs: &Needs) -> Vec<Option<Sequence<'a>>> {
    examples.iter().map(|example| example.rejected().filter(|_| needs.rejected())).collect()
}

/// What a pass reports; its gradients are in the leaves' `grad` and in the head's.
pub(super) struct Outcome {
    /// The part's share of the batch's metrics, scalars by name.
    pub metrics: Vec<(String, Tensor)>,
    /// The loss of each example, (examples,) f32; empty where another outcome has them.
    pub blame: Tensor,
    /// What the objective carries into the next step.
    pub state: Vec<(String, Tensor)>,
}

/// What all passes of a step share.
pub(super) struct Pass<'a> {
    pub decoder: &'a Decoder,
    pub objective: &'a dyn Objective,
    /// What the objective carries from step to step.
    pub state: &'a BTreeMap<String, f64>,
    pub compute: Compute,
    pub layout: LayoutKind,
    /// Keep one layer's activations, and compute the others again.
    pub checkpointing: bool,
    /// The policy's parameters as leaves of this step's graph.
    pub leaves: &'a ParameterSet,
    pub head: &'a Head,
    pub totals: &'a Totals,
}

impl Pass<'_> {
    /// Forward and backward on a part of the batch: adds its gradients to the leaves', and the head's own share to
    /// `head_gradient`, where there is one. The loss's gradient with respect to the rows' log-probabilities is `known`
    /// where the whole step was looked at before.
    pub fn run(
        &self,
        examples: &[Example],
        head_gradient: Option<&mut Tensor>,
        known: Option<&Tensor>,
    ) -> Result<Outcome> {
        let layout = self.lay_out(examples)?;
        layout.log_size();
        if self.checkpointing {
            let (hidden, tape) = self.decoder.hidden_states_checkpointed(self.leaves, &layout.input, &self.compute)?;
            let (outcome, gradient) = self.loss(&hidden, &layout, examples, head_gradient, known)?;
            tape.backward(&gradient)?;
            return Ok(outcome);
        }
        let hidden = self.decoder.hidden_states(self.leaves, &layout.input, None, &self.compute)?;
        let (outcome, gradient) = self.loss(&hidden, &layout, examples, head_gradient, known)?;
        if hidden.requires_grad() {
            send_back(&hidden, &gradient)?;
        }
        Ok(outcome)
    }

    /// How a part of the batch stands in a forward pass.
    pub fn lay_out(&self, examples: &[Example]) -> Result<Layout> {
        let needs = self.objective.needs();
        let chosen: Vec<_> = examples.iter().map(|example| example.chosen(needs.prompt())).collect();
        lay_out(self.layout, self.decoder, &self.compute, &chosen, &rejected(examples, needs))
    }

    /// The loss's gradient with respect to the hidden states, in their shape.
    pub fn loss(
        &self,
        hidden: &Tensor,
        layout: &Layout,
        examples: &[Example],
        head_gradient: Option<&mut Tensor>,
        known: Option<&Tensor>,
    ) -> Result<(Outcome, Tensor)> {
        let predicting = layout.predicting(hidden)?;
        let scores = self.head.score(&predicting, &layout.targets)?;
        let (mut outcome, gradient) = match known {
            Some(gradient) => (Outcome::empty(gradient)?, gradient.shallow_clone()),
            None => {
                let logps = scores.logps.f_set_requires_grad(true)?;
                let pairs = self.numbers(&logps, &predicting, layout, examples)?;
                let (loss, outcome) = self.evaluate(&pairs)?;
                (outcome, Tensor::f_run_backward(&[loss], &[logps], false, false)?.swap_remove(0))
            }
        };
        let means = layout.responses.f_mv(&self.head.mean_logits(&predicting)?)?;
        let correct = layout.responses.f_mv(&scores.correct)?;
        self.report_tokens(&mut outcome.metrics, &means, &correct, examples.len() as i64)?;
        let gradient = scores.backward(&gradient, head_gradient)?;
        Ok((outcome, layout.spread(&gradient, hidden)?))
    }

    /// What the objective asks for of a part of the batch.
    pub fn numbers(
        &self,
        logps: &Tensor,
        predicting: &Tensor,
        layout: &Layout,
        examples: &[Example],
    ) -> Result<PairNumbers> {
        let needs = self.objective.needs();
        let entropies = match needs.collision_entropy() {
            true => Some(self.head.collision_entropies(predicting)?),
            false => None,
        };
        let scored = Scored { logps, collision_entropies: entropies.as_ref(), layout };
        numbers(needs, &scored, examples, self.totals, self.state)
    }

    /// The share of the batch's loss that these pairs have, and what the objective reports.
    pub fn evaluate(&self, pairs: &PairNumbers) -> Result<(Tensor, Outcome)> {
        let PairLosses { losses, report, state } = self.objective.losses(pairs)?;
        let mean = |values: &Tensor| values.f_sum(Kind::Float)?.f_div_scalar(self.totals.examples);
        let loss = mean(&losses)?;
        let mut metrics = vec![("loss".to_owned(), loss.f_detach()?)];
        for (name, values) in report {
            let values = values.f_detach()?;
            let whole = match values.dim() {
                // One that comes of the objective's state alone is on the CPU.
                0 => values.f_to_device(losses.device())?,
                _ => mean(&values)?,
            };
            metrics.push((name, whole));
        }
        Ok((loss, Outcome { metrics, blame: losses.f_detach()?, state }))
    }

    /// Means over the batch's response tokens, from sums over each sequence's.
    fn report_tokens(
        &self,
        metrics: &mut Vec<(String, Tensor)>,
        mean_logits: &Tensor,
        correct: &Tensor,
        pairs: i64,
    ) -> Result<()> {
        let mean = |sums: &Tensor, start: i64, tokens: f64| -> Result<Tensor> {
            Ok(sums.f_narrow(0, start, pairs)?.f_sum(Kind::Float)?.f_div_scalar(tokens)?)
        };
        metrics.push(("logits/chosen".into(), mean(mean_logits, 0, self.totals.chosen_tokens)?));
        if self.objective.needs().rejected() {
            metrics.push(("logits/rejected".into(), mean(mean_logits, pairs, self.totals.rejected_tokens)?));
        }
        metrics.push(("mean_token_accuracy".into(), mean(correct, 0, self.totals.chosen_tokens)?));
        Ok(())
    }
}

impl Outcome {
    /// Nothing to report, as tensors like this one.
    fn empty(like: &Tensor) -> Result<Self> {
        Ok(Outcome { metrics: Vec::new(), blame: like.f_narrow(0, 0, 0)?, state: Vec::new() })
    }
}
