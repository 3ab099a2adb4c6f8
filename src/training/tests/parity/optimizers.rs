//! Optimizer trajectories of PyTorch: golden/optimizers.json.

use sapo_flow_training::model::Kernels;
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
    for case in golden::cases("optimizers.json", 4) {
        check(&case, Kernels::Plain, Kind::Double, 1e-12);
        check(&case, Kernels::Plain, Kind::Float, 1e-6);
        check(&case, Kernels::Fused, Kind::Float, 1e-6);
    }
}

fn check(case: &Value, kernels: Kernels, kind: Kind, tolerance: f64) {
    let numbers = |numbers: &Value| Tensor::from_slice(&golden::floats(numbers)).view([-1, 1]).to_kind(kind);
    let learning_rate = case["params"]["lr"].as_f64().unwrap();
    // A matrix, since weight decay leaves vectors alone.
    let parameters = vec![("weight".to_owned(), numbers(&case["initial"]).set_requires_grad(true))];
    let mut optimizer = Optimizer::new(rule(case), kernels, &parameters, 0).unwrap();
    let gradients = case["grads"].as_array().unwrap();
    let expected = case["after_each_step"].as_array().unwrap();
    assert_eq!(gradients.len(), expected.len());
    for (step, (gradient, expected)) in gradients.iter().zip(expected).enumerate() {
        optimizer.step(&parameters, vec![numbers(gradient)], learning_rate, 1.0).unwrap();
        let found: Vec<f64> = parameters[0].1.detach().view(-1).to_kind(Kind::Double).try_into().unwrap();
        let what = format!("{} after step {step}, {kernels:?} kernels, {kind:?}", case["optimizer"]);
        golden::assert_close(&what, &found, &golden::floats(expected), tolerance);
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
    let mut optimizer = Optimizer::new(rule, Kernels::Plain, &whole, 0).unwrap();
    optimizer.step(&whole, vec![gradient.copy()], 0.01, 0.5).unwrap();

    let parts: Vec<(String, Tensor)> = (0..columns)
        .step_by(7_000)
        .map(|at| (at.to_string(), weight.narrow(1, at, 7_000.min(columns - at)).copy()))
        .collect();
    let mut optimizer = Optimizer::new(rule, Kernels::Plain, &parts, 0).unwrap();
    let gradients = (0..columns).step_by(7_000).map(|at| gradient.narrow(1, at, 7_000.min(columns - at)).copy());
    optimizer.step(&parts, gradients.collect(), 0.01, 0.5).unwrap();
    let joined = Tensor::cat(&parts.iter().map(|(_, part)| part).collect::<Vec<_>>(), 1);
    assert!(whole[0].1 != weight);
    assert!(whole[0].1.allclose(&joined, 1e-6, 1e-7, false));
}

/// AdamW with 8-bit state as torchao computes it: tests/torchao/adamw_8bit.py.
mod adamw_8bit {
    use super::*;
    use sapo_flow_training::parameters::ParameterSet;
    use tch::Device;

    fn recorded() -> Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/torchao/adamw_8bit.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    fn bytes(value: &Value) -> Vec<u8> {
        let text = value.as_str().unwrap();
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    fn floats(value: &Value) -> Vec<f64> {
        let bytes = bytes(value);
        bytes.chunks_exact(4).map(|four| f64::from(f32::from_le_bytes(four.try_into().unwrap()))).collect()
    }

    /// `numbers` of the program.
    fn numbers(shape: &[i64], step: i64) -> Tensor {
        let number = |index: i64| {
            let signed = (index * 7919 + step * 104_729) % 2003 - 1001;
            signed as f32 / 1024.0 * 2f32.powi(-((index * 31 + step * 17) % 21) as i32)
        };
        let numbers: Vec<f32> = (0..shape.iter().product()).map(number).collect();
        Tensor::from_slice(&numbers).view(shape)
    }

    #[test]
    fn steps_and_state_are_those_of_torchao() {
        let recorded = recorded();
        let setting = |name: &str| recorded["settings"][name].as_f64().unwrap();
        let beta = |index: usize| recorded["settings"]["betas"][index].as_f64().unwrap();
        let (beta1, beta2, eps, weight_decay) = (beta(0), beta(1), setting("eps"), setting("weight_decay"));
        let shapes: Vec<(String, Vec<i64>)> = ["quantised", "plain"]
            .map(|name| (name.to_owned(), serde_json::from_value(recorded["shapes"][name].clone()).unwrap()))
            .into();
        let parameters: Vec<(String, Tensor)> =
            shapes.iter().map(|(name, shape)| (name.clone(), numbers(shape, 0))).collect();
        let rule = Rule::Adamw8bit { beta1, beta2, eps, weight_decay };
        let mut optimizer = Optimizer::new(rule, Kernels::Fused, &parameters, 0).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        let steps = recorded["steps"].as_object().unwrap();
        for step in 1..=10 {
            let gradients = shapes.iter().map(|(_, shape)| numbers(shape, step)).collect();
            optimizer.step(&parameters, gradients, setting("lr"), 1.0).unwrap();
            let Some(expected) = steps.get(&step.to_string()) else { continue };
            for (name, parameter) in &parameters {
                let found: Vec<f64> = parameter.view(-1).to_kind(Kind::Double).try_into().unwrap();
                golden::assert_close(&format!("{name}, step {step}"), &found, &floats(&expected[name]), 1e-6);
            }
            optimizer.save(&path).unwrap();
            let state = ParameterSet::read(&path, Device::Cpu).unwrap();
            for moment in ["exp_avg", "exp_avg_sq"] {
                let tensor = |part: &str| state.get(&format!("quantised.{moment}.{part}")).unwrap().view(-1);
                let scales: Vec<f64> = tensor("scale").to_kind(Kind::Double).try_into().unwrap();
                assert_eq!(scales, floats(&expected[&format!("{moment}.scale")]), "{moment}, step {step}");
                let codes: Vec<u8> = tensor("codes").try_into().unwrap();
                assert!(codes == bytes(&expected[&format!("{moment}.codes")]), "{moment}, step {step}");
            }
        }
        assert_eq!(steps.len(), 3);
    }

    #[test]
    fn a_resumed_optimizer_goes_on_to_the_byte() {
        let rule = Rule::Adamw8bit { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };
        let parameters = || vec![("weight".to_owned(), numbers(&[64, 80], 0)), ("norm".to_owned(), numbers(&[64], 0))];
        let step = |optimizer: &mut Optimizer, parameters: &[(String, Tensor)], step: i64| {
            let gradients = parameters.iter().map(|(_, parameter)| numbers(&parameter.size(), step)).collect();
            optimizer.step(parameters, gradients, 0.01, 0.5).unwrap();
        };
        let straight = parameters();
        let mut optimizer = Optimizer::new(rule, Kernels::Fused, &straight, 0).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        (1..=3).for_each(|at| step(&mut optimizer, &straight, at));
        optimizer.save(&path).unwrap();
        let resumed: Vec<_> = straight.iter().map(|(name, parameter)| (name.clone(), parameter.copy())).collect();
        (4..=6).for_each(|at| step(&mut optimizer, &straight, at));

        let mut optimizer = Optimizer::new(rule, Kernels::Fused, &resumed, 0).unwrap();
        optimizer.load(&path).unwrap();
        (4..=6).for_each(|at| step(&mut optimizer, &resumed, at));
        assert_eq!(straight, resumed);
        let plain = Rule::Adamw { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };
        let error = Optimizer::new(plain, Kernels::Fused, &resumed, 0).unwrap().load(&path).unwrap_err().to_string();
        assert!(error.contains("`weight.exp_avg` is missing"), "{error}");
    }
}
