//! Importing GGUF files: dequantisation, weights, configuration, tokenizers, and what is refused.
//!
//! `quantised_blocks.json` beside this file holds random blocks and what the `gguf` package of llama.cpp makes of them.

use crate::gguf_file::GgufFile;
use crate::golden;
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};
use sapo_flow_training::gguf::{ImportSummary, WeightType, import};
use sapo_flow_training::model::{Compute, Model};
use sapo_flow_training::parameters::ParameterSet;
use sapo_flow_training::text::TextTokenizer;
use std::path::PathBuf;
use tch::Kind;

/// An imported file, in a temporary directory.
struct Imported {
    folder: tempfile::TempDir,
    result: sapo_flow_training::Result<ImportSummary>,
}

fn imported_as(file: &GgufFile, weight_type: WeightType) -> Imported {
    let folder = tempfile::tempdir().unwrap();
    file.write(&folder.path().join("model.gguf"));
    let result = import(&folder.path().join("model.gguf"), &folder.path().join("model"), weight_type);
    Imported { folder, result }
}

fn imported(file: &GgufFile) -> Imported {
    imported_as(file, WeightType::Float32)
}

impl Imported {
    fn directory(&self) -> PathBuf {
        if let Err(error) = &self.result {
            panic!("{error}");
        }
        self.folder.path().join("model")
    }

    fn json(&self, name: &str) -> serde_json::Value {
        golden::json(self.directory().join(name))
    }

    fn tensor(&self, name: &str) -> Tensor {
        let tensors = candle_core::safetensors::load(self.directory().join("model.safetensors"), &Device::Cpu).unwrap();
        tensors[name].clone()
    }

    fn tokens(&self, text: &str) -> Vec<String> {
        let tokenizer = TextTokenizer::load(&self.directory()).unwrap();
        tokenizer.encode(text).unwrap().into_iter().map(|id| tokenizer.token(id).unwrap()).collect()
    }

    fn error(&self) -> String {
        let message = self.result.as_ref().expect_err("the import is refused").to_string();
        assert!(message.contains("model.gguf: "), "{message}");
        assert_eq!(std::fs::read_dir(self.folder.path()).unwrap().count(), 1, "nothing is left beside the file");
        message
    }
}

fn blocks(kind: GgmlDType, bytes: Vec<u8>, values: usize) -> QTensor {
    QTensor::new(QStorage::from_data(bytes.into(), &Device::Cpu, kind).unwrap(), values).unwrap()
}

/// A model whose norms are `tensors`, one a layer, dequantised.
fn dequantised(tensors: Vec<QTensor>) -> Vec<Vec<f64>> {
    let (layers, hidden) = (tensors.len(), tensors[0].shape().elem_count());
    let mut file = GgufFile::tiny();
    file.set_number("llama.block_count", layers as u32);
    file.set_number("llama.embedding_length", hidden as u32);
    file.set_number("llama.attention.key_length", 2);
    file.add_zeros("token_embd.weight", &[3, hidden]);
    file.add_zeros("output_norm.weight", &[hidden]);
    for (layer, norm) in tensors.into_iter().enumerate() {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        file.tensors.insert(name("attn_norm"), norm);
        file.add_zeros(name("ffn_norm"), &[hidden]);
        for (part, shape) in [
            ("attn_q", [4, hidden]),
            ("attn_k", [2, hidden]),
            ("attn_v", [2, hidden]),
            ("attn_output", [hidden, 4]),
            ("ffn_gate", [6, hidden]),
            ("ffn_up", [6, hidden]),
            ("ffn_down", [hidden, 6]),
        ] {
            file.add_zeros(name(part), &shape);
        }
    }
    let imported = imported(&file);
    let norm = |layer: usize| imported.tensor(&format!("model.layers.{layer}.input_layernorm.weight"));
    let values = |layer: usize| norm(layer).to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect();
    (0..layers).map(values).collect()
}

#[test]
fn every_quantisation_reads_as_the_gguf_package_reads_it() {
    let cases: serde_json::Value = serde_json::from_str(include_str!("quantised_blocks.json")).unwrap();
    let cases = cases.as_array().unwrap();
    let kinds = cases.iter().map(|case| match case["type"].as_str().unwrap() {
        "F32" => GgmlDType::F32,
        "F16" => GgmlDType::F16,
        "BF16" => GgmlDType::BF16,
        "Q4_0" => GgmlDType::Q4_0,
        "Q4_1" => GgmlDType::Q4_1,
        "Q5_0" => GgmlDType::Q5_0,
        "Q5_1" => GgmlDType::Q5_1,
        "Q8_0" => GgmlDType::Q8_0,
        "Q2_K" => GgmlDType::Q2K,
        "Q3_K" => GgmlDType::Q3K,
        "Q4_K" => GgmlDType::Q4K,
        "Q5_K" => GgmlDType::Q5K,
        "Q6_K" => GgmlDType::Q6K,
        other => panic!("unknown type {other}"),
    });
    let bytes = |case: &serde_json::Value| {
        let digits = case["bytes"].as_str().unwrap();
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
    };
    let tensors = cases.iter().zip(kinds).map(|(case, kind)| blocks(kind, bytes(case), 256)).collect();
    for (case, found) in cases.iter().zip(dequantised(tensors)) {
        golden::assert_close(case["type"].as_str().unwrap(), &found, &golden::floats(&case["values"]), 1e-6);
    }
}

/// ggml's formulas on blocks of 32 whose scale d is 0.5 and minimum m is -1: Q8_0 x = d q, Q4_0 x = d (q - 8),
/// Q4_1 x = d q + m. Half-bytes hold value i in their low half and value i + 16 in their high half.
#[test]
fn simple_blocks_follow_the_formulas() {
    let (half, minus_one) = ([0x00, 0x38], [0x00, 0xbc]);
    let halves: Vec<u8> = (0..16).map(|index| index | (15 - index) << 4).collect();
    let quants = |index: usize| if index < 16 { index as f64 } else { 31.0 - index as f64 };
    let signed: Vec<u8> = (0..32).map(|index: i8| (index - 16) as u8).collect();
    let found = dequantised(vec![
        blocks(GgmlDType::Q8_0, [&half[..], &signed].concat(), 32),
        blocks(GgmlDType::Q4_0, [&half[..], &halves].concat(), 32),
        blocks(GgmlDType::Q4_1, [&half[..], &minus_one, &halves].concat(), 32),
    ]);
    let expected = |value: &dyn Fn(usize) -> f64| (0..32).map(value).collect::<Vec<f64>>();
    assert_eq!(found[0], expected(&|index| 0.5 * (index as f64 - 16.0)));
    assert_eq!(found[1], expected(&|index| 0.5 * (quants(index) - 8.0)));
    assert_eq!(found[2], expected(&|index| 0.5 * quants(index) - 1.0));
}

#[test]
fn golden_models_come_back_with_their_weights_and_logits() {
    for directory in golden::models() {
        let expected = golden::json(directory.join("config.json"));
        if expected["rope_scaling"].is_object() {
            continue; // Its constants are not Llama 3's own, the only ones a GGUF file can stand for.
        }
        let imported = imported(&GgufFile::of_directory(&directory));
        let found = imported.json("config.json");
        for key in ["model_type", "architectures", "rms_norm_eps", "rope_theta", "tie_word_embeddings"] {
            assert_eq!(found[key], expected[key], "{key} of {}", directory.display());
        }
        assert_eq!(found["sliding_window"], expected["sliding_window"], "{}", directory.display());

        let device = tch::Device::Cpu;
        let weights = ParameterSet::read(&directory.join("model.safetensors"), device).unwrap();
        let model = Model::load(&imported.directory(), device, Kind::Float).unwrap();
        assert_eq!(model.parameters.len(), weights.len());
        for (name, tensor) in weights.iter() {
            assert_eq!(*tensor, *model.parameters.get(name).unwrap(), "{name} of {}", directory.display());
        }

        let batch = golden::json(directory.join("expected.json"));
        let length = golden::floats(&batch["lengths"])[0] as usize;
        let row = golden::tokens(&batch["input_ids"][0])[..length].to_vec();
        let compute = Compute::new(Kind::Float);
        let input = model.decoder.input(&[row]).unwrap();
        let hidden = model.decoder.hidden_states(&model.parameters, &input, None, &compute).unwrap();
        let logits = model.decoder.logits(&model.parameters, &hidden, &compute).unwrap().get(0);
        let golden_logits = ParameterSet::read(&directory.join("logits.safetensors"), device).unwrap();
        let golden_logits = golden_logits.get("logits").unwrap().get(0).narrow(0, 0, length as i64);
        assert!(golden::largest_difference(&logits, &golden_logits) < 1e-4, "{}", directory.display());
    }
}

#[test]
fn a_summary_says_what_was_imported() {
    let imported = imported(&GgufFile::tiny());
    let directory = imported.directory();
    let summary = imported.result.as_ref().unwrap();
    assert_eq!((summary.model_type.as_str(), summary.vocabulary, summary.has_chat_template), ("llama", 3, false));
    // Embeddings 3 x 4; q and o 4 x 4, k and v 2 x 4, three 6 x 4; three norms of 4.
    assert_eq!(summary.parameters, 12 + 2 * 16 + 2 * 8 + 3 * 24 + 3 * 4);
    assert_eq!(summary.tensor_types, [("F32".to_owned(), 11)].into());
    assert_eq!(summary.directory, directory);
    let generation = imported.json("generation_config.json");
    assert_eq!((&generation["bos_token_id"], &generation["eos_token_id"]), (&0.into(), &1.into()));
}

#[test]
fn bfloat16_weights_are_rounded_to_the_nearest() {
    let mut file = GgufFile::tiny();
    // One, then halfway between neighbours (a tie goes to the even one), just above it, and an infinity.
    let values = [1.0, 1.0 + 1.0 / 256.0, 1.003_906_4, f32::NEG_INFINITY];
    file.add("output_norm.weight", &Tensor::from_slice(&values, 4, &Device::Cpu).unwrap());
    let imported = imported_as(&file, WeightType::BFloat16);
    let norm = imported.tensor("model.norm.weight");
    assert_eq!(norm.dtype(), candle_core::DType::BF16);
    let norm = norm.to_dtype(candle_core::DType::F32).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(norm, [1.0, 1.0, 1.007_812_5, f32::NEG_INFINITY]);
    assert_eq!(imported.json("config.json")["torch_dtype"], "bfloat16");
}

#[test]
fn llama_3_frequency_factors_become_its_rope_scaling() {
    let mut file = GgufFile::tiny();
    file.set("llama.rope.freq_base", Value::F32(500_000.0));
    file.set_number("llama.attention.key_length", 16);
    for (name, shape) in [("q", [32, 4]), ("k", [16, 4]), ("v", [16, 4]), ("output", [4, 32])] {
        file.add_zeros(format!("blk.0.attn_{name}.weight"), &shape);
    }
    // transformers 5.23, default over llama3 inverse frequencies: head size 16, theta 5e5, factor 32, 1, 4, 8192.
    let factors = [1.0f32, 1.0, 1.0, 1.0, 3.292_263, 32.0, 32.0, 32.0];
    file.add("rope_freqs.weight", &Tensor::from_slice(&factors, 8, &Device::Cpu).unwrap());
    let scaling = imported(&file).json("config.json")["rope_scaling"].clone();
    assert_eq!(
        scaling,
        serde_json::json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})
    );

    let others = Tensor::from_slice(&[1f32, 1.0, 1.0, 2.0, 3.0, 9.0, 9.0, 9.0], 8, &Device::Cpu).unwrap();
    file.add("rope_freqs.weight", &others);
    assert!(imported(&file).error().contains("expected the factors of Llama 3's rope scaling"));
}

/// A model with a vocabulary of its own, as large as its tokens need.
fn with_tokens(tokens: &[(&str, i32)]) -> GgufFile {
    let mut file = GgufFile::tiny();
    file.set_texts("tokenizer.ggml.tokens", &tokens.iter().map(|(token, _)| *token).collect::<Vec<_>>());
    let types = tokens.iter().map(|&(_, token_type)| Value::I32(token_type)).collect();
    file.set("tokenizer.ggml.token_type", Value::Array(types));
    file.add_zeros("token_embd.weight", &[tokens.len(), 4]);
    file
}

/// What is merged shows how text was split: single digits, up to three, or all; letters with an apostrophe or not;
/// slashes with a punctuation mark or not.
#[test]
fn text_is_split_the_way_the_file_names() {
    let normal = ["1", "2", "3", "4", "12", "123", "1234", "'", "L", "'L", "a", "B", "aB", "e", "\u{301}"];
    let tokens = [("<s>", 3), ("</s>", 3), ("<tool>", 4)].into_iter().chain(normal.map(|token| (token, 1)));
    let mut file = with_tokens(&tokens.collect::<Vec<_>>());
    file.set_texts("tokenizer.ggml.merges", &["1 2", "12 3", "123 4", "' L", "a B"]);
    let text = "1234'LaB<tool></s>";
    for (name, expected) in [
        ("smollm", "1 2 3 4 ' L aB <tool> </s>"),
        ("qwen2", "1 2 3 4 'L aB <tool> </s>"),
        ("llama-bpe", "123 4 'L aB <tool> </s>"),
        ("tekken", "1 2 3 4 'L a B <tool> </s>"),
        ("gpt-2", "1234 ' L aB <tool> </s>"),
    ] {
        file.set("tokenizer.ggml.pre", Value::String(name.into()));
        let imported = imported(&file);
        assert_eq!(imported.tokens(text).join(" "), expected, "{name}");
        // Llama 3's and Mistral's tokenizers begin with BOS, unless the file says otherwise.
        let adds_bos = matches!(name, "llama-bpe" | "tekken");
        let leading = TextTokenizer::load(&imported.directory()).unwrap().leading_ids().to_vec();
        assert_eq!(leading, if adds_bos { vec![0] } else { vec![] }, "{name}");
    }
    file.set("tokenizer.ggml.pre", Value::String("martian".into()));
    assert!(imported(&file).error().contains("tokenizer.ggml.pre: expected smollm, "));
    assert!(imported(&file).error().contains("found \"martian\""));
}

/// SentencePiece merges by score: of "▁ab", the pair whose joint token scores best goes first.
#[test]
fn a_sentence_piece_vocabulary_merges_by_score() {
    let normal = ["▁", "a", "b", "▁a", "ab"].map(|token| (token, 1));
    let bytes = [("<0xC3>", 6), ("<0xA9>", 6)];
    let tokens: Vec<_> = [("<unk>", 2), ("<s>", 3), ("</s>", 3)].into_iter().chain(bytes).chain(normal).collect();
    let mut file = with_tokens(&tokens);
    file.set("tokenizer.ggml.model", Value::String("llama".into()));
    file.set_number("tokenizer.ggml.bos_token_id", 1);
    file.set_number("tokenizer.ggml.eos_token_id", 2);
    for (scores, expected) in [([-1.0, -2.0], "▁a b"), ([-2.0, -1.0], "▁ ab")] {
        let scores = [0.0; 8].into_iter().chain(scores).map(Value::F32).collect();
        file.set("tokenizer.ggml.scores", Value::Array(scores));
        let imported = imported(&file);
        assert_eq!(imported.tokens("ab").join(" "), expected);
        assert_eq!(imported.tokens("é a</s>").join(" "), "▁ <0xC3> <0xA9> ▁a </s>");
        let tokenizer = TextTokenizer::load(&imported.directory()).unwrap();
        assert_eq!(tokenizer.decode(&tokenizer.encode("é ab a").unwrap()).unwrap(), "é ab a");
        assert_eq!((tokenizer.leading_ids(), tokenizer.eos_ids()), (&[1][..], &[2][..]));
    }
    file.set("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    assert_eq!(imported(&file).tokens("ab a").join(" "), "ab ▁a");
}

fn without_tokens(file: &mut GgufFile) {
    file.set("tokenizer.ggml.model", Value::String("llama".into()));
    for list in ["tokens", "token_type", "scores"] {
        file.set(&format!("tokenizer.ggml.{list}"), Value::Array(Vec::new()));
    }
    for role in ["bos", "eos"] {
        file.metadata.remove(&format!("tokenizer.ggml.{role}_token_id"));
    }
}

#[test]
fn what_cannot_be_imported_is_refused_by_name() {
    type Spoil = fn(&mut GgufFile);
    let cases: [(Spoil, &str); 13] = [
        (|file| file.set("general.architecture", Value::String("bert".into())), "found \"bert\""),
        (|file| drop(file.metadata.remove("llama.block_count")), "llama.block_count is missing"),
        (
            |file| file.set("llama.block_count", Value::String("one".into())),
            "llama.block_count: expected a whole number, found the type String",
        ),
        (
            |file| file.set_number("llama.block_count", u32::MAX),
            "llama.block_count: expected at most 2000 layers, found 4294967295",
        ),
        (
            |file| file.set("llama.attention.key_length", Value::U64(u64::MAX - 1)),
            "blk.0.attn_q.weight: expected the shape",
        ),
        (
            |file| {
                file.set_number("llama.attention.head_count", 0);
                file.set_number("llama.attention.key_length", 2);
            },
            "expected an even head size and at least one head, found 2, 0 heads",
        ),
        (without_tokens, "tokenizer.ggml.tokens: expected at least one token, found none"),
        (|file| file.set_number("llama.expert_count", 8), "mixtures of experts are not supported"),
        (|file| file.set_number("llama.attention.head_count", 0), "expected an even head size and at least one head"),
        (
            |file| file.set("llama.rope.scaling.type", Value::String("spiral".into())),
            "llama.rope.scaling.type: expected none, linear or yarn, found \"spiral\"",
        ),
        (
            |file| {
                drop(file.tensors.remove("blk.0.attn_k.weight"));
                file.add_zeros("blk.0.ffn_up.weight", &[5, 4]);
                file.add_zeros("blk.1.ffn_up.weight", &[6, 4]);
            },
            "3 tensors do not fit a llama model: blk.0.attn_k.weight is missing; blk.0.ffn_up.weight: expected the shape \
             [6, 4], found [5, 4]; blk.1.ffn_up.weight is unexpected",
        ),
        (
            |file| file.set("tokenizer.ggml.model", Value::String("bert".into())),
            "expected gpt2 or llama, found \"bert\"",
        ),
        (|file| file.set_number("tokenizer.ggml.eos_token_id", 3), "eos_token_id: expected an id below 3, found 3"),
    ];
    for (spoil, expected) in cases {
        let mut file = GgufFile::tiny();
        spoil(&mut file);
        let message = imported(&file).error();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn files_and_directories_are_checked_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = (folder.path().join("model.gguf"), folder.path().join("model"));
    let refused = || import(&file, &directory, WeightType::Float32).expect_err("the import is refused").to_string();
    assert!(refused().contains("model.gguf: "));
    std::fs::write(&file, "not a model").unwrap();
    assert!(refused().contains("not a GGUF file"));

    // A file cut short is found out while its weights are read, and leaves nothing behind.
    GgufFile::tiny().write(&file);
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 40]).unwrap();
    assert!(refused().contains("remaining in file"), "{}", refused());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("config.json"), "mine").unwrap();
    assert!(refused().contains("expected a new or empty directory"));
    assert_eq!(std::fs::read_to_string(directory.join("config.json")).unwrap(), "mine");
}
