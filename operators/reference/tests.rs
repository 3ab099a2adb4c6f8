//! Log-probabilities under golden models: what transformers computed, kept or not, and across a checkpoint.

use sapo_flow_training::model::Decoder;

use super::*;
use crate::testing::{Harness, golden, golden_path, pair, token_ids};

/// The golden pairs of the tiny Llama model.
fn pairs() -> Vec<Arc<Pair>> {
    let expected = golden("models/llama/expected.json");
    let pairs = expected["step"]["pairs"].as_array().expect("a list");
    let ids = |pair: &serde_json::Value, part: &str| token_ids(&pair[part]);
    let golden = (0..).zip(pairs).map(|(row, stored)| {
        let rejected = ids(stored, "rejected_ids");
        pair(row, &ids(stored, "prompt_ids"), &ids(stored, "chosen_ids"), Some(&rejected)).into()
    });
    golden.collect()
}

/// The model that `reference` takes over from `weights` when it is told to.
fn weights() -> Weights {
    let Model { decoder, parameters, files } = load("models/llama");
    handed_over(SharedWeights { decoder, parameters, files: Arc::new(files), version: 7 })
}

fn handed_over(weights: SharedWeights) -> Weights {
    Weights { model: "learner".into(), version: weights.version, handle: Some(Arc::new(weights)) }
}

fn load(name: &str) -> Model {
    Model::load(&golden_path(name), Device::Cpu, Kind::Float).expect("a golden model")
}

fn with(keep_logps: bool) -> String {
    let model = golden_path("models/llama/reference");
    format!("{{model: '{}', refresh_every: 3, keep_logps: {keep_logps}}}", model.display())
}

fn step(operator: &mut Reference, step: u64, pairs: &[Arc<Pair>]) -> Vec<ReferenceLogps> {
    let batch = Record::Batch(Batch { pairs: pairs.to_vec(), reference: None }.into());
    let inputs = Inputs::new(vec![("batches", vec![batch]), ("weights", vec![Record::Weights(weights())])]);
    let outputs = operator.step(step, inputs).expect("a step");
    let records: Vec<Record> = outputs.records.into_iter().map(|(_, record)| record).collect();
    match records.as_slice() {
        [Record::Batch(batch)] => batch.reference.clone().expect("log-probabilities"),
        other => panic!("expected a batch, found {other:?}"),
    }
}

fn start(harness: &Harness, keep_logps: bool) -> Reference {
    let mut operator: Reference = harness.build(&with(keep_logps)).expect("good settings");
    operator.start(Inputs::default()).expect("a golden model");
    operator
}

/// Where both were computed in one batch and where not, they differ in the last bits of f32 sums over tens of tokens.
fn assert_close(found: &[ReferenceLogps], expected: &[ReferenceLogps]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let differs = (found.chosen - expected.chosen).abs().max((found.rejected - expected.rejected).abs());
        assert!(differs < 1e-4, "{found:?} {expected:?}");
    }
}

/// transformers' mean log-probabilities under the reference follow from those under the policy and the rewards, which are
/// beta times the difference.
#[test]
fn logps_are_those_of_transformers() {
    let expected = &golden("models/llama/expected.json")["step"]["dpo_reference"];
    let metric = |name: &str| expected["metrics"][name].as_f64().expect("a number");
    let beta = expected["beta"].as_f64().expect("a number");
    let harness = Harness::new();
    for keep_logps in [true, false] {
        let logps = step(&mut start(&harness, keep_logps), 0, &pairs());
        let mean = |of: fn(&ReferenceLogps) -> f32| {
            logps.iter().map(|logps| f64::from(of(logps))).sum::<f64>() / logps.len() as f64
        };
        let chosen = metric("logps/real") - metric("rewards/real") / beta;
        let rejected = metric("logps/generated") - metric("rewards/generated") / beta;
        assert!((mean(|logps| logps.chosen) - chosen).abs() < 1e-4);
        assert!((mean(|logps| logps.rejected) - rejected).abs() < 1e-4);
    }
}

#[test]
fn with_plain_kernels_nothing_is_kept_unless_asked_for() {
    let expected = step(&mut start(&Harness::new(), true), 0, &pairs());
    let harness = Harness::with_plain_kernels();
    let model = golden_path("models/llama/reference");
    for (more, kept) in [("", 0), (", keep_logps: true", 4)] {
        let with = format!("{{model: '{}', refresh_every: 3{more}}}", model.display());
        let mut operator: Reference = harness.build(&with).expect("good settings");
        operator.start(Inputs::default()).expect("a golden model");
        assert_close(&step(&mut operator, 0, &pairs()), &expected);
        assert_eq!(operator.memo.entries().len(), kept);
    }
}

#[test]
fn what_is_kept_is_what_would_be_computed_until_the_model_changes() {
    let harness = Harness::new();
    let (mut keeping, mut plain) = (start(&harness, true), start(&harness, false));
    let golden = pairs();
    let [first, second] = golden.as_slice() else { panic!("two golden pairs") };
    let crossed = Pair { chosen_ids: second.chosen_ids.clone(), ..Pair::clone(first) };
    let single = Pair { rejected_ids: None, ..Pair::clone(second) };
    let batches: [&[Arc<Pair>]; 4] = [
        &[first.clone(), first.clone()],
        &[second.clone(), first.clone(), single.clone().into()],
        // Its rejected response is known, its chosen one is not.
        &[crossed.into(), single.into()],
        // At this step the model is another.
        &[first.clone(), second.clone()],
    ];
    let mut kept = Vec::new();
    for (number, batch) in (0..).zip(batches) {
        let (found, expected) = (step(&mut keeping, number, batch), step(&mut plain, number, batch));
        assert_close(&found, &expected);
        kept.push(keeping.memo.entries().len());
    }
    // Distinct responses: two, four, five; and four under the new model.
    assert_eq!(kept, [2, 4, 5, 4]);
}

#[test]
fn a_resumed_run_finds_the_same_bits() {
    let harness = Harness::new();
    let mut whole = start(&harness, true);
    let golden = pairs();
    step(&mut whole, 0, &golden);
    whole.snapshot(&harness.checkpoint()).expect("a snapshot");
    let mut resumed: Reference = harness.resume(&with(true)).expect("good settings");
    resumed.restore(&harness.checkpoint()).expect("a checkpoint");
    resumed.start(Inputs::default()).expect("a golden model");
    assert_eq!(resumed.memo.entries(), whole.memo.entries());
    // Alone in its batch it would be computed with other bits.
    assert_eq!(step(&mut resumed, 1, &golden[1..]), step(&mut whole, 1, &golden[1..]));
}

/// Where weights are is what their decoder says; no such device is needed to say it.
#[test]
fn weights_from_another_device_are_taken_to_its_own() {
    let harness = Harness::new();
    let mut operator = start(&harness, true);
    let Model { decoder, parameters, files } = load("models/llama");
    // A device that no machine of the tests has, and that a thread need not enter.
    let elsewhere = Decoder { device: Device::Mps, ..Decoder::clone(&decoder) };
    let arriving = SharedWeights { decoder: elsewhere.into(), parameters, files: Arc::new(files), version: 7 };
    operator.refresh(3, Some(handed_over(arriving))).expect("a refresh");
    let taken = operator.weights.as_ref().expect("it has started");
    assert_eq!((taken.version, taken.decoder.device), (7, Device::Cpu));
}
