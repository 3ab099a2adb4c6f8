//! The weights as decoding reads them.

use tch::{Device, Tensor};

use super::few_rows::FewRows;
use super::{CachePass, Decoding, KvCache, PackedWeights, Recording};
use crate::model::{AttentionMask, Compute, Decoder, Kernels, ModelInput};
use crate::parameters::ParameterSet;
use crate::{Error, Result};

/// Rows up to which reading the weights takes longer than the arithmetic.
const MOST_ROWS: usize = 16;

/// Tokens from which on laying the weights out pays: it takes about as long as this many tokens save by it.
const WORTHWHILE_TOKENS: usize = 12;

/// How decoding reads the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// As everything else does.
    Plain,
    /// Laid out by oneDNN for many rows.
    Packed,
    /// In place, by products of our own for a few rows.
    InPlace,
    /// The same in 8 bits.
    Int8,
}

impl Decoding {
    /// How the weights are read for so many rows under way at a time, and at most so many tokens a response.
    pub(crate) fn layout(&self, device: Device, kernels: Kernels, rows: usize, new_tokens: usize) -> Layout {
        match device {
            Device::Cpu if self.int8_weights => Layout::Int8,
            _ if self.recording != Recording::None => Layout::Plain,
            Device::Cpu if !self.pack_weights => Layout::Plain,
            Device::Cpu if kernels == Kernels::Fused && rows <= MOST_ROWS => Layout::InPlace,
            Device::Cpu if new_tokens >= WORTHWHILE_TOKENS => Layout::Packed,
            _ => Layout::Plain,
        }
    }
}

/// A decoder's weights in one of the layouts.
pub(super) enum DecodingWeights {
    /// [`Layout::Plain`] and [`Layout::Packed`]: the weights, and those of them that are laid out anew.
    Whole(ParameterSet, PackedWeights),
    /// [`Layout::InPlace`] and [`Layout::Int8`].
    FewRows(FewRows),
}

impl DecodingWeights {
    /// Takes the weights over, for batches of `rows` rows.
    pub fn new(mut weights: ParameterSet, decoder: &Decoder, layout: Layout, rows: usize) -> Result<Self> {
        Ok(match layout {
            Layout::Plain => DecodingWeights::Whole(weights, PackedWeights::default()),
            Layout::Packed => {
                let packed = PackedWeights::take_from(&mut weights, decoder, rows as i64)?;
                DecodingWeights::Whole(weights, packed)
            }
            Layout::InPlace => DecodingWeights::FewRows(FewRows::take_from(&mut weights, decoder, false)?),
            Layout::Int8 => DecodingWeights::FewRows(FewRows::take_from(&mut weights, decoder, true)?),
        })
    }

    /// Runs one token a row, (rows, 1), at `positions` (rows, 1) through the decoder; returns the hidden states (rows,
    /// hidden_size) at them.
    pub fn feed(
        &self,
        decoder: &Decoder,
        tokens: &Tensor,
        positions: &Tensor,
        cache: &mut KvCache,
        compute: &Compute,
    ) -> Result<Tensor> {
        match self {
            DecodingWeights::FewRows(few_rows) => few_rows.feed(decoder, tokens, positions, cache),
            DecodingWeights::Whole(..) => self.feed_into(decoder, tokens, positions, &cache.begin(positions)?, compute),
        }
    }

    /// The same without a word about how many tokens `pass` finds, or who counts them: see [`KvCache::at`].
    pub fn feed_into(
        &self,
        decoder: &Decoder,
        tokens: &Tensor,
        positions: &Tensor,
        pass: &CachePass,
        compute: &Compute,
    ) -> Result<Tensor> {
        let DecodingWeights::Whole(weights, packed) = self else {
            return Err(Error::Argument("cuda_graphs: expected no int8_weights".into()));
        };
        let (ids, positions) = (tokens.shallow_clone(), positions.shallow_clone());
        let input = ModelInput { ids, positions, mask: AttentionMask::Causal };
        Ok(decoder.hidden_states_in(weights, packed, &input, Some(pass), compute)?.f_squeeze_dim(1)?)
    }

    /// The head on hidden states (rows, hidden_size): logits (rows, vocab_size) as f32.
    pub fn logits(&self, decoder: &Decoder, hidden: &Tensor, compute: &Compute) -> Result<Tensor> {
        match self {
            DecodingWeights::FewRows(few_rows) => few_rows.logits(hidden),
            DecodingWeights::Whole(weights, packed) => decoder.logits_with(weights, packed, hidden, compute),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_tokens_and_kernels_decide_how_weights_are_read() {
        let layout = |decoding: Decoding, kernels, rows, tokens| decoding.layout(Device::Cpu, kernels, rows, tokens);
        let (fast, plain) = (Decoding::default(), Decoding::suited_to(Kernels::Plain));
        assert_eq!(layout(fast, Kernels::Fused, 16, 1), Layout::InPlace);
        assert_eq!(layout(fast, Kernels::Fused, 17, 12), Layout::Packed);
        assert_eq!(layout(fast, Kernels::Fused, 17, 11), Layout::Plain);
        assert_eq!(layout(fast, Kernels::Plain, 1, 12), Layout::Packed);
        assert_eq!(layout(plain, Kernels::Plain, 1, 12), Layout::Plain);
        assert_eq!(layout(plain, Kernels::Plain, 17, 12), Layout::Plain);
    }
}
