//! Keys and values of the tokens a decoder has seen, so that each new token costs one token's work.

use tch::{Device, Kind, Tensor};

use crate::model::ModelConfig;
use crate::{Error, Result};

/// Keys and values of all layers, in memory that is allocated once. Rows fill their slots in step: slot `s` of every row
/// is written by the same call.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    /// Position of the token in each slot, (rows, capacity), i64.
    positions: Tensor,
    /// Slots that hold tokens.
    used: i64,
    /// Slots that the call under way fills.
    filling: i64,
    capacity: i64,
}

/// (rows, key heads, capacity, head_dim) each.
#[derive(Debug)]
struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

impl KvCache {
    /// An empty cache for `rows` sequences of up to `capacity` tokens, with keys and values as `kind`.
    pub fn new(config: &ModelConfig, rows: i64, capacity: i64, device: Device, kind: Kind) -> Result<Self> {
        let size = [rows, config.num_key_value_heads, capacity, config.head_dim];
        let empty = || Tensor::f_empty(size, (kind, device));
        let layer = |_: &bool| Ok(LayerCache { keys: empty()?, values: empty()? });
        Ok(KvCache {
            layers: config.sliding_layers.iter().map(layer).collect::<Result<_>>()?,
            positions: Tensor::f_empty([rows, capacity], (Kind::Int64, device))?,
            used: 0,
            filling: 0,
            capacity,
        })
    }

    /// Number of slots that hold tokens.
    pub fn used(&self) -> i64 {
        self.used
    }

    /// Starts a forward pass over tokens at `positions` (rows, tokens): the next slots become theirs.
    pub(crate) fn begin(&mut self, positions: &Tensor) -> Result<()> {
        let (_, tokens) = positions.size2()?;
        if self.used + tokens > self.capacity {
            let (used, capacity) = (self.used, self.capacity);
            return Err(Error::Argument(format!("{used} + {tokens} tokens for a cache that holds {capacity}")));
        }
        self.positions.f_narrow(1, self.used, tokens)?.f_copy_(positions)?;
        self.filling = tokens;
        self.used += tokens;
        Ok(())
    }

    /// Positions of the cached tokens and of those about to be added, (rows, used + tokens).
    pub(crate) fn positions_with(&self, positions: &Tensor) -> Result<Tensor> {
        Ok(Tensor::f_cat(&[&self.positions.f_narrow(1, 0, self.used)?, positions], 1)?)
    }

    /// Stores one layer's keys and values (rows, key heads, tokens, head_dim) of the pass under way, and returns all of
    /// the layer's: (rows, key heads, used, head_dim).
    pub(crate) fn append(&mut self, layer: usize, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let (start, tokens) = (self.used - self.filling, self.filling);
        let layer = &self.layers[layer];
        layer.keys.f_narrow(2, start, tokens)?.f_copy_(keys)?;
        layer.values.f_narrow(2, start, tokens)?.f_copy_(values)?;
        if start == 0 {
            return Ok((keys.shallow_clone(), values.shallow_clone()));
        }
        Ok((layer.keys.f_narrow(2, 0, self.used)?, layer.values.f_narrow(2, 0, self.used)?))
    }

    /// Keeps `rows` and lets the others go: row `rows[i]` becomes row i. In place, without fresh memory: a row that moves
    /// must come from beyond the new number of rows.
    pub(crate) fn keep_rows(&mut self, rows: &[usize]) -> Result<()> {
        let used = self.used;
        let moves = rows.iter().enumerate().filter(|(to, from)| to != *from);
        for (to, from) in moves.map(|(to, &from)| (to as i64, from as i64)) {
            for tensor in self.layers.iter().flat_map(|layer| [&layer.keys, &layer.values]) {
                let used_of = |row: i64| tensor.f_select(0, row)?.f_narrow(1, 0, used);
                used_of(to)?.f_copy_(&used_of(from)?)?;
            }
            self.positions.f_select(0, to)?.f_copy_(&self.positions.f_select(0, from)?)?;
        }
        let count = rows.len() as i64;
        for layer in &mut self.layers {
            layer.keys = layer.keys.f_narrow(0, 0, count)?;
            layer.values = layer.values.f_narrow(0, 0, count)?;
        }
        self.positions = self.positions.f_narrow(0, 0, count)?;
        Ok(())
    }
}
