//! Log-probabilities of examples' responses under a model that is not being trained.

use tch::{Kind, Tensor, no_grad};

use super::Example;
use super::layout::padded;
use crate::Result;
use crate::logps::Head;
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

/// Score the responses of all examples, `micro_batch_size` examples at a time.
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
    let sequences: Vec<Vec<_>> = examples
        .chunks(micro_batch_size.max(1))
        .map(|part| {
            let each = part.iter().map(|example| std::iter::once(example.chosen(None)).chain(example.rejected()));
            each.flatten().collect()
        })
        .collect();
    let sums = no_grad(|| {
        let head = Head::new(decoder, parameters, compute)?;
        let part_sums = sequences.iter().map(|part| {
            let layout = padded(decoder, part)?;
            let hidden = decoder.hidden_states(parameters, &layout.input, None, compute)?;
            let logps = head.logps(&layout.predicting(&hidden)?, &layout.targets)?;
            Ok(layout.responses.f_mv(&logps)?)
        });
        let sums = Tensor::f_cat(&part_sums.collect::<Result<Vec<_>>>()?, 0)?;
        Ok::<_, crate::Error>(Vec::<f32>::try_from(sums.f_to_kind(Kind::Float)?)?)
    })?;
    let mut scores = sequences
        .iter()
        .flatten()
        .zip(sums)
        .map(|(sequence, logps)| ResponseScore { logps, tokens: sequence.response_tokens() });
    let mut next = || scores.next().expect("every sequence has a sum");
    Ok(examples
        .iter()
        .map(|example| ExampleScore { chosen: next(), rejected: example.rejected_ids.is_some().then(&mut next) })
        .collect())
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
