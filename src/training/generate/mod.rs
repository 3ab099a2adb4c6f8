//! Generation: batched decoding with a cache of keys and values.
//!
//! A request's result depends on the weights, its prompt and its seed, not on the requests it shares a batch with
//! (except for the last bits of floating-point sums, whose order varies with a batch's shape).

mod cache;
mod choice;
mod packed;
pub mod random;
mod warpers;

use tch::{Device, Kind, Tensor};

pub use cache::KvCache;
pub use choice::{Choice, Chosen, choose};
pub use packed::PackedWeights;
pub use warpers::Warpers;

use crate::model::{AttentionMask, Compute, Decoder, ModelInput};
use crate::parameters::ParameterSet;
use crate::{Error, Result};

/// The stream of a request's seed that its tokens are drawn from.
const TOKEN_STREAM: u64 = 0;

/// A prompt to be continued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The tokens before the first generated one; at least one.
    pub prompt_ids: Vec<u32>,
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// Decides all draws: the one for the token at index i is a function of the seed and i.
    pub seed: u64,
}

/// How to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// How each token is chosen.
    pub choice: Choice,
    /// Tokens after which a row ends; they are part of it.
    pub eos_ids: Vec<u32>,
    /// How the model computes.
    pub compute: Compute,
    /// Whether weights may be laid out anew for decoding on a CPU, where that pays: the same sums, in another order.
    pub pack_weights: bool,
}

/// What a request got.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// The generated tokens.
    pub tokens: Vec<u32>,
    /// Log-probability of each under the model itself, before temperature, top-k and top-p, in nats.
    pub logps: Vec<f32>,
    /// Whether the last token is one of the EOS tokens.
    pub ended: bool,
}

/// Continues all prompts together. Rows that have ended leave the batch.
pub fn generate(
    decoder: &Decoder,
    weights: &ParameterSet,
    requests: &[Request],
    sampling: &Sampling,
) -> Result<Vec<Generation>> {
    let _guard = tch::no_grad_guard();
    check(decoder, requests, sampling)?;
    let mut generations = vec![Generation::default(); requests.len()];
    let active: Vec<usize> = (0..requests.len()).filter(|&row| requests[row].max_new_tokens > 0).collect();
    if active.is_empty() {
        return Ok(generations);
    }
    // Once for all tokens, where training converts the weights in each pass.
    let mut weights = weights.to_kind(sampling.compute.kind);
    let new_tokens = active.iter().map(|&row| requests[row].max_new_tokens).max().unwrap_or(0);
    let rows = active.len() as i64;
    let (mut batch, mut hidden) = DecodingBatch::start(decoder, &weights, requests, active, &sampling.compute)?;
    // Only now: the prompts' many tokens are best served by the plain layout.
    let packed = match sampling.pack_weights && PackedWeights::pay(decoder, new_tokens) {
        true => PackedWeights::take_from(&mut weights, decoder, rows)?,
        false => PackedWeights::default(),
    };
    loop {
        let logits = decoder.logits_with(&weights, &packed, &hidden, &sampling.compute)?;
        let draw = |row: usize| {
            let request = batch.active[row];
            random::uniform(requests[request].seed, TOKEN_STREAM, generations[request].tokens.len() as u64)
        };
        let chosen = choose(&logits, &sampling.choice, draw)?;
        for (&request, chosen) in batch.active.iter().zip(&chosen) {
            let generation = &mut generations[request];
            generation.tokens.push(chosen.token);
            generation.logps.push(chosen.logp);
            generation.ended = sampling.eos_ids.contains(&chosen.token);
        }
        let goes_on = |request: usize| {
            !generations[request].ended && generations[request].tokens.len() < requests[request].max_new_tokens
        };
        let survivors: Vec<usize> = (0..chosen.len()).filter(|&row| goes_on(batch.active[row])).collect();
        if survivors.is_empty() {
            return Ok(generations);
        }
        let kept = close_gaps(&survivors);
        batch.keep_rows(&kept)?;
        let tokens: Vec<i64> = kept.iter().map(|&row| i64::from(chosen[row].token)).collect();
        hidden = batch.step(decoder, (&weights, &packed), &tokens, &sampling.compute)?;
    }
}

fn check(decoder: &Decoder, requests: &[Request], sampling: &Sampling) -> Result<()> {
    if let Choice::Sample(warpers) = &sampling.choice {
        warpers.check()?;
    }
    for (index, request) in requests.iter().enumerate() {
        if request.prompt_ids.is_empty() {
            return Err(Error::Argument(format!(
                "request {index}: expected a prompt of at least one token, found none"
            )));
        }
        decoder.check_ids(&request.prompt_ids).map_err(|error| Error::Argument(format!("request {index}: {error}")))?;
    }
    Ok(())
}

/// Orders rising row numbers so that few rows move: a row that fits where it is stays, the last ones fill the gaps.
fn close_gaps(survivors: &[usize]) -> Vec<usize> {
    let count = survivors.len();
    let mut movers = survivors.iter().copied().filter(|&row| row >= count);
    let stays = |row: usize| survivors.binary_search(&row).is_ok();
    (0..count).filter_map(|row| if stays(row) { Some(row) } else { movers.next() }).collect()
}

/// The rows that are being continued.
///
/// Prompts are padded at their right ends to the longest, and all rows put each new token into the same next slot of the
/// cache, so that it is written in one piece. A shorter prompt's row thus has a gap of slots that its mask hides, while
/// its positions go on without one.
struct DecodingBatch {
    /// Index of each row's request.
    active: Vec<usize>,
    /// Each row's prompt length in tokens.
    prompt_tokens: Vec<i64>,
    /// Tokens generated so far in each row and fed to the decoder.
    fed: i64,
    cache: KvCache,
    /// (rows, 1, 1, capacity), true at slots that hold tokens or will; none where no row has a gap.
    visible: Option<Tensor>,
    device: Device,
}

impl DecodingBatch {
    /// Runs the prompts through the decoder; returns the hidden state (rows, hidden_size) at each one's last token.
    fn start(
        decoder: &Decoder,
        weights: &ParameterSet,
        requests: &[Request],
        active: Vec<usize>,
        compute: &Compute,
    ) -> Result<(Self, Tensor)> {
        let device = decoder.device;
        let prompts: Vec<&[u32]> = active.iter().map(|&row| requests[row].prompt_ids.as_slice()).collect();
        let prompt_tokens: Vec<i64> = prompts.iter().map(|prompt| prompt.len() as i64).collect();
        let longest = prompt_tokens.iter().copied().max().unwrap_or(0);
        let new_tokens = active.iter().map(|&row| requests[row].max_new_tokens as i64).max().unwrap_or(0);
        // The last token is never fed.
        let capacity = longest + new_tokens - 1;
        let rows = active.len() as i64;
        let mut cache = decoder.new_cache(rows, capacity, compute)?;
        let input = decoder.input(&prompts)?;
        let hidden = decoder.hidden_states(weights, &input, Some(&mut cache), compute)?;
        let last: Vec<i64> = (0..rows).zip(&prompt_tokens).map(|(row, tokens)| row * longest + tokens - 1).collect();
        // (rows, tokens, hidden_size) -> (rows, hidden_size)
        let hidden = hidden.f_flatten(0, 1)?.f_index_select(0, &Tensor::f_from_slice(&last)?.f_to_device(device)?)?;
        let visible = match prompt_tokens.iter().all(|&tokens| tokens == longest) {
            true => None,
            false => {
                let slots = Tensor::f_arange(capacity, (Kind::Int64, device))?.f_unsqueeze(0)?;
                let ends = Tensor::f_from_slice(&prompt_tokens)?.f_to_device(device)?.f_unsqueeze(1)?;
                let visible = slots.f_lt_tensor(&ends)?.f_logical_or(&slots.f_ge(longest)?)?;
                Some(visible.f_view([rows, 1, 1, capacity])?)
            }
        };
        Ok((DecodingBatch { active, prompt_tokens, fed: 0, cache, visible, device }, hidden))
    }

    /// Lets all rows but the given ones go; see [`KvCache::keep_rows`].
    fn keep_rows(&mut self, rows: &[usize]) -> Result<()> {
        if rows.len() == self.active.len() {
            return Ok(());
        }
        self.active = rows.iter().map(|&row| self.active[row]).collect();
        self.prompt_tokens = rows.iter().map(|&row| self.prompt_tokens[row]).collect();
        self.cache.keep_rows(rows)?;
        if let Some(visible) = &self.visible {
            let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
            self.visible = Some(visible.f_index_select(0, &Tensor::f_from_slice(&rows)?.f_to_device(self.device)?)?);
        }
        Ok(())
    }

    /// Feeds one token a row; returns the hidden states (rows, hidden_size) at them.
    fn step(
        &mut self,
        decoder: &Decoder,
        (weights, packed): (&ParameterSet, &PackedWeights),
        tokens: &[i64],
        compute: &Compute,
    ) -> Result<Tensor> {
        let column = |values: &[i64]| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(values)?.f_to_device(self.device)?.f_unsqueeze(1)?)
        };
        let positions: Vec<i64> = self.prompt_tokens.iter().map(|prompt| prompt + self.fed).collect();
        let mask = match &self.visible {
            None => AttentionMask::Causal,
            Some(visible) => AttentionMask::Dense(visible.f_narrow(3, 0, self.cache.used() + 1)?),
        };
        let input = ModelInput { ids: column(tokens)?, positions: column(&positions)?, mask };
        self.fed += 1;
        let hidden = decoder.hidden_states_with(weights, packed, &input, Some(&mut self.cache), compute)?;
        Ok(hidden.f_squeeze_dim(1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::close_gaps;

    #[test]
    fn the_last_rows_fill_the_gaps() {
        assert_eq!(close_gaps(&[0, 1, 2]), [0, 1, 2]);
        assert_eq!(close_gaps(&[1, 2, 4, 6]), [4, 1, 2, 6]);
        assert_eq!(close_gaps(&[5]), [5]);
    }
}
