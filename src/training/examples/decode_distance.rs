//! How far decoding with fewer bits is from float32, over the answers of a file of conversations:
//! `decode_distance MODEL DATA.jsonl`.
//!
//! The answers' tokens are given, and after each the distributions of the next are compared. `int8_weights` is computed
//! with the numbers that its weights stand for; generated answers' log-probabilities tell whether that is the same.
//! Prompts go through the weights as they are, as in decoding.

use std::path::Path;

use sapo_flow_training::device;
use sapo_flow_training::generate::{Choice, Decoding, Request, Sampling, generate};
use sapo_flow_training::model::{AttentionMask, Compute, Decoder, Model, ModelInput};
use sapo_flow_training::native::decode::Linear;
use sapo_flow_training::parameters::ParameterSet;
use sapo_flow_training::text::{ChatTemplate, EncodedAnswer, Message, TextTokenizer, encode_conversation};
use tch::{Device, Kind, Tensor};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const FLOAT: Compute = Compute::new(Kind::Float);

/// A model as one of the ways to decode computes it.
struct Way<'a> {
    name: &'static str,
    compute: Compute,
    prompt: &'a ParameterSet,
    layers: &'a ParameterSet,
    head: &'a ParameterSet,
}

/// What is summed over positions.
#[derive(Default)]
struct Sums {
    kl: f64,
    same_token: f64,
    nll: f64,
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, data] = arguments.as_slice() else { return Err("expected a model's directory and a file".into()) };
    device::set_threads(1);
    let _guard = tch::no_grad_guard();
    let model = Model::load(Path::new(directory), Device::Cpu, Kind::Float)?;
    let answers = read_answers(Path::new(directory), data)?;

    let weights = &model.parameters;
    let (layers, all) = (rounded(&model, false)?, rounded(&model, true)?);
    let bfloat16 = weights.to_kind(Kind::BFloat16).to_kind(Kind::Float);
    let as_they_are = |name, compute| Way { name, compute, prompt: weights, layers: weights, head: weights };
    let exact = as_they_are("float32", FLOAT);
    let int8 = Way { name: "int8_weights", layers: &layers, head: &all, ..exact };
    let stored = Way { name: "bfloat16 weights", prompt: &bfloat16, layers: &bfloat16, head: &bfloat16, ..exact };
    let ways = [as_they_are("bfloat16", Compute::new(Kind::BFloat16)), stored, int8];

    let mut positions = 0;
    let mut nll = 0.0;
    let mut sums: [Sums; 3] = Default::default();
    for answer in &answers {
        let expected = exact.logps(&model.decoder, answer)?;
        let targets = Tensor::from_slice(&answer.answer_ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>());
        nll += chosen(&expected, &targets)?;
        positions += answer.answer_ids.len();
        for (way, sums) in ways.iter().zip(&mut sums) {
            let found = way.logps(&model.decoder, answer)?;
            let kl = expected.f_exp()?.f_mul(&expected.f_sub(&found)?)?;
            sums.kl += kl.f_sum(Kind::Double)?.f_double_value(&[])?;
            let same = found.f_argmax(-1, false)?.f_eq_tensor(&expected.f_argmax(-1, false)?)?;
            sums.same_token += same.f_sum(Kind::Double)?.f_double_value(&[])?;
            sums.nll += chosen(&found, &targets)?;
        }
    }
    let mean = |sum: f64| sum / positions as f64;
    println!("{} answers, {positions} tokens, {:.4} nats a token in float32", answers.len(), mean(nll));
    for (way, Sums { kl, same_token, nll }) in ways.iter().zip(sums) {
        println!(
            "{}: KL from float32 {:.2e} nats a token, the same most likely token at {:.2}%, {:.4} nats a token",
            way.name,
            mean(kl),
            100.0 * mean(same_token),
            mean(nll),
        );
    }
    println!(
        "generated with int8_weights: log-probabilities differ by at most {:.1e}",
        check(&model, &ways[2], &answers)?
    );
    Ok(())
}

impl Way<'_> {
    /// Log-probabilities of each token of an answer, (answer tokens, vocab_size).
    fn logps(&self, decoder: &Decoder, answer: &EncodedAnswer) -> Outcome<Tensor> {
        let ids = |ids: &[u32]| Tensor::from_slice(&ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>());
        let (prompt, last) = (ids(&answer.prompt_ids), answer.answer_ids.len() - 1);
        let prompt_tokens = prompt.size()[0];
        let mut cache = decoder.new_cache(1, prompt_tokens + last as i64, &self.compute)?;
        let mut pass = |weights: &ParameterSet, ids: Tensor, from: i64| -> Outcome<Tensor> {
            let positions = Tensor::f_arange_start(from, from + ids.size()[0], (Kind::Int64, Device::Cpu))?;
            let (ids, positions) = (ids.f_unsqueeze(0)?, positions.f_unsqueeze(0)?);
            let input = ModelInput { ids, positions, mask: AttentionMask::Causal };
            Ok(decoder.hidden_states(weights, &input, Some(&mut cache), &self.compute)?.f_squeeze_dim(0)?)
        };
        let mut hidden = vec![pass(self.prompt, prompt, 0)?.f_narrow(0, prompt_tokens - 1, 1)?];
        // The last token is never fed.
        if last > 0 {
            hidden.push(pass(self.layers, ids(&answer.answer_ids[..last]), prompt_tokens)?);
        }
        let hidden = Tensor::f_cat(&hidden, 0)?;
        let logits = decoder.logits(self.head, &hidden, &self.compute)?;
        Ok(logits.f_log_softmax(-1, Kind::Float)?)
    }
}

/// The model's parameters with the layers' linear weights as `int8_weights` rounds them, and the head's, if that is asked
/// for: where it is the embedding as well, that one stays as it is.
fn rounded(model: &Model, head: bool) -> Outcome<ParameterSet> {
    // Its products with unit vectors are its columns.
    let round = |weight: &Tensor| -> Outcome<Tensor> {
        let units = Tensor::f_eye(weight.size()[1], (Kind::Float, Device::Cpu))?;
        Ok(Linear::quantized(weight, None)?.multiply(&units)?.f_transpose(0, 1)?.f_contiguous()?)
    };
    let is_rounded = |name: &str| name.ends_with("proj.weight") || (head && name == model.decoder.head_name());
    let parameter = |(name, weight): (&str, &Tensor)| -> Outcome<(String, Tensor)> {
        let weight = if is_rounded(name) { round(weight)? } else { weight.shallow_clone() };
        Ok((name.to_string(), weight))
    };
    model.parameters.iter().map(parameter).collect()
}

/// The largest difference between log-probabilities of tokens that are generated with `int8_weights`, and what `way` makes
/// of them.
fn check(model: &Model, way: &Way, answers: &[EncodedAnswer]) -> Outcome<f64> {
    let decoding = Decoding { int8_weights: true, ..Decoding::default() };
    let sampling = Sampling { choice: Choice::Greedy, eos_ids: vec![], compute: FLOAT, decoding };
    let mut largest = 0.0;
    for answer in answers.iter().take(4) {
        let request = Request { prompt_ids: answer.prompt_ids.clone(), max_new_tokens: 32, seed: 0 };
        let generation = generate(&model.decoder, &model.parameters, &[request], &sampling)?.remove(0);
        let answer = EncodedAnswer { prompt_ids: answer.prompt_ids.clone(), answer_ids: generation.tokens };
        let found = way.logps(&model.decoder, &answer)?;
        for (index, (&token, logp)) in answer.answer_ids.iter().zip(generation.logps).enumerate() {
            let difference = found.f_double_value(&[index as i64, i64::from(token)])? - f64::from(logp);
            largest = f64::max(largest, difference.abs());
        }
    }
    Ok(largest)
}

/// The negative sum of the targets' log-probabilities, in nats.
fn chosen(logps: &Tensor, targets: &Tensor) -> Outcome<f64> {
    let chosen = logps.f_gather(1, &targets.f_unsqueeze(1)?, false)?;
    Ok(-chosen.f_sum(Kind::Double)?.f_double_value(&[])?)
}

fn read_answers(directory: &Path, data: &str) -> Outcome<Vec<EncodedAnswer>> {
    let tokenizer = TextTokenizer::load(directory)?;
    let template = ChatTemplate::load(directory)?.ok_or("the model has no chat template")?;
    let answer = |line: &str| -> Outcome<EncodedAnswer> {
        let row: serde_json::Value = serde_json::from_str(line)?;
        let text = |message: &serde_json::Value, key: &str| message[key].as_str().unwrap_or_default().to_string();
        let messages = row["messages"].as_array().ok_or("expected messages in each line")?;
        let messages: Vec<Message> =
            messages.iter().map(|message| Message::new(text(message, "role"), text(message, "content"))).collect();
        Ok(encode_conversation(&tokenizer, &template, &messages)?)
    };
    std::fs::read_to_string(data)?.lines().map(answer).collect()
}
