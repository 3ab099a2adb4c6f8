//! Decoding a few rows on a CPU, where reading the weights is the work: see [`native::decode`](crate::native::decode).

use tch::{Kind, Tensor};

use super::KvCache;
use crate::Result;
use crate::model::Decoder;
use crate::native::decode::{DecodedLayer, Linear, Places};
use crate::native::fused::rms_norm;
use crate::parameters::ParameterSet;

/// A decoder's weights for one token a row at a time. They stay where they are: nothing is copied, unless it is put in 8
/// bits.
pub(super) struct FewRows {
    layers: Vec<DecodedLayer>,
    last_norm: Tensor,
    head: Linear,
    embedding: Tensor,
    eps: f64,
}

impl FewRows {
    /// Takes the layers' linear weights out of `weights`; an embedding that is the head as well stays there too.
    pub fn take_from(weights: &mut ParameterSet, decoder: &Decoder, int8: bool) -> Result<Self> {
        let linear = if int8 { Linear::quantized } else { Linear::new };
        let layers =
            (0..decoder.config.num_hidden_layers as usize).map(|layer| take_layer(weights, decoder, layer, linear));
        let layers = layers.collect::<Result<_>>()?;
        let head = linear(weights.get(decoder.head_name())?, None)?;
        let last_norm = float(weights.get(Decoder::LAST_NORM)?)?;
        let embedding = weights.get(Decoder::EMBEDDING)?.shallow_clone();
        Ok(FewRows { layers, last_norm, head, embedding, eps: decoder.config.rms_norm_eps })
    }

    /// Runs one token a row, (rows, 1), through the decoder; returns the hidden states (rows, hidden_size) at them, f32.
    pub fn feed(&self, decoder: &Decoder, tokens: &Tensor, positions: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let hidden = Tensor::f_embedding(&self.embedding, &tokens.f_squeeze_dim(1)?, -1, false, false)?;
        // Fresh memory, even where it is f32 already: the layers write to it.
        let hidden = hidden.f_to_kind(Kind::Float)?;
        cache.advance(positions.size()[0], 1)?;
        let rotation = match cache.rotation(positions)? {
            Some(rotation) => rotation,
            None => decoder.rope.at(positions, cache.used(), Kind::Float)?,
        };
        let (positions, [cosine, sine]) = (positions.f_contiguous()?, rotation.contiguous()?);
        let places = Places { positions: &positions, cosine: &cosine, sine: &sine };
        for (index, layer) in self.layers.iter().enumerate() {
            layer.apply(&hidden, cache.layer(index), &places)?;
        }
        rms_norm(&hidden, &self.last_norm, self.eps)
    }

    /// The head on hidden states (rows, hidden_size): logits (rows, vocab_size) as f32.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.multiply(&hidden.f_to_kind(Kind::Float)?)
    }
}

fn float(weight: &Tensor) -> Result<Tensor> {
    Ok(weight.f_to_kind(Kind::Float)?.f_contiguous()?)
}

fn take_layer(
    weights: &mut ParameterSet,
    decoder: &Decoder,
    layer: usize,
    linear: fn(&Tensor, Option<&Tensor>) -> Result<Linear>,
) -> Result<DecodedLayer> {
    let config = &decoder.config;
    let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
    let mut take = |part: &str| -> Result<Linear> {
        let weight = weights.take(&name(part))?;
        linear(&weight, weights.get(&format!("model.layers.{layer}.{part}.bias")).ok())
    };
    let attention = ["q", "k", "v", "o"].map(|part| take(&format!("self_attn.{part}_proj")));
    let feed_forward = ["gate", "up", "down"].map(|part| take(&format!("mlp.{part}_proj")));
    let ([query, key, value, output], [gate, up, down]) = (attention, feed_forward);
    let linears = [query?, key?, value?, output?, gate?, up?, down?];
    let norm = |part: &str| float(weights.get(&name(part))?);
    let head_norms = match config.qk_norm {
        true => Some([norm("self_attn.q_norm")?, norm("self_attn.k_norm")?]),
        false => None,
    };
    Ok(DecodedLayer {
        norms: [norm("input_layernorm")?, norm("post_attention_layernorm")?],
        head_norms,
        linears,
        heads: config.num_attention_heads,
        key_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        window: config.sliding_window.filter(|_| config.sliding_layers[layer]),
        eps: config.rms_norm_eps,
    })
}
