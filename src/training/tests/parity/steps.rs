//! A whole training step of every golden model: loss, metrics, and every parameter's gradient norm, as transformers and
//! autograd computed them for two pairs (`step` in golden/models/*/expected.json). All ways to compute a step are held to
//! these, and their gradients to each other number by number.

use std::path::Path;
use std::sync::Arc;

use sapo_flow_training::learner::{Example, LayoutKind, Learner, LearnerSettings, StepMetrics, reference_logps};
use sapo_flow_training::logps::Limits;
use sapo_flow_training::model::{AttentionMask, Compute, Kernels, Model, ModelInput};
use sapo_flow_training::objectives::{Objective, PairTensor};
use sapo_flow_training::optim::{Rule, Schedule, ScheduleKind, Warmup};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::golden;
use crate::objectives::{dpo, orpo};

const LOSS_TOLERANCE: f64 = 1e-5;
const NORM_TOLERANCE: f64 = 1e-3;
/// Of a gradient's numbers, as a share of the largest. (The most that was seen is 4e-6.)
const GRADIENT_TOLERANCE: f64 = 1e-5;

/// Each parameter's, by name.
pub type Gradients = Vec<(String, Tensor)>;

/// A model directory in f32 on the CPU.
pub fn load(directory: &Path) -> Model {
    Model::load(directory, Device::Cpu, Kind::Float).unwrap()
}

/// AdamW at a constant learning rate, without clipping, in f32.
pub fn settings(objective: Arc<dyn Objective>) -> LearnerSettings {
    LearnerSettings {
        objective,
        optimizer: Rule::Adamw { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 },
        learning_rate: 1e-3,
        schedule: Schedule::new(ScheduleKind::Constant, Warmup::Steps(0), 10).unwrap(),
        max_grad_norm: None,
        layout: LayoutKind::SharedPrefix,
        gradient_checkpointing: false,
        release_gradients: false,
        freeze: Vec::new(),
        compute: Compute::new(Kind::Float),
        logits: Limits::default(),
        seed: 0,
    }
}

/// The pairs of a golden step.
pub fn examples(step: &Value) -> Vec<Example> {
    let pairs = step["pairs"].as_array().expect("a step has pairs");
    let example = |(index, pair): (usize, &Value)| Example {
        prompt_ids: golden::tokens(&pair["prompt_ids"]),
        chosen_ids: golden::tokens(&pair["chosen_ids"]),
        rejected_ids: Some(golden::tokens(&pair["rejected_ids"])),
        label: format!("pair {index}"),
        ..Example::default()
    };
    pairs.iter().enumerate().map(example).collect()
}

/// The pairs of a golden step, with log-probabilities of the reference model beside it.
pub fn examples_with_reference(directory: &Path, step: &Value) -> Vec<Example> {
    let mut examples = examples(step);
    let model = load(&directory.join("reference"));
    let compute = Compute::new(Kind::Float);
    let logps = reference_logps(&model.decoder, &model.parameters, &examples, &compute, 8).unwrap();
    for (example, logps) in examples.iter_mut().zip(logps) {
        example.reference = Some(logps);
    }
    examples
}

#[track_caller]
fn assert_metric(what: &str, metrics: &StepMetrics, name: &str, expected: &Value, tolerance: f64) {
    let expected = expected.as_f64().unwrap_or_else(|| panic!("{what} has no number for {name}"));
    golden::assert_close(&format!("{what}, {name}"), &[metrics[name]], &[expected], tolerance);
}

/// The loss and all gradient norms of one golden case, in both layouts and with both kernels, and all gradients as the
/// plainest way has them; the plainest's metrics for more to be compared.
fn check(
    what: &str,
    directory: &Path,
    objective: Arc<dyn Objective>,
    examples: &[Example],
    expected: &Value,
) -> StepMetrics {
    let (all, few) = (Limits::default(), few_logits(directory));
    let check_in = |layout: LayoutKind, kernels: Kernels, logits: Limits| {
        let compute = Compute { kind: Kind::Float, kernels };
        let settings = LearnerSettings { layout, compute, logits, ..settings(objective.clone()) };
        let what = format!("{what}, {layout:?}, {kernels:?}, {logits:?}");
        let (metrics, gradients) = check_with(settings, &what, directory, examples, expected);
        (what, metrics, gradients)
    };
    let (_, metrics, plain) = check_in(LayoutKind::Padded, Kernels::Plain, all);
    for (layout, kernels, logits) in [
        (LayoutKind::SharedPrefix, Kernels::Plain, all),
        (LayoutKind::Padded, Kernels::Fused, all),
        (LayoutKind::Padded, Kernels::Fused, few),
        (LayoutKind::SharedPrefix, Kernels::Fused, all),
        (LayoutKind::SharedPrefix, Kernels::Fused, few),
    ] {
        let (what, _, found) = check_in(layout, kernels, logits);
        assert_gradients(&what, &found, &plain, GRADIENT_TOLERANCE);
    }
    metrics
}

/// Golden logits are fewer than a chunk: here are three rows in a chunk, and each chunk is computed again for the gradient.
pub fn few_logits(directory: &Path) -> Limits {
    let row = 4 * load(directory).decoder.config.vocab_size;
    Limits { chunk_bytes: 3 * row, piece_bytes: 2 * row, kept_bytes: 0 }
}

/// Each number of each gradient, to a share of the gradient's largest.
#[track_caller]
pub fn assert_gradients(what: &str, found: &Gradients, expected: &Gradients, tolerance: f64) {
    for ((name, expected), (_, found)) in expected.iter().zip(found) {
        let difference = golden::largest_difference(found, expected) / expected.abs().max().double_value(&[]);
        assert!(difference <= tolerance, "{what}, gradient of {name}: {difference}");
    }
}

fn check_with(
    settings: LearnerSettings,
    what: &str,
    directory: &Path,
    examples: &[Example],
    expected: &Value,
) -> (StepMetrics, Gradients) {
    let Model { decoder, parameters, .. } = load(directory);
    let learner = Learner::new(decoder, parameters, settings).unwrap();
    let (metrics, gradients) = learner.loss_gradients(examples, examples.len()).unwrap();
    assert_metric(what, &metrics, "loss", &expected["loss"], LOSS_TOLERANCE);
    let norms = expected["grad_norms"].as_object().expect("a case has norms");
    assert_eq!(gradients.len(), norms.len(), "{what}: number of gradients");
    for (name, gradient) in &gradients {
        let found = gradient.norm().double_value(&[]);
        let expected = norms[name].as_f64().expect("a norm is a number");
        let close = (found - expected).abs() <= NORM_TOLERANCE * expected;
        assert!(close, "{what}, gradient norm of {name}: expected {expected}, found {found}");
    }
    (metrics, gradients)
}

#[test]
fn orpo_steps_match() {
    for directory in golden::models() {
        let step = &golden::json(directory.join("expected.json"))["step"];
        let examples = examples(step);
        for (case, nll) in [("orpo_trl", PairTensor::SequenceNll), ("orpo_response_nll", PairTensor::ChosenNll)] {
            let (what, expected) = (format!("{} {case}", directory.display()), &step[case]);
            let objective = orpo(expected["beta"].as_f64().unwrap(), nll);
            let metrics = check(&what, &directory, objective, &examples, expected);
            assert_metric(&what, &metrics, "nll_loss", &expected["nll_loss"], LOSS_TOLERANCE);
            // The authors' step differs in its NLL alone (and takes means of logits over padding too).
            for (name, value) in step["orpo_reference"]["metrics"].as_object().unwrap() {
                if name != "nll_loss" && !name.starts_with("logits/") {
                    assert_metric(&what, &metrics, name, value, LOSS_TOLERANCE);
                }
            }
        }
    }
}

/// Mean negative log-likelihood, nats, of every next token of the chosen rows padded with token 0, padding as a target
/// like any other; nothing attends to padding.
fn nll_over_padding(model: &Model, examples: &[Example]) -> f64 {
    let rows: Vec<Vec<u32>> = examples.iter().map(|pair| [&pair.prompt_ids[..], &pair.chosen_ids].concat()).collect();
    let mut input = ModelInput::right_padded(&rows, 0, Device::Cpu).unwrap();
    let (batch, tokens) = input.ids.size2().unwrap();
    let lengths = Tensor::from_slice(&rows.iter().map(|row| row.len() as i64).collect::<Vec<_>>());
    let text = Tensor::arange(tokens, (Kind::Int64, Device::Cpu)).unsqueeze(0).less_tensor(&lengths.unsqueeze(1));
    let causal = Tensor::ones([tokens, tokens], (Kind::Bool, Device::Cpu)).tril(0);
    input.mask = AttentionMask::Dense(text.view([batch, 1, 1, tokens]).logical_and(&causal));
    let compute = Compute::new(Kind::Float);
    let hidden = model.decoder.hidden_states(&model.parameters, &input, None, &compute).unwrap();
    let logits = model.decoder.logits(&model.parameters, &hidden, &compute).unwrap();
    let logits = logits.narrow(1, 0, tokens - 1).flatten(0, 1); // (batch * (tokens - 1), vocab_size)
    let targets = input.ids.narrow(1, 1, tokens - 1).flatten(0, 1);
    logits.cross_entropy_for_logits(&targets).double_value(&[])
}

/// The authors' loss differs from ours in that it learns to write padding: with padding counted as text, its number
/// results.
#[test]
fn the_authors_nll_counts_padding() {
    let _guard = tch::no_grad_guard();
    for directory in golden::models() {
        let step = &golden::json(directory.join("expected.json"))["step"];
        let theirs = &step["orpo_reference"];
        let number = |value: &Value| value.as_f64().expect("a number");
        let what = format!("{} orpo_reference", directory.display());
        let nll = nll_over_padding(&load(&directory), &examples(step));
        golden::assert_close(&what, &[nll], &[number(&theirs["metrics"]["nll_loss"])], LOSS_TOLERANCE);
        let loss = nll - number(&theirs["beta"]) * number(&theirs["metrics"]["log_odds_ratio"]);
        golden::assert_close(&what, &[loss], &[number(&theirs["loss"])], LOSS_TOLERANCE);
    }
}

#[test]
fn dpo_steps_match() {
    for directory in golden::models() {
        let step = &golden::json(directory.join("expected.json"))["step"];
        let examples = examples_with_reference(&directory, step);
        let (what, expected) = (format!("{} dpo", directory.display()), &step["dpo_reference"]);
        let objective = dpo(expected["beta"].as_f64().unwrap());
        let metrics = check(&what, &directory, objective, &examples, expected);
        for (name, value) in expected["metrics"].as_object().unwrap() {
            // The authors call chosen and rejected responses real and generated.
            let name = name.replace("real", "chosen").replace("generated", "rejected");
            if !name.starts_with("logits/") {
                assert_metric(&what, &metrics, &name, value, LOSS_TOLERANCE);
            }
        }
    }
}
