//! Settings that the golden models do not have: biases, rope scalings, windows in some layers.
//!
//! `more_models.json` holds logits that transformers 5.23 computed, in f32, for small models whose weights are the
//! pseudo-random numbers of [`weights`], which any program can make again.

use std::path::Path;

use sapo_flow_training::generate::{Choice, Decoding, Request, Sampling, generate};
use sapo_flow_training::model::{Compute, Decoder, Kernels, ModelConfig};
use sapo_flow_training::parameters::ParameterSet;
use tch::{Device, Kind, Tensor};

use crate::golden;

/// A number in [-0.5, 0.5) for each element, from its index and that of its tensor among all sorted by name. Norms are
/// 1 + 0.4 times it, all other weights 0.8 times.
fn weights(decoder: &Decoder) -> ParameterSet {
    let mut expected = decoder.expected_parameters();
    expected.sort();
    let tensor = |(index, (name, shape)): (u64, (String, Vec<i64>))| {
        let number = |element: u64| {
            let mixed = (element * 2_654_435_761 + index * 1_013_904_223) & 0xffff_ffff;
            let mixed = ((mixed ^ (mixed >> 15)) * 2_246_822_519) & 0xffff_ffff;
            let number = (mixed >> 8) as f64 / f64::from(1 << 24) - 0.5;
            (if name.ends_with("norm.weight") { 1.0 + 0.4 * number } else { 0.8 * number }) as f32
        };
        let numbers: Vec<f32> = (0..shape.iter().product::<i64>() as u64).map(number).collect();
        (name, Tensor::from_slice(&numbers).view(shape.as_slice()))
    };
    (0..).zip(expected).map(tensor).collect()
}

#[test]
fn logits_of_less_common_settings() {
    let _guard = tch::no_grad_guard();
    let cases: serde_json::Value = serde_json::from_str(include_str!("more_models.json")).unwrap();
    let compute = Compute::new(Kind::Float);
    for case in cases.as_array().unwrap() {
        let config = ModelConfig::new(Path::new("config.json"), case["config"].as_object().unwrap().clone(), None);
        let decoder = Decoder::new(config.unwrap(), Device::Cpu).unwrap();
        let weights = weights(&decoder);
        let input = decoder.input(&[golden::tokens(&case["input_ids"])]).unwrap();
        let hidden = decoder.hidden_states(&weights, &input, None, &compute).unwrap();
        let logits = decoder.logits(&weights, &hidden, &compute).unwrap().get(0);
        for (position, expected) in golden::floats(&case["at"]).into_iter().zip(case["logits"].as_array().unwrap()) {
            let found = Vec::<f64>::try_from(logits.get(position as i64).to_kind(Kind::Double)).unwrap();
            let what = format!("{} at position {position}", case["name"]);
            golden::assert_close(&what, &found, &golden::floats(expected), 1e-4);
        }
    }
}

/// Rotations go by the longest row, of those under way together. All ways to decode know how long that is.
#[test]
fn rotations_that_depend_on_length_are_the_same_whatever_the_way() {
    let cases: serde_json::Value = serde_json::from_str(include_str!("more_models.json")).unwrap();
    let mut found = 0;
    for case in cases.as_array().unwrap() {
        let config = ModelConfig::new(Path::new("config.json"), case["config"].as_object().unwrap().clone(), None);
        let decoder = Decoder::new(config.unwrap(), Device::Cpu).unwrap();
        if !decoder.rope.depends_on_length() {
            continue;
        }
        found += 1;
        let (weights, ids) = (weights(&decoder), golden::tokens(&case["input_ids"]));
        let request = |tokens| Request { prompt_ids: ids[..tokens].to_vec(), max_new_tokens: 6, seed: 1 };
        let requests = [3, 24, 11].map(request);
        let generate = |kernels, decoding| {
            let compute = Compute { kind: Kind::Float, kernels };
            let sampling = Sampling { choice: Choice::Greedy, eos_ids: Vec::new(), compute, decoding };
            generate(&decoder, &weights, &requests, &sampling).unwrap().into_iter().map(|made| made.tokens)
        };
        let plain = Decoding { pack_weights: false, ..Decoding::default() };
        let expected: Vec<Vec<u32>> = generate(Kernels::Plain, plain).collect();
        for decoding in [Decoding::default(), Decoding { look_every: Some(4), ..plain }] {
            for kernels in [Kernels::Fused, Kernels::Plain] {
                assert!(generate(kernels, decoding).eq(expected.iter().cloned()), "{} {decoding:?}", case["name"]);
            }
        }
    }
    assert_eq!(found, 4);
}
