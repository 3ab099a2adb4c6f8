//! How sequences stand in a forward pass, and which of its hidden states predict tokens that a loss needs.
//!
//! The rest of the learner knows a layout only through its fields, so another way to lay sequences out is another
//! function that makes one.

use std::collections::HashMap;
use std::iter::once;
use std::ops::Range;
use std::slice::from_ref;

use tch::Tensor;

use super::example::Sequence;
use crate::Result;
use crate::device::upload;
use crate::model::{AttentionMask, Compute, Decoder, Kernels, ModelInput, SharedPrefix};
use crate::native::products;

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
    /// 1 where a row's token belongs to a chosen sequence, prompt and response, else 0; (pairs, rows) f32. None where
    /// prompts are not scored.
    pub chosen_sequences: Option<Tensor>,
}

/// Which of the two layouts a learner uses. Both give the same losses and gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LayoutKind {
    /// An example's responses behind the tokens that both begin with, all examples in one row: nothing is padded, and
    /// nothing that both responses share is computed twice.
    #[default]
    SharedPrefix,
    /// Each response with its prompt in a row of its own, padded to the longest: the plain way.
    Padded,
}

impl LayoutKind {
    /// What goes with these kernels where nothing else is said: with the plain ones the plain way.
    pub fn suited_to(kernels: Kernels) -> Self {
        match kernels {
            Kernels::Fused => LayoutKind::SharedPrefix,
            Kernels::Plain => LayoutKind::Padded,
        }
    }
}

/// Numbers of tokens and of rows are rounded up to a multiple of this for [`LayoutKind::SharedPrefix`], where oneDNN
/// computes: it makes code for every shape of a product, in 0.4 ms and more, and keeps the last ones.
const MULTIPLE: usize = 64;

/// Lays out chosen sequences and the rejected ones that go with them, where there are any. In the layout's `responses` come
/// all chosen ones, then the rejected ones.
pub(super) fn lay_out(
    kind: LayoutKind,
    decoder: &Decoder,
    compute: &Compute,
    chosen: &[Sequence],
    rejected: &[Option<Sequence>],
) -> Result<Layout> {
    match kind {
        LayoutKind::SharedPrefix => {
            let by_onednn = products::by_onednn(compute.kind, decoder.device);
            shared_prefix(decoder, if by_onednn { MULTIPLE } else { 1 }, chosen, rejected)
        }
        LayoutKind::Padded => {
            padded(decoder, &chosen.iter().chain(rejected.iter().flatten()).copied().collect::<Vec<_>>())
        }
    }
}

/// Predictions under construction.
#[derive(Default)]
struct Predictions {
    rows: Vec<i64>,
    targets: Vec<i64>,
    /// For each sequence, the spans of rows that belong to its response.
    spans: Vec<Vec<Range<usize>>>,
    /// For each sequence whose prompt is scored too, the rows that belong to it.
    sequences: Vec<Range<usize>>,
}

impl Predictions {
    fn push(&mut self, row: usize, target: u32) {
        self.rows.push(row as i64);
        self.targets.push(i64::from(target));
    }

    /// The rows of a pair whose tokens begin at `start`: all of the first sequence, then the second one's own. `first` and
    /// `second` are the sequences' tokens.
    fn pair(&mut self, start: usize, sequence: &Sequence, first: &[u32], second: Option<(&Sequence, &[u32])>) -> Rows {
        let from = sequence.first_scored();
        let first_row = self.rows.len();
        for (position, &id) in first.iter().enumerate().skip(from) {
            self.push(start + position - 1, id);
        }
        let row_of = |position: usize| first_row + position - from;
        let end = row_of(first.len());
        let mut rows = Rows {
            shared: first.len(),
            chosen: once(row_of(sequence.first_response())..end).collect(),
            whole: first_row..end,
            rejected: None,
        };
        if let Some((other, second)) = second {
            let shared = first.iter().zip(second).take_while(|(left, right)| left == right).count();
            let begins = other.first_response();
            let own_row = self.rows.len();
            for (position, &id) in second.iter().enumerate().skip(begins.max(shared)) {
                // The last shared token predicts the first one of the second sequence's own.
                let before = if position == shared { start + shared } else { start + first.len() + position - shared };
                self.push(before - 1, id);
            }
            rows.rejected = Some(vec![row_of(begins)..row_of(shared.max(begins)), own_row..self.rows.len()]);
            rows.shared = shared;
        }
        rows
    }

    fn finish(self, decoder: &Decoder, input: ModelInput) -> Result<Layout> {
        let count = self.rows.len();
        let device = decoder.device;
        // (sequences, rows), 1 in each sequence's spans.
        let members = |spans: &[&[Range<usize>]]| -> Result<Tensor> {
            let mut members = vec![0.0f32; spans.len() * count];
            for (index, spans) in spans.iter().enumerate() {
                for span in *spans {
                    members[index * count..][span.clone()].fill(1.0);
                }
            }
            let shape = [spans.len() as i64, count as i64];
            Ok(upload(&members, device)?.f_view(shape)?)
        };
        let tokens = |spans: &Vec<Range<usize>>| spans.iter().map(Range::len).sum::<usize>() as f32;
        let tokens: Vec<f32> = self.spans.iter().map(tokens).collect();
        let sequences: Vec<&[Range<usize>]> = self.sequences.iter().map(from_ref).collect();
        Ok(Layout {
            input,
            rows: upload(&self.rows, device)?,
            targets: upload(&self.targets, device)?,
            responses: members(&self.spans.iter().map(Vec::as_slice).collect::<Vec<_>>())?,
            response_tokens: upload(&tokens, device)?,
            chosen_sequences: if sequences.is_empty() { None } else { Some(members(&sequences)?) },
        })
    }
}

/// Where a pair stands among the rows.
#[derive(Clone)]
struct Rows {
    /// Tokens that both sequences begin with; all of the first where there is no second.
    shared: usize,
    /// The chosen response's spans.
    chosen: Vec<Range<usize>>,
    /// The chosen sequence's scored tokens.
    whole: Range<usize>,
    /// The rejected response's spans.
    rejected: Option<Vec<Range<usize>>>,
}

/// One sequence in each row of the batch, padded at the right.
fn padded(decoder: &Decoder, sequences: &[Sequence]) -> Result<Layout> {
    let width = sequences.iter().map(Sequence::len).max().unwrap_or(0);
    let mut predictions = Predictions::default();
    let mut all_ids = Vec::with_capacity(sequences.len());
    for (index, sequence) in sequences.iter().enumerate() {
        let ids = sequence.ids();
        let begin = predictions.rows.len();
        for (position, &id) in ids.iter().enumerate().skip(sequence.first_scored()) {
            predictions.push(index * width + position - 1, id);
        }
        // The response's rows are the sequence's last.
        let end = predictions.rows.len();
        predictions.spans.push(once(end - sequence.response_tokens()..end).collect());
        predictions.sequences.extend(sequence.prompt_scored.then_some(begin..end));
        all_ids.push(ids);
    }
    predictions.finish(decoder, decoder.input(&all_ids)?)
}

/// All pairs in one row, without padding: of each pair the tokens that both sequences begin with, the rest of the chosen
/// one, the rest of the rejected one. A pair that is there more than once, as replay buffers draw them, is computed once: its
/// sequences share their rows.
fn shared_prefix(
    decoder: &Decoder,
    multiple: usize,
    chosen: &[Sequence],
    rejected: &[Option<Sequence>],
) -> Result<Layout> {
    let mut predictions = Predictions::default();
    let (mut ids, mut positions, mut pairs) = (Vec::new(), Vec::new(), Vec::new());
    let mut rejected_spans = Vec::new();
    let mut laid_out = HashMap::new();
    for (sequence, other) in chosen.iter().zip(rejected) {
        let start = ids.len();
        let (first, second) = (sequence.ids(), other.as_ref().map(Sequence::ids));
        let from = sequence.first_scored();
        let pair = (first, second, sequence.first_response(), from);
        let rows = match laid_out.get(&pair) {
            Some(rows) => Rows::clone(rows),
            None => {
                let (first, second, ..) = &pair;
                let rows = predictions.pair(start, sequence, first, other.as_ref().zip(second.as_deref()));
                let shared = rows.shared;
                ids.extend(first.iter().map(|&id| i64::from(id)));
                positions.extend(0..first.len() as i64);
                let own = second.iter().flat_map(|second| &second[shared..]);
                let tokens = ids.len();
                ids.extend(own.map(|&id| i64::from(id)));
                let own = ids.len() - tokens;
                positions.extend(shared as i64..(shared + own) as i64);
                pairs.push(SharedPrefix { shared: shared as i64, first: first.len() as i64, second: own as i64 });
                laid_out.insert(pair, rows.clone());
                rows
            }
        };
        predictions.spans.push(rows.chosen);
        predictions.sequences.extend(sequence.prompt_scored.then_some(rows.whole));
        rejected_spans.extend(rows.rejected);
    }
    predictions.spans.extend(rejected_spans);
    // Tokens and rows that belong to no sequence: no pair sees them, and no gradient comes from them.
    let tokens = ids.len().next_multiple_of(multiple);
    ids.resize(tokens, 0);
    positions.resize(tokens, 0);
    while !predictions.rows.len().is_multiple_of(multiple) {
        predictions.push(0, 0);
    }
    let row = |values: &[i64]| -> Result<Tensor> { Ok(upload(values, decoder.device)?.f_unsqueeze(0)?) };
    let input = ModelInput { ids: row(&ids)?, positions: row(&positions)?, mask: AttentionMask::Pairs(pairs) };
    predictions.finish(decoder, input)
}

impl Layout {
    /// Tell the log how much goes through the model.
    pub fn log_size(&self) {
        let (positions, logit_rows) = (self.input.ids.numel(), self.targets.numel());
        tracing::debug!(positions, logit_rows, "forward and backward pass");
    }

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

    #[test]
    fn without_a_prompt_the_first_token_of_a_response_cannot_be_scored() {
        let mut sequence = Sequence { prompt: &[], response: &[5, 6, 7], prompt_scored: false };
        assert_eq!((sequence.first_response(), sequence.response_tokens(), sequence.scored_tokens()), (1, 2, 2));
        sequence.prompt = &[1, 2];
        assert_eq!((sequence.first_response(), sequence.response_tokens(), sequence.scored_tokens()), (2, 3, 3));
        sequence.prompt_scored = true;
        assert_eq!((sequence.first_scored(), sequence.scored_tokens()), (1, 4));
    }
}
