//! Log-probabilities of examples' responses under a model that is not being trained.

use tch::{Kind, no_grad};

use super::Example;
use super::example::Sequence;
use super::layout::{LayoutKind, lay_out};
use crate::Result;
use crate::logps::{Head, Limits};
use crate::model::{Compute, Decoder};
use crate::parameters::ParameterSet;

/// A response's log-probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ResponseScore {
    /// Summed over its tokens, in nats.
    pub logps: f32,
    /// Tokens summed over.
    pub tokens: usize,
}

impl ResponseScore {
    /// Log-probability per token.
    pub fn mean(&self) -> f32 {
        self.logps / self.tokens as f32
    }
}

/// An example's responses under a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExampleScore {
    /// The chosen response.
    pub chosen: ResponseScore,
    /// The rejected response, where there is one.
    pub rejected: Option<ResponseScore>,
}

/// Score the responses of all examples, `micro_batch_size` examples at a time: in the layout that goes with the kernels.
pub fn score(
    decoder: &Decoder,
    parameters: &ParameterSet,
    examples: &[Example],
    compute: &Compute,
    micro_batch_size: usize,
) -> Result<Vec<ExampleScore>> {
    for example in examples {
        example.check_tokens(decoder)?;
    }
    if examples.is_empty() {
        return Ok(Vec::new());
    }
    let head = Head::new(decoder, parameters, compute, Limits::default())?;
    let mut scores = Vec::with_capacity(examples.len());
    for part in examples.chunks(micro_batch_size.max(1)) {
        let chosen: Vec<_> = part.iter().map(|example| example.chosen(false)).collect();
        let rejected: Vec<_> = part.iter().map(Example::rejected).collect();
        let layout = lay_out(LayoutKind::suited_to(compute.kernels), decoder, compute, &chosen, &rejected)?;
        let sums = no_grad(|| {
            let hidden = decoder.hidden_states(parameters, &layout.input, None, compute)?;
            let logps = head.logps(&layout.predicting(&hidden)?, &layout.targets)?;
            Ok::<_, crate::Error>(Vec::<f32>::try_from(layout.responses.f_mv(&logps)?.f_to_kind(Kind::Float)?)?)
        })?;
        let score = |sequence: &Sequence, logps: f32| ResponseScore { logps, tokens: sequence.response_tokens() };
        let (of_chosen, of_rejected) = sums.split_at(part.len());
        let mut of_rejected = of_rejected.iter();
        for ((chosen, rejected), &logps) in chosen.iter().zip(&rejected).zip(of_chosen) {
            let rejected = rejected.as_ref().and_then(|sequence| Some(score(sequence, *of_rejected.next()?)));
            scores.push(ExampleScore { chosen: score(chosen, logps), rejected });
        }
    }
    Ok(scores)
}

/// Summed log-probabilities of every example's chosen and rejected response under a reference model, in nats; 0 for a
/// rejected response that is absent.
pub fn reference_logps(
    decoder: &Decoder,
    parameters: &ParameterSet,
    examples: &[Example],
    compute: &Compute,
    micro_batch_size: usize,
) -> Result<Vec<(f32, f32)>> {
    let scores = score(decoder, parameters, examples, compute, micro_batch_size)?;
    Ok(scores.iter().map(|score| (score.chosen.logps, score.rejected.map_or(0.0, |rejected| rejected.logps))).collect())
}
