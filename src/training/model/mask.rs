//! Which tokens a token attends to.

use tch::{Device, Kind, Tensor};

use crate::device::upload;
use crate::generate::CachePass;
use crate::{Error, Result};

/// Tokens for a decoder, with their positions.
#[derive(Debug)]
pub struct ModelInput {
    /// Token ids, (batch, tokens), i64.
    pub ids: Tensor,
    /// Each token's position in its own sequence, (batch, tokens), i64: where the mask says where sequences begin, what it
    /// says.
    pub positions: Tensor,
    /// Which tokens attend to which.
    pub mask: AttentionMask,
}

/// Which keys each query attends to. A sliding window, where the model has one, is the decoder's business and comes on
/// top: a query sees keys whose positions are less than the window behind its own.
#[derive(Debug)]
pub enum AttentionMask {
    /// Each token attends to itself and to all before it, cached ones included.
    Causal,
    /// Bool, (batch or 1, 1, queries, keys), true where the query attends to the key; keys are the cached tokens and
    /// then the input's own. Every query, padding too, must attend to something.
    Dense(Tensor),
    /// One row that holds these pairs of sequences, one after the other. No pair sees another, nor anything cached. Tokens
    /// after them fill the row up: nothing sees them, and what the decoder returns there is meaningless.
    Pairs(Vec<SharedPrefix>),
}

/// Two sequences that begin alike, laid out as: the tokens both begin with, the rest of the first, the rest of the
/// second. Attention works on each part by itself, so that nothing is padded and nothing computed twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedPrefix {
    /// Tokens both begin with.
    pub shared: i64,
    /// Tokens of the first sequence, the shared ones included.
    pub first: i64,
    /// Tokens of the second behind the shared ones; 0 where there is no second, or nothing more of it.
    pub second: i64,
}

impl ModelInput {
    /// Rows of tokens padded at their right ends to the longest. Since padding comes after all tokens of its row, a
    /// causal mask keeps it out of sight; what the decoder returns at padding is meaningless.
    pub fn right_padded<R: AsRef<[u32]>>(rows: &[R], pad: u32, device: Device) -> Result<Self> {
        let tokens = rows.iter().map(|row| row.as_ref().len()).max().unwrap_or(0);
        if rows.iter().any(|row| row.as_ref().is_empty()) || tokens == 0 {
            return Err(Error::Argument("a batch needs at least one row, and each row at least one token".into()));
        }
        let mut ids = Vec::with_capacity(rows.len() * tokens);
        for row in rows {
            let row = row.as_ref();
            ids.extend(row.iter().map(|&id| i64::from(id)));
            ids.resize(ids.len() + tokens - row.len(), i64::from(pad));
        }
        let (batch, tokens) = (rows.len() as i64, tokens as i64);
        let ids = upload(&ids, device)?.f_view([batch, tokens])?;
        let positions = Tensor::f_arange(tokens, (Kind::Int64, device))?.f_unsqueeze(0)?;
        Ok(ModelInput { ids, positions: positions.f_expand([batch, tokens], false)?, mask: AttentionMask::Causal })
    }

    /// The sequences that attend to themselves alone, where that says all.
    fn in_pairs(&self, keys: i64, cache: Option<&CachePass>) -> Result<Option<Vec<SharedPrefix>>> {
        let (batch, tokens) = self.ids.size2()?;
        Ok(match &self.mask {
            AttentionMask::Pairs(pairs) => Some(and_filler(pairs, tokens)),
            AttentionMask::Causal if tokens > 1 && tokens == keys && !cache.is_some_and(CachePass::is_ragged) => {
                Some(vec![SharedPrefix { shared: 0, first: tokens, second: 0 }; batch as usize])
            }
            AttentionMask::Causal | AttentionMask::Dense(_) => None,
        })
    }

    /// Tokens of the longest sequence, `cached` ones included. The host knows, except with a dense mask: that does not say
    /// where sequences begin.
    pub(super) fn longest(&self, cached: i64) -> Result<i64> {
        Ok(match &self.mask {
            AttentionMask::Causal => cached + self.ids.size2()?.1,
            AttentionMask::Pairs(pairs) => {
                pairs.iter().map(|pair| pair.first.max(pair.shared + pair.second)).max().unwrap_or(0)
            }
            AttentionMask::Dense(_) if self.positions.numel() == 0 => 0,
            AttentionMask::Dense(_) => self.positions.f_max()?.f_int64_value(&[])? + 1,
        })
    }

    /// (batch, tokens), once all three parts are known to fit each other and `cached` tokens before them.
    pub(super) fn sizes(&self, cached: i64) -> Result<(i64, i64)> {
        let (batch, tokens) = self.ids.size2()?;
        if self.positions.size() != [batch, tokens] {
            let found = self.positions.size();
            return Err(Error::Argument(format!("positions: expected shape {:?}, found {found:?}", [batch, tokens])));
        }
        if let AttentionMask::Pairs(pairs) = &self.mask {
            let held: i64 = pairs.iter().map(|pair| pair.first + pair.second).sum();
            let whole = pairs.iter().all(|pair| 0 <= pair.shared && pair.shared <= pair.first && pair.first > 0);
            if batch != 1 || cached != 0 || held > tokens || !whole {
                return Err(Error::Argument(format!(
                    "attention mask: expected one row of {tokens} tokens with pairs that attend to nothing cached, found \
                     {batch} rows, {cached} cached, and pairs {pairs:?}"
                )));
            }
        }
        if let AttentionMask::Dense(mask) = &self.mask {
            let (size, rest) = (mask.size(), [1, tokens, cached + tokens]);
            if size.len() != 4 || (size[0] != batch && size[0] != 1) || size[1..] != rest || mask.kind() != Kind::Bool {
                let expected = [batch, 1, tokens, cached + tokens];
                let kind = mask.kind();
                return Err(Error::Argument(format!(
                    "attention mask: expected Bool of shape {expected:?}, found {kind:?} of shape {size:?}"
                )));
            }
        }
        Ok((batch, tokens))
    }
}

/// The pairs, and the tokens behind them as one more, for attention to have something to work on everywhere.
fn and_filler(pairs: &[SharedPrefix], tokens: i64) -> Vec<SharedPrefix> {
    let filler = tokens - pairs.iter().map(|pair| pair.first + pair.second).sum::<i64>();
    let filler = (filler > 0).then_some(SharedPrefix { shared: 0, first: filler, second: 0 });
    pairs.iter().copied().chain(filler).collect()
}

/// Numbers of a mask from one query to the next, or a multiple. libtorch's attention with a mask on a GPU takes no other: it
/// would copy the mask in each call, and keep each copy for the backward pass.
const ALIGNMENT: i64 = 8;

/// A mask as attention takes it.
pub(super) enum LayerMask {
    /// All queries attend to all keys.
    Everything,
    /// As many queries as keys, each attending to itself and what is before it.
    Causal,
    /// Added to the scores: 0 or minus infinity, (batch or 1, 1, queries, keys).
    Additive(Tensor),
    /// Each pair by itself.
    Pairs(Vec<PairMask>),
    /// What [`products::attend`](crate::native::products::attend) takes: pairs, (pairs, 3), and the window.
    Sequences(Tensor, Option<i64>),
}

/// The masks of one pair.
pub(super) struct PairMask {
    pub pair: SharedPrefix,
    /// Of the first sequence to itself.
    pub first: LayerMask,
    /// Of the second's own tokens to the shared ones and to themselves; if causal, the shared ones are to be queries too.
    pub second: LayerMask,
}

/// Flash attention, which GPUs have for bfloat16, takes no mask but the causal one, with as many queries as keys. For the
/// second of a pair that means to compute the shared tokens' queries once more, and to leave out what comes of them. That
/// is less than a mask costs (another kernel, of half the speed, and keys repeated for their groups) up to about this many
/// shared tokens for each of the second's own: its products are then twice those with the mask.
const MOST_SHARED: i64 = 3;

impl PairMask {
    pub fn new(pair: SharedPrefix, window: Option<i64>, device: Device, kind: Kind) -> Result<Self> {
        let masked = |queries: i64, keys: i64| -> Result<LayerMask> {
            let mut visible = causal(queries, keys, device)?;
            if let Some(window) = window {
                // A key as far back as the window is out of sight.
                visible = visible.f_logical_and(&visible.f_tril(keys - queries - window)?.f_logical_not()?)?;
            }
            Ok(LayerMask::Additive(additive(&visible, kind)?))
        };
        let far = |keys: i64| window.is_some_and(|window| window < keys);
        let first = if far(pair.first) { masked(pair.first, pair.first)? } else { LayerMask::Causal };
        let has_flash = matches!(device, Device::Cuda(_)) && kind == Kind::BFloat16;
        let second = match pair.second {
            0 => LayerMask::Everything,
            tokens if has_flash && pair.shared <= MOST_SHARED * tokens && !far(pair.shared + tokens) => {
                LayerMask::Causal
            }
            tokens => masked(tokens, pair.shared + tokens)?,
        };
        Ok(PairMask { pair, first, second })
    }
}

/// The masks of a forward pass, made once for all layers.
pub(super) struct LayerMasks {
    full: LayerMask,
    /// None where it is the same.
    sliding: Option<LayerMask>,
}

impl LayerMasks {
    /// Of a layer with a sliding window, or without.
    pub fn of(&self, slides: bool) -> &LayerMask {
        self.sliding.as_ref().filter(|_| slides).unwrap_or(&self.full)
    }

    fn in_sequences(pairs: &[SharedPrefix], window: Option<i64>) -> Result<Self> {
        let numbers: Vec<i64> = pairs.iter().flat_map(|pair| [pair.shared, pair.first, pair.second]).collect();
        let pairs = Tensor::f_from_slice(&numbers)?.f_view([-1, 3])?;
        let sliding = window.map(|window| LayerMask::Sequences(pairs.shallow_clone(), Some(window)));
        Ok(LayerMasks { full: LayerMask::Sequences(pairs, None), sliding })
    }

    /// With `fused` for [`native::products`](crate::native::products) wherever that can do it.
    pub fn new(
        input: &ModelInput,
        cache: Option<&CachePass>,
        window: Option<i64>,
        kind: Kind,
        fused: bool,
    ) -> Result<Self> {
        let tokens = input.ids.size2()?.1;
        let keys = cache.map_or(0, CachePass::keys).max(tokens);
        input.sizes(keys - tokens)?;
        if fused && let Some(pairs) = input.in_pairs(keys, cache)? {
            return LayerMasks::in_sequences(&pairs, window);
        }
        let key_positions = || Tensor::f_arange(keys, (Kind::Int64, input.ids.device()))?.f_view([1, 1, 1, keys]);
        // (batch, 1, queries, 1)
        let query_positions = || input.positions.f_unsqueeze(1)?.f_unsqueeze(-1);
        if let AttentionMask::Pairs(pairs) = &input.mask {
            let pairs = and_filler(pairs, tokens);
            let masks = |window| -> Result<LayerMask> {
                let mask = |pair: &SharedPrefix| PairMask::new(*pair, window, input.ids.device(), kind);
                Ok(LayerMask::Pairs(pairs.iter().map(mask).collect::<Result<_>>()?))
            };
            let sliding = window.map(|window| masks(Some(window))).transpose()?;
            return Ok(LayerMasks { full: masks(None)?, sliding });
        }
        let visible = match &input.mask {
            AttentionMask::Pairs(_) => None,
            AttentionMask::Dense(mask) => Some(mask.shallow_clone()),
            AttentionMask::Causal if cache.is_some_and(CachePass::is_ragged) => {
                Some(key_positions()?.f_le_tensor(&query_positions()?)?)
            }
            // One query attends to all keys; the very first tokens are what plain causal attention is for.
            AttentionMask::Causal if tokens == 1 || tokens == keys => None,
            AttentionMask::Causal => Some(causal(tokens, keys, input.ids.device())?),
        };
        let plain = if tokens == 1 { LayerMask::Everything } else { LayerMask::Causal };
        let full = match &visible {
            None => plain,
            Some(visible) => LayerMask::Additive(additive(visible, kind)?),
        };
        let sliding = match window {
            Some(window) if window < keys => {
                let visible = match visible {
                    Some(visible) => visible,
                    None => causal(tokens, keys, input.ids.device())?,
                };
                // A cached token is in the slot of its position. (batch, 1, 1, keys)
                let key_positions = match cache {
                    Some(_) => key_positions()?,
                    None => input.positions.f_unsqueeze(1)?.f_unsqueeze(1)?,
                };
                let near = query_positions()?.f_sub(&key_positions)?.f_lt(window)?;
                Some(LayerMask::Additive(additive(&near.f_logical_and(&visible)?, kind)?))
            }
            _ => None,
        };
        Ok(LayerMasks { full, sliding })
    }
}

/// (1, 1, queries, keys): the queries are the last of the keys.
fn causal(queries: i64, keys: i64, device: Device) -> Result<Tensor> {
    Ok(Tensor::f_ones([1, 1, queries, keys], (Kind::Bool, device))?.f_tril(keys - queries)?)
}

/// 0 where a key is visible, else minus infinity. What it says of a query begins at a multiple of [`ALIGNMENT`] in memory.
fn additive(visible: &Tensor, kind: Kind) -> Result<Tensor> {
    let (batch, heads, queries, keys) = visible.size4()?;
    let size = [batch, heads, queries, (keys + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT];
    let mut mask = Tensor::f_zeros(size, (kind, visible.device()))?.f_narrow(-1, 0, keys)?;
    // In place: a new tensor would have no gaps.
    let _ = mask.f_masked_fill_(&visible.f_logical_not()?, f64::NEG_INFINITY)?;
    Ok(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(mask: AttentionMask) -> ModelInput {
        ModelInput { mask, ..ModelInput::right_padded(&[vec![1u32, 2, 3], vec![4]], 9, Device::Cpu).unwrap() }
    }

    #[test]
    fn rows_are_padded_at_their_right_ends() {
        let input = input(AttentionMask::Causal);
        assert_eq!(Vec::<Vec<i64>>::try_from(&input.ids).unwrap(), [[1, 2, 3], [4, 9, 9]]);
        assert_eq!(Vec::<Vec<i64>>::try_from(&input.positions).unwrap(), [[0, 1, 2], [0, 1, 2]]);
    }

    #[test]
    fn a_window_hides_what_lies_further_back() {
        let masks = LayerMasks::new(&input(AttentionMask::Causal), None, Some(2), Kind::Float, false).unwrap();
        let (LayerMask::Causal, LayerMask::Additive(sliding)) = (masks.of(false), masks.of(true)) else { panic!() };
        let visible = sliding.get(0).get(0).isfinite().to_kind(Kind::Int64);
        assert_eq!(Vec::<Vec<i64>>::try_from(visible).unwrap(), [[1, 0, 0], [1, 1, 0], [0, 1, 1]]);
    }

    #[test]
    fn a_window_no_shorter_than_the_input_costs_nothing() {
        let masks = LayerMasks::new(&input(AttentionMask::Causal), None, Some(3), Kind::Float, false).unwrap();
        assert!(matches!(masks.of(true), LayerMask::Causal));
    }

    #[test]
    fn a_mask_has_gaps_in_memory_where_keys_are_no_multiple() {
        for (keys, apart) in [(7, 8), (8, 8), (9, 16)] {
            let visible = causal(5, keys, Device::Cpu).unwrap();
            let mask = additive(&visible, Kind::Float).unwrap();
            assert_eq!((mask.size(), mask.stride()), (vec![1, 1, 5, keys], vec![5 * apart, 5 * apart, apart, 1]));
            let plain = Tensor::zeros([1, 1, 5, keys], (Kind::Float, Device::Cpu));
            assert_eq!(mask, plain.masked_fill(&visible.logical_not(), f64::NEG_INFINITY));
            let of = |tokens: i64, step: f64| {
                (Tensor::arange(2 * tokens * 4, (Kind::Float, Device::Cpu)) * step).sin().view([1, 2, tokens, 4])
            };
            let attend = |mask: &Tensor| {
                let (key, value) = (of(keys, 2.3), of(keys, 0.7));
                Tensor::scaled_dot_product_attention(&of(5, 1.7), &key, &value, Some(mask), 0.0, false, None, false)
            };
            assert_eq!(attend(&mask), attend(&mask.contiguous()));
        }
    }

    #[test]
    fn pairs_without_a_window_have_their_masks_once() {
        let pairs = vec![SharedPrefix { shared: 1, first: 3, second: 2 }];
        let row = || Tensor::from_slice(&[0i64, 1, 2, 1, 2]).view([1, 5]);
        let input = ModelInput { ids: row(), positions: row(), mask: AttentionMask::Pairs(pairs) };
        let same = |window| {
            let masks = LayerMasks::new(&input, None, window, Kind::Float, false).unwrap();
            std::ptr::eq(masks.of(false), masks.of(true))
        };
        assert!(same(None) && !same(Some(2)));
    }

    #[test]
    fn the_longest_sequence_is_what_positions_say() {
        let row = |positions: &[i64], mask| {
            let row = || Tensor::from_slice(positions).view([1, -1]);
            ModelInput { ids: row(), positions: row(), mask }
        };
        let pairs = [(1, 3, 1), (1, 3, 4), (2, 2, 0)].map(|(shared, first, second)| {
            row(
                &(0..first).chain(shared..shared + second).collect::<Vec<_>>(),
                AttentionMask::Pairs(vec![SharedPrefix { shared, first, second }]),
            )
        });
        let dense = AttentionMask::Dense(Tensor::ones([1, 1, 4, 4], (Kind::Bool, Device::Cpu)));
        let dense = row(&[0, 1, 0, 1], dense);
        let cached = row(&[5, 6], AttentionMask::Causal);
        let pair = SharedPrefix { shared: 1, first: 3, second: 1 };
        let filled = row(&[vec![0, 1, 2, 1], vec![0; 60]].concat(), AttentionMask::Pairs(vec![pair]));
        let inputs = pairs.iter().chain([&dense, &filled]).map(|input| (input, 0));
        for (input, before) in inputs.chain([(&input(AttentionMask::Causal), 0), (&cached, 5)]) {
            assert_eq!(input.longest(before).unwrap(), input.positions.max().int64_value(&[]) + 1);
        }
    }

    #[test]
    fn inputs_whose_parts_do_not_fit_are_errors() {
        for rows in [vec![], vec![vec![1u32], vec![]]] {
            let message = ModelInput::right_padded(&rows, 0, Device::Cpu).unwrap_err().to_string();
            assert_eq!(message, "a batch needs at least one row, and each row at least one token");
        }
        let mut shifted = input(AttentionMask::Causal);
        shifted.positions = shifted.positions.narrow(1, 0, 2);
        let message = shifted.sizes(0).unwrap_err().to_string();
        assert_eq!(message, "positions: expected shape [2, 3], found [2, 2]");
        let mask = Tensor::ones([2, 1, 3, 3], (Kind::Float, Device::Cpu));
        let message = input(AttentionMask::Dense(mask)).sizes(1).unwrap_err().to_string();
        assert_eq!(message, "attention mask: expected Bool of shape [2, 1, 3, 4], found Float of shape [2, 1, 3, 3]");
    }
}
