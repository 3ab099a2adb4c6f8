//! Each way against autograd on all logits at once, worked out here, and against each other on golden data.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::{Device, Kind, Tensor, no_grad};

use super::{Head, Limits, chunks, plain};
use crate::model::{Compute, Kernels, Model};
use crate::native::testing::with_all_instructions;

const ROWS: i64 = 11;
const VOCABULARY: i64 = 37;

/// Numbers without a pattern that matters, from -1 to 1.
fn numbers(rows: i64, columns: i64, step: f64) -> Tensor {
    (Tensor::arange(rows * columns, (Kind::Float, Device::Cpu)) * step).sin().view([rows, columns])
}

/// So many rows in a chunk, in a piece, and kept.
fn limits([chunk, piece, kept]: [i64; 3], vocabulary: i64) -> Limits {
    let bytes = |rows: i64| rows * 4 * vocabulary;
    Limits { chunk_bytes: bytes(chunk), piece_bytes: bytes(piece), kept_bytes: bytes(kept) }
}

#[test]
fn all_ways_agree_with_autograd_on_all_logits_at_once() {
    let weight = numbers(VOCABULARY, 8, 1.7).set_requires_grad(true);
    let hidden = (numbers(ROWS, 8, 2.3) * 4.0).set_requires_grad(true);
    let targets = Tensor::arange(ROWS, (Kind::Int64, Device::Cpu)) * 3;
    let upstream = numbers(1, ROWS, 0.9).view(-1);

    let logits = hidden.matmul(&weight.transpose(0, 1));
    let expected = logits.log_softmax(-1, Kind::Float).gather(1, &targets.unsqueeze(-1), false).squeeze_dim(1);
    (&expected * &upstream).sum(Kind::Float).backward();
    let best = logits.argmax(-1, false).eq_tensor(&targets).to_kind(Kind::Float);
    let squares = logits.softmax(-1, Kind::Float).square().sum_dim_intlist(-1, false, Kind::Float);
    let is_close = |found: &Tensor, expected: &Tensor| found.allclose(expected, 1e-5, 1e-6, false);

    let check = |head: Head| {
        for weight_gradient_before in [0.0, 3.0] {
            let scores = head.score(&hidden, &targets).unwrap();
            assert!(!scores.logps.requires_grad() && is_close(&scores.logps, &expected));
            assert_eq!(scores.correct, best);
            let mut weight_gradient = weight.detach().full_like(weight_gradient_before);
            let hidden_gradient = scores.backward(&upstream, Some(&mut weight_gradient)).unwrap();
            assert!(is_close(&hidden_gradient, &hidden.grad()));
            assert!(is_close(&(weight_gradient - weight_gradient_before), &weight.grad()));
        }
        // A head that is not trained.
        let scores = head.score(&hidden, &targets).unwrap();
        assert!(is_close(&scores.backward(&upstream, None).unwrap(), &hidden.grad()));
        assert!(is_close(&head.logps(&hidden, &targets).unwrap(), &expected));
        assert!(is_close(&head.collision_entropies(&hidden).unwrap(), &-squares.log()));
        assert!(is_close(&head.mean_logits(&hidden).unwrap(), &logits.mean_dim(-1, false, Kind::Float)));
    };
    check(Head::Plain(plain::Head::new(&weight, Kind::Float).unwrap()));
    with_all_instructions(|| {
        for fused in [true, false] {
            for rows in [[64, 64, 1000], [4, 3, 1000], [4, 4, 0], [3, 1, 3]] {
                let limits = limits(rows, VOCABULARY);
                check(Head::InChunks(chunks::Head::new(&weight, Kind::Float, fused, limits).unwrap()));
            }
        }
    });
}

/// Hidden states (rows, hidden_size) of a golden step's chosen sequences, and the tokens that follow, (rows,).
fn hidden_states(model: &Model, step: &Value, compute: &Compute) -> (Tensor, Tensor) {
    let (mut states, mut targets) = (Vec::new(), Vec::new());
    for pair in step["pairs"].as_array().unwrap() {
        let tokens = |name: &str| serde_json::from_value::<Vec<u32>>(pair[name].clone()).unwrap();
        let ids = [tokens("prompt_ids"), tokens("chosen_ids")].concat();
        let input = model.decoder.input(&[&ids]).unwrap();
        let hidden = model.decoder.hidden_states(&model.parameters, &input, None, compute).unwrap();
        states.push(hidden.squeeze_dim(0).narrow(0, 0, ids.len() as i64 - 1));
        targets.extend(ids[1..].iter().map(|&id| i64::from(id)));
    }
    (Tensor::cat(&states, 0), Tensor::from_slice(&targets))
}

/// Several chunks and pieces, and logits computed again, by the operators that GPUs take, too: the golden negative
/// log-likelihood to 1e-5, and each row's and all gradients as autograd has them, to 1e-5 of the largest. In bfloat16, of
/// whose 8 bits of significand a rounding takes 2^-9: to 2^-6 of the largest.
#[test]
fn chunks_agree_with_autograd_on_golden_data() {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let golden = std::env::var_os("GOLDEN_DIR").map_or(beside, PathBuf::from);
    for directory in std::fs::read_dir(golden.join("models")).unwrap().map(|entry| entry.unwrap().path()) {
        let model = Model::load(&directory, Device::Cpu, Kind::Float).unwrap();
        let text = std::fs::read_to_string(directory.join("expected.json")).unwrap();
        let step = &serde_json::from_str::<Value>(&text).unwrap()["step"];
        let expected_nll = step["orpo_trl"]["nll_loss"].as_f64().unwrap();
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2f64.powi(-6))] {
            let compute = Compute { kind, kernels: Kernels::Plain };
            let (hidden, targets) = no_grad(|| hidden_states(&model, step, &compute));
            let upstream = numbers(1, targets.numel() as i64, 0.9).view(-1);
            let weight = model.parameters.get(model.decoder.head_name()).unwrap();
            let run = |head: Head| {
                let scores = head.score(&hidden, &targets).unwrap();
                let logps = scores.logps.shallow_clone();
                let mut of_weight = weight.zeros_like();
                let of_hidden = scores.backward(&upstream, Some(&mut of_weight)).unwrap();
                [logps, of_hidden.to_kind(Kind::Float), of_weight]
            };
            let expected = run(Head::Plain(plain::Head::new(weight, kind).unwrap()));
            let nll = -expected[0].mean(Kind::Float).double_value(&[]);
            let bound = if kind == Kind::Float { 1e-5 } else { tolerance } * expected_nll;
            assert!((nll - expected_nll).abs() < bound, "{}: {nll}, {expected_nll}", directory.display());
            for fused in [true, false] {
                let limits = limits([4, 3, 0], weight.size()[0]);
                let found = run(Head::InChunks(chunks::Head::new(weight, kind, fused, limits).unwrap()));
                for (name, (found, expected)) in ["logps", "hidden", "weight"].iter().zip(found.iter().zip(&expected)) {
                    let differs = (found - expected).abs().max().double_value(&[]);
                    let scale = expected.abs().max().double_value(&[]);
                    let what = format!("{} {kind:?} {name}, fused {fused}", directory.display());
                    assert!(differs <= tolerance * scale, "{what}: {differs} of {scale}");
                }
            }
        }
    }
}
