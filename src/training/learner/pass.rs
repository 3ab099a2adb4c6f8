//! The forward and backward pass of one micro-batch.

use tch::{Kind, Tensor};

use super::Example;
use super::example::Sequence;
use super::layout::{Layout, LayoutKind, lay_out};
use crate::Result;
use crate::logps::{Head, KEPT_BYTES};
use crate::model::checkpointing::send_back;
use crate::model::{Compute, Decoder};
use crate::objectives::{Objective, PairLogps, PairLosses, Responses, sft};
use crate::parameters::ParameterSet;

/// What the means of a whole batch divide by. Every part divides by these, so that the parts' losses and gradients add
/// up to the batch's, however it is divided.
pub(super) struct Totals {
    examples: f64,
    nll_tokens: f64,
    chosen_tokens: f64,
    rejected_tokens: f64,
    /// Tokens that go into the model.
    pub input_tokens: u64,
}

impl Totals {
    pub fn of(examples: &[Example], objective: &Objective) -> Self {
        let chosen: Vec<Sequence> = examples.iter().map(|example| example.chosen(objective.nll())).collect();
        let rejected: Vec<Sequence> = rejected(examples, objective).into_iter().flatten().collect();
        let response_tokens =
            |sequences: &[Sequence]| -> usize { sequences.iter().map(|sequence| sequence.response_tokens()).sum() };
        Totals {
            examples: examples.len() as f64,
            nll_tokens: chosen.iter().map(|sequence| sequence.nll_tokens()).sum::<usize>() as f64,
            chosen_tokens: response_tokens(&chosen) as f64,
            rejected_tokens: response_tokens(&rejected) as f64,
            input_tokens: chosen.iter().chain(&rejected).map(|sequence| sequence.len() as u64).sum(),
        }
    }
}

/// Each example's rejected response, if the objective looks at them.
fn rejected<'a>(examples: &'a [Example], objective: &Objective) -> Vec<Option<Sequence<'a>>> {
    examples.iter().map(|example| example.rejected().filter(|_| objective.needs_rejected())).collect()
}

/// What a pass reports; its gradients are in the leaves' `grad` and in the head's.
pub(super) struct Outcome {
    /// The part's share of the batch's metrics, scalars by name. The first is the loss.
    pub metrics: Vec<(&'static str, Tensor)>,
    /// A number for each example that is not finite if the example made the loss so; (examples,) f32.
    pub blame: Tensor,
}

/// What all passes of a step share.
pub(super) struct Pass<'a> {
    pub decoder: &'a Decoder,
    pub objective: &'a Objective,
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
    /// `head_gradient`, where there is one.
    pub fn run(&self, examples: &[Example], head_gradient: Option<&mut Tensor>) -> Result<Outcome> {
        let chosen: Vec<_> = examples.iter().map(|example| example.chosen(self.objective.nll())).collect();
        let layout = lay_out(self.layout, self.decoder, &chosen, &rejected(examples, self.objective))?;
        if self.checkpointing {
            let (hidden, tape) = self.decoder.hidden_states_checkpointed(self.leaves, &layout.input, &self.compute)?;
            let (outcome, gradient) = self.loss(&hidden, &layout, examples, head_gradient)?;
            tape.backward(&gradient)?;
            return Ok(outcome);
        }
        let hidden = self.decoder.hidden_states(self.leaves, &layout.input, None, &self.compute)?;
        let (outcome, gradient) = self.loss(&hidden, &layout, examples, head_gradient)?;
        if hidden.requires_grad() {
            send_back(&hidden, &gradient)?;
        }
        Ok(outcome)
    }

    /// The loss and its gradient with respect to the hidden states, in their shape.
    fn loss(
        &self,
        hidden: &Tensor,
        layout: &Layout,
        examples: &[Example],
        head_gradient: Option<&mut Tensor>,
    ) -> Result<(Outcome, Tensor)> {
        let predicting = layout.predicting(hidden)?;
        let scores = self.head.score(&predicting, &layout.targets, KEPT_BYTES)?;
        let logps = scores.logps.f_set_requires_grad(true)?;
        let (loss, mut outcome) = self.terms(&logps, layout, examples)?;
        let means = layout.responses.f_mv(&self.head.mean_logits(&predicting)?)?;
        let correct = layout.responses.f_mv(&scores.correct)?;
        self.report_tokens(&mut outcome.metrics, &means, &correct, examples.len() as i64)?;
        let gradient = Tensor::f_run_backward(&[loss], &[logps], false, false)?.swap_remove(0);
        let gradient = scores.backward(&gradient, head_gradient)?;
        Ok((outcome, layout.spread(&gradient, hidden)?))
    }

    /// The objective on the rows' log-probabilities.
    fn terms(&self, logps: &Tensor, layout: &Layout, examples: &[Example]) -> Result<(Tensor, Outcome)> {
        let pairs = examples.len() as i64;
        let sums = layout.responses.f_mv(logps)?; // (sequences,): chosen, then rejected
        let mut blame = sums.f_narrow(0, 0, pairs)?.f_detach()?;
        let mut terms = Vec::new();
        let mut metrics = Vec::new();
        if self.objective.nll().is_some() {
            let nll = sft::nll(logps, &layout.counted, self.totals.nll_tokens)?;
            metrics.push(("nll_loss", nll.f_detach()?));
            terms.push(nll);
        }
        if self.objective.needs_rejected() {
            let responses = |start: i64| -> Result<Responses> {
                let part = |tensor: &Tensor| tensor.f_narrow(0, start, pairs);
                Ok(Responses { logps: part(&sums)?, tokens: part(&layout.response_tokens)? })
            };
            let reference = match self.objective.needs_reference() {
                true => Some(reference(examples, self.decoder.device)?),
                false => None,
            };
            let inputs = PairLogps { chosen: responses(0)?, rejected: responses(pairs)?, reference };
            if let Some(losses) = self.objective.pair_losses(&inputs)? {
                terms.push(losses.losses.f_sum(Kind::Float)?.f_div_scalar(self.totals.examples)?);
                blame = losses.losses.f_detach()?;
                self.report_pairs(&mut metrics, &losses)?;
            }
        }
        let loss = terms.into_iter().map(Ok).reduce(|sum, term| Ok(sum?.f_add(&term?)?));
        let loss = loss.unwrap_or_else(|| Err(crate::Error::Argument("the objective has no terms".into())))?;
        metrics.insert(0, ("loss", loss.f_detach()?));
        Ok((loss, Outcome { metrics, blame }))
    }

    /// Means over the batch's pairs.
    fn report_pairs(&self, metrics: &mut Vec<(&'static str, Tensor)>, losses: &PairLosses) -> Result<()> {
        let mut report = |name, values: &Tensor| -> Result<()> {
            metrics.push((name, values.f_detach()?.f_sum(Kind::Float)?.f_div_scalar(self.totals.examples)?));
            Ok(())
        };
        let (chosen, rejected) = (&losses.chosen_rewards, &losses.rejected_rewards);
        report("rewards/chosen", chosen)?;
        report("rewards/rejected", rejected)?;
        report("rewards/accuracies", &chosen.f_gt_tensor(rejected)?)?;
        report("rewards/margins", &chosen.f_sub(rejected)?)?;
        report("logps/chosen", &losses.chosen_logps)?;
        report("logps/rejected", &losses.rejected_logps)?;
        for (name, values) in &losses.details {
            report(name, values)?;
        }
        Ok(())
    }

    /// Means over the batch's response tokens, from sums over each sequence's.
    fn report_tokens(
        &self,
        metrics: &mut Vec<(&'static str, Tensor)>,
        mean_logits: &Tensor,
        correct: &Tensor,
        pairs: i64,
    ) -> Result<()> {
        let mean = |sums: &Tensor, start: i64, tokens: f64| -> Result<Tensor> {
            Ok(sums.f_narrow(0, start, pairs)?.f_sum(Kind::Float)?.f_div_scalar(tokens)?)
        };
        metrics.push(("logits/chosen", mean(mean_logits, 0, self.totals.chosen_tokens)?));
        if self.objective.needs_rejected() {
            metrics.push(("logits/rejected", mean(mean_logits, pairs, self.totals.rejected_tokens)?));
        }
        metrics.push(("mean_token_accuracy", mean(correct, 0, self.totals.chosen_tokens)?));
        Ok(())
    }
}

/// The reference model's log-probabilities, chosen and rejected; (examples,) f32 each.
fn reference(examples: &[Example], device: tch::Device) -> Result<(Tensor, Tensor)> {
    let (chosen, rejected): (Vec<f32>, Vec<f32>) =
        examples.iter().map(|example| example.reference.unwrap_or((f32::NAN, f32::NAN))).unzip();
    let tensor = |values: &[f32]| Tensor::f_from_slice(values)?.f_to_device(device);
    Ok((tensor(&chosen)?, tensor(&rejected)?))
}
