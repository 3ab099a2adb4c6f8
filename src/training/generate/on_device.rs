//! Choosing the next tokens of a batch where its logits are, by the same rules as on the host and with the same draws,
//! so that a GPU goes on without waiting to be asked.

use tch::{Kind, Tensor};

use super::choice::Choice;
use super::warpers::Warpers;
use crate::Result;

/// Tokens that have been chosen for the rows of a batch; all on the device.
#[derive(Debug)]
pub struct Drawn {
    /// (rows,), i64.
    pub tokens: Tensor,
    /// Their log-probabilities under the model itself, before any warper, in nats: (rows,), f32. Not finite where the
    /// logits were not.
    pub logps: Tensor,
    /// Whether some row had more tokens that tie with its k-th likeliest than were looked at: a bool.
    pub missed_ties: Tensor,
}

/// Chooses one token for each row of `logits` (rows, vocab_size), f32, as [`choose`](super::choose) does. `draws` (rows,),
/// f64, are the rows' random numbers in [0, 1). With top-k, ties are looked for among a few tokens more than k, or in the
/// `whole` vocabulary.
pub fn choose_on_device(logits: &Tensor, choice: &Choice, draws: &Tensor, whole: bool) -> Result<Drawn> {
    let normalizers = logits.f_logsumexp(-1, false)?;
    let nothing = || Tensor::f_zeros([] as [i64; 0], (Kind::Bool, logits.device()));
    let (values, tokens, missed_ties) = match choice {
        Choice::Greedy => {
            let (values, tokens) = logits.f_max_dim(-1, false)?;
            (values, tokens, nothing()?)
        }
        Choice::Sample(warpers) => {
            let vocab_size = logits.size2()?.1;
            let count = if whole { vocab_size } else { warpers.candidates(vocab_size) };
            let (values, tokens) = likeliest(logits, count)?;
            let scaled = warpers.scale_tensor(&values)?;
            let missed_ties = match warpers.top_k {
                Some(k) if count < vocab_size => {
                    let column = |index: i64| scaled.f_select(1, index);
                    column(k as i64 - 1)?.f_eq_tensor(&column(count - 1)?)?.f_any()?
                }
                _ => nothing()?,
            };
            let index = pick(&scaled, warpers, draws)?;
            let picked = |of_all: &Tensor| of_all.f_gather(1, &index, false)?.f_squeeze_dim(1);
            (picked(&values)?, picked(&tokens)?, missed_ties)
        }
    };
    Ok(Drawn { logps: values.f_sub(&normalizers)?, tokens, missed_ties })
}

/// The `count` largest logits of each row in falling order, and their tokens: (rows, count). Equal ones are in the order
/// of their ids.
fn likeliest(logits: &Tensor, count: i64) -> Result<(Tensor, Tensor)> {
    if count == logits.size2()?.1 {
        return Ok(logits.f_sort_stable(true, -1, true)?);
    }
    let (_, tokens) = logits.f_topk(count, -1, true, false)?;
    let (tokens, _) = tokens.f_sort(-1, false)?;
    let (values, order) = logits.f_gather(-1, &tokens, false)?.f_sort_stable(true, -1, true)?;
    Ok((values, tokens.f_gather(-1, &order, false)?))
}

/// Where in each row of falling `scaled` logits (rows, count) its draw lies: (rows, 1).
fn pick(scaled: &Tensor, warpers: &Warpers, draws: &Tensor) -> Result<Tensor> {
    let (_, count) = scaled.size2()?;
    let mut weights = scaled.f_sub(&scaled.f_narrow(1, 0, 1)?)?.f_to_kind(Kind::Double)?.f_exp()?;
    if let Some(k) = warpers.top_k.map(|k| k as i64).filter(|&k| k < count) {
        let below = scaled.f_lt_tensor(&scaled.f_narrow(1, k - 1, 1)?)?;
        weights = weights.f_masked_fill(&below, 0.0)?;
    }
    if let Some(top_p) = warpers.top_p {
        // What lies at and behind each token; the likeliest one stays whatever that is.
        let tails = shares(&weights)?.f_flip([1])?.f_cumsum(1, Kind::Double)?.f_flip([1])?;
        let dropped = tails.f_le(1.0 - top_p)?;
        let _ = dropped.f_narrow(1, 0, 1)?.f_fill_(0.0)?;
        weights = weights.f_masked_fill(&dropped, 0.0)?;
    }
    let passed = shares(&weights)?.f_cumsum(1, Kind::Double)?.f_le_tensor(&draws.f_unsqueeze(1)?)?;
    let counted = |what: &Tensor| what.f_sum_dim_intlist(1, true, Kind::Int64);
    // Rounding may leave a little above the sum: that belongs to the last that is kept.
    let last = counted(&weights.f_gt(0.0)?)?.f_sub_scalar(1)?;
    Ok(counted(&passed)?.f_minimum(&last)?.f_clamp_min(0)?)
}

/// Rows divided by their sums.
fn shares(weights: &Tensor) -> Result<Tensor> {
    Ok(weights.f_div(&weights.f_sum_dim_intlist(1, true, Kind::Double)?)?)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn token(logits: &Tensor, warpers: Warpers, draw: f64, whole: bool) -> (i64, bool) {
        let drawn = choose_on_device(logits, &Choice::Sample(warpers), &Tensor::from_slice(&[draw]), whole).unwrap();
        (drawn.tokens.int64_value(&[0]), bool::try_from(drawn.missed_ties).unwrap())
    }

    #[test]
    fn ties_beyond_those_looked_at_are_told_and_found_in_the_whole_vocabulary() {
        let logits = Tensor::zeros([1, 200], (Kind::Float, Device::Cpu));
        let warpers = Warpers { temperature: 0.5, top_k: Some(3), top_p: None };
        for (draw, expected) in [(0.0, 0), (0.5001, 100), (0.9999, 199)] {
            assert!(token(&logits, warpers, draw, false).1);
            assert_eq!(token(&logits, warpers, draw, true), (expected, false));
        }
    }

    /// Probabilities are 0.610, 0.224, 0.083, 0.083 and less; with top_p 0.6 the second is kept, and the first is 0.731.
    #[test]
    fn the_token_that_crosses_top_p_is_kept() {
        let logits = Tensor::from_slice(&[1f32, 3.0, 0.0, 2.0, 1.0]).unsqueeze(0);
        let warpers = Warpers { temperature: 1.0, top_k: None, top_p: Some(0.6) };
        for (draw, expected) in [(0.0, 1), (0.73, 1), (0.74, 3), (0.9999, 3)] {
            assert_eq!(token(&logits, warpers, draw, false), (expected, false));
        }
        let sharp = Warpers { top_p: Some(1e-9), ..warpers };
        assert_eq!(token(&logits, sharp, 0.9999, false), (1, false));
    }

    #[test]
    fn logits_that_are_not_finite_show_in_the_logps() {
        let logits = Tensor::from_slice(&[0f32, 1.0, f32::NAN, 1.0, f32::INFINITY, 1.0]).view([3, 2]);
        let warpers = Warpers { temperature: 1.0, top_k: Some(1), top_p: Some(0.5) };
        for choice in [Choice::Greedy, Choice::Sample(warpers)] {
            let draws = Tensor::from_slice(&[0.5, 0.5, 0.5]);
            let drawn = choose_on_device(&logits, &choice, &draws, false).unwrap();
            let finite = Vec::<f64>::try_from(drawn.logps.isfinite().to_kind(Kind::Double)).unwrap();
            assert_eq!(finite, [1.0, 0.0, 0.0]);
        }
    }
}
