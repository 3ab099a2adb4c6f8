//! The model's shape: GGUF's architecture keys as a Hugging Face config.json.

use super::WeightType;
use super::metadata::Metadata;
use super::rope;
use super::tokenizer::SpecialIds;
use crate::Result;
use crate::model::config::MAX_LAYERS;
use serde_json::{Value, json};
use std::io::{Read, Seek};

/// What config.json needs to say, under Hugging Face's names.
pub struct Config {
    /// `llama`, `mistral`, `qwen2` or `qwen3`.
    pub model_type: &'static str,
    /// Whether the file keeps the rows of `q_proj` and `k_proj` in the order that llama.cpp's rotary embedding wants.
    pub permuted: bool,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    /// `max_position_embeddings`, in tokens.
    pub context_length: usize,
    pub tie_word_embeddings: bool,
    pub qkv_bias: bool,
    pub output_bias: bool,
    rms_norm_eps: f64,
    rope_theta: f64,
    rope_scaling: Option<Value>,
    sliding_window: Option<usize>,
}

impl Config {
    /// Reads the architecture's keys.
    pub fn read(metadata: &Metadata, reader: &mut (impl Read + Seek)) -> Result<Self> {
        let architecture = metadata.need("general.architecture", Metadata::text)?;
        let key = |name: &str| format!("{architecture}.{name}");
        let sliding_window = metadata.number(&key("attention.sliding_window"))?.filter(|&window| window > 0);
        let model_type = match architecture {
            "llama" if sliding_window.is_some() => "mistral",
            "llama" => "llama",
            "qwen2" => "qwen2",
            "qwen3" => "qwen3",
            other => {
                let message = format!(
                    "general.architecture: expected llama (Mistral included), qwen2 or qwen3, found \"{other}\""
                );
                return Err(metadata.error(message));
            }
        };
        if metadata.number(&key("expert_count"))?.is_some_and(|experts| experts > 0) {
            return Err(metadata.error(format!("{}: mixtures of experts are not supported", key("expert_count"))));
        }
        let need = |name: &str| metadata.need(&key(name), Metadata::number);
        let hidden_size = need("embedding_length")?;
        let num_attention_heads = need("attention.head_count")?;
        let head_dim = match metadata.number(&key("attention.key_length"))? {
            Some(length) => length,
            None => hidden_size.checked_div(num_attention_heads).unwrap_or(0),
        };
        let num_key_value_heads = metadata.number(&key("attention.head_count_kv"))?.unwrap_or(num_attention_heads);
        if head_dim == 0 || head_dim % 2 == 1 || num_attention_heads == 0 || num_key_value_heads == 0 {
            let message = format!(
                "expected an even head size and at least one head, found {head_dim}, {num_attention_heads} heads and \
                 {num_key_value_heads} key-value heads"
            );
            return Err(metadata.error(message));
        }
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(length) = metadata.number(&key(name))?.filter(|&length| length != head_dim) {
                return Err(metadata.error(format!("{}: expected the head size {head_dim}, found {length}", key(name))));
            }
        }
        let num_hidden_layers = need("block_count")?;
        // Tensors are listed for each before they are looked for: one out of all bounds would fill the memory.
        if num_hidden_layers > MAX_LAYERS as usize {
            let key = key("block_count");
            return Err(
                metadata.error(format!("{key}: expected at most {MAX_LAYERS} layers, found {num_hidden_layers}"))
            );
        }
        let rope_theta = metadata.real(&key("rope.freq_base"))?.unwrap_or(10_000.0);
        let embeddings = metadata.tensors().into_iter().find(|(name, ..)| *name == "token_embd.weight");
        let Some((_, &[vocab_size, _], _)) = embeddings else {
            return Err(metadata.error("expected a matrix token_embd.weight"));
        };
        Ok(Self {
            model_type,
            permuted: architecture == "llama",
            hidden_size,
            intermediate_size: need("feed_forward_length")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size,
            context_length: need("context_length")?,
            tie_word_embeddings: !metadata.has_tensor("output.weight"),
            qkv_bias: metadata.has_tensor("blk.0.attn_q.bias"),
            output_bias: metadata.has_tensor("blk.0.attn_output.bias"),
            rms_norm_eps: metadata.need(&key("attention.layer_norm_rms_epsilon"), Metadata::real)?,
            rope_theta,
            rope_scaling: rope::scaling(metadata, reader, architecture, rope_theta, head_dim)?,
            sliding_window,
        })
    }

    /// config.json, in the spelling that transformers 4 and 5 both read.
    pub fn to_json(&self, ids: &SpecialIds, weight_type: WeightType) -> Value {
        let class = match self.model_type {
            "mistral" => "MistralForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            _ => "LlamaForCausalLM",
        };
        let mut config = json!({
            "architectures": [class],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_dropout": 0.0,
            "bos_token_id": ids.bos,
            "eos_token_id": ids.eos,
            "pad_token_id": ids.pad,
            "torch_dtype": match weight_type {
                WeightType::Float32 => "float32",
                WeightType::BFloat16 => "bfloat16",
            },
        });
        match self.model_type {
            "mistral" => config["sliding_window"] = json!(self.sliding_window),
            "qwen2" => config["use_sliding_window"] = json!(false),
            _ => config["attention_bias"] = json!(self.qkv_bias),
        }
        config
    }
}
