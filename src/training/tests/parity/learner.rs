//! The learner against itself: what must not depend on how a batch is divided, laid out or resumed.

use std::path::PathBuf;
use std::sync::Arc;

use sapo_flow_training::Error;
use sapo_flow_training::learner::{Example, LayoutKind, Learner, LearnerSettings, score};
use sapo_flow_training::model::{Compute, Model};
use sapo_flow_training::objectives::{Objective, PairTensor};
use sapo_flow_training::optim::{Schedule, ScheduleKind, Warmup};
use sapo_flow_training::parameters::ParameterSet;
use tch::{Kind, Tensor};

use crate::golden;
use crate::objectives::{dpo, entangled, ipo, orpo, sft};
use crate::steps::{examples, examples_with_reference, load, settings};

/// ORPO as in TRL.
fn whole_orpo() -> Arc<dyn Objective> {
    orpo(0.1, PairTensor::SequenceNll)
}

/// A golden model whose head is tied to its embedding, and one with a head of its own.
fn tied_and_untied() -> [PathBuf; 2] {
    ["smollm", "qwen2"].map(|name| golden::path("models").join(name))
}

fn learner(directory: &std::path::Path, settings: LearnerSettings) -> Learner {
    let Model { decoder, parameters, .. } = load(directory);
    Learner::new(decoder, parameters, settings).unwrap()
}

/// Eight examples of many lengths, with reference log-probabilities.
fn eight_examples(directory: &std::path::Path) -> Vec<Example> {
    let step = &golden::json(directory.join("expected.json"))["step"];
    let pairs = examples_with_reference(directory, step);
    let mut examples: Vec<Example> = (0..4).flat_map(|_| pairs.clone()).collect();
    for (index, example) in examples.iter_mut().enumerate() {
        example.chosen_ids.truncate(3 + index);
        example.prompt_ids.truncate(1 + index);
        example.numbers = [("weight".to_owned(), 1.0 + 0.5 * index as f64)].into();
        example.label = format!("example {index}");
    }
    examples
}

/// The largest difference between gradients, relative to the largest element of each.
fn difference(left: &[(String, Tensor)], right: &[(String, Tensor)]) -> f64 {
    assert_eq!(left.len(), right.len());
    let each = left.iter().zip(right).map(|((name, left), (other, right))| {
        assert_eq!(name, other);
        golden::largest_difference(left, right) / left.abs().max().double_value(&[])
    });
    each.fold(0.0, f64::max)
}

fn weights(learner: &Learner) -> Vec<u8> {
    let bytes = |tensor: &Tensor| {
        let mut bytes = vec![0; tensor.numel() * 4];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        bytes
    };
    learner.parameters().iter().flat_map(|(_, tensor)| bytes(tensor)).collect()
}

#[test]
fn a_batch_of_eight_is_two_of_four() {
    for directory in tied_and_untied() {
        let examples = eight_examples(&directory);
        for objective in [whole_orpo(), dpo(0.1), sft(PairTensor::ChosenNll), entangled(0.1)] {
            let (whole, expected) =
                learner(&directory, settings(objective.clone())).loss_gradients(&examples, 8).unwrap();
            for size in [4, 3, 1] {
                let (metrics, gradients) =
                    learner(&directory, settings(objective.clone())).loss_gradients(&examples, size).unwrap();
                let difference = difference(&expected, &gradients);
                assert!(difference < 1e-5, "{objective:?} in parts of {size}: gradients differ by {difference}");
                assert_eq!(whole.keys().collect::<Vec<_>>(), metrics.keys().collect::<Vec<_>>());
                for (name, value) in &whole {
                    golden::assert_close(name, &[metrics[name]], &[*value], 1e-5);
                }
            }
        }
    }
}

/// Responses that begin alike, do not, are the beginning of each other, or are equal; a window shorter than they are.
#[test]
fn shared_prefixes_change_nothing() {
    for directory in golden::models() {
        let mut examples = eight_examples(&directory);
        let prompt = examples[7].prompt_ids.clone();
        let long: Vec<u32> = (0..24).map(|token| 20 + 5 * token).collect();
        for (example, shared) in examples.iter_mut().zip([0, 1, 4, 9, 12, 15, 20, 24]) {
            example.prompt_ids.clone_from(&prompt);
            example.chosen_ids = [&long[..shared], &[3, 4, 5]].concat();
            example.rejected_ids = Some([&long[..shared], &[6, 7]].concat());
        }
        examples[1].rejected_ids = Some(examples[1].chosen_ids[..2].to_vec());
        examples[2].chosen_ids.truncate(3);
        examples[3].rejected_ids = Some(examples[3].chosen_ids.clone());
        // Without a prompt, first in a pass and later; the first one's responses differ at once.
        examples[0].prompt_ids.clear();
        examples[4].prompt_ids.clear();
        // Drawn twice, and computed once.
        examples[7] = examples[6].clone();
        for objective in [whole_orpo(), dpo(0.1), sft(PairTensor::SequenceNll), entangled(0.1)] {
            let padded = LearnerSettings { layout: LayoutKind::Padded, ..settings(objective.clone()) };
            let (plain, expected) = learner(&directory, padded).loss_gradients(&examples, 8).unwrap();
            for checkpointing in [false, true] {
                let settings = LearnerSettings { gradient_checkpointing: checkpointing, ..settings(objective.clone()) };
                let (metrics, gradients) = learner(&directory, settings).loss_gradients(&examples, 3).unwrap();
                let difference = difference(&expected, &gradients);
                assert!(difference < 1e-5, "{}: {objective:?}: {difference}", directory.display());
                for (name, value) in &plain {
                    golden::assert_close(name, &[metrics[name]], &[*value], 1e-5);
                }
            }
        }
    }
}

#[test]
fn checkpointing_changes_memory_only() {
    for directory in tied_and_untied() {
        let examples = eight_examples(&directory);
        let (_, expected) = learner(&directory, settings(whole_orpo())).loss_gradients(&examples, 8).unwrap();
        let settings = LearnerSettings { gradient_checkpointing: true, ..settings(whole_orpo()) };
        let (_, gradients) = learner(&directory, settings).loss_gradients(&examples, 4).unwrap();
        assert!(difference(&expected, &gradients) < 1e-5);
    }
}

#[test]
fn bfloat16_gradients_point_the_same_way() {
    for directory in tied_and_untied() {
        let examples = eight_examples(&directory);
        let (whole, expected) = learner(&directory, settings(whole_orpo())).loss_gradients(&examples, 8).unwrap();
        let settings = LearnerSettings { compute: Compute::new(Kind::BFloat16), ..settings(whole_orpo()) };
        let (metrics, gradients) = learner(&directory, settings).loss_gradients(&examples, 8).unwrap();
        golden::assert_close("loss", &[metrics["loss"]], &[whole["loss"]], 0.02);
        for ((name, exact), (_, found)) in expected.iter().zip(&gradients) {
            assert_eq!(found.kind(), Kind::Float, "{name}");
            let cosine = exact.flatten(0, -1).dot(&found.flatten(0, -1)) / (exact.norm() * found.norm());
            assert!(cosine.double_value(&[]) > 0.98, "{name}: {cosine:?}");
        }
    }
}

#[test]
fn a_resumed_learner_ends_with_the_same_bytes() {
    for directory in tied_and_untied() {
        let examples = eight_examples(&directory);
        let settings = LearnerSettings {
            max_grad_norm: Some(0.5),
            schedule: Schedule::new(ScheduleKind::Cosine, Warmup::Steps(2), 6).unwrap(),
            ..settings(whole_orpo())
        };
        let mut straight = learner(&directory, settings.clone());
        let before = weights(&straight);
        let metrics: Vec<_> = (0..6).map(|step| straight.step(step, &examples, 8).unwrap()).collect();
        assert_ne!(weights(&straight), before);
        assert!(metrics[5]["loss"] < metrics[0]["loss"]);
        assert_eq!(metrics[0]["learning_rate"], 0.0);
        assert_eq!(metrics[1]["num_tokens"], 2.0 * metrics[0]["num_tokens"]);

        let saved = tempfile::tempdir().unwrap();
        let mut first = learner(&directory, settings.clone());
        (0..3).for_each(|step| drop(first.step(step, &examples, 8).unwrap()));
        first.save(saved.path()).unwrap();
        let mut second = learner(&directory, settings.clone());
        second.load(saved.path()).unwrap();
        let resumed: Vec<_> = (3..6).map(|step| second.step(step, &examples, 8).unwrap()).collect();
        assert_eq!(resumed, metrics[3..]);
        assert_eq!(weights(&second), weights(&straight));

        let optimizer = saved.path().join("optimizer.safetensors");
        let bytes = std::fs::read(&optimizer).unwrap();
        std::fs::write(&optimizer, &bytes[..bytes.len() - 1]).unwrap();
        let error = learner(&directory, settings.clone()).load(saved.path()).unwrap_err().to_string();
        assert!(error.contains("optimizer.safetensors") && error.contains("truncated"), "{error}");
    }
}

#[test]
fn what_an_objective_carries_from_step_to_step_is_saved() {
    let [directory, _] = tied_and_untied();
    let examples = eight_examples(&directory);
    let mut straight = learner(&directory, settings(entangled(0.1)));
    let metrics: Vec<_> = (0..4).map(|step| straight.step(step, &examples, 3).unwrap()).collect();
    assert_ne!(metrics[0]["mean"], metrics[1]["mean"]);

    let saved = tempfile::tempdir().unwrap();
    let mut first = learner(&directory, settings(entangled(0.1)));
    (0..2).for_each(|step| drop(first.step(step, &examples, 3).unwrap()));
    first.save(saved.path()).unwrap();
    let mut second = learner(&directory, settings(entangled(0.1)));
    second.load(saved.path()).unwrap();
    let resumed: Vec<_> = (2..4).map(|step| second.step(step, &examples, 3).unwrap()).collect();
    assert_eq!(resumed, metrics[2..]);
    assert_eq!(weights(&second), weights(&straight));

    let error = learner(&directory, settings(whole_orpo())).load(saved.path()).unwrap_err().to_string();
    assert!(error.contains("learner.json") && error.contains("mean"), "{error}");
}

#[test]
fn weights_handed_out_stay_as_they_are_once_left() {
    let [directory, _] = tied_and_untied();
    let examples = eight_examples(&directory);
    let mut learner = learner(&directory, settings(whole_orpo()));
    let handed_out: ParameterSet = learner.parameters().shallow_clone();
    let before = handed_out.deep_copy();
    learner.leave_weights();
    learner.step(0, &examples, 8).unwrap();
    for ((_, before), (name, after)) in before.iter().zip(handed_out.iter()) {
        assert_eq!(before, after, "{name}");
    }
    assert!(weights(&learner) != weights(&crate::learner::learner(&directory, settings(whole_orpo()))));
}

#[test]
fn frozen_parameters_stay_as_they_are() {
    let [_, directory] = tied_and_untied();
    let examples = eight_examples(&directory);
    for pattern in ["model.layers.0.*", "model.embed_tokens.weight", "lm_head.weight", "model.*"] {
        let settings = LearnerSettings { freeze: vec![pattern.into()], ..settings(whole_orpo()) };
        let mut learner = learner(&directory, settings);
        let before = learner.parameters().deep_copy();
        learner.step(0, &examples, 8).unwrap();
        for ((name, before), (_, after)) in before.iter().zip(learner.parameters().iter()) {
            let frozen = name.starts_with(pattern.trim_end_matches('*'));
            assert_eq!(before == after, frozen, "{name} with {pattern} frozen");
        }
    }
    let Model { decoder, parameters, .. } = load(&directory);
    let settings = LearnerSettings { freeze: vec!["layers.0.*".into()], ..settings(whole_orpo()) };
    let error = Learner::new(decoder, parameters, settings).err().unwrap().to_string();
    assert!(error.contains("`layers.0.*`"), "{error}");
}

#[test]
fn a_loss_that_is_not_finite_names_its_examples_and_changes_nothing() {
    let [directory, _] = tied_and_untied();
    let mut examples = eight_examples(&directory);
    // The reference makes this pair's margin 2e38 - (-2e38), which f32 does not hold.
    examples[5].reference = Some((-2e38, 2e38));
    let mut learner = learner(&directory, settings(ipo(0.1)));
    let before = weights(&learner);
    match learner.step(0, &examples, 8).unwrap_err() {
        Error::NonFinite { step: 0, what: "loss", examples } => assert_eq!(examples, ["example 5"]),
        other => panic!("{other}"),
    }
    assert_eq!(weights(&learner), before);
    assert_eq!(learner.steps(), 0);
}

#[test]
fn examples_that_cannot_be_learned_from_are_refused_by_name() {
    let [directory, _] = tied_and_untied();
    let good = eight_examples(&directory).swap_remove(3);
    let refused = |objective: Arc<dyn Objective>, example: Example| {
        learner(&directory, settings(objective)).step(0, &[example], 1).unwrap_err().to_string()
    };
    let error = refused(whole_orpo(), Example { chosen_ids: vec![], ..good.clone() });
    assert!(error.contains("example 3, chosen response"), "{error}");
    let error = refused(whole_orpo(), Example { rejected_ids: None, ..good.clone() });
    assert!(error.contains("example 3, rejected response"), "{error}");
    let error = refused(dpo(0.1), Example { reference: None, ..good.clone() });
    assert!(error.contains("example 3, reference"), "{error}");
    let error = refused(entangled(0.1), Example { numbers: Default::default(), ..good.clone() });
    assert!(error.contains("example 3, `weight`"), "{error}");
    let error = refused(whole_orpo(), Example { prompt_ids: vec![1, 99_999], ..good.clone() });
    assert!(error.contains("example 3, prompt") && error.contains("99999"), "{error}");
    assert!(learner(&directory, settings(whole_orpo())).step(0, &[], 1).is_err());
}

#[test]
fn scores_are_the_log_probabilities_that_a_step_reports() {
    for directory in golden::models() {
        let step = &golden::json(directory.join("expected.json"))["step"];
        let Model { decoder, parameters, .. } = load(&directory);
        let compute = Compute::new(Kind::Float);
        for micro_batch_size in [1, 8] {
            let scores = score(&decoder, &parameters, &examples(step), &compute, micro_batch_size).unwrap();
            let chosen: Vec<f64> = scores.iter().map(|score| score.chosen.mean().into()).collect();
            let rejected: Vec<f64> = scores.iter().map(|score| score.rejected.unwrap().mean().into()).collect();
            let expected = |name: &str| golden::floats(&step["orpo_trl"][name]);
            golden::assert_close("chosen", &chosen, &expected("chosen_avg_logps"), 1e-5);
            golden::assert_close("rejected", &rejected, &expected("rejected_avg_logps"), 1e-5);
        }
    }
}

#[test]
fn logits_are_reported_as_means_over_response_tokens() {
    let [directory, _] = tied_and_untied();
    let example = eight_examples(&directory).swap_remove(4);
    let learner = learner(&directory, settings(whole_orpo()));
    let (metrics, _) = learner.loss_gradients(std::slice::from_ref(&example), 1).unwrap();
    let compute = Compute::new(Kind::Float);
    for (name, response) in [("chosen", &example.chosen_ids), ("rejected", example.rejected_ids.as_ref().unwrap())] {
        let row = [example.prompt_ids.as_slice(), response].concat();
        let input = learner.decoder.input(&[row]).unwrap();
        let hidden = learner.decoder.hidden_states(learner.parameters(), &input, None, &compute).unwrap();
        let logits = learner.decoder.logits(learner.parameters(), &hidden, &compute).unwrap();
        let (start, length) = (example.prompt_ids.len() as i64 - 1, response.len() as i64);
        let logits = logits.narrow(1, start, length);
        let expected = logits.mean(Kind::Float).double_value(&[]);
        golden::assert_close(name, &[metrics[&format!("logits/{name}")]], &[expected], 1e-5);
        if name == "chosen" {
            let targets = Tensor::from_slice(&response.iter().map(|&id| i64::from(id)).collect::<Vec<_>>());
            let correct = logits.argmax(-1, false).eq_tensor(&targets).to_kind(Kind::Float).mean(Kind::Float);
            golden::assert_close("accuracy", &[metrics["mean_token_accuracy"]], &[correct.double_value(&[])], 1e-6);
        }
    }
}

#[test]
fn tails_and_entropies_are_those_of_the_logits() {
    let [directory, _] = tied_and_untied();
    let mut example = eight_examples(&directory).swap_remove(4);
    let rejected = example.rejected_ids.as_mut().unwrap();
    rejected.extend([9, 8, 7, 6, 5, 4, 3, 11, 12, 13]);
    let shorter = example.chosen_ids.len() as i64;
    assert!((rejected.len() as i64) > shorter);
    let learner = learner(&directory, settings(entangled(0.1)));
    let (metrics, _) = learner.loss_gradients(std::slice::from_ref(&example), 1).unwrap();
    let compute = Compute::new(Kind::Float);
    for (name, response) in [("chosen", &example.chosen_ids), ("rejected", example.rejected_ids.as_ref().unwrap())] {
        let row = [example.prompt_ids.as_slice(), response].concat();
        let input = learner.decoder.input(std::slice::from_ref(&row)).unwrap();
        let hidden = learner.decoder.hidden_states(learner.parameters(), &input, None, &compute).unwrap();
        let logits = learner.decoder.logits(learner.parameters(), &hidden, &compute).unwrap().squeeze_dim(0);
        let targets = Tensor::from_slice(&row[1..].iter().map(|&id| i64::from(id)).collect::<Vec<_>>());
        let logps = logits.log_softmax(-1, Kind::Float);
        let scored = logps.narrow(0, 0, row.len() as i64 - 1).gather(1, &targets.unsqueeze(1), false).squeeze_dim(1);
        let (start, length) = (example.prompt_ids.len() as i64 - 1, response.len() as i64);
        let tail = scored.narrow(0, start + shorter, length - shorter).sum(Kind::Float).double_value(&[]);
        golden::assert_close(name, &[metrics[&format!("{name}_tail_logps")]], &[tail], 1e-5);
        let squares = logps.exp().square().sum_dim_intlist(-1, false, Kind::Float);
        let entropy = -squares.log().narrow(0, start, length).mean(Kind::Float).double_value(&[]);
        golden::assert_close(name, &[metrics[&format!("{name}_collision_entropy")]], &[entropy], 1e-5);
        if name == "chosen" {
            let nll = -scored.mean(Kind::Float).double_value(&[]);
            golden::assert_close(name, &[metrics["sequence_nll"]], &[nll], 1e-5);
            let nll = -scored.narrow(0, start, length).mean(Kind::Float).double_value(&[]);
            golden::assert_close(name, &[metrics["chosen_nll"]], &[nll], 1e-5);
        }
    }
}

/// The mean of 64 equal pairs is one of them, in one pass or in 64: a 64th of a number is as exact as the number.
#[test]
fn many_passes_lose_nothing_with_weights_in_bfloat16() {
    for directory in tied_and_untied() {
        let example = eight_examples(&directory).swap_remove(2);
        let gradients = |examples: &[Example], objective| {
            let Model { decoder, parameters, .. } = Model::load(&directory, tch::Device::Cpu, Kind::BFloat16).unwrap();
            let learner = Learner::new(decoder, parameters, settings(objective)).unwrap();
            learner.loss_gradients(examples, 1).unwrap()
        };
        let (alone, expected) = gradients(std::slice::from_ref(&example), dpo(0.1));
        let (together, found) = gradients(&vec![example.clone(); 64], dpo(0.1));
        assert!(difference(&expected, &found) < 1e-6);
        golden::assert_close("norm", &[together["grad_norm"]], &[alone["grad_norm"]], 1e-6);
    }
}

/// Steps of a run that came without pairs have gone by for the schedule, too: of six linear ones the fourth has half the rate.
#[test]
fn the_learning_rate_is_that_of_the_step() {
    let [directory, _] = tied_and_untied();
    let schedule = Schedule::new(ScheduleKind::Linear, Warmup::Steps(0), 6).unwrap();
    let mut learner = learner(&directory, LearnerSettings { schedule, ..settings(whole_orpo()) });
    let rate = settings(whole_orpo()).learning_rate;
    let metrics = learner.step(3, &eight_examples(&directory), 8).unwrap();
    assert_eq!((metrics["learning_rate"], learner.steps()), (rate / 2.0, 1));
}
