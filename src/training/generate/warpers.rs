//! What transformers' logits warpers do, on one row of logits: temperature, then top-k, then top-p (nucleus sampling,
//! arXiv 1904.09751).

use tch::Tensor;

use crate::{Error, Result};

/// Beyond the k likeliest, this many more are looked at so that ties with the k-th are seen to end.
const ROOM_FOR_TIES: i64 = 64;

/// How a distribution over the next token is changed before one is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Warpers {
    /// Divides the logits.
    pub temperature: f64,
    /// Keeps tokens at least as likely as the k-th; ties with it are kept too.
    pub top_k: Option<usize>,
    /// Keeps the smallest set of likeliest tokens with at least this probability.
    pub top_p: Option<f64>,
}

impl Warpers {
    /// Refuses values that mean nothing.
    pub fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::Argument(message));
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return refuse(format!("temperature: expected a positive number, found {}", self.temperature));
        }
        if self.top_k == Some(0) {
            return refuse("top_k: expected a positive number, found 0".into());
        }
        match self.top_p {
            Some(p) if !(p > 0.0 && p <= 1.0) => refuse(format!("top_p: expected a number in (0, 1], found {p}")),
            _ => Ok(()),
        }
    }

    /// A logit as top-k and top-p see it, in the precision that transformers computes it in.
    pub fn scale(&self, logit: f32) -> f32 {
        logit / self.temperature as f32
    }

    /// The same for a tensor of logits.
    pub(super) fn scale_tensor(&self, logits: &Tensor) -> Result<Tensor> {
        Ok(logits.f_div_scalar(f64::from(self.temperature as f32))?)
    }

    /// How many of the likeliest tokens to look at.
    pub(crate) fn candidates(&self, vocab_size: i64) -> i64 {
        self.top_k.map_or(vocab_size, |k| (k as i64).saturating_add(ROOM_FOR_TIES).min(vocab_size))
    }

    /// Probabilities of the tokens that are kept, given all logits that can matter in falling order: the result is as
    /// long as the part of `logits` that is kept.
    pub fn probabilities(&self, logits: &[f32]) -> Vec<f64> {
        let Some(largest) = logits.first().map(|&logit| self.scale(logit)) else { return Vec::new() };
        let threshold = match self.top_k {
            Some(k) if k < logits.len() => self.scale(logits[k - 1]),
            _ => f32::NEG_INFINITY,
        };
        let scaled = logits.iter().map(|&logit| self.scale(logit)).take_while(|&logit| logit >= threshold);
        let mut weights: Vec<f64> = scaled.map(|logit| f64::from(logit - largest).exp()).collect();
        if let Some(top_p) = self.top_p {
            weights.truncate(nucleus(&weights, top_p));
        }
        let total: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= total);
        weights
    }
}

/// How many of the falling `weights` top-p keeps: transformers drops the least likely tokens while their probabilities
/// sum to at most 1 - top_p, and never the likeliest.
fn nucleus(weights: &[f64], top_p: f64) -> usize {
    let total: f64 = weights.iter().sum();
    let mut dropped = 0.0;
    let mut kept = weights.len();
    for weight in weights.iter().skip(1).rev() {
        dropped += weight / total;
        if dropped > 1.0 - top_p {
            break;
        }
        kept -= 1;
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [3.0, 2.0, 1.0, 1.0, 0.0];

    fn kept(top_k: Option<usize>, top_p: Option<f64>) -> usize {
        Warpers { temperature: 1.0, top_k, top_p }.probabilities(&LOGITS).len()
    }

    #[test]
    fn ties_with_the_last_of_top_k_are_kept() {
        assert_eq!(kept(Some(2), None), 2);
        assert_eq!(kept(Some(3), None), 4);
        assert_eq!(kept(Some(9), None), 5);
    }

    /// Probabilities are 0.610, 0.224, 0.083, 0.083 and 0.030 (and so on, normalised).
    #[test]
    fn top_p_keeps_the_token_that_crosses_it() {
        assert_eq!(kept(None, Some(1.0)), 5);
        assert_eq!(kept(None, Some(0.6)), 2);
        assert_eq!(kept(None, Some(0.5)), 1);
        assert_eq!(kept(None, Some(1e-9)), 1);
    }

    #[test]
    fn probabilities_sum_to_one_at_extreme_temperatures() {
        for temperature in [1e-3, 1.0, 1e6] {
            let probabilities = Warpers { temperature, top_k: None, top_p: None }.probabilities(&LOGITS);
            assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn meaningless_settings_are_errors() {
        let fine = Warpers { temperature: 0.7, top_k: Some(50), top_p: Some(0.95) };
        assert!(fine.check().is_ok());
        let broken = [
            ("temperature", Warpers { temperature: 0.0, ..fine }),
            ("temperature", Warpers { temperature: f64::NAN, ..fine }),
            ("top_k", Warpers { top_k: Some(0), ..fine }),
            ("top_p", Warpers { top_p: Some(0.0), ..fine }),
            ("top_p", Warpers { top_p: Some(1.5), ..fine }),
        ];
        for (name, warpers) in broken {
            let message = warpers.check().unwrap_err().to_string();
            assert!(message.starts_with(name), "{message}");
        }
    }
}
