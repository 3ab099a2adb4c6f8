//! The weights: llama.cpp's names and layouts as Hugging Face's, written as one safetensors file.

use super::WeightType;
use super::config::Config;
use super::metadata::Metadata;
use super::rope::FREQUENCY_FACTORS;
use crate::{Error, Result};
use candle_core::Tensor;
use serde_json::{Map, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, Write};
use std::path::Path;

/// A tensor to import.
pub struct Entry {
    /// Its name in the GGUF file.
    source: String,
    /// Its name in the Hugging Face model.
    target: String,
    /// Its shape, which is the same in both.
    pub shape: Vec<usize>,
    /// The heads within which rows change places, where they do.
    permuted_heads: Option<usize>,
}

/// What to import, sorted by Hugging Face name. Every missing, unexpected or misshapen tensor is in the error.
pub fn plan(metadata: &Metadata, config: &Config) -> Result<Vec<Entry>> {
    let mut entries = expected(config);
    let found: BTreeMap<&str, &[usize]> =
        metadata.tensors().into_iter().map(|(name, shape, _)| (name, shape)).collect();
    let mut wrong = Vec::new();
    for Entry { source, shape, .. } in &entries {
        match found.get(source.as_str()) {
            None => wrong.push(format!("{source} is missing")),
            Some(found) if found != shape => {
                wrong.push(format!("{source}: expected the shape {shape:?}, found {found:?}"))
            }
            Some(_) => {}
        }
    }
    let known = |name: &str| name == FREQUENCY_FACTORS || entries.iter().any(|entry| entry.source == name);
    wrong.extend(found.keys().filter(|name| !known(name)).map(|name| format!("{name} is unexpected")));
    if !wrong.is_empty() {
        let message = format!("{} tensors do not fit a {} model: {}", wrong.len(), config.model_type, wrong.join("; "));
        return Err(metadata.error(message));
    }
    entries.sort_by(|a, b| a.target.cmp(&b.target));
    Ok(entries)
}

/// Dequantises and writes the tensors one at a time, in the order of the plan.
pub fn write(
    metadata: &Metadata,
    reader: &mut (impl Read + Seek),
    plan: &[Entry],
    weight_type: WeightType,
    path: &Path,
) -> Result<()> {
    let failed = |source| Error::Io { path: path.into(), source };
    let file = File::create(path).map_err(failed)?;
    let mut output = BufWriter::new(file);
    output.write_all(&header(plan, weight_type)).map_err(failed)?;
    for entry in plan {
        let values = metadata.tensor(reader, &entry.source)?;
        let values = match entry.permuted_heads {
            Some(heads) => unpermuted(&values, heads),
            None => Ok(values),
        };
        let values = values.and_then(|values| values.flatten_all()?.to_vec1::<f32>());
        let values = values.map_err(|error| metadata.error(format!("tensor {}: {error}", entry.source)))?;
        let bytes: Vec<u8> = match weight_type {
            WeightType::Float32 => values.into_iter().flat_map(f32::to_le_bytes).collect(),
            WeightType::BFloat16 => values.into_iter().flat_map(|value| bfloat16(value).to_le_bytes()).collect(),
        };
        output.write_all(&bytes).map_err(failed)?;
    }
    let file = output.into_inner().map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)
}

/// Number of tensors of each type.
pub fn count_types(metadata: &Metadata) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for (_, _, tensor_type) in metadata.tensors() {
        *counts.entry(tensor_type).or_default() += 1;
    }
    counts
}

/// The tensors of a model, in the order of its layers.
fn expected(config: &Config) -> Vec<Entry> {
    let hidden = config.hidden_size;
    let query = config.num_attention_heads.saturating_mul(config.head_dim);
    let key_value = config.num_key_value_heads.saturating_mul(config.head_dim);
    let mut entries = Vec::new();
    let mut add = |source: String, target: String, shape: &[usize], permuted_heads: Option<usize>| {
        entries.push(Entry { source, target, shape: shape.to_vec(), permuted_heads });
    };
    add("token_embd.weight".into(), "model.embed_tokens.weight".into(), &[config.vocab_size, hidden], None);
    for layer in 0..config.num_hidden_layers {
        let mut add = |source: &str, target: &str, shape: &[usize], permuted_heads: Option<usize>| {
            add(format!("blk.{layer}.{source}"), format!("model.layers.{layer}.{target}"), shape, permuted_heads);
        };
        let query_heads = Some(config.num_attention_heads).filter(|_| config.permuted);
        let key_heads = Some(config.num_key_value_heads).filter(|_| config.permuted);
        add("attn_norm.weight", "input_layernorm.weight", &[hidden], None);
        add("attn_q.weight", "self_attn.q_proj.weight", &[query, hidden], query_heads);
        add("attn_k.weight", "self_attn.k_proj.weight", &[key_value, hidden], key_heads);
        add("attn_v.weight", "self_attn.v_proj.weight", &[key_value, hidden], None);
        add("attn_output.weight", "self_attn.o_proj.weight", &[hidden, query], None);
        if config.qkv_bias {
            add("attn_q.bias", "self_attn.q_proj.bias", &[query], query_heads);
            add("attn_k.bias", "self_attn.k_proj.bias", &[key_value], key_heads);
            add("attn_v.bias", "self_attn.v_proj.bias", &[key_value], None);
        }
        if config.output_bias {
            add("attn_output.bias", "self_attn.o_proj.bias", &[hidden], None);
        }
        if config.model_type == "qwen3" {
            add("attn_q_norm.weight", "self_attn.q_norm.weight", &[config.head_dim], None);
            add("attn_k_norm.weight", "self_attn.k_norm.weight", &[config.head_dim], None);
        }
        add("ffn_norm.weight", "post_attention_layernorm.weight", &[hidden], None);
        add("ffn_gate.weight", "mlp.gate_proj.weight", &[config.intermediate_size, hidden], None);
        add("ffn_up.weight", "mlp.up_proj.weight", &[config.intermediate_size, hidden], None);
        add("ffn_down.weight", "mlp.down_proj.weight", &[hidden, config.intermediate_size], None);
    }
    add("output_norm.weight".into(), "model.norm.weight".into(), &[hidden], None);
    if !config.tie_word_embeddings {
        add("output.weight".into(), "lm_head.weight".into(), &[config.vocab_size, hidden], None);
    }
    entries
}

/// llama.cpp rotates neighbouring rows of a head, Hugging Face rows half a head apart.
fn unpermuted(rows: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
    let row_size: usize = rows.dims()[1..].iter().product();
    // (heads, head_dim / 2, 2, row) -> (heads, 2, head_dim / 2, row)
    let pairs = rows.reshape((heads, rows.dim(0)? / heads / 2, 2, row_size))?;
    pairs.transpose(1, 2)?.contiguous()?.reshape(rows.shape())
}

/// The safetensors header: its length, and names with types, shapes and places as JSON.
fn header(plan: &[Entry], weight_type: WeightType) -> Vec<u8> {
    let (name, size) = match weight_type {
        WeightType::Float32 => ("F32", 4),
        WeightType::BFloat16 => ("BF16", 2),
    };
    let mut tensors = Map::new();
    tensors.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for Entry { target, shape, .. } in plan {
        let end = offset + shape.iter().product::<usize>() * size;
        tensors.insert(target.clone(), json!({"dtype": name, "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut text = json!(tensors).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// The nearest bfloat16, ties to even.
fn bfloat16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}
