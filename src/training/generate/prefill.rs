//! The pass over prompts that fills rows of a cache.
//!
//! Prompts stand one after the other in one row, so that none is padded. One that another begins with, or that equals
//! another, is not computed again: its keys and values are the other's first ones. So several responses to a prompt cost
//! one, and segments that begin at different places of one answer cost the longest. That is so in each call; between calls
//! [`Batch`](super::batch::Batch) copies what a row still holds.

use tch::Tensor;

use super::PackedWeights;
use super::cache::{KvCache, Placement};
use crate::Result;
use crate::device::upload;
use crate::model::{AttentionMask, Compute, Decoder, ModelInput, SharedPrefix};
use crate::native::products;
use crate::parameters::ParameterSet;

/// Tokens of a pass from which on the next prompt waits for the next pass: by then matrix products are as fast as they
/// get, and memory is bounded.
pub const PASS_TOKENS: usize = 4096;

/// Tokens of a pass are rounded up to a multiple of this where oneDNN computes: it keeps something for every new number.
const MULTIPLE: usize = 16;

/// A prompt, and the row of the cache that it begins anew.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prompt<'a> {
    pub row: usize,
    pub ids: &'a [u32],
}

/// What passes over prompts give.
pub(super) struct Prefilled {
    /// The hidden states at the prompts' last tokens, (prompts, hidden_size).
    pub hidden: Tensor,
    /// Tokens that were computed for it.
    pub tokens: usize,
}

/// Fills the prompts' rows. No prompt is empty, and there is one. With `share` those that others begin with are taken from
/// them.
pub(super) fn prefill(
    decoder: &Decoder,
    weights: &ParameterSet,
    prompts: &[Prompt],
    cache: &mut KvCache,
    compute: &Compute,
    share: bool,
) -> Result<Prefilled> {
    let carriers = match share {
        true => carriers(&prompts.iter().map(|prompt| prompt.ids).collect::<Vec<_>>()),
        false => (0..prompts.len()).collect(),
    };
    let multiple = if products::by_onednn(compute.kind, decoder.device) { MULTIPLE } else { 1 };
    let mut states = Vec::new();
    // The prompts in the order of the states.
    let mut order = Vec::new();
    let mut all_tokens = 0;
    for computed in passes(prompts, &carriers) {
        let tokens_of = |carrier: &usize| prompts[*carrier].ids.len() as i64;
        let (mut placements, mut last) = (Vec::new(), Vec::new());
        let mut from = 0;
        for carrier in &computed {
            for (index, _) in carriers.iter().enumerate().filter(|(_, of)| *of == carrier) {
                let tokens = tokens_of(&index);
                placements.push(Placement { row: prompts[index].row, from, tokens });
                last.push(from + tokens - 1);
                order.push(index as i64);
            }
            from += tokens_of(carrier);
        }
        let ids = computed.iter().flat_map(|&carrier| prompts[carrier].ids.iter().map(|&id| i64::from(id)));
        let mut ids: Vec<i64> = ids.collect();
        let mut positions: Vec<i64> = computed.iter().flat_map(|carrier| 0..tokens_of(carrier)).collect();
        all_tokens += ids.len();
        // Tokens that no prompt sees, and that go to no row of the cache.
        let tokens = ids.len().next_multiple_of(multiple);
        ids.resize(tokens, 0);
        positions.resize(tokens, 0);
        let row = |values: &[i64]| -> Result<Tensor> { Ok(upload(values, decoder.device)?.f_unsqueeze(0)?) };
        let alone = |tokens: i64| SharedPrefix { shared: tokens, first: tokens, second: 0 };
        let mask = AttentionMask::Pairs(computed.iter().map(|carrier| alone(tokens_of(carrier))).collect());
        let input = ModelInput { ids: row(&ids)?, positions: row(&positions)?, mask };
        let filling = cache.fill(&placements)?;
        let hidden = decoder.hidden_states_in(weights, &PackedWeights::default(), &input, Some(&filling), compute)?;
        // (1, tokens, hidden_size) -> (prompts, hidden_size)
        states.push(hidden.f_squeeze_dim(0)?.f_index_select(0, &row(&last)?.f_squeeze_dim(0)?)?);
    }
    let mut places = vec![0; order.len()];
    (0..).zip(&order).for_each(|(place, &index)| places[index as usize] = place);
    let places = upload::<i64>(&places, decoder.device)?;
    Ok(Prefilled { hidden: Tensor::f_cat(&states, 0)?.f_index_select(0, &places)?, tokens: all_tokens })
}

/// For each prompt the one that is computed for it: one that begins with it, perhaps itself.
fn carriers(prompts: &[&[u32]]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|&index| prompts[index]);
    let mut carriers = vec![0; prompts.len()];
    let mut carrier = None;
    // In this order what begins with a prompt comes right after it.
    for &index in order.iter().rev() {
        let found = carrier.filter(|&carrier: &usize| prompts[carrier].starts_with(prompts[index])).unwrap_or(index);
        carriers[index] = found;
        carrier = Some(found);
    }
    carriers
}

/// The prompts that are computed, divided into passes.
fn passes(prompts: &[Prompt], carriers: &[usize]) -> Vec<Vec<usize>> {
    let mut passes: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for index in (0..prompts.len()).filter(|&index| carriers[index] == index) {
        let tokens = prompts[index].ids.len();
        match passes.last_mut().filter(|_| tokens <= room) {
            Some(pass) => pass.push(index),
            None => {
                passes.push(vec![index]);
                room = PASS_TOKENS;
            }
        }
        room = room.saturating_sub(tokens);
    }
    passes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_that_others_begin_with_are_carried_by_the_longest() {
        let prompts: [&[u32]; 7] = [&[1, 2], &[1, 2, 3], &[2], &[1, 2], &[1, 2, 3, 4], &[1, 3], &[1]];
        let carriers = carriers(&prompts);
        // 1 begins [1, 2, ...] and [1, 3]; the latter comes later in order, but the former right behind it.
        assert_eq!(carriers, [4, 4, 2, 4, 4, 5, 4]);
    }

    #[test]
    fn passes_are_filled_up_to_their_limit() {
        let ids = vec![7; PASS_TOKENS + 1];
        let lengths = [PASS_TOKENS - 1, 1, 1, PASS_TOKENS + 1, 5];
        let prompts: Vec<Prompt> = lengths.iter().map(|&tokens| Prompt { row: 0, ids: &ids[..tokens] }).collect();
        assert_eq!(passes(&prompts, &[0, 1, 2, 3, 4]), [vec![0, 1], vec![2], vec![3], vec![4]]);
        // The third is part of the fourth.
        assert_eq!(passes(&prompts, &[0, 1, 3, 3, 4]), [vec![0, 1], vec![3], vec![4]]);
    }
}
