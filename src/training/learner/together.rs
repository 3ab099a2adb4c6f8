//! A step whose pairs' losses depend on each other, where its pairs fill several passes.
//!
//! The gradients are exact, as in GradCache (Gao et al. 2021, arXiv 2101.06983): first the log-probabilities of all
//! parts, without a graph; from these the losses of the whole step, and their gradient with respect to the
//! log-probabilities; then each part again, with its share of that gradient. It takes one more forward pass of each part.

use tch::{Tensor, no_grad};

use super::Example;
use super::numbers::concatenated;
use super::pass::{Outcome, Pass};
use crate::Result;

impl Pass<'_> {
    /// As [`run`](Self::run) on all parts of a step together. `run` is given each part again, with what is known of its
    /// gradient.
    pub fn run_together(
        &self,
        parts: &[&[Example]],
        mut run: impl FnMut(&[Example], Option<&Tensor>) -> Result<Outcome>,
    ) -> Result<Vec<Outcome>> {
        let mut rows = Vec::with_capacity(parts.len());
        let mut pairs = Vec::with_capacity(parts.len());
        for part in parts {
            let layout = self.lay_out(part)?;
            let (logps, predicting) = no_grad(|| {
                let hidden = self.decoder.hidden_states(self.leaves, &layout.input, None, &self.compute)?;
                let predicting = layout.predicting(&hidden)?;
                Ok::<_, crate::Error>((self.head.logps(&predicting, &layout.targets)?, predicting))
            })?;
            let logps = logps.f_set_requires_grad(true)?;
            pairs.push(self.numbers(&logps, &predicting, &layout, part)?);
            rows.push(logps);
        }
        let (loss, outcome) = self.evaluate(&concatenated(pairs)?)?;
        let gradients = Tensor::f_run_backward(&[loss], &rows, false, false)?;
        let mut outcomes = vec![outcome];
        for (part, gradient) in parts.iter().zip(&gradients) {
            outcomes.push(run(part, Some(gradient))?);
        }
        Ok(outcomes)
    }
}
