//! The numbers of pairs that an objective asks for, from the log-probabilities of a pass.

use std::collections::BTreeMap;

use tch::Tensor;

use super::Example;
use super::layout::Layout;
use super::pass::Totals;
use crate::device::upload;
use crate::objectives::{Needs, PairNumbers, PairTensor};
use crate::{Error, Result};

/// What a pass knows of its rows.
pub(super) struct Scored<'a> {
    /// Log-probabilities of the rows' targets, (rows,) f32.
    pub logps: &'a Tensor,
    /// -log sum p^2 of the rows' distributions, (rows,) f32, where the objective needs it.
    pub collision_entropies: Option<&'a Tensor>,
    /// How the rows stand.
    pub layout: &'a Layout,
}

/// The numbers of a part of a step.
pub(super) fn numbers(
    needs: &Needs,
    scored: &Scored,
    examples: &[Example],
    totals: &Totals,
    state: &BTreeMap<String, f64>,
) -> Result<PairNumbers> {
    let device = scored.logps.device();
    let pairs = examples.len() as i64;
    let layout = scored.layout;
    let of_rows = |rows: &Tensor| layout.responses.f_mv(rows); // (rows,) -> (sequences,): chosen, then rejected
    let sums = of_rows(scored.logps)?;
    let chosen = |sequences: &Tensor| sequences.f_narrow(0, 0, pairs);
    let rejected = |sequences: &Tensor| sequences.f_narrow(0, pairs, pairs);
    let per_token = || sums.f_div(&layout.response_tokens);
    let entropies = || match scored.collision_entropies {
        Some(rows) => Ok(of_rows(rows)?.f_div(&layout.response_tokens)?),
        None => Err(Error::Argument("collision entropies were not computed".into())),
    };
    let reference = |part: fn((f32, f32)) -> f32| -> Result<Tensor> {
        let values: Vec<f32> = examples.iter().map(|example| example.reference.map_or(f32::NAN, part)).collect();
        upload(&values, device)
    };
    let mut tensors = BTreeMap::new();
    for tensor in &needs.tensors {
        let values = match tensor {
            PairTensor::ChosenLogps => chosen(&sums)?,
            PairTensor::RejectedLogps => rejected(&sums)?,
            PairTensor::RefChosenLogps => reference(|(chosen, _)| chosen)?,
            PairTensor::RefRejectedLogps => reference(|(_, rejected)| rejected)?,
            PairTensor::ChosenAvgLogps => chosen(&per_token()?)?,
            PairTensor::RejectedAvgLogps => rejected(&per_token()?)?,
            PairTensor::ChosenLen => chosen(&layout.response_tokens)?,
            PairTensor::RejectedLen => rejected(&layout.response_tokens)?,
            PairTensor::ChosenNll => chosen(&sums)?.f_mul_scalar(-totals.examples / totals.chosen_tokens)?,
            PairTensor::SequenceNll => {
                let whole = layout.chosen_sequences.as_ref();
                let whole = whole.ok_or_else(|| Error::Argument("the prompt's tokens were not scored".into()))?;
                whole.f_mv(scored.logps)?.f_mul_scalar(-totals.examples / totals.sequence_tokens)?
            }
            PairTensor::ChosenTailLogps => chosen(&tails(layout, pairs)?.f_mv(scored.logps)?)?,
            PairTensor::RejectedTailLogps => rejected(&tails(layout, pairs)?.f_mv(scored.logps)?)?,
            PairTensor::ChosenCollisionEntropy => chosen(&entropies()?)?,
            PairTensor::RejectedCollisionEntropy => rejected(&entropies()?)?,
        };
        tensors.insert(*tensor, values);
    }
    let mut numbers = BTreeMap::new();
    for name in &needs.numbers {
        let values: Vec<f32> =
            examples.iter().map(|example| example.numbers.get(name).map_or(f32::NAN, |value| *value as f32)).collect();
        numbers.insert(name.clone(), upload(&values, device)?);
    }
    Ok(PairNumbers { tensors, numbers, state: state.clone() })
}

/// 1 where a row's token belongs to a response and stands past the length of the pair's shorter one, else 0;
/// (sequences, rows).
fn tails(layout: &Layout, pairs: i64) -> Result<Tensor> {
    let tokens = layout.response_tokens.f_view([2, pairs])?;
    let shorter = tokens.f_amin(0, false)?.f_repeat([2])?; // (pairs,) -> (sequences,)
    // A response's rows stand in the order of its tokens. They are counted in integers: a GPU's sums of others are not the same
    // each time, as far as libtorch knows, and refused where all is to be.
    let position = layout.responses.f_cumsum(1, tch::Kind::Int64)?;
    Ok(layout.responses.f_mul(&position.f_gt_tensor(&shorter.f_unsqueeze(1)?)?)?)
}

/// The numbers of several parts as those of one.
pub(super) fn concatenated(parts: Vec<PairNumbers>) -> Result<PairNumbers> {
    fn joined<K: Ord + Clone>(
        parts: &[PairNumbers],
        of: fn(&PairNumbers) -> &BTreeMap<K, Tensor>,
    ) -> Result<BTreeMap<K, Tensor>> {
        let names = parts.first().into_iter().flat_map(|part| of(part).keys().cloned());
        names
            .map(|name| {
                let tensors: Vec<&Tensor> = parts.iter().filter_map(|part| of(part).get(&name)).collect();
                Ok((name, Tensor::f_cat(&tensors, 0)?))
            })
            .collect()
    }
    let tensors = joined(&parts, |part| &part.tensors)?;
    let numbers = joined(&parts, |part| &part.numbers)?;
    let state = parts.into_iter().next().map(|part| part.state).unwrap_or_default();
    Ok(PairNumbers { tensors, numbers, state })
}
