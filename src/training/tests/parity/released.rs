//! Gradients released layer by layer: the same update as with all gradients together.

use std::path::Path;
use std::sync::Arc;

use sapo_flow_training::Error;
use sapo_flow_training::learner::{Example, Learner, LearnerSettings, StepMetrics};
use sapo_flow_training::model::Model;
use sapo_flow_training::objectives::{Objective, PairTensor};
use sapo_flow_training::optim::Rule;
use tch::Kind;

use crate::golden;
use crate::objectives::{dpo, entangled, ipo, orpo};
use crate::steps::{examples_with_reference, load, settings};

fn examples(directory: &Path) -> Vec<Example> {
    let step = &golden::json(directory.join("expected.json"))["step"];
    let mut examples = examples_with_reference(directory, step);
    for example in &mut examples {
        example.numbers = [("weight".to_owned(), 1.5)].into();
    }
    examples
}

/// Three steps of a learner; their metrics, and the learner.
fn trained(directory: &Path, settings: LearnerSettings) -> (Vec<StepMetrics>, Learner) {
    let Model { decoder, parameters, .. } = load(directory);
    let mut learner = Learner::new(decoder, parameters, settings).unwrap();
    let examples = examples(directory);
    let metrics = (0..3).map(|step| learner.step(step, &examples, examples.len()).unwrap()).collect();
    (metrics, learner)
}

fn checkpointed(objective: Arc<dyn Objective>) -> LearnerSettings {
    LearnerSettings { gradient_checkpointing: true, ..settings(objective) }
}

#[test]
fn released_gradients_make_the_same_bytes() {
    let (beta1, beta2, eps, weight_decay) = (0.9, 0.999, 1e-8, 0.01);
    for directory in golden::models() {
        for (objective, optimizer, freeze) in [
            (orpo(0.1, PairTensor::SequenceNll), Rule::Adamw { beta1, beta2, eps, weight_decay }, None),
            (dpo(0.1), Rule::Adamw8bit { beta1, beta2, eps, weight_decay }, Some("model.layers.0.*")),
            (entangled(0.1), Rule::Sgd { weight_decay }, Some("model.embed_tokens.weight")),
        ] {
            let freeze = freeze.map(str::to_owned).into_iter().collect();
            let plain = LearnerSettings { optimizer, freeze, ..checkpointed(objective) };
            let released = LearnerSettings { release_gradients: true, ..plain.clone() };
            let ((expected, plain), (found, released)) = (trained(&directory, plain), trained(&directory, released));
            assert_eq!(found, expected, "{} {optimizer:?}", directory.display());
            for ((name, plain), (_, released)) in plain.parameters().iter().zip(released.parameters().iter()) {
                assert_eq!(plain, released, "{} {optimizer:?} {name}", directory.display());
            }
        }
    }
}

#[test]
fn what_cannot_be_released_is_refused() {
    let directory = golden::path("models").join("smollm");
    let released = LearnerSettings { release_gradients: true, ..checkpointed(ipo(0.1)) };
    for settings in [
        LearnerSettings { gradient_checkpointing: false, ..released.clone() },
        LearnerSettings { max_grad_norm: Some(1.0), ..released.clone() },
    ] {
        let Model { decoder, parameters, .. } = load(&directory);
        let error = Learner::new(decoder, parameters, settings).err().unwrap().to_string();
        assert!(error.starts_with("release_gradients: expected"), "{error}");
    }
    let Model { decoder, parameters, .. } = load(&directory);
    let before = parameters.deep_copy();
    let mut learner = Learner::new(decoder, parameters, released).unwrap();
    let mut examples = examples(&directory);
    let error = learner.step(0, &examples, 1).unwrap_err().to_string();
    assert!(error.contains("found 2 passes of [1, 1] examples"), "{error}");
    // A loss that is not finite is found before any weight has changed.
    examples[1].reference = Some((-2e38, 2e38));
    let error = learner.step(0, &examples, 2).unwrap_err();
    assert!(matches!(&error, Error::NonFinite { what: "loss", examples, .. } if examples == &["pair 1"]), "{error}");
    assert_eq!(learner.steps(), 0);
    for ((name, before), (_, after)) in before.iter().zip(learner.parameters().iter()) {
        assert_eq!(before, after, "{name}");
    }
}

/// Weights in bfloat16 learn: as those in float32 do, but for the rounding.
#[test]
fn weights_in_bfloat16_follow_those_in_float32() {
    for name in ["smollm", "qwen2"] {
        let directory = golden::path("models").join(name);
        let examples = examples(&directory);
        let run = |kind: Kind, release_gradients: bool| {
            let Model { decoder, parameters, .. } = Model::load(&directory, tch::Device::Cpu, kind).unwrap();
            let settings = LearnerSettings { release_gradients, ..checkpointed(orpo(0.1, PairTensor::SequenceNll)) };
            let mut learner = Learner::new(decoder, parameters, settings).unwrap();
            let losses: Vec<f64> = (0..8).map(|step| learner.step(step, &examples, 2).unwrap()["loss"]).collect();
            (losses, learner)
        };
        let ((exact, _), (losses, plain), (again, released)) =
            (run(Kind::Float, false), run(Kind::BFloat16, false), run(Kind::BFloat16, true));
        let fall = |losses: &[f64]| losses[0] - losses[7];
        assert!(fall(&exact) > 0.0);
        assert!((fall(&losses) / fall(&exact) - 1.0).abs() < 0.1, "{name}: {exact:?} {losses:?}");
        assert_eq!(losses, again);
        for ((name, plain), (_, released)) in plain.parameters().iter().zip(released.parameters().iter()) {
            assert_eq!((plain.kind(), plain), (Kind::BFloat16, released), "{name}");
        }
    }
}
