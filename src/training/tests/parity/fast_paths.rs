//! Every fast path against the plain one, in the settings that other tests do not have: many rows that are decoded with weights
//! laid out anew, sequences of several blocks of attention, bfloat16, and each set of instructions.

use std::path::Path;
use std::sync::Arc;

use sapo_flow_training::generate::{Choice, Decoding, Generation, Request, Sampling, generate};
use sapo_flow_training::learner::{Example, LayoutKind, Learner, LearnerSettings, StepMetrics};
use sapo_flow_training::logps::Limits;
use sapo_flow_training::model::rope::RopeScaling;
use sapo_flow_training::model::{Compute, Decoder, Kernels, Model, ModelConfig};
use sapo_flow_training::objectives::{Objective, PairTensor};
use tch::{Device, Kind, Tensor};

use crate::golden;
use crate::objectives::{dpo, orpo};
use crate::steps::{Gradients, assert_gradients, examples_with_reference, few_logits, load, settings};

/// Most that a number is off by once it is rounded to the 8 bits of bfloat16's significand, as a share of it.
const ROUNDING: f64 = 1.0 / 256.0;

const FUSED: Kernels = Kernels::Fused;
const PLAIN: Kernels = Kernels::Plain;

/// The golden prompts of a model, each followed by its first greedy tokens, as many as `cuts`: prompts that begin like others,
/// and are of many lengths.
fn requests(directory: &Path, cuts: usize, max_new_tokens: usize) -> Vec<Request> {
    let expected = golden::json(directory.join("expected.json"));
    let rows = |key: &str| expected[key].as_array().unwrap().iter().map(golden::tokens).collect::<Vec<_>>();
    let lengths = golden::floats(&expected["lengths"]);
    let prompts = rows("input_ids").into_iter().zip(lengths).zip(rows("greedy_12"));
    let of_prompt = |((row, length), greedy): ((Vec<u32>, f64), Vec<u32>)| {
        let prompt = row[..length as usize].to_vec();
        (0..cuts).map(move |cut| [prompt.as_slice(), &greedy[..cut]].concat())
    };
    let request = |prompt_ids| Request { prompt_ids, max_new_tokens, seed: 0 };
    prompts.flat_map(of_prompt).map(request).collect()
}

fn greedy(model: &Model, requests: &[Request], kind: Kind, kernels: Kernels) -> Vec<Generation> {
    let (compute, decoding) = (Compute { kind, kernels }, Decoding::suited_to(kernels));
    let sampling = Sampling { choice: Choice::Greedy, eos_ids: vec![], compute, decoding };
    generate(&model.decoder, &model.parameters, requests, &sampling).unwrap()
}

/// More rows than are decoded in place, and enough tokens for weights to be laid out anew. Sums of 48 to 128 products in another
/// order change log-probabilities by some millionths.
#[test]
fn many_rows_get_the_plain_tokens() {
    for directory in golden::models() {
        let (model, requests) = (load(&directory), requests(&directory, 7, 20));
        assert!(requests.len() > 16);
        let expected = greedy(&model, &requests, Kind::Float, PLAIN);
        let found = greedy(&model, &requests, Kind::Float, FUSED);
        assert!(found != expected, "another path");
        assert_alike(&found, &expected, &directory.display().to_string());
    }
}

#[track_caller]
fn assert_alike(found: &[Generation], expected: &[Generation], what: &str) {
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.tokens, expected.tokens, "{what}");
        let pairs = found.logps.iter().zip(&expected.logps);
        assert!(pairs.clone().all(|(found, expected)| (found - expected).abs() < 2e-5), "{what}: {pairs:?}");
    }
}

unsafe extern "C" {
    /// As `native/fused.cpp` has it.
    fn sapo_limit_instructions(limit: i32) -> i32;
}

/// All that decodes a few rows, with the instructions of every processor from x86-64's first on, as far as this one has them.
#[test]
fn each_set_of_instructions_gets_the_plain_tokens() {
    for directory in golden::models() {
        let (model, requests) = (load(&directory), requests(&directory, 3, 20));
        let expected = greedy(&model, &requests, Kind::Float, PLAIN);
        for limit in 0..=2 {
            // Safety: it sets a number of this thread's own.
            unsafe { sapo_limit_instructions(limit) };
            let found = greedy(&model, &requests, Kind::Float, FUSED);
            assert_alike(&found, &expected, &format!("{}, set {limit}", directory.display()));
        }
    }
}

/// The model with something amiss that tolerances must not let pass: positions and the scale of attention a tenth off, and a
/// window of one token more.
fn amiss(directory: &Path) -> Vec<(&'static str, Model)> {
    let with = |change: fn(&mut ModelConfig)| {
        let Model { decoder, parameters, files } = load(directory);
        let mut config = decoder.config.clone();
        change(&mut config);
        Model { decoder: Decoder::new(config, Device::Cpu).unwrap().into(), parameters, files }
    };
    let mut scaled = load(directory);
    let of_queries = |name: &str| ["q_proj.weight", "q_proj.bias"].iter().any(|end| name.ends_with(end));
    let has_norms = scaled.decoder.config.qk_norm;
    for (name, tensor) in scaled.parameters.iter_mut() {
        if if has_norms { name.ends_with("q_norm.weight") } else { of_queries(name) } {
            *tensor = &*tensor * 1.1;
        }
    }
    let mut all = vec![
        ("positions", with(|config| config.rope.scaling = RopeScaling::Linear { factor: 1.1 })),
        ("scale", scaled),
    ];
    if load(directory).decoder.config.sliding_window.is_some() {
        all.push(("window", with(|config| config.sliding_window = config.sliding_window.map(|window| window + 1))));
    }
    all
}

/// What a plain pass in bfloat16 over prompt and tokens gives for each token: its log-probability, and the best token's.
fn plain_logps(model: &Model, request: &Request, tokens: &[u32]) -> Vec<[f64; 2]> {
    let compute = Compute { kind: Kind::BFloat16, kernels: PLAIN };
    let whole = [request.prompt_ids.as_slice(), tokens].concat();
    let input = model.decoder.input(&[&whole]).unwrap();
    let hidden = model.decoder.hidden_states(&model.parameters, &input, None, &compute).unwrap();
    let logits = model.decoder.logits(&model.parameters, &hidden, &compute).unwrap().get(0);
    let logps = logits.log_softmax(-1, Kind::Float);
    let at = |(index, &token): (usize, &u32)| {
        let row = logps.get((request.prompt_ids.len() + index - 1) as i64);
        [row.double_value(&[i64::from(token)]), row.max().double_value(&[])]
    };
    tokens.iter().enumerate().map(at).collect()
}

/// How much what `model` generates in bfloat16 is off what the plain path makes of the same tokens, in roundings: the root of
/// the mean squared difference of log-probabilities, the largest, and how far the best token's was above that of the one chosen.
fn decoding_differences(model: &Model, directory: &Path, requests: &[Request]) -> [f64; 3] {
    let plain = load(directory);
    let (mut squares, mut count, mut largest, mut missed) = (0.0, 0.0, 0f64, 0f64);
    for (request, found) in requests.iter().zip(greedy(model, requests, Kind::BFloat16, FUSED)) {
        for (&logp, [expected, best]) in found.logps.iter().zip(plain_logps(&plain, request, &found.tokens)) {
            let difference = (f64::from(logp) - expected).abs();
            (squares, count) = (squares + difference * difference, count + 1.0);
            (largest, missed) = (largest.max(difference), missed.max(best - expected));
        }
    }
    [(squares / count).sqrt(), largest, missed].map(|nats| nats / ROUNDING)
}

/// In bfloat16 the paths round at other places: logits of up to about 10 end up 3 roundings of 1 apart, and log-probabilities
/// with them. (That is less than the plain path is off float32, 4 to 7.) Both few rows, in place, and many, laid out anew. What
/// is amiss makes 20 and more of it.
#[test]
fn decoding_in_bfloat16_is_near_the_plain_path() {
    let _guard = tch::no_grad_guard();
    let is_near = |[mean, largest, missed]: [f64; 3]| mean <= 6.0 && largest <= 20.0 && missed <= 20.0;
    for directory in golden::models() {
        for cuts in [3, 7] {
            let (what, requests) = (directory.display(), requests(&directory, cuts, 20));
            let sound = decoding_differences(&load(&directory), &directory, &requests);
            assert!(is_near(sound) && sound[0] > 0.0, "{what}: {sound:?}");
            for (part, model) in amiss(&directory) {
                let found = decoding_differences(&model, &directory, &requests);
                assert!(!is_near(found), "{what}, {part} amiss: {found:?}");
            }
        }
    }
}

fn gradients(
    model: Model,
    kernels: Kernels,
    objective: Arc<dyn Objective>,
    of: &[Example],
) -> (StepMetrics, Gradients) {
    let compute = Compute { kind: Kind::BFloat16, kernels };
    gradients_with(model, compute, Limits::default(), objective, of)
}

/// In the layout that goes with the kernels.
fn gradients_with(
    model: Model,
    compute: Compute,
    logits: Limits,
    objective: Arc<dyn Objective>,
    of: &[Example],
) -> (StepMetrics, Gradients) {
    let layout = LayoutKind::suited_to(compute.kernels);
    let settings = LearnerSettings { layout, compute, logits, ..settings(objective) };
    Learner::new(model.decoder, model.parameters, settings).unwrap().loss_gradients(of, of.len()).unwrap()
}

/// 249 and 240 tokens, of which 150 are the prompt's, and 140 and 250, of which 100 are: fused attention takes queries in blocks
/// of 128.
fn long_examples() -> [Example; 2] {
    let ids = |from: u32, count: u32| (from..from + count).map(|n| 3 + n * n % 157).collect();
    let example = |from, [prompt, chosen, rejected]: [u32; 3]| Example {
        prompt_ids: ids(from, prompt),
        chosen_ids: ids(from + 40, chosen),
        rejected_ids: Some(ids(from + 60, rejected)),
        reference: Some((-4.9 * chosen as f32, -5.1 * rejected as f32)),
        ..Example::default()
    };
    [example(0, [150, 99, 90]), example(7, [100, 40, 150])]
}

/// In float32: metrics to 1e-5, and each number of the gradients to 3e-5 of the largest, by three rows of logits in a chunk,
/// too, with chunks computed again. (The most that was seen is 6e-6. Sums of 500 nats are rounded by 2e-5, a tenth of which
/// goes into all of DPO's gradients.)
#[test]
fn long_sequences_get_the_plain_gradients() {
    let examples = long_examples();
    for directory in golden::models() {
        for objective in [orpo(0.1, PairTensor::SequenceNll), dpo(0.1)] {
            let run = |kernels: Kernels, logits: Limits| {
                let compute = Compute { kind: Kind::Float, kernels };
                gradients_with(load(&directory), compute, logits, objective.clone(), &examples)
            };
            let (expected, plain) = run(PLAIN, Limits::default());
            for limits in [Limits::default(), few_logits(&directory)] {
                let what = format!("{} {objective:?}, {limits:?}", directory.display());
                let (metrics, found) = run(FUSED, limits);
                for (name, expected) in &expected {
                    golden::assert_close(&format!("{what}, {name}"), &[metrics[name]], &[*expected], 1e-5);
                }
                assert_gradients(&what, &found, &plain, 3e-5);
            }
        }
    }
}

/// The norm of the difference as a share of the plain gradients' norm, in roundings: of all gradients, and the largest of a
/// parameter's own but for biases of keys.
fn gradient_differences(found: &Gradients, plain: &Gradients) -> [f64; 2] {
    let squared = |tensor: &Tensor| tensor.square().sum(Kind::Double).double_value(&[]);
    let (mut differences, mut norms, mut largest) = (0.0, 0.0, 0f64);
    for ((name, plain), (_, found)) in plain.iter().zip(found) {
        assert_eq!(found.kind(), Kind::Float, "{name}");
        let (difference, norm) = (squared(&(found - plain)), squared(plain));
        (differences, norms) = (differences + difference, norms + norm);
        // The gradient of a key's bias is what is left of larger numbers, and so are its differences.
        if !name.ends_with("k_proj.bias") {
            largest = largest.max((difference / norm).sqrt());
        }
    }
    [(differences / norms).sqrt(), largest].map(|share| share / ROUNDING)
}

/// Fused kernels and shared prefixes against plain kernels and padded rows, both in bfloat16. Through three layers and back,
/// roundings at other places add up to 5 to 10 of the gradients, and at most 13 of a parameter's, on a processor whose products
/// are oneDNN's. (That is about what the plain path is off float32.) The loss and log-probabilities differ by a rounding or two. What is amiss makes 31 and more of all gradients, and one position too many of rejected responses
/// 17.
#[test]
fn learning_in_bfloat16_is_near_the_plain_path() {
    let is_near = |[all, largest]: [f64; 2]| all <= 14.0 && largest <= 24.0;
    for directory in golden::models() {
        let step = &golden::json(directory.join("expected.json"))["step"];
        let examples = examples_with_reference(&directory, step);
        for objective in [orpo(0.1, PairTensor::SequenceNll), dpo(0.1)] {
            let what = format!("{} {objective:?}", directory.display());
            let (expected, plain) = gradients(load(&directory), PLAIN, objective.clone(), &examples);
            let (metrics, found) = gradients(load(&directory), FUSED, objective.clone(), &examples);
            for name in ["loss", "logps/chosen", "logps/rejected"] {
                golden::assert_close(&format!("{what}, {name}"), &[metrics[name]], &[expected[name]], 3.0 * ROUNDING);
            }
            let sound = gradient_differences(&found, &plain);
            assert!(is_near(sound) && sound[0] > 0.0, "{what}: {sound:?}");
            for (part, model) in amiss(&directory) {
                let found = gradient_differences(&gradients(model, FUSED, objective.clone(), &examples).1, &plain);
                assert!(found[0] > 24.0, "{what}, {part} amiss: {found:?}");
            }
        }
    }
}
