//! Model directories: saved and loaded again, in several files, and refused with a clear message.

use std::path::Path;

use sapo_flow_training::Error;
use sapo_flow_training::model::{Model, ModelConfig};
use sapo_flow_training::parameters::ParameterSet;
use sapo_flow_training::text::TextTokenizer;
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::golden;

pub fn load(directory: &Path) -> sapo_flow_training::Result<Model> {
    Model::load(directory, Device::Cpu, Kind::Float)
}

pub fn assert_same(left: &ParameterSet, right: &ParameterSet) {
    assert!(left.names().eq(right.names()));
    for ((name, left), (_, right)) in left.iter().zip(right.iter()) {
        assert_eq!(left, right, "{name}");
    }
}

/// A copy of the first golden model, to be spoiled.
pub fn copy() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        std::fs::copy(golden::models()[0].join(name), directory.path().join(name)).unwrap();
    }
    directory
}

/// Sets a key of the copy's config.json, or removes it where `value` is null.
pub fn configure(directory: &Path, key: &str, value: Value) {
    let path = directory.join("config.json");
    let mut config: serde_json::Map<String, Value> =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    match value {
        Value::Null => config.shift_remove(key),
        value => config.insert(key.into(), value),
    };
    std::fs::write(&path, serde_json::to_string(&config).unwrap()).unwrap();
}

#[test]
fn a_saved_model_loads_again() {
    for directory in golden::models() {
        let model = load(&directory).unwrap();
        let saved = tempfile::tempdir().unwrap();
        model.save(saved.path(), Kind::Float).unwrap();
        let again = load(saved.path()).unwrap();
        assert_same(&model.parameters, &again.parameters);
        assert_eq!(model.decoder.config.rope, again.decoder.config.rope);
        assert_eq!(model.decoder.config.eos_token_ids, again.decoder.config.eos_token_ids);

        model.save(saved.path(), Kind::BFloat16).unwrap();
        let half = load(saved.path()).unwrap();
        assert_same(&model.parameters.to_kind(Kind::BFloat16).to_kind(Kind::Float), &half.parameters);
        assert_eq!(half.decoder.config.raw["dtype"], "bfloat16");
        assert_eq!(half.decoder.config.raw["torch_dtype"], "bfloat16");
    }
}

#[test]
fn settings_of_transformers_5_are_saved_for_both() {
    let directory = copy();
    for key in ["rope_theta", "rope_scaling"] {
        configure(directory.path(), key, Value::Null);
    }
    configure(directory.path(), "rope_parameters", json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}));
    let config = ModelConfig::load(directory.path()).unwrap();
    let written = config.to_json(Kind::Float);
    assert_eq!(written["rope_theta"], 500.0);
    assert_eq!(written["rope_scaling"], json!({"rope_type": "linear", "factor": 2.0}));
    assert!(!written.contains_key("rope_parameters"));
    let again = ModelConfig::new(Path::new("config.json"), written, None).unwrap();
    assert_eq!(again.rope, config.rope);
}

#[test]
fn tokenizer_files_go_with_the_model_even_when_their_source_is_gone() {
    let source = copy();
    let tokenizer = write_tokenizer(source.path(), "</s>");
    std::fs::write(source.path().join("chat_template.jinja"), "{{ messages }}").unwrap();
    let model = load(source.path()).unwrap();
    drop(source);
    let saved = tempfile::tempdir().unwrap();
    let inner = saved.path().join("step-1/policy");
    model.save(&inner, Kind::Float).unwrap();
    assert_eq!(std::fs::read_to_string(inner.join("tokenizer.json")).unwrap(), tokenizer);
    assert_eq!(std::fs::read_to_string(inner.join("chat_template.jinja")).unwrap(), "{{ messages }}");
    assert!(inner.join("generation_config.json").exists());
}

#[test]
fn end_tokens_are_those_of_both_configurations() {
    let directory = copy();
    let generation = directory.path().join("generation_config.json");
    configure(directory.path(), "eos_token_id", json!(7));
    let mut found = Vec::new();
    for text in [r#"{"eos_token_id": [5, 6]}"#, r#"{"eos_token_id": 4}"#, "{}"] {
        std::fs::write(&generation, text).unwrap();
        found.push(ModelConfig::load(directory.path()).unwrap().eos_token_ids);
    }
    std::fs::remove_file(&generation).unwrap();
    configure(directory.path(), "eos_token_id", json!([7, 8]));
    found.push(ModelConfig::load(directory.path()).unwrap().eos_token_ids);
    assert_eq!(found, [vec![7, 5, 6], vec![7, 4], vec![7], vec![7, 8]]);
}

#[test]
fn end_tokens_outside_of_the_vocabulary_are_refused() {
    let directory = copy();
    let generation = directory.path().join("generation_config.json");
    std::fs::write(&generation, r#"{"eos_token_id": [2, 160]}"#).unwrap();
    let message = load(directory.path()).unwrap_err().to_string();
    let expected = "generation_config.json: `eos_token_id`: expected ids below vocab_size, 160, found 160";
    assert!(message.contains(expected), "{message}");
    std::fs::write(&generation, "{}").unwrap();
    let tokenizer = write_tokenizer(directory.path(), "</s>").replace("\"</s>\":2", "\"</s>\":160");
    std::fs::write(directory.path().join("tokenizer.json"), tokenizer).unwrap();
    let message = load(directory.path()).unwrap_err().to_string();
    let expected = "config.json: `vocab_size`: expected more than 160, the end token of tokenizer.json, found 160";
    assert!(message.contains(expected), "{message}");
}

/// Answers end in the tokenizer's EOS: a model that did not know it would write on where they stop.
#[test]
fn a_model_ends_its_responses_where_its_tokenizer_ends_answers() {
    let directory = copy();
    configure(directory.path(), "eos_token_id", json!(2));
    std::fs::write(directory.path().join("generation_config.json"), r#"{"eos_token_id": [2, 6]}"#).unwrap();
    assert_eq!(load(directory.path()).unwrap().decoder.config.eos_token_ids, [2, 6]);
    write_tokenizer(directory.path(), "<end>");
    let tokenizer = TextTokenizer::load(directory.path()).unwrap();
    assert_eq!(tokenizer.eos_ids(), [1, 2, 6]);
    assert_eq!(load(directory.path()).unwrap().decoder.config.eos_token_ids, [1, 2, 6]);
}

/// A tokenizer of three words, `<s>` 0, `<end>` 1 and `</s>` 2, one of which ends answers; its text.
fn write_tokenizer(directory: &Path, eos_token: &str) -> String {
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "<end>": 1, "</s>": 2}, "unk_token": "<s>"},
    });
    std::fs::write(directory.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(directory.join("tokenizer_config.json"), json!({"eos_token": eos_token}).to_string()).unwrap();
    tokenizer.to_string()
}

#[test]
fn tensors_that_do_not_fit_are_listed() {
    let directory = copy();
    let model = load(directory.path()).unwrap();
    let spoiled: ParameterSet = model
        .parameters
        .iter()
        .filter(|(name, _)| !name.ends_with("0.self_attn.q_proj.weight") && *name != "model.norm.weight")
        .map(|(name, tensor)| match name {
            "model.layers.1.mlp.up_proj.weight" => ("model.layers.1.mlp.middle.weight".into(), tensor.shallow_clone()),
            "model.layers.1.input_layernorm.weight" => (name.into(), tensor.unsqueeze(0)),
            _ => (name.into(), tensor.shallow_clone()),
        })
        .collect();
    spoiled.write(&directory.path().join("model.safetensors"), None).unwrap();
    let error = load(directory.path()).unwrap_err();
    let Error::Tensors { differences, .. } = &error else { panic!("{error}") };
    let missing = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"];
    assert_eq!(differences.missing, missing);
    assert_eq!(differences.unexpected, ["model.layers.1.mlp.middle.weight"]);
    let width = model.decoder.config.hidden_size;
    assert_eq!(differences.shapes, [("model.layers.1.input_layernorm.weight".into(), vec![width], vec![1, width])]);
    let message = error.to_string();
    let names = missing.iter().chain(["model.layers.1.mlp.middle.weight"].iter());
    assert!(names.into_iter().all(|name| message.contains(name)), "{message}");
    assert!(message.contains(&format!("expected shape [{width}], found [1, {width}]")), "{message}");
}

#[test]
fn stored_rope_frequencies_are_no_reason_to_refuse_a_checkpoint() {
    let directory = copy();
    let model = load(directory.path()).unwrap();
    let extra = [("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), tch::Tensor::from_slice(&[1f32]))];
    let tensors = model.parameters.iter().map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()));
    let more: ParameterSet = tensors.chain(extra).collect();
    more.write(&directory.path().join("model.safetensors"), None).unwrap();
    assert_same(&load(directory.path()).unwrap().parameters, &model.parameters);
}

#[test]
fn configurations_that_are_not_built_are_refused_by_key() {
    let cases = [
        (
            "architectures",
            json!(["GPT2LMHeadModel"]),
            "architecture `GPT2LMHeadModel` is not supported; supported: Llama",
        ),
        ("rope_scaling", json!({"rope_type": "spiral"}), "`rope_scaling`: expected rope_type default, linear,"),
        ("rope_scaling", json!({"rope_type": "linear"}), "`factor`: is missing"),
        ("partial_rotary_factor", json!(0.5), "`partial_rotary_factor`: only whole heads"),
        ("hidden_act", json!("gelu"), "`hidden_act`: expected silu, found gelu"),
        ("quantization_config", json!({"bits": 4}), "`quantization_config`: quantized weights cannot be trained"),
        ("num_key_value_heads", json!(999), "`num_key_value_heads`: 999 does not divide num_attention_heads, "),
        ("num_hidden_layers", json!(0), "`num_hidden_layers`: expected a positive number, found 0"),
        ("head_dim", json!(7), "`head_dim`: expected an even number, found 7"),
        ("hidden_size", json!("wide"), "`hidden_size`: invalid type: string \"wide\""),
        ("vocab_size", Value::Null, "`vocab_size`: is missing"),
        ("eos_token_id", json!([2, 160]), "`eos_token_id`: expected ids below vocab_size, 160, found 160"),
        ("rms_norm_eps", json!(1e39), "`rms_norm_eps`: expected a number from 0 on, found 1e39"),
        (
            "num_hidden_layers",
            json!(1_000_000_000_000_i64),
            "`num_hidden_layers`: expected at most 2000 layers, found 1000000000000",
        ),
        ("vocab_size", json!(1_i64 << 62), "`vocab_size`: expected at most 2147483647, found 4611686018427387904"),
    ];
    for (key, value, expected) in cases {
        let directory = copy();
        configure(directory.path(), key, value);
        let message = load(directory.path()).unwrap_err().to_string();
        assert!(message.contains("config.json: ") && message.contains(expected), "{message}");
    }
}

#[test]
fn files_that_are_broken_or_absent_are_named() {
    let error = |spoil: &dyn Fn(&Path)| {
        let directory = copy();
        spoil(directory.path());
        load(directory.path()).unwrap_err().to_string()
    };
    let weights = |directory: &Path| directory.join("model.safetensors");

    let message = error(&|directory| std::fs::remove_file(directory.join("config.json")).unwrap());
    assert!(message.contains("config.json: No such file"), "{message}");
    let message = error(&|directory| std::fs::write(directory.join("config.json"), "[1]").unwrap());
    assert!(message.contains("config.json: expected a JSON object"), "{message}");
    let message = error(&|directory| std::fs::write(directory.join("generation_config.json"), "{").unwrap());
    assert!(message.contains("generation_config.json: expected a JSON object"), "{message}");
    let message = error(&|directory| std::fs::remove_file(weights(directory)).unwrap());
    assert!(message.contains("expected weights in model.safetensors or model.safetensors.index.json"), "{message}");
    let message = error(&|directory| std::fs::write(weights(directory), "GGUF").unwrap());
    assert!(message.contains("model.safetensors: too short for a safetensors file"), "{message}");
    let message = error(&|directory| std::fs::write(weights(directory), "not a safetensors file").unwrap());
    assert!(message.contains("model.safetensors: not a safetensors file"), "{message}");
    let message = error(&|directory| {
        let bytes = std::fs::read(weights(directory)).unwrap();
        std::fs::write(weights(directory), &bytes[..bytes.len() - 100]).unwrap();
    });
    assert!(message.contains("is it truncated?"), "{message}");
    let message = error(&|directory| {
        std::fs::remove_file(weights(directory)).unwrap();
        let index = r#"{"weight_map": {"model.norm.weight": "model-1.safetensors"}}"#;
        std::fs::write(directory.join("model.safetensors.index.json"), index).unwrap();
    });
    assert!(message.contains("model-1.safetensors: No such file"), "{message}");
}
