//! Optimizer trajectories of PyTorch: golden/optimizers.json.

use sapo_flow_training::optim::{Optimizer, Rule};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::golden;

fn rule(case: &Value) -> Rule {
    let number = |name: &str| case["params"][name].as_f64().unwrap_or_else(|| panic!("no {name} in {case}"));
    match case["optimizer"].as_str().unwrap() {
        "adamw" => Rule::Adamw {
            beta1: case["params"]["betas"][0].as_f64().unwrap(),
            beta2: case["params"]["betas"][1].as_f64().unwrap(),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
        },
        "rmsprop" => Rule::Rmsprop { alpha: number("alpha"), eps: number("eps"), weight_decay: number("weight_decay") },
        "sgd" => Rule::Sgd { weight_decay: number("weight_decay") },
        other => panic!("optimizer {other} is not tested"),
    }
}

#[test]
fn trajectories_match() {
    for case in golden::json("optimizers.json").as_array().unwrap() {
        let rule = rule(case);
        let learning_rate = case["params"]["lr"].as_f64().unwrap();
        // A matrix, since weight decay leaves vectors alone.
        let weight = Tensor::from_slice(&golden::floats(&case["initial"])).view([-1, 1]).set_requires_grad(true);
        let parameters = vec![("weight".to_owned(), weight)];
        let mut optimizer = Optimizer::new(rule, &parameters).unwrap();
        let gradients = case["grads"].as_array().unwrap();
        let expected = case["after_each_step"].as_array().unwrap();
        assert_eq!(gradients.len(), expected.len());
        for (step, (gradient, expected)) in gradients.iter().zip(expected).enumerate() {
            let gradient = Tensor::from_slice(&golden::floats(gradient)).view([-1, 1]);
            optimizer.step(&parameters, vec![gradient], learning_rate, 1.0).unwrap();
            let found: Vec<f64> = parameters[0].1.detach().view(-1).try_into().unwrap();
            let what = format!("{} after step {step}", case["optimizer"]);
            golden::assert_close(&what, &found, &golden::floats(expected), 1e-12);
        }
    }
}

#[test]
fn a_large_tensor_updated_by_threads_in_blocks_is_updated_as_its_parts_are() {
    sapo_flow_training::device::set_threads(3);
    let (rows, columns) = (3, 70_001);
    let weight = Tensor::arange(rows * columns, (Kind::Float, tch::Device::Cpu)).sin().view([rows, columns]);
    let gradient = weight.cos();
    let rule = Rule::Adamw { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };

    let whole = vec![("whole".to_owned(), weight.copy())];
    let mut optimizer = Optimizer::new(rule, &whole).unwrap();
    optimizer.step(&whole, vec![gradient.copy()], 0.01, 0.5).unwrap();

    let parts: Vec<(String, Tensor)> = (0..columns)
        .step_by(7_000)
        .map(|at| (at.to_string(), weight.narrow(1, at, 7_000.min(columns - at)).copy()))
        .collect();
    let mut optimizer = Optimizer::new(rule, &parts).unwrap();
    let gradients = (0..columns).step_by(7_000).map(|at| gradient.narrow(1, at, 7_000.min(columns - at)).copy());
    optimizer.step(&parts, gradients.collect(), 0.01, 0.5).unwrap();
    let joined = Tensor::cat(&parts.iter().map(|(_, part)| part).collect::<Vec<_>>(), 1);
    assert!(whole[0].1 != weight);
    assert!(whole[0].1.allclose(&joined, 1e-6, 1e-7, false));
}
