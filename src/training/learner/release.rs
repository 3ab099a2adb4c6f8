//! A step whose gradients go into the optimizer layer by layer and are freed, so that no two layers' are there at a time.
//!
//! It takes a step of one pass, with gradient checkpointing and without clipping: a gradient to which another pass would
//! add, or that would have to be scaled by the norm of all, cannot be let go. The loss and what the objective carries on
//! are looked at before the first weight changes; the norm of the gradients is known only once all weights have.

use std::collections::HashMap;

use tch::{Kind, Tensor};

use super::pass::Totals;
use super::report::{check_finite, read_metrics};
use super::{Example, Learner, StepMetrics, head_gradient, pass, trained};
use crate::logps::Head;
use crate::optim::{Part, joined_norm, norm};
use crate::{Error, Result};

impl Learner {
    /// Update the weights; the step's metrics, and what the objective carries into the next one.
    pub(super) fn update_by_layers(
        &mut self,
        step: u64,
        parts: &[&[Example]],
        totals: &Totals,
        learning_rate: f64,
    ) -> Result<(StepMetrics, Vec<(String, f64)>)> {
        let examples = the_only(parts)?;
        let leaves = self.leaves()?;
        let head = Head::new(&self.decoder, &leaves, &self.settings.compute, self.settings.logits)?;
        let mut of_head = head_gradient(&self.decoder, &leaves)?;
        let trained = trained(&self.parameters, &self.frozen);
        let pass = pass(&self.decoder, &self.settings, &self.objective_state, &leaves, &head, totals);
        let layout = pass.lay_out(examples)?;
        layout.log_size();
        let (hidden, tape) = pass.decoder.hidden_states_checkpointed(&leaves, &layout.input, &pass.compute)?;
        let (outcome, gradient) = pass.loss(&hidden, &layout, examples, of_head.as_mut(), None)?;
        let outcomes = vec![outcome];
        check_finite(step, parts, &outcomes, &read_metrics(&outcomes, None)?)?;

        let places: HashMap<&str, usize> =
            trained.iter().enumerate().map(|(index, (name, _))| (name.as_str(), index)).collect();
        let zero = Tensor::f_zeros([0i64; 0], (Kind::Float, pass.decoder.device))?;
        let mut norms: Vec<Tensor> = trained.iter().map(|_| zero.shallow_clone()).collect();
        let optimizer = &mut self.optimizer;
        optimizer.begin();
        let mut release = |gradients: Vec<(&str, Tensor)>| -> Result<()> {
            let mut parts = Vec::with_capacity(gradients.len());
            for (name, gradient) in gradients {
                let Some(&index) = places.get(name) else { continue };
                norms[index] = norm(&gradient)?;
                parts.push(Part { index, parameter: trained[index].1.shallow_clone(), gradient });
            }
            optimizer.update(parts, learning_rate, 1.0)
        };
        let head_name = pass.decoder.head_name();
        if !pass.decoder.config.tie_word_embeddings {
            release(of_head.take().map(|gradient| (head_name, gradient)).into_iter().collect())?;
        }
        tape.backward_by_layers(&gradient, |mut gradients| {
            for (_, gradient) in gradients.iter_mut().filter(|(name, _)| *name == head_name) {
                // Tied to the embedding, the head's weight has a gradient from both.
                if let Some(mut of_head) = of_head.take() {
                    *gradient = of_head.f_add_(gradient)?;
                }
            }
            release(gradients)
        })?;
        let metrics = read_metrics(&outcomes, Some(&joined_norm(&norms)?))?;
        let state = check_finite(step, parts, &outcomes, &metrics)?;
        tracing::debug!(step, "gradients released, weights updated");
        Ok((metrics, state))
    }
}

fn the_only<'e>(parts: &[&'e [Example]]) -> Result<&'e [Example]> {
    match parts {
        [part] => Ok(part),
        _ => Err(Error::Argument(format!(
            "release_gradients: expected a step's examples in one forward and backward pass, found {} passes of {:?} \
             examples; the gradients of one pass cannot be released while others add to them: make batches larger, or turn \
             it off",
            parts.len(),
            parts.iter().map(|part| part.len()).collect::<Vec<_>>()
        ))),
    }
}
