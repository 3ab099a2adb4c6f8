//! Whole training steps of the golden models through formulas: `step` in golden/models/*/expected.json.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapo_flow_training::learner::{Example, LayoutKind, Learner, LearnerSettings, reference_logps};
use sapo_flow_training::logps::Limits;
use sapo_flow_training::model::{Compute, Model};
use sapo_flow_training::optim::{Rule, Schedule, ScheduleKind, Warmup};
use serde_json::Value;
use tch::{Device, Kind};

use super::ObjectiveConfig;

fn models() -> Vec<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let folder = std::env::var_os("GOLDEN_DIR").map_or(beside, PathBuf::from).join("models");
    let entries = std::fs::read_dir(folder).expect("the golden models are there");
    entries.map(|entry| entry.unwrap().path()).filter(|path| path.join("expected.json").exists()).collect()
}

fn load(directory: &Path) -> Model {
    Model::load(directory, Device::Cpu, Kind::Float).unwrap()
}

fn tokens(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32).collect()
}

/// The pairs of a golden step, with log-probabilities of the reference model beside it.
fn examples(directory: &Path, step: &Value) -> Vec<Example> {
    let example = |pair: &Value| Example {
        prompt_ids: tokens(&pair["prompt_ids"]),
        chosen_ids: tokens(&pair["chosen_ids"]),
        rejected_ids: Some(tokens(&pair["rejected_ids"])),
        ..Example::default()
    };
    let mut examples: Vec<Example> = step["pairs"].as_array().unwrap().iter().map(example).collect();
    let model = load(&directory.join("reference"));
    let compute = Compute::new(Kind::Float);
    let logps = reference_logps(&model.decoder, &model.parameters, &examples, &compute, 8).unwrap();
    examples.iter_mut().zip(logps).for_each(|(example, logps)| example.reference = Some(logps));
    examples
}

/// Compare the loss, every gradient's norm, and the metrics that the golden case has.
fn check(directory: &Path, objective: &str, examples: &[Example], expected: &Value, metrics_of: &Value) {
    let what = format!("{} {objective}", directory.display());
    let config: ObjectiveConfig = serde_yaml::from_str(objective).unwrap();
    let settings = LearnerSettings {
        objective: Arc::new(config.compile().unwrap()),
        optimizer: Rule::Sgd { weight_decay: 0.0 },
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
    };
    let Model { decoder, parameters, .. } = load(directory);
    let learner = Learner::new(decoder, parameters, settings).unwrap();
    let (metrics, gradients) = learner.loss_gradients(examples, examples.len()).unwrap();
    let close =
        |found: f64, expected: f64, tolerance: f64| (found - expected).abs() <= tolerance * expected.abs().max(1.0);
    let loss = expected["loss"].as_f64().unwrap();
    assert!(close(metrics["loss"], loss, 1e-5), "{what}: loss {}, expected {loss}", metrics["loss"]);
    let norms = expected["grad_norms"].as_object().unwrap();
    assert_eq!(gradients.len(), norms.len(), "{what}");
    for (name, gradient) in gradients {
        let (found, expected) = (gradient.norm().double_value(&[]), norms[&name].as_f64().unwrap());
        assert!((found - expected).abs() <= 1e-3 * expected, "{what}, {name}: {found}, expected {expected}");
    }
    for (name, value) in metrics_of.as_object().unwrap() {
        // The authors call chosen and rejected responses real and generated; their NLL and logits include padding.
        let name = name.replace("real", "chosen").replace("generated", "rejected");
        if name != "nll_loss" && !name.starts_with("logits/") {
            let (found, expected) = (metrics[&name], value.as_f64().unwrap());
            assert!(close(found, expected, 1e-5), "{what}, {name}: {found}, expected {expected}");
        }
    }
}

#[test]
fn golden_steps_match_through_formulas() {
    let models = models();
    assert!(!models.is_empty());
    for directory in models {
        let text = std::fs::read_to_string(directory.join("expected.json")).unwrap();
        let step = &serde_json::from_str::<Value>(&text).unwrap()["step"];
        let examples = examples(&directory, step);
        for (case, nll) in [("orpo_trl", "sequence"), ("orpo_response_nll", "response")] {
            let objective = format!("{{name: orpo, beta: {}, nll: {nll}}}", step[case]["beta"]);
            check(&directory, &objective, &examples, &step[case], &step["orpo_reference"]["metrics"]);
        }
        let expected = &step["dpo_reference"];
        let objective = format!("{{name: dpo, beta: {}}}", expected["beta"]);
        check(&directory, &objective, &examples, expected, &expected["metrics"]);
    }
}
