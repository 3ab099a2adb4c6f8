//! Averages that TRL's `BEMACallback` computed (tests/trl/bema.json, by tests/trl/tpo.py), and across a checkpoint.

use std::sync::Arc;

use sapo_flow_engine::record::Weights;
use sapo_flow_training::model::Model;
use serde_json::Value;
use tch::Tensor;

use super::*;
use crate::testing::{Harness, golden_path};

const MOVED: &str = "model.norm.weight";

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number") as f32).collect()
}

/// A golden model after so many updates, four of its weights being those given.
fn weights(version: u64, moved: &Value) -> Vec<(&'static str, Vec<Record>)> {
    let Model { decoder, parameters, files } =
        Model::load(&golden_path("models/llama"), Device::Cpu, Kind::Float).expect("a golden model");
    let values = Tensor::from_slice(&floats(moved));
    parameters.get(MOVED).expect("a norm").narrow(0, 0, 4).copy_(&values);
    let shared = SharedWeights { decoder, parameters, files: Arc::new(files), version };
    vec![(
        "weights",
        vec![Record::Weights(Weights { model: "learner".into(), version, handle: Some(Arc::new(shared)) })],
    )]
}

/// Version and the four weights of what was emitted.
fn emitted(outputs: Outputs) -> (u64, Vec<f32>) {
    let Some((_, Record::Weights(weights))) = outputs.records.into_iter().next() else { panic!("no weights") };
    let shared = crate::weights::shared(&weights).expect("a model");
    let four = shared.parameters.get(MOVED).expect("a norm").narrow(0, 0, 4);
    (weights.version, Vec::try_from(four).expect("four numbers"))
}

fn settings(case: &Value) -> String {
    let names = [("update_freq", "every"), ("update_after", "start_after"), ("min_ema_multiplier", "min_share")];
    let ours = |name: &str| {
        names.iter().find(|(theirs, _)| *theirs == name).map_or(name.to_owned(), |(_, ours)| (*ours).into())
    };
    let settings = case["settings"].as_object().expect("a mapping");
    let with: serde_json::Map<String, Value> =
        settings.iter().map(|(name, value)| (ours(name), value.clone())).collect();
    Value::Object(with).to_string()
}

#[test]
fn averages_are_those_of_trl_also_from_a_checkpoint() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/trl/bema.json");
    let cases: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path).expect("the file")).expect("JSON");
    assert_eq!(cases.len(), 3);
    for case in &cases {
        let (policy, averages) =
            (case["policy"].as_array().expect("a list"), case["averages"].as_array().expect("a list"));
        for stopped_after in [0, 4] {
            let harness = Harness::new();
            let mut operator: Bema = harness.build(&settings(case)).expect("good settings");
            let first = emitted(operator.start(Inputs::new(weights(0, &policy[0]))).expect("a start"));
            assert_eq!(first, (0, floats(&policy[0])));
            for (update, (moved, expected)) in (1..).zip(policy[1..].iter().zip(averages)) {
                // A step without an update of the learner changes nothing.
                for _ in 0..2 {
                    let outputs = operator.step(update, Inputs::new(weights(update, moved))).expect("a step");
                    let (version, found) = emitted(outputs);
                    let close =
                        found.iter().zip(floats(expected)).all(|(found, expected)| (found - expected).abs() < 1e-6);
                    assert!(
                        close && version <= update,
                        "update {update}: {found:?}, {expected:?} of {}",
                        case["settings"]
                    );
                }
                if update == stopped_after {
                    let checkpoint = harness.checkpoint();
                    operator.snapshot(&checkpoint).expect("a snapshot");
                    operator = harness.resume(&settings(case)).expect("good settings");
                    operator.restore(&checkpoint).expect("a snapshot");
                    operator.start(Inputs::new(weights(update, moved))).expect("a start");
                }
            }
        }
    }
}

#[test]
fn impossible_settings_are_refused() {
    for (with, key) in [
        ("{lag: 0.5}", "lag"),
        ("{ema_power: -1}", "ema_power"),
        ("{bias_power: .nan}", "bias_power"),
        ("{multiplier: -0.1}", "multiplier"),
        ("{min_share: 1.5}", "min_share"),
        ("{device: gpu}", "device"),
    ] {
        let issues = Bema::check(&serde_yaml::from_str(with).expect("a config"));
        assert_eq!(issues.iter().map(|issue| issue.key.as_str()).collect::<Vec<_>>(), [key], "{with}");
    }
}
