//! Writes GGUF files for the import tests: a header to begin with, and the golden models under llama.cpp's names.

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

/// What goes into a file.
#[derive(Default)]
pub struct GgufFile {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, QTensor>,
}

impl GgufFile {
    /// The header of a small model, with a byte-level vocabulary of `vocab_size` tokens: `<s>`, `</s>`, the printable
    /// characters, and fillers.
    pub fn model(architecture: &str, vocab_size: usize) -> Self {
        let mut file = Self::default();
        let printable = (b'!'..=b'~').map(|byte| char::from(byte).to_string());
        let tokens: Vec<String> = ["<s>".to_owned(), "</s>".to_owned()]
            .into_iter()
            .chain(printable)
            .chain((0..).map(|n| format!("[F{n}]")))
            .take(vocab_size)
            .collect();
        let types = (0..vocab_size).map(|id| if id < 2 { 3 } else { 1 }).map(Value::I32).collect();
        file.set("general.architecture", Value::String(architecture.into()));
        file.set("tokenizer.ggml.model", Value::String("gpt2".into()));
        file.set("tokenizer.ggml.pre", Value::String("gpt-2".into()));
        file.set_texts("tokenizer.ggml.tokens", &tokens);
        file.set("tokenizer.ggml.token_type", Value::Array(types));
        file.set_texts("tokenizer.ggml.merges", &["a b"; 0]);
        file.set("tokenizer.ggml.bos_token_id", Value::U32(0));
        file.set("tokenizer.ggml.eos_token_id", Value::U32(1));
        file
    }

    pub fn set(&mut self, key: &str, value: Value) {
        self.metadata.insert(key.into(), value);
    }

    pub fn set_number(&mut self, key: &str, number: u32) {
        self.set(key, Value::U32(number));
    }

    pub fn set_texts(&mut self, key: &str, texts: &[impl AsRef<str>]) {
        self.set(key, Value::Array(texts.iter().map(|text| Value::String(text.as_ref().into())).collect()));
    }

    pub fn add(&mut self, name: impl Into<String>, tensor: &Tensor) {
        self.tensors.insert(name.into(), QTensor::quantize(tensor, GgmlDType::F32).unwrap());
    }

    pub fn add_zeros(&mut self, name: impl Into<String>, shape: &[usize]) {
        self.add(name, &Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap());
    }

    pub fn write(&self, path: &Path) {
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }

    /// A one-layer Llama of zeros: hidden size 4, two heads of two, one key-value head, and the tokens `<s>`, `</s>`, `!`.
    pub fn tiny() -> Self {
        let mut file = Self::model("llama", 3);
        for (key, number) in [
            ("block_count", 1),
            ("context_length", 16),
            ("embedding_length", 4),
            ("feed_forward_length", 6),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
        ] {
            file.set_number(&format!("llama.{key}"), number);
        }
        file.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
        for (name, shape) in [
            ("token_embd.weight", &[3, 4][..]),
            ("output_norm.weight", &[4]),
            ("blk.0.attn_norm.weight", &[4]),
            ("blk.0.attn_q.weight", &[4, 4]),
            ("blk.0.attn_k.weight", &[2, 4]),
            ("blk.0.attn_v.weight", &[2, 4]),
            ("blk.0.attn_output.weight", &[4, 4]),
            ("blk.0.ffn_norm.weight", &[4]),
            ("blk.0.ffn_gate.weight", &[6, 4]),
            ("blk.0.ffn_up.weight", &[6, 4]),
            ("blk.0.ffn_down.weight", &[4, 6]),
        ] {
            file.add_zeros(name, shape);
        }
        file
    }

    /// A golden model, as llama.cpp's converter would write it.
    pub fn of_directory(directory: &Path) -> Self {
        let config = std::fs::read_to_string(directory.join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        let number = |key: &str| config[key].as_u64().map(|number| u32::try_from(number).unwrap());
        let model_type = config["model_type"].as_str().unwrap();
        let architecture = if model_type == "mistral" { "llama" } else { model_type };
        let mut file = Self::model(architecture, number("vocab_size").unwrap() as usize);
        for (key, source) in [
            ("block_count", "num_hidden_layers"),
            ("context_length", "max_position_embeddings"),
            ("embedding_length", "hidden_size"),
            ("feed_forward_length", "intermediate_size"),
            ("attention.head_count", "num_attention_heads"),
            ("attention.head_count_kv", "num_key_value_heads"),
            ("attention.key_length", "head_dim"),
            ("attention.sliding_window", "sliding_window"),
        ] {
            if let Some(number) = number(source) {
                file.set_number(&format!("{architecture}.{key}"), number);
            }
        }
        let real = |key: &str| Value::F32(config[key].as_f64().unwrap() as f32);
        file.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), real("rms_norm_eps"));
        file.set(&format!("{architecture}.rope.freq_base"), real("rope_theta"));

        let tensors = candle_core::safetensors::load(directory.join("model.safetensors"), &Device::Cpu).unwrap();
        for (name, tensor) in tensors {
            let heads = match () {
                () if architecture != "llama" => None,
                () if name.contains("q_proj") => number("num_attention_heads"),
                () if name.contains("k_proj") => number("num_key_value_heads"),
                () => None,
            };
            let tensor = heads.map_or(tensor.clone(), |heads| permuted(&tensor, heads as usize));
            file.add(llama_cpp_name(&name), &tensor);
        }
        file
    }
}

/// `LlamaModel.permute` of llama.cpp's `convert_hf_to_gguf.py`.
fn permuted(tensor: &Tensor, heads: usize) -> Tensor {
    let (rows, columns) = tensor.dims2().unwrap();
    let halves = tensor.reshape((heads, 2, rows / heads / 2, columns)).unwrap();
    halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, columns)).unwrap()
}

fn llama_cpp_name(name: &str) -> String {
    [
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ]
    .iter()
    .fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}
