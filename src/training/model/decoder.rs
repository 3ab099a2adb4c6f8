//! The decoder that all supported families share: embedding, layers, a last norm, and a head over the vocabulary.

use std::sync::LazyLock;

use tch::{Device, Kind, Tensor};

use super::layer::{Pass, attention_kind};
use super::mask::{LayerMasks, ModelInput};
use super::rope::Rope;
use super::{KvCache, ModelConfig};
use crate::generate::{CachePass, PackedWeights};
use crate::native::products;
use crate::parameters::ParameterSet;
use crate::{Error, Result};

const HEAD: &str = "lm_head.weight";
static NOTHING_PACKED: LazyLock<PackedWeights> = LazyLock::new(PackedWeights::default);

/// A decoder without its weights, which every call is given.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Shape and special tokens.
    pub config: ModelConfig,
    /// Position embeddings.
    pub rope: Rope,
    /// Where it computes; weights and inputs must be there.
    pub device: Device,
}

/// How a forward pass computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compute {
    /// Kind of the matrix products, Float or BFloat16. Weights of another kind are converted inside the graph, so that
    /// gradients arrive in the weights' own kind.
    pub kind: Kind,
    /// What works between the products.
    pub kernels: Kernels,
}

/// What computes norms, gates, rotations, attention, float32 products and log-probabilities on a CPU, and updates and averages
/// float32 weights on any device. Both give the same numbers but for the last bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kernels {
    /// In as few passes over memory as may be, [`native::fused`](crate::native::fused), and by the library that is faster
    /// there, [`native::products`](crate::native::products). On GPUs only AdamW and averages have fused kernels. On all devices
    /// log-probabilities come of some logits at a time, with a gradient worked out by hand.
    #[default]
    Fused,
    /// Compositions of libtorch's operators, and autograd's gradients: the plain way.
    Plain,
}

impl Compute {
    /// In this kind, with the fastest kernels.
    pub const fn new(kind: Kind) -> Self {
        Compute { kind, kernels: Kernels::Fused }
    }

    /// Whether fused kernels are to be used on a device.
    pub(crate) fn is_fused(&self, device: Device) -> bool {
        self.kernels == Kernels::Fused && device == Device::Cpu
    }
}

impl Decoder {
    pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
    pub(crate) const LAST_NORM: &str = "model.norm.weight";

    /// A decoder of the shape that `config` says.
    pub fn new(config: ModelConfig, device: Device) -> Result<Self> {
        let rope = Rope::new(config.rope.clone())?;
        Ok(Decoder { config, rope, device })
    }

    /// Names and shapes of the weights, in the order of the computation. A head tied to the embedding is not among them.
    pub fn expected_parameters(&self) -> Vec<(String, Vec<i64>)> {
        let config = &self.config;
        let hidden = config.hidden_size;
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let mut parameters = vec![(Self::EMBEDDING.to_owned(), vec![config.vocab_size, hidden])];
        let linear = |name: String, rows: i64, columns: i64, bias: bool| {
            let mut shapes = vec![(format!("{name}.weight"), vec![rows, columns])];
            shapes.extend(bias.then(|| (format!("{name}.bias"), vec![rows])));
            shapes
        };
        for layer in 0..config.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let norm = |part: &str, width: i64| (name(&format!("{part}.weight")), vec![width]);
            parameters.push(norm("input_layernorm", hidden));
            parameters.extend(linear(name("self_attn.q_proj"), queries, hidden, config.qkv_bias));
            parameters.extend(linear(name("self_attn.k_proj"), keys, hidden, config.qkv_bias));
            parameters.extend(linear(name("self_attn.v_proj"), keys, hidden, config.qkv_bias));
            if config.qk_norm {
                parameters.push(norm("self_attn.q_norm", config.head_dim));
                parameters.push(norm("self_attn.k_norm", config.head_dim));
            }
            parameters.extend(linear(name("self_attn.o_proj"), hidden, queries, config.output_bias));
            parameters.push(norm("post_attention_layernorm", hidden));
            parameters.extend(linear(name("mlp.gate_proj"), config.intermediate_size, hidden, config.mlp_bias));
            parameters.extend(linear(name("mlp.up_proj"), config.intermediate_size, hidden, config.mlp_bias));
            parameters.extend(linear(name("mlp.down_proj"), hidden, config.intermediate_size, config.mlp_bias));
        }
        parameters.push((Self::LAST_NORM.to_owned(), vec![hidden]));
        if !config.tie_word_embeddings {
            parameters.push((HEAD.to_owned(), vec![config.vocab_size, hidden]));
        }
        parameters
    }

    /// Rows of tokens as an input on this decoder's device, padded at their right ends.
    pub fn input<R: AsRef<[u32]>>(&self, rows: &[R]) -> Result<ModelInput> {
        for (index, row) in rows.iter().enumerate() {
            self.check_ids(row.as_ref()).map_err(|error| Error::Argument(format!("row {index}: {error}")))?;
        }
        ModelInput::right_padded(rows, 0, self.device)
    }

    /// Refuses tokens outside of the vocabulary (a GPU would only abort on them).
    pub fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let vocab_size = self.config.vocab_size;
        match ids.iter().find(|&&id| i64::from(id) >= vocab_size) {
            Some(id) => Err(Error::Argument(format!("token {id} is not in the vocabulary of {vocab_size} tokens"))),
            None => Ok(()),
        }
    }

    /// The last hidden states (batch, tokens, hidden_size), normed, ready for [`logits`](Self::logits).
    ///
    /// With a cache the input continues what is in it, and its keys and values are added.
    pub fn hidden_states(
        &self,
        weights: &ParameterSet,
        input: &ModelInput,
        cache: Option<&mut KvCache>,
        compute: &Compute,
    ) -> Result<Tensor> {
        let cache = cache.map(|cache| cache.begin(&input.positions)).transpose()?;
        self.hidden_states_in(weights, &NOTHING_PACKED, input, cache.as_ref(), compute)
    }

    /// The same where it has been said what the pass does with a cache, and with some of the weights laid out for decoding,
    /// through which no gradient flows.
    pub(crate) fn hidden_states_in(
        &self,
        weights: &ParameterSet,
        packed: &PackedWeights,
        input: &ModelInput,
        cache: Option<&CachePass>,
        compute: &Compute,
    ) -> Result<Tensor> {
        let pass = Pass { packed, ..self.pass(weights, input, cache, compute)? };
        let mut hidden = self.embed(weights, input, compute)?;
        for layer in 0..self.layers() {
            hidden = pass.layer(layer, &hidden, cache)?;
        }
        pass.norm(&hidden, Self::LAST_NORM)
    }

    /// Name of the head's weight, (vocab_size, hidden_size): the embedding's where they are tied.
    pub fn head_name(&self) -> &'static str {
        if self.config.tie_word_embeddings { Self::EMBEDDING } else { HEAD }
    }

    /// The head on any selection of hidden states (..., hidden_size): logits (..., vocab_size) as f32.
    pub fn logits(&self, weights: &ParameterSet, hidden: &Tensor, compute: &Compute) -> Result<Tensor> {
        self.logits_with(weights, &NOTHING_PACKED, hidden, compute)
    }

    /// The same with some of the weights laid out for decoding.
    pub fn logits_with(
        &self,
        weights: &ParameterSet,
        packed: &PackedWeights,
        hidden: &Tensor,
        compute: &Compute,
    ) -> Result<Tensor> {
        let hidden = hidden.f_to_kind(compute.kind)?;
        let logits = match packed.apply(self.head_name(), &hidden)? {
            Some(logits) => logits,
            None => {
                let weight = weights.get(self.head_name())?.f_to_kind(compute.kind)?;
                match compute.is_fused(self.device) {
                    true => products::linear(&hidden, &weight, None)?,
                    false => hidden.f_linear(&weight, None::<&Tensor>)?,
                }
            }
        };
        Ok(logits.f_to_kind(Kind::Float)?)
    }

    /// A cache for `rows` sequences of up to `capacity` tokens each.
    pub fn new_cache(&self, rows: i64, capacity: i64, compute: &Compute) -> Result<KvCache> {
        KvCache::new(self, rows, capacity, attention_kind(self.device, compute.kind))
    }

    pub(super) fn layers(&self) -> usize {
        self.config.sliding_layers.len()
    }

    pub(super) fn embed(&self, weights: &ParameterSet, input: &ModelInput, compute: &Compute) -> Result<Tensor> {
        Ok(Tensor::f_embedding(weights.get(Self::EMBEDDING)?, &input.ids, -1, false, false)?.f_to_kind(compute.kind)?)
    }

    pub(super) fn pass<'a>(
        &'a self,
        weights: &'a ParameterSet,
        input: &ModelInput,
        cache: Option<&CachePass>,
        compute: &Compute,
    ) -> Result<Pass<'a>> {
        let attention_kind = attention_kind(self.device, compute.kind);
        let fused = compute.is_fused(self.device);
        let cached_rotation = cache.map(|pass| pass.cache().rotation(&input.positions)).transpose()?.flatten();
        let rotation = match cached_rotation {
            Some(rotation) => rotation,
            None if self.rope.depends_on_length() => {
                let tokens = input.ids.size2()?.1;
                let cached = cache.map_or(0, |pass| (pass.keys() - tokens).max(0));
                self.rope.at(&input.positions, input.longest(cached)?, attention_kind)?
            }
            None => self.rope.at(&input.positions, 0, attention_kind)?,
        };
        Ok(Pass {
            config: &self.config,
            weights,
            packed: &NOTHING_PACKED,
            kind: compute.kind,
            fused,
            attention_kind,
            rotation,
            masks: LayerMasks::new(input, cache, self.config.sliding_window, attention_kind, fused)?,
        })
    }
}
