//! Keys and values of the tokens a decoder has seen, so that each new token costs one token's work.

use tch::{Device, Kind, Tensor};

use crate::device::upload;
use crate::model::Decoder;
use crate::model::rope::Rotation;
use crate::{Error, Result};

/// Keys and values of all layers, in memory that is allocated once. A row's token at position p has the row's slot p, so
/// that a row can be continued, left out or begun anew whatever the others hold.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    /// Tokens in each row.
    lengths: Vec<i64>,
    /// Slots of a row.
    capacity: i64,
    device: Device,
    /// The rotations at all slots; none where they depend on a sequence's length.
    rotations: Option<Rotation>,
}

/// (rows, capacity, key heads, head_dim) each.
#[derive(Debug)]
struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

/// A prompt's way from a pass over several into a row: tokens `from..from + tokens` of the pass become the row's first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    pub row: usize,
    pub from: i64,
    pub tokens: i64,
}

/// What a forward pass does with a cache.
pub(crate) struct CachePass<'a> {
    cache: &'a KvCache,
    writes: Writes,
    /// Slots that the pass attends to.
    keys: i64,
}

/// Where the keys and values of a pass go.
enum Writes {
    /// Into the same slots of every row, from this one on.
    InStep(i64),
    /// Into these slots, (batch * tokens,), counted through all rows.
    Scattered(Tensor),
    /// Those of tokens `sources` (n,) of one row into `slots` (n,). The pass attends to itself alone.
    Filling { sources: Tensor, slots: Tensor },
}

impl KvCache {
    /// An empty cache for `rows` sequences of up to `capacity` tokens, with keys and values as `kind`.
    pub(crate) fn new(decoder: &Decoder, rows: i64, capacity: i64, kind: Kind) -> Result<Self> {
        let Decoder { config, rope, device } = decoder;
        let device = *device;
        let size = [rows, capacity, config.num_key_value_heads, config.head_dim];
        // Not just empty: a mask hides what a shorter row has not written yet, but not from a NaN times nought.
        let zeros = || Tensor::f_zeros(size, (kind, device));
        let layer = |_: &bool| Ok(LayerCache { keys: zeros()?, values: zeros()? });
        let positions = || Tensor::f_arange(capacity, (Kind::Int64, device))?.f_unsqueeze(0);
        let rotations = match rope.depends_on_length() {
            true => None,
            false => Some(rope.at(&positions()?, capacity, kind)?),
        };
        Ok(KvCache {
            layers: config.sliding_layers.iter().map(layer).collect::<Result<_>>()?,
            lengths: vec![0; rows as usize],
            capacity,
            device,
            rotations,
        })
    }

    /// Tokens in the longest row.
    pub fn used(&self) -> i64 {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// Slots of a row.
    pub(crate) fn capacity(&self) -> i64 {
        self.capacity
    }

    /// Slots that are left in the longest row.
    pub(crate) fn left(&self) -> i64 {
        self.capacity - self.used()
    }

    /// Tokens in each row.
    pub(crate) fn lengths(&self) -> &[i64] {
        &self.lengths
    }

    /// Starts a forward pass over tokens at `positions` (rows, tokens), each row's next ones.
    pub(crate) fn begin(&mut self, positions: &Tensor) -> Result<CachePass<'_>> {
        let (rows, tokens) = positions.size2()?;
        let used = self.used();
        let writes = match self.lengths.iter().all(|&length| length == used) {
            true => Writes::InStep(used),
            false => Writes::Scattered(self.slots(positions)?),
        };
        self.advance(rows, tokens)?;
        Ok(CachePass { cache: self, writes, keys: used + tokens })
    }

    /// A pass over tokens at `positions` (rows, tokens) in which nothing depends on how many tokens there are, so that it can
    /// be recorded: a mask hides what of `keys` slots lies behind a row's token. The tokens are not counted.
    pub(crate) fn at(&self, positions: &Tensor, keys: i64) -> Result<CachePass<'_>> {
        Ok(CachePass { cache: self, writes: Writes::Scattered(self.slots(positions)?), keys })
    }

    /// Slots, counted through all rows, of tokens at `positions` (rows, tokens): (rows * tokens,).
    fn slots(&self, positions: &Tensor) -> Result<Tensor> {
        let rows = positions.size()[0];
        let starts = Tensor::f_arange(rows, (Kind::Int64, self.device))?.f_mul_scalar(self.capacity)?;
        Ok(starts.f_unsqueeze(1)?.f_add(positions)?.f_flatten(0, 1)?)
    }

    /// Counts so many more tokens in each of its rows, for those who put their keys and values there themselves.
    pub(crate) fn advance(&mut self, rows: i64, tokens: i64) -> Result<()> {
        let (used, capacity) = (self.used(), self.capacity);
        if rows as usize != self.lengths.len() {
            let held = self.lengths.len();
            return Err(Error::Argument(format!("{rows} rows of tokens for a cache of {held} rows")));
        }
        if used + tokens > capacity {
            return Err(Error::Argument(format!("{used} + {tokens} tokens for a cache that holds {capacity}")));
        }
        self.lengths.iter_mut().for_each(|length| *length += tokens);
        Ok(())
    }

    /// One layer's keys and values, (rows, capacity, key heads, head_dim).
    pub(crate) fn layer(&self, layer: usize) -> [&Tensor; 2] {
        let LayerCache { keys, values } = &self.layers[layer];
        [keys, values]
    }

    /// The rotations at `positions` (batch, tokens); none where they depend on a sequence's length.
    pub(crate) fn rotation(&self, positions: &Tensor) -> Result<Option<Rotation>> {
        self.rotations.as_ref().map(|rotations| rotations.select(positions)).transpose()
    }

    /// Starts a forward pass over one row of prompts, which begin anew the rows that they are placed in.
    pub(crate) fn fill(&mut self, placements: &[Placement]) -> Result<CachePass<'_>> {
        let (mut sources, mut slots) = (Vec::new(), Vec::new());
        for &Placement { row, from, tokens } in placements {
            if tokens > self.capacity || row >= self.lengths.len() {
                let (rows, capacity) = (self.lengths.len(), self.capacity);
                let message = format!("{tokens} tokens for row {row} of a cache of {rows} rows that hold {capacity}");
                return Err(Error::Argument(message));
            }
            self.lengths[row] = tokens;
            sources.extend(from..from + tokens);
            slots.extend((0..tokens).map(|slot| row as i64 * self.capacity + slot));
        }
        let (sources, slots) = (upload(&sources, self.device)?, upload(&slots, self.device)?);
        let writes = Writes::Filling { sources, slots };
        Ok(CachePass { cache: self, writes, keys: 0 })
    }

    /// Forgets the last tokens of every row: the next ones take their slots.
    pub(crate) fn forget(&mut self, tokens: i64) {
        self.lengths.iter_mut().for_each(|length| *length -= tokens);
    }

    /// Begins a row anew with the first `tokens` of a row, which may be itself.
    pub(crate) fn copy_row(&mut self, from: usize, to: usize, tokens: i64) -> Result<()> {
        if from != to {
            for tensor in self.layers.iter().flat_map(|layer| [&layer.keys, &layer.values]) {
                let first_of = |row: usize| tensor.f_select(0, row as i64)?.f_narrow(0, 0, tokens);
                first_of(to)?.f_copy_(&first_of(from)?)?;
            }
        }
        self.lengths[to] = tokens;
        Ok(())
    }

    /// Keeps `rows` and lets the others go: row `rows[i]` becomes row i. In place, without fresh memory: a row that moves
    /// must come from beyond the new number of rows.
    pub(crate) fn keep_rows(&mut self, rows: &[usize]) -> Result<()> {
        for (to, &from) in rows.iter().enumerate() {
            self.copy_row(from, to, self.lengths[from])?;
        }
        let count = rows.len() as i64;
        for layer in &mut self.layers {
            layer.keys = layer.keys.f_narrow(0, 0, count)?;
            layer.values = layer.values.f_narrow(0, 0, count)?;
        }
        self.lengths.truncate(rows.len());
        Ok(())
    }
}

impl CachePass<'_> {
    /// Slots that the pass attends to, its own tokens' included; none where it attends to itself alone.
    pub(crate) fn keys(&self) -> i64 {
        self.keys
    }

    /// Whether rows hold different numbers of tokens, so that a mask has to hide what is behind the shorter ones' ends.
    pub(crate) fn is_ragged(&self) -> bool {
        matches!(self.writes, Writes::Scattered(_))
    }

    /// The cache itself.
    pub(crate) fn cache(&self) -> &KvCache {
        self.cache
    }

    /// Stores one layer's keys and values (batch, tokens, key heads, head_dim), and returns what the pass attends to:
    /// (batch, keys, key heads, head_dim).
    pub(crate) fn append(&self, layer: usize, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let stored = &self.cache.layers[layer];
        for (stored, new) in [(&stored.keys, keys), (&stored.values, values)] {
            // (rows, capacity, key heads, head_dim) -> (rows * capacity, key heads, head_dim): a view, never a copy.
            let slots_of_all_rows = || stored.f_view([-1, stored.size()[2], stored.size()[3]]);
            match &self.writes {
                Writes::InStep(start) => {
                    stored.f_narrow(1, *start, new.size()[1])?.f_copy_(new)?;
                }
                Writes::Scattered(slots) => {
                    let _ = slots_of_all_rows()?.f_index_copy_(0, slots, &new.f_flatten(0, 1)?)?;
                }
                Writes::Filling { sources, slots } => {
                    let new = new.f_squeeze_dim(0)?.f_index_select(0, sources)?;
                    let _ = slots_of_all_rows()?.f_index_copy_(0, slots, &new)?;
                }
            }
        }
        if let Writes::Filling { .. } | Writes::InStep(0) = self.writes {
            return Ok((keys.shallow_clone(), values.shallow_clone()));
        }
        Ok((stored.keys.f_narrow(1, 0, self.keys)?, stored.values.f_narrow(1, 0, self.keys)?))
    }
}
