//! The imported SmolLM2-135M-Instruct agrees with transformers' own import of the same GGUF file.
//!
//! The model is the directory that SAPO_FLOW_MODEL names, or models/smollm2-135m-instruct; `make setup` brings it.
//! Without it these tests say so and pass.

use crate::golden;
use sapo_flow_training::generate::{Choice, Decoding, Request, Sampling, generate};
use sapo_flow_training::model::{AttentionMask, Compute, Model, ModelInput};
use sapo_flow_training::text::{ChatTemplate, Message, TextTokenizer, encode_conversation, encode_prompt};
use serde_json::Value;
use std::path::PathBuf;
use tch::{Device, Kind, Tensor};

const COMPUTE: Compute = Compute::new(Kind::Float);

/// The model's directory, if it is there.
fn model() -> Option<PathBuf> {
    let directory = match std::env::var_os("SAPO_FLOW_MODEL") {
        Some(directory) => PathBuf::from(directory),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/smollm2-135m-instruct"),
    };
    if directory.join("config.json").exists() {
        return Some(directory);
    }
    eprintln!("skipped: no model at {}, run make setup", directory.display());
    None
}

fn cases(golden: &Value, kind: &str) -> Vec<Value> {
    let cases = golden[kind].as_array().unwrap().clone();
    assert!(!cases.is_empty());
    cases
}

fn messages(case: &Value) -> Vec<Message> {
    serde_json::from_value(case["messages"].clone()).unwrap()
}

#[test]
fn texts_have_the_same_tokens() {
    let Some(directory) = model() else { return };
    let tokenizer = TextTokenizer::load(&directory).unwrap();
    for case in cases(&golden::json("smollm2.json"), "texts") {
        let text = case["text"].as_str().unwrap();
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(ids, golden::tokens(&case["ids"]), "{text:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
}

#[test]
fn chats_have_the_same_text_and_tokens() {
    let Some(directory) = model() else { return };
    let tokenizer = TextTokenizer::load(&directory).unwrap();
    let template = ChatTemplate::load(&directory).unwrap().expect("the model has a template");
    for case in cases(&golden::json("smollm2.json"), "chats") {
        let mut messages = messages(&case);
        let rendered = template.render_prompt(&messages).unwrap();
        assert_eq!(rendered, case["rendered"].as_str().unwrap());
        let ids = golden::tokens(&case["ids"]);
        assert_eq!(encode_prompt(&tokenizer, &rendered).unwrap(), ids);

        // With an answer the prompt stays the same, and the answer ends in the model's EOS, without the line break
        // that the template writes after it.
        messages.push(Message::new("assistant", "Paris."));
        let encoded = encode_conversation(&tokenizer, &template, &messages).unwrap();
        assert_eq!(encoded.prompt_ids, ids);
        assert_eq!(tokenizer.decode(&encoded.answer_ids).unwrap(), "Paris.<|im_end|>");
        assert_eq!(encoded.answer_ids.last(), tokenizer.eos_id().as_ref());
    }
}

#[test]
fn chats_have_the_same_logits() {
    let Some(directory) = model() else { return };
    let Model { decoder, parameters, .. } = Model::load(&directory, Device::Cpu, Kind::Float).unwrap();
    for case in cases(&golden::json("smollm2.json"), "chats") {
        let ids = golden::tokens(&case["ids"]);
        let input = decoder.input(&[&ids]).unwrap();
        let hidden = decoder.hidden_states(&parameters, &input, None, &COMPUTE).unwrap();
        // (tokens, vocab_size)
        let logits = decoder.logits(&parameters, &hidden, &COMPUTE).unwrap().squeeze_dim(0);

        let (values, top) = logits.get(-1).topk(10, -1, true, true);
        assert_eq!(Vec::<i64>::try_from(top).unwrap(), signed(&golden::tokens(&case["last_top10_ids"])));
        let expected = Tensor::from_slice(&golden::floats(&case["last_top10_logits"]));
        assert!(golden::largest_difference(&values, &expected) < 1e-3, "{values} {expected}");

        let next = Tensor::from_slice(&signed(&ids[1..])).unsqueeze(-1);
        let before = logits.narrow(0, 0, ids.len() as i64 - 1);
        let logps = before.log_softmax(-1, Kind::Float).gather(-1, &next, false);
        let sum = logps.sum(Kind::Double).double_value(&[]);
        let expected = case["sum_logp_of_ids_from_second"].as_f64().unwrap();
        assert!((sum - expected).abs() < 1e-2, "log-probability of the chat: expected {expected}, found {sum}");
    }
}

/// `smollm2_greedy.json` beside this file is what transformers 5.23 generates from the model, given an attention mask
/// of ones; the answers run on past their end tokens.
#[test]
fn greedy_answers_are_those_of_transformers() {
    let Some(directory) = model() else { return };
    let Model { decoder, parameters, .. } = Model::load(&directory, Device::Cpu, Kind::Float).unwrap();
    let cases: Vec<Value> = serde_json::from_str(include_str!("smollm2_greedy.json")).unwrap();
    let request = |case: &Value| Request { prompt_ids: golden::tokens(&case["ids"]), max_new_tokens: 16, seed: 0 };
    let requests: Vec<Request> = cases.iter().map(request).collect();
    let sampling =
        Sampling { choice: Choice::Greedy, eos_ids: Vec::new(), compute: COMPUTE, decoding: Decoding::default() };
    let answers = generate(&decoder, &parameters, &requests, &sampling).unwrap();
    for (case, answer) in cases.iter().zip(answers) {
        assert_eq!(answer.tokens, golden::tokens(&case["greedy_16"]));
    }
}

/// The golden answers come from transformers' `generate` without an attention mask and without an EOS token. It then
/// takes padding tokens in the prompt for padding, and hides them; this model's padding token is `<|im_end|>`, the end
/// of every turn. The golden logits come from a forward pass that hides nothing.
#[test]
fn golden_greedy_answers_with_padding_tokens_of_the_prompt_hidden() {
    let Some(directory) = model() else { return };
    let tokenizer = TextTokenizer::load(&directory).unwrap();
    let model = Model::load(&directory, Device::Cpu, Kind::Float).unwrap();
    for case in cases(&golden::json("smollm2.json"), "chats") {
        let expected = golden::tokens(&case["greedy_16"]);
        let mut ids = golden::tokens(&case["ids"]);
        let prompt = ids.len();
        let mut visible: Vec<bool> = ids.iter().map(|&id| Some(id) != tokenizer.pad_id()).collect();
        while ids.len() < prompt + expected.len() {
            ids.push(likeliest(&model, &ids, &visible));
            visible.push(true);
        }
        assert_eq!(ids[prompt..], expected);
        assert_eq!(tokenizer.decode(&ids[prompt..]).unwrap(), case["greedy_text"].as_str().unwrap());
    }
}

/// The likeliest next token where only visible tokens are attended to, and only they count in positions.
fn likeliest(model: &Model, ids: &[u32], visible: &[bool]) -> u32 {
    let length = ids.len() as i64;
    let visible = Tensor::from_slice(visible);
    let positions = (visible.cumsum(0, Kind::Int64) - 1).unsqueeze(0);
    // (1, 1, queries, keys)
    let causal = Tensor::ones([length, length], (Kind::Bool, Device::Cpu)).tril(0);
    let mask = AttentionMask::Dense(causal.logical_and(&visible).view([1, 1, length, length]));
    let input = ModelInput { ids: Tensor::from_slice(&signed(ids)).unsqueeze(0), positions, mask };
    let hidden = model.decoder.hidden_states(&model.parameters, &input, None, &COMPUTE).unwrap();
    let logits = model.decoder.logits(&model.parameters, &hidden.get(0).get(-1), &COMPUTE).unwrap();
    u32::try_from(logits.argmax(-1, false).int64_value(&[])).unwrap()
}

fn signed(ids: &[u32]) -> Vec<i64> {
    ids.iter().map(|&id| i64::from(id)).collect()
}
