//! One decoder layer: attention and a gated feed-forward block, each after a norm and added to its input.

use tch::{Device, Kind, Tensor};

use super::ModelConfig;
use super::mask::{LayerMask, LayerMasks, PairMask};
use super::rope::Rotation;
use crate::Result;
use crate::generate::{CachePass, PackedWeights};
use crate::native::{fused, products};
use crate::parameters::ParameterSet;

/// What all layers of a forward pass share.
pub(super) struct Pass<'a> {
    pub config: &'a ModelConfig,
    pub weights: &'a ParameterSet,
    /// Linear layers whose weights are not among `weights`, while decoding.
    pub packed: &'a PackedWeights,
    /// Of the matrix products.
    pub kind: Kind,
    /// Whether what lies between them goes through [`native::fused`](crate::native::fused).
    pub fused: bool,
    /// Of rotation, attention and cache.
    pub attention_kind: Kind,
    pub rotation: Rotation,
    pub masks: LayerMasks,
}

/// The kind in which attention is computed. libtorch's attention is slow in bfloat16 on CPUs, backward above all.
pub(crate) fn attention_kind(device: Device, kind: Kind) -> Kind {
    if device == Device::Cpu { Kind::Float } else { kind }
}

impl Pass<'_> {
    /// Layer `layer` on `hidden` (batch, tokens, hidden_size).
    pub fn layer(&self, layer: usize, hidden: &Tensor, cache: Option<&CachePass>) -> Result<Tensor> {
        let normed = self.norm(hidden, &format!("model.layers.{layer}.input_layernorm.weight"))?;
        let hidden = hidden.f_add(&self.attention(layer, &normed, cache)?)?;
        let normed = self.norm(&hidden, &format!("model.layers.{layer}.post_attention_layernorm.weight"))?;
        Ok(hidden.f_add(&self.feed_forward(layer, &normed)?)?)
    }

    fn attention(&self, layer: usize, hidden: &Tensor, cache: Option<&CachePass>) -> Result<Tensor> {
        let config = self.config;
        let (batch, tokens, _) = hidden.size3()?;
        let [query, key, value] = self.heads(layer, hidden)?;
        let (key, value) = match cache {
            Some(cache) => cache.append(layer, &key, &value)?,
            None => (key, value),
        };
        let attended = match self.masks.of(config.sliding_layers[layer]) {
            LayerMask::Sequences(pairs, window) => products::attend(&query, &key, &value, pairs, *window, self.kind)?,
            mask => {
                // (batch, tokens, heads, head_dim) -> (batch, heads, tokens, head_dim), and back
                let (query, key, value) = (query.f_transpose(1, 2)?, key.f_transpose(1, 2)?, value.f_transpose(1, 2)?);
                attend(&query, &key, &value, mask)?.f_to_kind(self.kind)?.f_transpose(1, 2)?
            }
        };
        let attended = attended.f_reshape([batch, tokens, -1])?;
        self.linear(&attended, &format!("model.layers.{layer}.self_attn.o_proj"), config.output_bias)
    }

    /// Queries and keys, normed and rotated, and values of a layer's input, (batch, tokens, heads, head_dim), as attention
    /// takes them.
    fn heads(&self, layer: usize, hidden: &Tensor) -> Result<[Tensor; 3]> {
        let config = self.config;
        let (batch, tokens, _) = hidden.size3()?;
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let heads = |projected: Tensor| projected.f_view([batch, tokens, -1, config.head_dim]);
        let rotated = |heads: Tensor| match self.fused {
            true => fused::rotate(&heads, &self.rotation.cosine, &self.rotation.sine),
            false => self.rotation.apply(&heads.f_to_kind(self.attention_kind)?),
        };
        let (queries, keys) = (config.num_attention_heads, config.num_key_value_heads);
        let (mut query, mut key, value) = match self.packed.apply(&name("qkv_proj.weight"), hidden)? {
            Some(joined) => {
                let joined = heads(joined)?;
                let value = joined.f_narrow(2, queries + keys, keys)?.f_to_kind(self.attention_kind)?;
                let rest = joined.f_narrow(2, 0, queries + keys)?;
                if !config.qk_norm {
                    let both = rotated(rest)?;
                    return Ok([both.f_narrow(2, 0, queries)?, both.f_narrow(2, queries, keys)?, value]);
                }
                (rest.f_narrow(2, 0, queries)?, rest.f_narrow(2, queries, keys)?, value)
            }
            None => {
                let project = |part: &str| self.linear(hidden, &name(part), config.qkv_bias);
                (heads(project("q_proj")?)?, heads(project("k_proj")?)?, heads(project("v_proj")?)?)
            }
        };
        if config.qk_norm {
            query = self.norm(&query, &name("q_norm.weight"))?;
            key = self.norm(&key, &name("k_norm.weight"))?;
        }
        Ok([rotated(query)?, rotated(key)?, value.f_to_kind(self.attention_kind)?])
    }

    fn feed_forward(&self, layer: usize, hidden: &Tensor) -> Result<Tensor> {
        let name = |part: &str| format!("model.layers.{layer}.mlp.{part}_proj");
        let project = |input: &Tensor, part: &str| self.linear(input, &name(part), self.config.mlp_bias);
        let (gate, up) = match self.packed.apply(&format!("{}.weight", name("gate_up")), hidden)? {
            Some(joined) => {
                let width = self.config.intermediate_size;
                (joined.f_narrow(-1, 0, width)?, joined.f_narrow(-1, width, width)?)
            }
            None => (project(hidden, "gate")?, project(hidden, "up")?),
        };
        let gated = if self.fused { fused::gated(&gate, &up)? } else { gate.f_silu()?.f_mul(&up)? };
        project(&gated, "down")
    }

    /// Root-mean-square norm over the last dimension (arXiv 1910.07467).
    pub fn norm(&self, input: &Tensor, weight: &str) -> Result<Tensor> {
        let weight = self.weights.get(weight)?;
        if self.fused {
            return fused::rms_norm(input, weight, self.config.rms_norm_eps);
        }
        let weight = weight.f_to_kind(self.kind)?;
        Ok(input.f_rms_norm(weight.size(), Some(&weight), self.config.rms_norm_eps)?)
    }

    fn linear(&self, input: &Tensor, name: &str, bias: bool) -> Result<Tensor> {
        let weight = format!("{name}.weight");
        if let Some(output) = self.packed.apply(&weight, input)? {
            return Ok(output);
        }
        let weight = self.weights.get(&weight)?.f_to_kind(self.kind)?;
        let bias = match bias {
            true => Some(self.weights.get(&format!("{name}.bias"))?.f_to_kind(self.kind)?),
            false => None,
        };
        match self.fused {
            true => products::linear(input, &weight, bias.as_ref()),
            false => Ok(input.f_linear(&weight, bias.as_ref())?),
        }
    }
}

/// Attention of `query` (batch, heads, queries, head_dim) to `key` and `value` (batch, key heads, keys, head_dim), where
/// groups of consecutive query heads share a key head.
fn attend(query: &Tensor, key: &Tensor, value: &Tensor, mask: &LayerMask) -> Result<Tensor> {
    if let LayerMask::Pairs(pairs) = mask {
        return attend_in_pairs(query, key, value, pairs);
    }
    let (batch, heads, queries, head_dim) = query.size4()?;
    let (_, key_heads, keys, _) = key.size4()?;
    let group = heads / key_heads;
    if queries == 1 && group > 1 {
        // With one query a head, a group's heads can stand as queries of one head: nothing has to be repeated.
        let grouped = query.f_reshape([batch, key_heads, group, head_dim])?;
        return Ok(dot_product_attention(&grouped, key, value, mask)?.f_reshape([batch, heads, 1, head_dim])?);
    }
    if group == 1 || finds_key_heads(query, mask) {
        return dot_product_attention(query, key, value, mask);
    }
    let repeat = |shared: &Tensor| -> Result<Tensor> {
        let repeated = shared.f_unsqueeze(2)?.f_expand([batch, key_heads, group, keys, head_dim], false)?;
        Ok(repeated.f_reshape([batch, heads, keys, head_dim])?)
    };
    dot_product_attention(query, &repeat(key)?, &repeat(value)?, mask)
}

/// Whether libtorch's attention finds the key head of a group itself, without a copy for each query head. On GPUs its flash
/// attention does, with gradients too: it takes bfloat16 and no mask, and heads of so many numbers on all of them. What
/// else there is would repeat them as well, or keep all scores.
fn finds_key_heads(query: &Tensor, mask: &LayerMask) -> bool {
    let head_dim = query.size().last().copied().unwrap_or(0);
    let is_masked = !matches!(mask, LayerMask::Everything | LayerMask::Causal);
    matches!(query.device(), Device::Cuda(_)) && query.kind() == Kind::BFloat16 && head_dim <= 192 && !is_masked
}

/// The same within each pair of sequences: the first attends to itself, the second's own tokens to the shared ones and to
/// themselves.
fn attend_in_pairs(query: &Tensor, key: &Tensor, value: &Tensor, pairs: &[PairMask]) -> Result<Tensor> {
    let sizes: Vec<i64> =
        pairs.iter().flat_map(|PairMask { pair, .. }| [pair.shared, pair.first - pair.shared, pair.second]).collect();
    // Splits, not slices: the gradient of all parts is then put together once.
    let split = |tensor: &Tensor| tensor.f_split_with_sizes(&sizes[..], 2);
    let (queries, keys, values) = (split(query)?, split(key)?, split(value)?);
    let mut attended = Vec::with_capacity(2 * pairs.len());
    for (index, mask) in pairs.iter().enumerate() {
        let of = |parts: &[Tensor], which: [usize; 2]| {
            Tensor::f_cat(&which.map(|part| parts[3 * index + part].shallow_clone()), 2)
        };
        let (shared_and_first, shared_and_second) = ([0, 1], [0, 2]);
        let (key, value) = (of(&keys, shared_and_first)?, of(&values, shared_and_first)?);
        attended.push(attend(&of(&queries, shared_and_first)?, &key, &value, &mask.first)?);
        if mask.pair.second > 0 {
            let (key, value) = (of(&keys, shared_and_second)?, of(&values, shared_and_second)?);
            attended.push(match mask.second {
                LayerMask::Causal => attend(&of(&queries, shared_and_second)?, &key, &value, &LayerMask::Causal)?
                    .f_narrow(2, mask.pair.shared, mask.pair.second)?,
                _ => attend(&queries[3 * index + 2], &key, &value, &mask.second)?,
            });
        }
    }
    Ok(Tensor::f_cat(&attended, 2)?)
}

fn dot_product_attention(query: &Tensor, key: &Tensor, value: &Tensor, mask: &LayerMask) -> Result<Tensor> {
    let (mask, causal) = match mask {
        LayerMask::Everything => (None, false),
        LayerMask::Causal => (None, true),
        LayerMask::Additive(mask) => (Some(mask), false),
        LayerMask::Pairs(_) | LayerMask::Sequences(..) => {
            return Err(crate::Error::Argument("pairs within a pair".into()));
        }
    };
    let grouped = query.size4()?.1 != key.size4()?.1;
    Ok(Tensor::f_scaled_dot_product_attention(query, key, value, mask, 0.0, causal, None, grouped)?)
}

#[cfg(test)]
mod tests {
    use super::super::mask::SharedPrefix;
    use super::*;

    fn numbers(heads: i64, step: f64) -> Tensor {
        let numbers = (Tensor::arange(2 * heads * 5 * 8, (Kind::Float, Device::Cpu)) * step).sin();
        numbers.view([2, heads, 5, 8]).set_requires_grad(true)
    }

    #[test]
    fn the_second_of_a_pair_attends_alike_with_a_mask_and_without() {
        let pair = SharedPrefix { shared: 2, first: 3, second: 2 };
        let masked = || PairMask::new(pair, None, Device::Cpu, Kind::Float).unwrap();
        assert!(matches!(masked().second, LayerMask::Additive(_)), "else there is nothing to compare with");
        let ways = [masked(), PairMask { second: LayerMask::Causal, ..masked() }].map(|mask| {
            let inputs = [numbers(6, 1.7), numbers(2, 2.3), numbers(2, 0.7)];
            let attended = attend(&inputs[0], &inputs[1], &inputs[2], &LayerMask::Pairs(vec![mask])).unwrap();
            (&attended * &attended).sum(Kind::Float).backward();
            (attended, inputs.map(|input| input.grad()))
        });
        let [(masked, masked_gradients), (causal, gradients)] = ways;
        assert_eq!(causal.size(), [2, 6, 5, 8]);
        assert!(causal.allclose(&masked, 1e-6, 1e-6, false));
        for (causal, masked) in gradients.iter().zip(&masked_gradients) {
            assert!(causal.allclose(masked, 1e-5, 1e-6, false));
        }
    }

    #[test]
    fn key_heads_that_libtorch_finds_are_those_that_are_repeated() {
        for mask in [LayerMask::Causal, LayerMask::Everything] {
            let ways = [attend, dot_product_attention].map(|attend| {
                let inputs = [numbers(6, 1.7), numbers(2, 2.3), numbers(2, 0.7)];
                let attended = attend(&inputs[0], &inputs[1], &inputs[2], &mask).unwrap();
                (&attended * &attended).sum(Kind::Float).backward();
                (attended, inputs.map(|input| input.grad()))
            });
            let [(repeated, repeated_gradients), (found, gradients)] = ways;
            assert!(found.allclose(&repeated, 1e-6, 1e-6, false));
            for (found, repeated) in gradients.iter().zip(&repeated_gradients) {
                assert!(found.allclose(repeated, 1e-6, 1e-6, false));
            }
        }
    }
}
