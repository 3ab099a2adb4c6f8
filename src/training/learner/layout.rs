//! How sequences stand in a forward pass, and which of its hidden states predict tokens that a loss needs.
//!
//! The rest of the learner knows a layout only through its fields, so another way to lay sequences out (responses
//! packed behind a prompt that they share) is another function that makes one.

use tch::Tensor;

use super::example::Sequence;
use crate::Result;
use crate::model::{Decoder, ModelInput};

/// Sequences laid out for one forward pass. "Rows" are predictions: a hidden state, and the token that comes next.
pub(super) struct Layout {
    /// The decoder's input.
    pub input: ModelInput,
    /// Which hidden states predict, as indices into (batch * tokens); (rows,) i64.
    pub rows: Tensor,
    /// The tokens they predict; (rows,) i64.
    pub targets: Tensor,
    /// 1 where a row's token belongs to the response of a sequence, else 0; (sequences, rows) f32.
    pub responses: Tensor,
    /// Scored tokens of each response; (sequences,) f32.
    pub response_tokens: Tensor,
    /// 1 where an NLL term covers a row's token, else 0; (rows,) f32.
    pub counted: Tensor,
}

/// One sequence in each row of the batch, padded at the right.
pub(super) fn padded(decoder: &Decoder, sequences: &[Sequence]) -> Result<Layout> {
    let width = sequences.iter().map(Sequence::len).max().unwrap_or(0);
    let (mut rows, mut targets, mut counted, mut spans) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (index, sequence) in sequences.iter().enumerate() {
        let ids = sequence.ids();
        let (response, nll) = (sequence.first_response(), sequence.first_nll().unwrap_or(ids.len()));
        for (position, &id) in ids.iter().enumerate().skip(response.min(nll)) {
            rows.push((index * width + position - 1) as i64);
            targets.push(i64::from(id));
            counted.push(if position >= nll { 1.0f32 } else { 0.0 });
        }
        // The response's rows are the sequence's last.
        spans.push(rows.len() - sequence.response_tokens()..rows.len());
    }
    let mut responses = vec![0.0f32; sequences.len() * rows.len()];
    for (index, span) in spans.iter().enumerate() {
        responses[index * rows.len()..][span.clone()].fill(1.0);
    }
    let tokens: Vec<f32> = spans.iter().map(|span| span.len() as f32).collect();
    let ids: Vec<Vec<u32>> = sequences.iter().map(Sequence::ids).collect();
    Ok(Layout {
        input: decoder.input(&ids)?,
        responses: Tensor::f_from_slice(&responses)?
            .f_view([sequences.len() as i64, rows.len() as i64])?
            .f_to_device(decoder.device)?,
        rows: Tensor::f_from_slice(&rows)?.f_to_device(decoder.device)?,
        targets: Tensor::f_from_slice(&targets)?.f_to_device(decoder.device)?,
        response_tokens: Tensor::f_from_slice(&tokens)?.f_to_device(decoder.device)?,
        counted: Tensor::f_from_slice(&counted)?.f_to_device(decoder.device)?,
    })
}

impl Layout {
    /// The hidden states that predict, out of (batch, tokens, hidden_size): (rows, hidden_size), without a graph.
    pub fn predicting(&self, hidden: &Tensor) -> Result<Tensor> {
        let (_, _, size) = hidden.size3()?;
        // (batch, tokens, hidden_size) -> (batch * tokens, hidden_size)
        Ok(hidden.f_detach()?.f_reshape([-1, size])?.f_index_select(0, &self.rows)?)
    }

    /// The reverse for a gradient: (rows, hidden_size) to the shape of `hidden`, zero where nothing is predicted.
    pub fn spread(&self, gradient: &Tensor, hidden: &Tensor) -> Result<Tensor> {
        let (batch, tokens, size) = hidden.size3()?;
        let mut spread = Tensor::f_zeros([batch * tokens, size], (gradient.kind(), gradient.device()))?;
        // Unlike index_add, deterministic on GPUs.
        let _ = spread.f_index_put_(&[Some(&self.rows)], gradient, true)?;
        Ok(spread.f_view([batch, tokens, size])?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::example::Sequence;
    use crate::objectives::NllScope;

    #[test]
    fn without_a_prompt_the_first_token_of_a_response_cannot_be_scored() {
        let mut sequence = Sequence { prompt: &[], response: &[5, 6, 7], nll: Some(NllScope::Response) };
        assert_eq!((sequence.first_response(), sequence.response_tokens(), sequence.nll_tokens()), (1, 2, 2));
        sequence.prompt = &[1, 2];
        assert_eq!((sequence.first_response(), sequence.response_tokens(), sequence.nll_tokens()), (2, 3, 3));
        sequence.nll = Some(NllScope::Sequence);
        assert_eq!((sequence.first_nll(), sequence.nll_tokens()), (Some(1), 4));
    }
}
