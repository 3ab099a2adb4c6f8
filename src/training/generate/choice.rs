//! Choosing the next tokens of a batch from its logits.
//!
//! The device finds each row's likeliest tokens; what is done to these few is done on the host. That is one small
//! transfer a token, which has to come anyway to see which rows have ended.

use tch::{Device, Kind, Tensor};

use super::warpers::Warpers;
use crate::{Error, Result};

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Choice {
    /// The likeliest.
    Greedy,
    /// Drawn from the warped distribution.
    Sample(Warpers),
}

/// A chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chosen {
    /// The token.
    pub token: u32,
    /// Its log-probability under the model itself, before any warper, in nats.
    pub logp: f32,
}

/// Chooses one token for each row of `logits` (rows, vocab_size), f32. `draw` gives a row's random number in [0, 1).
pub fn choose(logits: &Tensor, choice: &Choice, draw: impl Fn(usize) -> f64) -> Result<Vec<Chosen>> {
    let (rows, vocab_size) = logits.size2()?;
    let normalizers = host_floats(&logits.f_logsumexp(-1, false)?)?;
    if let Some(row) = normalizers.iter().position(|normalizer| !normalizer.is_finite()) {
        return Err(not_finite(row, rows as usize));
    }
    let picked: Vec<(u32, f32)> = match choice {
        Choice::Greedy => {
            let (values, tokens) = logits.f_max_dim(-1, false)?;
            let tokens = host_ids(&tokens)?;
            tokens.into_iter().zip(host_floats(&values)?).map(|(token, logit)| (token as u32, logit)).collect()
        }
        Choice::Sample(warpers) => {
            let count = warpers.candidates(vocab_size);
            let mut candidates = Candidates::of(logits, count)?;
            if candidates.may_miss_ties(warpers) && count < vocab_size {
                candidates = Candidates::of(logits, vocab_size)?;
            }
            (0..rows as usize).map(|row| candidates.pick(row, warpers, draw(row))).collect()
        }
    };
    let chosen = picked.into_iter().zip(normalizers);
    Ok(chosen.map(|((token, logit), normalizer)| Chosen { token, logp: logit - normalizer }).collect())
}

/// That logits were not finite, in a row of so many.
pub(super) fn not_finite(row: usize, rows: usize) -> Error {
    Error::Argument(format!("the model's logits are not finite (row {row} of {rows})"))
}

/// Each row's likeliest tokens in falling order; equal ones by their id, so that no device's sorting shows.
struct Candidates {
    rows: Vec<Vec<(f32, u32)>>,
}

impl Candidates {
    fn of(logits: &Tensor, count: i64) -> Result<Self> {
        let (values, tokens) = logits.f_topk(count, -1, true, true)?;
        let (values, tokens) = (host_floats(&values)?, host_ids(&tokens)?);
        let per_row = count.max(1) as usize;
        let row = |(values, tokens): (&[f32], &[i64])| {
            let mut row: Vec<(f32, u32)> = values.iter().zip(tokens).map(|(&v, &t)| (v, t as u32)).collect();
            row.sort_by(|left, right| right.0.total_cmp(&left.0).then(left.1.cmp(&right.1)));
            row
        };
        Ok(Candidates { rows: values.chunks(per_row).zip(tokens.chunks(per_row)).map(row).collect() })
    }

    /// Whether some row's last candidate still ties with its k-th.
    fn may_miss_ties(&self, warpers: &Warpers) -> bool {
        self.rows.iter().any(|row| match (warpers.top_k.and_then(|k| row.get(k - 1)), row.last()) {
            (Some(kth), Some(last)) => warpers.scale(kth.0) == warpers.scale(last.0),
            _ => false,
        })
    }

    /// The token at `draw` of a row's cumulative distribution, with its logit.
    fn pick(&self, row: usize, warpers: &Warpers, draw: f64) -> (u32, f32) {
        let candidates = &self.rows[row];
        let logits: Vec<f32> = candidates.iter().map(|(logit, _)| *logit).collect();
        let probabilities = warpers.probabilities(&logits);
        let mut rest = draw;
        let passed = probabilities.iter().take_while(|&&probability| {
            rest -= probability;
            rest >= 0.0
        });
        // Rounding may leave a little above the sum: that belongs to the last.
        let index = passed.count().min(probabilities.len().saturating_sub(1));
        let (logit, token) = candidates[index];
        (token, logit)
    }
}

pub(super) fn host_floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(Vec::<f32>::try_from(tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_reshape([-1])?)?)
}

pub(super) fn host_ids(tensor: &Tensor) -> Result<Vec<i64>> {
    Ok(Vec::<i64>::try_from(tensor.f_to_device(Device::Cpu)?.f_reshape([-1])?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equally_likely_tokens_are_all_drawn_in_the_order_of_their_ids() {
        // 200 tokens tie: more than top_k and the room for ties.
        let logits = Tensor::zeros([1, 200], (Kind::Float, Device::Cpu));
        let choice = Choice::Sample(Warpers { temperature: 0.5, top_k: Some(3), top_p: None });
        for (draw, token) in [(0.0, 0), (0.5001, 100), (0.9999, 199)] {
            let chosen = choose(&logits, &choice, |_| draw).unwrap();
            assert_eq!(chosen[0].token, token);
            assert!((chosen[0].logp + 200f32.ln()).abs() < 1e-6);
        }
    }

    #[test]
    fn logps_are_those_of_the_unwarped_distribution() {
        let logits = Tensor::from_slice(&[0f32, 2.0, 1.0]).view([1, 3]);
        let expected = -(1f32 + (-2f32).exp() + (-1f32).exp()).ln();
        let warpers = Warpers { temperature: 0.1, top_k: Some(1), top_p: Some(0.5) };
        for choice in [Choice::Greedy, Choice::Sample(warpers)] {
            let chosen = choose(&logits, &choice, |_| 0.5).unwrap();
            assert_eq!(chosen[0].token, 1);
            assert!((chosen[0].logp - expected).abs() < 1e-6);
        }
    }

    #[test]
    fn logits_that_are_not_finite_are_an_error() {
        let logits = Tensor::from_slice(&[0f32, 1.0, f32::NAN, 1.0]).view([2, 2]);
        let message = choose(&logits, &Choice::Greedy, |_| 0.0).unwrap_err().to_string();
        assert!(message.contains("not finite (row 1 of 2)"), "{message}");
    }
}
