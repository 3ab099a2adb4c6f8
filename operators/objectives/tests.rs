//! Objectives against TRL's values and against calculations by hand.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sapo_flow_training::objectives::{Objective, PairNumbers, PairTensor};
use serde_json::Value;
use tch::{Kind, Tensor};

use super::{ObjectiveConfig, Sum, built_in};

pub(super) fn compile(text: &str) -> Sum {
    let config: ObjectiveConfig = serde_yaml::from_str(text).expect("a test's own YAML");
    config.compile().unwrap_or_else(|issues| panic!("{text}: {issues:?}"))
}

fn tensor(name: &str) -> PairTensor {
    PairTensor::ALL.into_iter().find(|tensor| tensor.name() == name).unwrap_or_else(|| panic!("no tensor {name}"))
}

/// Numbers of pairs that gradients are asked for.
fn pairs(tensors: &[(&str, Vec<f64>)]) -> PairNumbers {
    let leaf = |values: &Vec<f64>| Tensor::from_slice(values).set_requires_grad(true);
    PairNumbers {
        tensors: tensors.iter().map(|(name, values)| (tensor(name), leaf(values))).collect(),
        ..Default::default()
    }
}

pub(super) fn numbers(values: &Tensor) -> Vec<f64> {
    values.to_kind(Kind::Double).detach().try_into().unwrap()
}

#[track_caller]
pub(super) fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let close = (found - expected).abs() <= tolerance * expected.abs().max(1.0);
        assert!(close, "{what}: expected {expected}, found {found}");
    }
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list of numbers").iter().map(|number| number.as_f64().unwrap()).collect()
}

/// The golden cases: at least 24 in the repository's own file, and one elsewhere.
fn golden() -> Vec<Value> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let elsewhere = std::env::var_os("GOLDEN_DIR").map(PathBuf::from);
    let path = elsewhere.as_ref().unwrap_or(&beside).join("objectives.json");
    let text = std::fs::read_to_string(path).expect("the golden data are there");
    let cases: Vec<Value> = serde_json::from_str(&text).expect("they are JSON");
    assert!(cases.len() >= 24 || elsewhere.is_some() && !cases.is_empty(), "{} cases", cases.len());
    cases
}

/// What the golden file's names are here, and what else they mean there.
fn written(case: &Value) -> String {
    let name = case["objective"].as_str().expect("a case has a name");
    let ours = match name {
        "dpo_sigmoid" | "trl_sigmoid" => "dpo",
        "dpo_hinge" => "hinge",
        "orpo_odds_ratio_term" => "orpo",
        // As TRL 1.x calls it.
        "trl_aot_pair" => "aot_unpaired",
        "cpo_simpo" => "simpo",
        "cpo_sigmoid" => "cpo",
        other => other.strip_prefix("trl_").unwrap_or(other),
    };
    let mut params = serde_json::Map::from_iter([("name".to_owned(), ours.into())]);
    for (name, value) in case["params"].as_object().expect("a case has params") {
        params.insert(name.replace("simpo_", "").replace("discopop_", ""), value.clone());
    }
    if matches!(ours, "cpo" | "cpo_hinge" | "cpo_ipo") {
        // The golden losses leave the NLL to the trainer.
        params.insert("nll_weight".into(), 0.into());
    }
    Value::Object(params).to_string()
}

#[test]
fn losses_and_gradients_are_those_of_trl() {
    for case in golden() {
        let name = case["objective"].as_str().unwrap();
        let objective = compile(&written(&case));
        let inputs: Vec<(&str, Vec<f64>)> =
            case["inputs"].as_object().unwrap().iter().map(|(name, values)| (name.as_str(), floats(values))).collect();
        let mut pairs = pairs(&inputs);
        pairs.state = objective.needs().state.clone();
        let count = inputs[0].1.len();
        if name == "orpo_odds_ratio_term" {
            // The term alone: a negative log-likelihood of 0.
            pairs
                .tensors
                .insert(PairTensor::SequenceNll, Tensor::zeros([count as i64], (Kind::Double, tch::Device::Cpu)));
        }
        let found = objective.losses(&pairs).unwrap();
        found.losses.sum(Kind::Double).backward();
        assert_close(name, &numbers(&found.losses), &floats(&case["losses"]), 1e-9);
        for (input, expected) in case["grads_of_sum"].as_object().unwrap() {
            let gradient = pairs.tensors[&tensor(input)].grad();
            let gradient = if gradient.defined() { numbers(&gradient) } else { vec![0.0; count] };
            assert_close(&format!("{name}, gradient of {input}"), &gradient, &floats(expected), 1e-9);
        }
    }
}

/// What tests/trl/losses.py had TRL compute: losses of single answers, and XPO's, which examples/xpo.yaml defines.
#[test]
fn losses_of_marked_answers_and_of_xpo_are_those_of_trl() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |file: &str| std::fs::read_to_string(root.join(file)).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&read("tests/trl/losses.json")).unwrap();
    let example: Value = serde_yaml::from_str(&read("examples/xpo.yaml")).unwrap();
    let mut ended: BTreeMap<String, f64> = BTreeMap::new();
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for case in &cases {
        let name = case["objective"].as_str().unwrap();
        let objective = if name == "xpo" {
            let mut definition = example["nodes"]["learner"]["with"]["objective"].clone();
            for (param, value) in case["params"].as_object().unwrap() {
                definition["params"][param] = value.clone();
            }
            compile(&definition.to_string())
        } else {
            let mut params = case["params"].clone();
            params["name"] = name.into();
            compile(&params.to_string())
        };
        let inputs: Vec<(&str, Vec<f64>)> =
            case["inputs"].as_object().unwrap().iter().map(|(name, values)| (name.as_str(), floats(values))).collect();
        let mut pairs = pairs(&inputs);
        for (name, values) in case["numbers"].as_object().unwrap() {
            pairs.numbers.insert(name.clone(), Tensor::from_slice(&floats(values)));
        }
        pairs.state = if case["follows"] == true { ended.clone() } else { objective.needs().state.clone() };
        let found = objective.losses(&pairs).unwrap();
        ended = found.state.iter().map(|(name, value)| (name.clone(), value.double_value(&[]))).collect();
        found.losses.sum(Kind::Double).backward();
        // TRL keeps BCO's running mean in float32.
        let tolerance = if name == "bco" { 1e-6 } else { 1e-9 };
        assert_close(name, &numbers(&found.losses), &floats(&case["losses"]), tolerance);
        for (input, expected) in case["grads_of_sum"].as_object().unwrap() {
            let gradient = pairs.tensors[&tensor(input)].grad();
            let gradient =
                if gradient.defined() { numbers(&gradient) } else { vec![0.0; found.losses.size()[0] as usize] };
            assert_close(&format!("{name}, gradient of {input}"), &gradient, &floats(expected), tolerance);
        }
        *seen.entry(name).or_default() += 1;
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [("apo_zero_unpaired", 2), ("bco", 6), ("kto", 2), ("xpo", 2)]);
}

/// What tests/trl/tpo.py had TRL's TPOTrainer compute; pairs come first, then as many gold answers.
#[test]
fn losses_of_triples_are_those_of_trl() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/trl/tpo.json");
    let cases: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(cases.len(), 5);
    for case in &cases {
        let mut params = case["params"].clone();
        params["name"] = "tpo".into();
        let objective = compile(&params.to_string());
        let of = |kind: &str, part: &str| floats(&case[kind][part]);
        // The rejected responses of gold answers are not looked at.
        let chosen = |kind: &str| [of(kind, "chosen"), of(kind, "gold")].concat();
        let rejected = |kind: &str, gold: f64| [of(kind, "rejected"), vec![gold; 3]].concat();
        let per_token = |sums: &[f64], lengths: &[f64]| sums.iter().zip(lengths).map(|(sum, n)| sum / n).collect();
        let (chosen_logps, rejected_logps) = (chosen("logps"), rejected("logps", -7.0));
        let (chosen_len, rejected_len) = (chosen("lengths"), rejected("lengths", 2.0));
        let averages = [per_token(&chosen_logps, &chosen_len), per_token(&rejected_logps, &rejected_len)];
        let [chosen_average, rejected_average]: [Vec<f64>; 2] = averages;
        let mut pairs = pairs(&[
            ("chosen_logps", chosen_logps),
            ("rejected_logps", rejected_logps),
            ("chosen_avg_logps", chosen_average),
            ("rejected_avg_logps", rejected_average),
            ("chosen_len", chosen_len.clone()),
            ("rejected_len", rejected_len.clone()),
        ]);
        pairs.numbers.insert("values.gold".into(), Tensor::from_slice(&[0f64, 0.0, 0.0, 1.0, 1.0, 1.0]));
        let loss = objective.losses(&pairs).unwrap().losses.mean(Kind::Double);
        assert_close("loss", &[loss.double_value(&[])], &[case["loss"].as_f64().unwrap()], 1e-9);
        loss.backward();
        // Where the loss reads logps per token, they are leaves of their own here, and no functions of the sums.
        let gradient = |sums: &str, averages: &str, lengths: &[f64]| -> Vec<f64> {
            let of = |name: &str| match pairs.tensors[&tensor(name)].grad() {
                gradient if gradient.defined() => numbers(&gradient),
                _ => vec![0.0; 6],
            };
            of(sums).iter().zip(of(averages)).zip(lengths).map(|((sum, average), n)| sum + average / n).collect()
        };
        let of_chosen = gradient("chosen_logps", "chosen_avg_logps", &chosen_len);
        let of_rejected = gradient("rejected_logps", "rejected_avg_logps", &rejected_len);
        assert_close("gradient of chosen", &of_chosen, &chosen("grads"), 1e-9);
        assert_close("gradient of rejected", &of_rejected, &rejected("grads", 0.0), 1e-9);
    }
}

#[test]
fn every_objective_compiles_and_has_finite_losses() {
    for name in built_in::names() {
        let objective = compile(name);
        assert!(!objective.needs().tensors.is_empty(), "{name}");
        let definition = built_in::definition(name).unwrap();
        assert!(!definition.description.is_empty(), "{name}");
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Two pairs; log-ratios of policy to reference are 2 and -1 (chosen), -3 and 1 (rejected).
pub(super) fn two_pairs() -> PairNumbers {
    pairs(&[
        ("chosen_logps", vec![-10.0, -12.0]),
        ("ref_chosen_logps", vec![-12.0, -11.0]),
        ("rejected_logps", vec![-20.0, -14.0]),
        ("ref_rejected_logps", vec![-17.0, -15.0]),
        ("chosen_len", vec![5.0, 4.0]),
        ("rejected_len", vec![10.0, 2.0]),
        ("chosen_avg_logps", vec![-2.0, -3.0]),
        ("rejected_avg_logps", vec![-2.0, -7.0]),
        ("chosen_nll", vec![2.5, 1.5]),
        ("sequence_nll", vec![3.5, 3.0]),
        ("chosen_tail_logps", vec![0.0, -5.0]),
        ("rejected_tail_logps", vec![-8.0, 0.0]),
        ("chosen_collision_entropy", vec![1.5, 0.5]),
        ("rejected_collision_entropy", vec![1.0, 9.5]),
    ])
}

pub(super) fn losses(text: &str, pairs: &PairNumbers) -> Vec<f64> {
    numbers(&compile(text).losses(pairs).unwrap().losses)
}

/// Losses of `two_pairs`, worked out from the formulas with log-ratios d = (2, -1) and (-3, 1).
#[test]
fn what_golden_data_lack_is_as_worked_out_by_hand() {
    let logistic = |x: f64| (1.0 + (-x).exp()).ln(); // -log sigmoid(x)
    let log_sigmoid = |x: f64| -logistic(x);
    let alpha = |d: f64| (-0.5 * d).exp() / -0.5; // alpha = 0.5
    let simpo = |p: f64| (1.0 - (-0.25 * p).exp()) / 0.25;
    let cases: [(&str, [f64; 2]); 14] = [
        // D = 5 and -2.
        ("dpo", [logistic(0.5), logistic(-0.2)]),
        (
            "{name: dpo, divergence: forward_kl}",
            [logistic(0.1 * (-(-2.0f64).exp() + 3.0f64.exp())), logistic(0.1 * (-1.0f64.exp() + (-1.0f64).exp()))],
        ),
        (
            "{name: dpo, divergence: js}",
            [
                logistic(0.1 * (log_sigmoid(2.0) - log_sigmoid(-3.0))),
                logistic(0.1 * (log_sigmoid(-1.0) - log_sigmoid(1.0))),
            ],
        ),
        (
            "{name: dpo, divergence: alpha}",
            [logistic(0.1 * (alpha(2.0) - alpha(-3.0))), logistic(0.1 * (alpha(-1.0) - alpha(1.0)))],
        ),
        ("{name: dpo, divergence: alpha, divergence_alpha: 1}", [logistic(0.5), logistic(-0.2)]),
        // Half of the tails: chosen -10 and -12 + 2.5, rejected -20 + 4 and -14; d = (2, 1.5) and (1, 1).
        ("ld_dpo", [logistic(0.1), logistic(0.05)]),
        // exp(-2 + 1.5) exp(-2 + 1), and exp(-3 + 0.5) exp(-7 + 9.5) = 1.
        ("wpo", [(-1.5f64).exp() * logistic(0.5), logistic(-0.2)]),
        (
            "{name: ipo, length: per_token}",
            [(2.0 / 5.0 + 3.0 / 10.0 - 5.0f64).powi(2), (-1.0 / 4.0 - 1.0 / 2.0 - 5.0f64).powi(2)],
        ),
        ("sigmoid_norm", [logistic(0.1 * (0.4 + 0.3)), logistic(0.1 * (-0.25 - 0.5))]),
        ("dpo_nll", [logistic(0.5) + 2.5, logistic(-0.2) + 1.5]),
        // KL: max(0, mean(2, -1)) = 0.5 and max(0, mean(-3, 1)) = 0.
        (
            "kto_pair",
            [
                0.5 * (1.0 - sigmoid(0.2)) + 0.5 * (1.0 - sigmoid(0.1 * 3.5)),
                0.5 * (1.0 - sigmoid(-0.1)) + 0.5 * (1.0 - sigmoid(0.1 * -0.5)),
            ],
        ),
        ("cpo", [logistic(1.0) + 2.5, logistic(0.2) + 1.5]),
        ("alphapo", [logistic(-0.5), logistic(2.0 * (simpo(-3.0) - simpo(-7.0)) - 0.5)]),
        ("sft", [2.5, 1.5]),
    ];
    for (text, expected) in cases {
        assert_close(text, &losses(text, &two_pairs()), &expected, 1e-6);
    }
    assert_close("sft", &losses("{name: sft, nll: sequence}", &two_pairs()), &[3.5, 3.0], 1e-9);
}

#[test]
fn single_answers_are_judged_by_their_marks() {
    let mut pairs = two_pairs();
    pairs.numbers.insert("values.desirable".into(), Tensor::from_slice(&[1.0f64, 0.0]));
    // The mismatched answers' log-ratios are -3 and 5, their mean 1; d = (2, -1).
    pairs.tensors.insert(PairTensor::RefRejectedLogps, Tensor::from_slice(&[-17.0f64, -19.0]));
    let objective = compile("{name: kto, undesirable_weight: 0.5}");
    assert!(objective.needs().whole_step && objective.needs().numbers.contains("values.desirable"));
    let found = objective.losses(&pairs).unwrap();
    let expected = [1.0 - sigmoid(0.1 * (2.0 - 1.0)), 0.5 * (1.0 - sigmoid(0.1 * (1.0 + 1.0)))];
    assert_close("kto", &numbers(&found.losses), &expected, 1e-9);
    found.losses.sum(Kind::Double).backward();
    assert!(!pairs.tensors[&PairTensor::RejectedLogps].grad().defined(), "no gradient goes through the KL term");
    let report: BTreeMap<String, f64> = found
        .report
        .iter()
        .filter(|(_, v)| v.dim() == 0)
        .map(|(name, v)| (name.clone(), v.double_value(&[])))
        .collect();
    assert_close("rewards", &[report["rewards/chosen"], report["rewards/rejected"]], &[0.2, -0.1], 1e-9);
}

/// TRL's RunningMoments: the mean over steps of each step's mean reward, this step's included.
#[test]
fn the_running_mean_of_bco_is_the_mean_over_steps() {
    let objective = compile("bco_pair");
    let mut pairs = two_pairs();
    pairs.state = objective.needs().state.clone();
    assert_eq!(pairs.state.values().copied().collect::<Vec<_>>(), [0.0, 0.0]);
    // Mean rewards: 0.1 * mean(2, -1, -3, 1) = -0.025, then with chosen log-ratios 4 higher 0.1 * 1.75 = 0.175.
    let mut expected = -0.025;
    for step in 1..=2 {
        let found = objective.losses(&pairs).unwrap();
        let next: BTreeMap<String, f64> =
            found.state.iter().map(|(name, value)| (name.clone(), value.double_value(&[]))).collect();
        assert_close("running mean", &[next["0.reward_mean"], next["0.steps_seen"]], &[expected, step as f64], 1e-9);
        let first = if step == 1 { 0.2 } else { 0.6 };
        let loss = -sigmoid(first - expected).ln() - sigmoid(expected + 0.3).ln();
        assert_close("loss", &numbers(&found.losses)[..1], &[loss], 1e-9);
        pairs.state = next;
        pairs.tensors.insert(PairTensor::ChosenLogps, Tensor::from_slice(&[-6.0f64, -8.0]).set_requires_grad(true));
        expected = (-0.025 + 0.175) / 2.0;
    }
}

#[test]
fn sums_weigh_their_parts_and_report_them() {
    let objective = compile("[{name: dpo, beta: 0.2, weight: 0.8}, {name: sft, weight: 0.5}, hinge]");
    let found = objective.losses(&two_pairs()).unwrap();
    // D = 5 and -2; the hinge's beta is 0.1.
    let logistic = |x: f64| (1.0 + (-x).exp()).ln();
    let expected = [0.8 * logistic(1.0) + 0.5 * 2.5 + 0.5, 0.8 * logistic(-0.4) + 0.5 * 1.5 + 1.2];
    assert_close("sum", &numbers(&found.losses), &expected, 1e-9);
    let report: BTreeMap<String, Vec<f64>> =
        found.report.iter().map(|(name, values)| (name.clone(), numbers(values))).collect();
    assert_close("part", &report["loss/dpo"], &[logistic(1.0), logistic(-0.4)], 1e-9);
    assert_close("part", &report["loss/sft"], &[2.5, 1.5], 1e-9);
    let unlearned = compile("[{name: dpo, beta: 0.2}, {name: sft, weight: 0}]").losses(&two_pairs()).unwrap();
    assert_close("dpo alone", &numbers(&unlearned.losses), &[logistic(1.0), logistic(-0.4)], 1e-9);
    assert!(unlearned.report.iter().any(|(name, _)| name == "loss/sft"));
    assert_close("the first one's rewards", &report["rewards/chosen"], &[0.4, -0.2], 1e-9);
    assert_close("accuracies", &report["rewards/accuracies"], &[1.0, 0.0], 1e-9);
    assert_close("nll", &report["nll_loss"], &[2.5, 1.5], 1e-9);
}
