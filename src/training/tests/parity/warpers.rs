//! Temperature, top-k and top-p against transformers' warpers.

use sapo_flow_training::generate::{Choice, Warpers, choose, choose_on_device};
use tch::Tensor;

use crate::golden;

struct Case {
    warpers: Warpers,
    /// Rows of logits, and of the probabilities that transformers makes of them.
    rows: Vec<(Vec<f64>, Vec<f64>)>,
}

fn cases() -> Vec<Case> {
    let case = |case: &serde_json::Value| {
        let rows = |key: &str| case[key].as_array().unwrap().iter().map(golden::floats).collect::<Vec<_>>();
        Case {
            warpers: Warpers {
                temperature: case["temperature"].as_f64().unwrap(),
                // transformers switches a warper off at 0 and 1.
                top_k: case["top_k"].as_u64().filter(|&k| k > 0).map(|k| k as usize),
                top_p: case["top_p"].as_f64().filter(|&p| p < 1.0),
            },
            rows: rows("logits").into_iter().zip(rows("probabilities")).collect(),
        }
    };
    golden::cases("warpers.json", 4).iter().map(case).collect()
}

#[test]
fn probabilities() {
    for Case { warpers, rows } in cases() {
        for (logits, expected) in rows {
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&left, &right| logits[right].total_cmp(&logits[left]));
            let falling: Vec<f32> = order.iter().map(|&token| logits[token] as f32).collect();
            let mut found = vec![0.0; logits.len()];
            for (&token, probability) in order.iter().zip(warpers.probabilities(&falling)) {
                found[token] = probability;
            }
            golden::assert_close(&format!("{warpers:?}"), &found, &expected, 1e-6);
        }
    }
}

/// A regular grid of draws meets each token as often as its probability says.
#[test]
fn chosen_tokens_have_these_probabilities() {
    const DRAWS: usize = 1000;
    for Case { warpers, rows } in cases() {
        for (logits, expected) in rows {
            let logits: Vec<f32> = logits.iter().map(|&logit| logit as f32).collect();
            let batch = Tensor::from_slice(&logits).unsqueeze(0).repeat([DRAWS as i64, 1]);
            let draws: Vec<f64> = (0..DRAWS).map(|row| (row as f64 + 0.5) / DRAWS as f64).collect();
            let chosen = choose(&batch, &Choice::Sample(warpers), |row| draws[row]).unwrap();
            // The device's way of choosing is another implementation of the same.
            let draws = Tensor::from_slice(&draws);
            let drawn = choose_on_device(&batch, &Choice::Sample(warpers), &draws, false).unwrap();
            let tokens: Vec<i64> = chosen.iter().map(|chosen| i64::from(chosen.token)).collect();
            assert_eq!(Vec::<i64>::try_from(drawn.tokens).unwrap(), tokens);
            let logps: Vec<f64> = chosen.iter().map(|chosen| f64::from(chosen.logp)).collect();
            golden::assert_close("logps", &Vec::<f64>::try_from(drawn.logps).unwrap(), &logps, 1e-5);
            let mut counts = vec![0usize; logits.len()];
            chosen.iter().for_each(|chosen| counts[chosen.token as usize] += 1);
            for (token, (&count, probability)) in counts.iter().zip(expected).enumerate() {
                let expected = probability * DRAWS as f64;
                assert!((count as f64 - expected).abs() <= 1.0, "{warpers:?} token {token}: {count} of {expected}");
            }
        }
    }
}
