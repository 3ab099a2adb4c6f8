//! Logits of the golden models, with and without a cache, and gradients with checkpointing.

use sapo_flow_training::model::{AttentionMask, Compute, Decoder, Model, ModelInput};
use sapo_flow_training::parameters::ParameterSet;
use tch::{Device, Kind, Tensor};

use crate::golden;

const F32: Compute = Compute::new(Kind::Float);

/// A golden model with its batch: rows of tokens without their padding.
struct Case {
    name: String,
    model: Model,
    rows: Vec<Vec<u32>>,
    /// (rows, tokens, vocab_size)
    logits: Tensor,
}

fn cases() -> Vec<Case> {
    let case = |directory: std::path::PathBuf| {
        let expected = golden::json(directory.join("expected.json"));
        let lengths = golden::floats(&expected["lengths"]);
        let padded = expected["input_ids"].as_array().unwrap();
        let rows = padded.iter().zip(lengths).map(|(row, length)| golden::tokens(row)[..length as usize].to_vec());
        let logits = ParameterSet::read(&directory.join("logits.safetensors"), Device::Cpu).unwrap();
        Case {
            name: directory.file_name().unwrap().to_string_lossy().into_owned(),
            model: Model::load(&directory, Device::Cpu, Kind::Float).unwrap(),
            rows: rows.collect(),
            logits: logits.get("logits").unwrap().shallow_clone(),
        }
    };
    golden::models().into_iter().map(case).collect()
}

impl Case {
    fn decoder(&self) -> &Decoder {
        &self.model.decoder
    }

    /// Logits (batch, tokens, vocab_size) without a cache.
    fn logits_of(&self, input: &ModelInput) -> Tensor {
        let hidden = self.decoder().hidden_states(&self.model.parameters, input, None, &F32).unwrap();
        self.decoder().logits(&self.model.parameters, &hidden, &F32).unwrap()
    }

    /// Compares logits (batch, tokens, vocab_size) with the golden ones where rows have tokens.
    fn assert_logits(&self, logits: &Tensor) {
        assert_eq!(logits.size(), self.logits.size(), "{}", self.name);
        for (index, row) in self.rows.iter().enumerate() {
            let tokens_of = |tensor: &Tensor| tensor.get(index as i64).narrow(0, 0, row.len() as i64);
            let difference = golden::largest_difference(&tokens_of(logits), &tokens_of(&self.logits));
            assert!(difference < 1e-4, "{} row {index}: logits differ by {difference}", self.name);
        }
    }
}

#[test]
fn logits_of_a_right_padded_batch() {
    let _guard = tch::no_grad_guard();
    for case in cases() {
        let input = case.decoder().input(&case.rows).unwrap();
        case.assert_logits(&case.logits_of(&input));
    }
}

#[test]
fn logits_of_packed_rows_under_a_dense_mask() {
    let _guard = tch::no_grad_guard();
    for case in cases() {
        let ids: Vec<i64> = case.rows.iter().flatten().map(|&id| i64::from(id)).collect();
        let positions: Vec<i64> = case.rows.iter().flat_map(|row| 0..row.len() as i64).collect();
        let owners: Vec<i64> =
            case.rows.iter().enumerate().flat_map(|(row, ids)| vec![row as i64; ids.len()]).collect();
        let total = ids.len() as i64;
        let owners = Tensor::from_slice(&owners);
        let mask = owners.unsqueeze(1).eq_tensor(&owners.unsqueeze(0)).tril(0).view([1, 1, total, total]);
        let input = ModelInput {
            ids: Tensor::from_slice(&ids).view([1, total]),
            positions: Tensor::from_slice(&positions).view([1, total]),
            mask: AttentionMask::Dense(mask),
        };
        let logits = case.logits_of(&input).squeeze_dim(0);
        let mut start = 0;
        for (index, row) in case.rows.iter().enumerate() {
            let length = row.len() as i64;
            let expected = case.logits.get(index as i64).narrow(0, 0, length);
            let difference = golden::largest_difference(&logits.narrow(0, start, length), &expected);
            assert!(difference < 1e-4, "{} row {index}: logits differ by {difference}", case.name);
            start += length;
        }
    }
}

#[test]
fn decoding_with_a_cache_equals_the_whole_computation() {
    let _guard = tch::no_grad_guard();
    for case in cases() {
        // Two prompt lengths and steps of one and of several tokens, through to each row's end.
        for (prompt, step) in [(1, 1), (3, 2), (5, 4)] {
            let row = &case.rows[0];
            let mut cache = case.decoder().new_cache(1, row.len() as i64, &F32).unwrap();
            let mut parts = Vec::new();
            let mut start = 0;
            while start < row.len() {
                let end = if start == 0 { prompt } else { (start + step).min(row.len()) };
                let mut input = case.decoder().input(&[&row[start..end]]).unwrap();
                input.positions += start as i64;
                let hidden = case.decoder().hidden_states(&case.model.parameters, &input, Some(&mut cache), &F32);
                parts.push(case.decoder().logits(&case.model.parameters, &hidden.unwrap(), &F32).unwrap());
                start = end;
            }
            let expected = case.logits.get(0).narrow(0, 0, row.len() as i64);
            let difference = golden::largest_difference(&Tensor::cat(&parts, 1).get(0), &expected);
            assert!(difference < 1e-4, "{} steps of {step}: logits differ by {difference}", case.name);
        }
    }
}

#[test]
fn checkpointed_gradients_equal_the_plain_ones() {
    for case in cases() {
        let gradients = |checkpointed: bool, kind: Kind| -> Vec<(String, Tensor)> {
            let compute = Compute::new(kind);
            let mut weights = case.model.parameters.deep_copy();
            for (_, tensor) in weights.iter_mut() {
                *tensor = tensor.set_requires_grad(true);
            }
            let input = case.decoder().input(&case.rows).unwrap();
            let loss = |hidden: &Tensor| {
                let logits = case.decoder().logits(&weights, hidden, &compute).unwrap();
                logits.log_softmax(-1, Kind::Float).get(0).square().mean(Kind::Float)
            };
            if checkpointed {
                let (hidden, tape) = case.decoder().hidden_states_checkpointed(&weights, &input, &compute).unwrap();
                loss(&hidden).backward();
                tape.backward(&hidden.grad()).unwrap();
            } else {
                loss(&case.decoder().hidden_states(&weights, &input, None, &compute).unwrap()).backward();
            }
            weights.iter().map(|(name, tensor)| (name.to_owned(), tensor.grad())).collect()
        };
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
            let pairs = gradients(false, kind).into_iter().zip(gradients(true, kind));
            for ((name, plain), (_, checkpointed)) in pairs {
                let scale = plain.norm().double_value(&[]);
                let difference = (&plain - &checkpointed).norm().double_value(&[]) / scale;
                assert!(scale > 0.0 && difference < tolerance, "{} {name} {kind:?}: {difference}", case.name);
            }
        }
    }
}

#[test]
fn a_full_cache_and_unknown_tokens_are_errors() {
    let case = cases().remove(0);
    let mut cache = case.decoder().new_cache(1, 2, &F32).unwrap();
    let input = case.decoder().input(&[[1u32, 2, 3]]).unwrap();
    let hidden = case.decoder().hidden_states(&case.model.parameters, &input, Some(&mut cache), &F32);
    assert_eq!(hidden.unwrap_err().to_string(), "0 + 3 tokens for a cache that holds 2");
    let vocab_size = case.decoder().config.vocab_size;
    let message = case.decoder().input(&[vec![1], vec![1, vocab_size as u32]]).unwrap_err().to_string();
    assert_eq!(message, format!("row 1: token {vocab_size} is not in the vocabulary of {vocab_size} tokens"));
}
