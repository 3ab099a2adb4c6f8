//! A Hugging Face model's configuration: config.json and generation_config.json, as transformers 4 and 5 write them.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tch::Kind;

use super::rope::RopeConfig;
use crate::{Error, Result};

/// The name of a model's configuration file.
pub const CONFIG_FILE: &str = "config.json";
/// The name of the file with a model's settings for generation.
pub const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// Ten times as many layers as the deepest models have.
pub(crate) const MAX_LAYERS: i64 = 2000;
/// A tensor's two sizes are at most this, so that their product is no overflow.
const MAX_WIDTH: i64 = i32::MAX as i64;

/// The families of decoders built here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM, TinyLlama and others of that form.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen 2 and 2.5: biases on the query, key and value projections.
    Qwen2,
    /// Qwen 3: norms on each head's queries and keys.
    Qwen3,
}

impl Architecture {
    const ALL: [(&str, &str, Architecture); 4] = [
        ("LlamaForCausalLM", "llama", Architecture::Llama),
        ("MistralForCausalLM", "mistral", Architecture::Mistral),
        ("Qwen2ForCausalLM", "qwen2", Architecture::Qwen2),
        ("Qwen3ForCausalLM", "qwen3", Architecture::Qwen3),
    ];
}

/// A decoder's shape and special tokens. Fields have Hugging Face's names.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Number of token ids.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width inside the feed-forward blocks.
    pub intermediate_size: i64,
    /// Number of layers.
    pub num_hidden_layers: i64,
    /// Query heads.
    pub num_attention_heads: i64,
    /// Key and value heads; divides the number of query heads.
    pub num_key_value_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Longest sequence, in tokens, that the model was made for.
    pub max_position_embeddings: i64,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f64,
    /// Whether the head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// A bias on attention's output projection.
    pub output_bias: bool,
    /// Biases in the feed-forward blocks.
    pub mlp_bias: bool,
    /// Norms on each head's queries and keys.
    pub qk_norm: bool,
    /// How many positions back a query of a sliding layer sees, itself included.
    pub sliding_window: Option<i64>,
    /// Per layer, whether it attends within `sliding_window` only.
    pub sliding_layers: Vec<bool>,
    /// Rotary position embeddings.
    pub rope: RopeConfig,
    /// First token of a sequence, for models that have one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a response: those of config.json, then those that generation_config.json has besides.
    pub eos_token_ids: Vec<u32>,
    /// Padding, where the model names one.
    pub pad_token_id: Option<u32>,
    /// All of config.json.
    pub raw: Map<String, Value>,
    /// All of generation_config.json, where there is one.
    pub generation: Option<Map<String, Value>>,
}

impl ModelConfig {
    /// Reads a model directory's config.json, and generation_config.json where there is one.
    pub fn load(directory: &Path) -> Result<Self> {
        let path = directory.join(CONFIG_FILE);
        let raw = read_object(&path)?;
        let generation_path = directory.join(GENERATION_CONFIG_FILE);
        let generation = if generation_path.exists() { Some(read_object(&generation_path)?) } else { None };
        Self::new(&path, raw, generation)
    }

    /// Makes sense of a config.json's content; `path` is its file, named in errors.
    pub fn new(path: &Path, raw: Map<String, Value>, generation: Option<Map<String, Value>>) -> Result<Self> {
        let architecture = architecture(path, &raw)?;
        let fields = Fields { path, object: &raw };
        fields.refuse_what_is_not_built()?;

        let hidden_size: i64 = fields.required("hidden_size")?;
        let num_attention_heads: i64 = fields.required("num_attention_heads")?;
        let num_hidden_layers = layers(&fields)?;
        let default_head_dim = match architecture {
            Architecture::Qwen3 => 128,
            _ => hidden_size / num_attention_heads.max(1),
        };
        let head_dim = fields.optional("head_dim")?.unwrap_or(default_head_dim);
        let max_position_embeddings = fields.required("max_position_embeddings")?;
        let attention_bias = fields.optional("attention_bias")?.unwrap_or(false);
        let (qkv_bias, output_bias) = match architecture {
            Architecture::Llama | Architecture::Qwen3 => (attention_bias, attention_bias),
            Architecture::Mistral => (false, false),
            Architecture::Qwen2 => (true, false),
        };
        let sliding_window = sliding_window(&fields, architecture)?;
        let of_generation = |key: &str| generation.as_ref().and_then(|generation| generation.get(key));
        let vocab_size = fields.required("vocab_size")?;
        let mut eos_token_ids = token_ids(path, "eos_token_id", raw.get("eos_token_id"), vocab_size)?;
        let generation_path = path.with_file_name(GENERATION_CONFIG_FILE);
        for id in token_ids(&generation_path, "eos_token_id", of_generation("eos_token_id"), vocab_size)? {
            if !eos_token_ids.contains(&id) {
                eos_token_ids.push(id);
            }
        }

        let config = ModelConfig {
            architecture,
            vocab_size,
            hidden_size,
            intermediate_size: fields.required("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: fields.optional("num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim,
            max_position_embeddings,
            rms_norm_eps: fields.optional("rms_norm_eps")?.unwrap_or(1e-6),
            tie_word_embeddings: fields.optional("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias,
            output_bias,
            mlp_bias: architecture == Architecture::Llama && fields.optional("mlp_bias")?.unwrap_or(false),
            qk_norm: architecture == Architecture::Qwen3,
            sliding_layers: sliding_layers(&fields, architecture, sliding_window, num_hidden_layers)?,
            sliding_window,
            rope: RopeConfig::from_fields(&fields, head_dim, max_position_embeddings)?,
            bos_token_id: fields.optional("bos_token_id")?,
            eos_token_ids,
            pad_token_id: fields.optional("pad_token_id")?,
            raw: raw.clone(),
            generation,
        };
        config.check(path)?;
        Ok(config)
    }

    /// config.json for weights stored as `kind`, in a spelling that transformers 4 and 5 both understand.
    pub fn to_json(&self, kind: Kind) -> Map<String, Value> {
        let mut json = self.raw.clone();
        let dtype = match kind {
            Kind::BFloat16 => "bfloat16",
            Kind::Half => "float16",
            _ => "float32",
        };
        // transformers 5 reads `dtype` and, as a legacy, rope_theta and rope_scaling; 4 reads `torch_dtype` and these two.
        json.insert("dtype".into(), dtype.into());
        json.insert("torch_dtype".into(), dtype.into());
        if let Some(Value::Object(mut rope)) = json.shift_remove("rope_parameters") {
            rope.shift_remove("rope_theta");
            let default = rope.get("rope_type").is_none_or(|kind| kind == "default");
            if !json.get("rope_scaling").is_some_and(Value::is_object) {
                json.insert("rope_scaling".into(), if default { Value::Null } else { Value::Object(rope) });
            }
        }
        json.insert("rope_theta".into(), self.rope.theta.into());
        json
    }

    fn check(&self, path: &Path) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
            ("sliding_window", self.sliding_window.unwrap_or(1)),
        ];
        if let Some((key, size)) = sizes.iter().find(|(_, size)| *size < 1) {
            return Err(Error::invalid(path, format!("`{key}`: expected a positive number, found {size}")));
        }
        // Lengths may be anything: nothing is made of their size.
        let widths = sizes.iter().filter(|(key, _)| !["max_position_embeddings", "sliding_window"].contains(key));
        let heads = ("num_attention_heads * head_dim", self.num_attention_heads.saturating_mul(self.head_dim));
        if let Some((key, size)) = widths.chain([&heads]).find(|(_, size)| *size > MAX_WIDTH) {
            return Err(Error::invalid(path, format!("`{key}`: expected at most {MAX_WIDTH}, found {size}")));
        }
        if self.rms_norm_eps < 0.0 || !(self.rms_norm_eps as f32).is_finite() {
            let message = format!("`rms_norm_eps`: expected a number from 0 on, found {:?}", self.rms_norm_eps);
            return Err(Error::invalid(path, message));
        }
        if self.num_attention_heads % self.num_key_value_heads != 0 {
            let (heads, groups) = (self.num_attention_heads, self.num_key_value_heads);
            let message = format!("`num_key_value_heads`: {groups} does not divide num_attention_heads, {heads}");
            return Err(Error::invalid(path, message));
        }
        if self.head_dim % 2 != 0 {
            return Err(Error::invalid(path, format!("`head_dim`: expected an even number, found {}", self.head_dim)));
        }
        Ok(())
    }
}

/// The family that `architectures` names, or else `model_type`.
fn architecture(path: &Path, raw: &Map<String, Value>) -> Result<Architecture> {
    let class = raw.get("architectures").and_then(|classes| classes.get(0)).and_then(Value::as_str);
    let model_type = raw.get("model_type").and_then(Value::as_str);
    let known = Architecture::ALL.iter().find(|(name, kind, _)| match class {
        Some(class) => class == *name,
        None => model_type == Some(kind),
    });
    known.map(|(_, _, architecture)| *architecture).ok_or_else(|| Error::Architecture {
        path: path.to_path_buf(),
        found: class.or(model_type).unwrap_or("(none named)").to_owned(),
        supported: Architecture::ALL.map(|(name, _, _)| name).join(", "),
    })
}

/// The number of layers, before anything is made for each: one out of all bounds would fill the memory.
fn layers(fields: &Fields) -> Result<i64> {
    let layers = fields.required("num_hidden_layers")?;
    if layers > MAX_LAYERS {
        return Err(fields.error("num_hidden_layers", format!("expected at most {MAX_LAYERS} layers, found {layers}")));
    }
    Ok(layers)
}

fn sliding_window(fields: &Fields, architecture: Architecture) -> Result<Option<i64>> {
    match architecture {
        Architecture::Llama => Ok(None),
        // An absent key means transformers' default for the family; null means no window.
        Architecture::Mistral if !fields.object.contains_key("sliding_window") => Ok(Some(4096)),
        Architecture::Mistral => fields.optional("sliding_window"),
        Architecture::Qwen2 | Architecture::Qwen3 => match fields.optional("use_sliding_window")? {
            Some(true) if !fields.object.contains_key("sliding_window") => Ok(Some(4096)),
            Some(true) => fields.optional("sliding_window"),
            _ => Ok(None),
        },
    }
}

fn sliding_layers(
    fields: &Fields,
    architecture: Architecture,
    window: Option<i64>,
    num_hidden_layers: i64,
) -> Result<Vec<bool>> {
    let layers = 0..num_hidden_layers.max(0);
    match (window, architecture) {
        (None, _) => Ok(layers.map(|_| false).collect()),
        (Some(_), Architecture::Llama | Architecture::Mistral) => Ok(layers.map(|_| true).collect()),
        (Some(_), Architecture::Qwen2 | Architecture::Qwen3) => match fields.optional::<Vec<String>>("layer_types")? {
            None => {
                let full: i64 = fields.optional("max_window_layers")?.unwrap_or(28);
                Ok(layers.map(|layer| layer >= full).collect())
            }
            Some(types) if types.len() as i64 == num_hidden_layers => types
                .iter()
                .map(|kind| match kind.as_str() {
                    "full_attention" => Ok(false),
                    "sliding_attention" => Ok(true),
                    other => Err(fields
                        .error("layer_types", format!("expected full_attention or sliding_attention, found {other}"))),
                })
                .collect(),
            Some(types) => {
                Err(fields.error("layer_types", format!("expected {num_hidden_layers} entries, found {}", types.len())))
            }
        },
    }
}

/// Reads a key that holds a token id below `vocab_size`, or a list of them.
fn token_ids(path: &Path, key: &str, value: Option<&Value>, vocab_size: i64) -> Result<Vec<u32>> {
    let value = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(value @ Value::Array(_)) => value.clone(),
        Some(value) => Value::Array(vec![value.clone()]),
    };
    let ids: Vec<u32> = serde_json::from_value(value)
        .map_err(|error| Error::invalid(path, format!("`{key}`: expected a token id or a list of them: {error}")))?;
    match ids.iter().find(|id| i64::from(**id) >= vocab_size) {
        // A response could never end in it.
        Some(id) => {
            Err(Error::invalid(path, format!("`{key}`: expected ids below vocab_size, {vocab_size}, found {id}")))
        }
        None => Ok(ids),
    }
}

fn read_object(path: &PathBuf) -> Result<Map<String, Value>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|error| Error::invalid(path, format!("expected a JSON object: {error}")))
}

/// Typed access to a JSON object's keys, with errors that name the file and the key.
pub(super) struct Fields<'a> {
    pub path: &'a Path,
    pub object: &'a Map<String, Value>,
}

impl Fields<'_> {
    /// The key's value; none where it is absent or null.
    pub fn optional<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        match self.object.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::deserialize(value).map(Some).map_err(|error| self.error(key, error)),
        }
    }

    pub fn required<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        self.optional(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    pub fn error(&self, key: &str, message: impl std::fmt::Display) -> Error {
        Error::invalid(self.path, format!("`{key}`: {message}"))
    }

    /// Settings under which the same weights would mean another model.
    fn refuse_what_is_not_built(&self) -> Result<()> {
        match self.optional::<String>("hidden_act")?.as_deref() {
            None | Some("silu" | "swish") => {}
            Some(other) => return Err(self.error("hidden_act", format!("expected silu, found {other}"))),
        }
        if self.object.get("quantization_config").is_some_and(|value| !value.is_null()) {
            return Err(self.error("quantization_config", "quantized weights cannot be trained; use the original ones"));
        }
        Ok(())
    }
}
