//! The responses under way.

use std::collections::VecDeque;

use tch::Tensor;

use super::choice::{host_floats, host_ids, not_finite};
use super::on_device::Drawn;
use super::prefill::{Prefilled, Prompt, prefill};
use super::recorded::{Fed, TokenWork, keys_for};
use super::weights::DecodingWeights;
use super::{Chosen, Generation, KvCache, Recording, Request, Sampling, choose, choose_on_device, random};
use crate::Result;
use crate::device::upload;
use crate::model::Decoder;
use crate::parameters::ParameterSet;

/// The stream of a request's seed that its tokens are drawn from.
const TOKEN_STREAM: u64 = 0;

/// The rows that are being continued, and the requests that wait for one.
///
/// Tokens are chosen for all rows, once or several times; then the host looks at them. Rows that have ended go to
/// requests that wait, or leave.
pub(super) struct Batch<'a> {
    decoder: &'a Decoder,
    /// For prompts.
    weights: Option<ParameterSet>,
    decoding_weights: DecodingWeights,
    requests: &'a [Request],
    sampling: &'a Sampling,
    generations: Vec<Generation>,
    waiting: VecDeque<usize>,
    /// Index of each row's request.
    active: Vec<usize>,
    cache: KvCache,
    /// The last hidden state of each row, (rows, hidden_size).
    hidden: Tensor,
    /// The work of a token, once it has been recorded.
    recorded: Option<TokenWork>,
    /// Tokens that passes over prompts have computed.
    prompt_tokens: usize,
}

impl<'a> Batch<'a> {
    /// Runs the first prompts through the decoder.
    pub fn start(
        decoder: &'a Decoder,
        weights: &ParameterSet,
        requests: &'a [Request],
        sampling: &'a Sampling,
    ) -> Result<Self> {
        let decoding = &sampling.decoding;
        // Once for all tokens, where training converts the weights in each pass.
        let weights = weights.to_kind(sampling.compute.kind);
        let mut waiting: VecDeque<usize> =
            (0..requests.len()).filter(|&index| requests[index].max_new_tokens > 0).collect();
        let rows = decoding.rows(waiting.len());
        if decoding.share_prompts && rows < waiting.len() {
            // What another begins with comes right after it, and so finds its keys and values still there.
            let prompt = |index: usize| &requests[index].prompt_ids;
            waiting.make_contiguous().sort_by(|&left, &right| prompt(right).cmp(prompt(left)));
        }
        // The last token is never fed.
        let slots = |&index: &usize| requests[index].prompt_ids.len() + requests[index].max_new_tokens - 1;
        let capacity = waiting.iter().map(slots).max().unwrap_or(0);
        let new_tokens = requests.iter().map(|request| request.max_new_tokens).max().unwrap_or(0);
        let active: Vec<usize> = waiting.drain(..rows).collect();
        let mut cache = decoder.new_cache(rows as i64, capacity as i64, &sampling.compute)?;
        let prompts = active.iter().enumerate().map(|(row, &index)| Prompt { row, ids: &requests[index].prompt_ids });
        let prompts: Vec<Prompt> = prompts.collect();
        let Prefilled { hidden, tokens: prompt_tokens } = match prompts.is_empty() {
            true => Prefilled { hidden: Tensor::new(), tokens: 0 },
            false => prefill(decoder, &weights, &prompts, &mut cache, &sampling.compute, decoding.share_prompts)?,
        };
        // Only now: the prompts' many tokens are best served by the plain layout. Prompts that will come when rows are free
        // need it again.
        let kept = (!waiting.is_empty()).then(|| weights.shallow_clone());
        let layout = decoding.layout(decoder.device, sampling.compute.kernels, rows, new_tokens);
        let decoding_weights = DecodingWeights::new(weights, decoder, layout, rows)?;
        let generations = vec![Generation::default(); requests.len()];
        Ok(Batch {
            decoder,
            weights: kept,
            decoding_weights,
            requests,
            sampling,
            generations,
            waiting,
            active,
            cache,
            hidden,
            recorded: None,
            prompt_tokens,
        })
    }

    /// Generates until nothing is left to be done.
    pub fn finish(mut self) -> Result<Vec<Generation>> {
        self.run()?;
        tracing::debug!(responses = self.requests.len(), prompt_tokens = self.prompt_tokens, "responses generated");
        Ok(self.generations)
    }

    fn run(&mut self) -> Result<()> {
        while !self.active.is_empty() {
            let chosen = match self.sampling.decoding.look_every(self.decoder.device) {
                1 => self.choose()?,
                tokens => self.choose_ahead(tokens)?,
            };
            self.look(&chosen)?;
        }
        Ok(())
    }

    /// Chooses the next token of each row on the host.
    fn choose(&self) -> Result<Vec<Vec<Chosen>>> {
        let chosen = choose(&self.logits(&self.hidden)?, &self.sampling.choice, |row| self.draw(row, 0))?;
        Ok(chosen.into_iter().map(|chosen| vec![chosen]).collect())
    }

    /// Chooses the next tokens of each row on the device, at most `tokens`. What comes after a row's end means nothing.
    fn choose_ahead(&mut self, tokens: usize) -> Result<Vec<Vec<Chosen>>> {
        let longest = self.active.iter().map(|&request| self.tokens_left(request)).max().unwrap_or(0);
        // All but the last of them are fed before the host looks again, and the longest row has room for its own.
        let tokens = tokens.min(longest).min(self.cache.left() as usize + 1);
        let mut drawn = self.draw_ahead(tokens, false)?;
        let missed: Vec<&Tensor> = drawn.iter().map(|drawn| &drawn.missed_ties).collect();
        if Tensor::f_stack(&missed, 0)?.f_any()?.f_int64_value(&[])? != 0 {
            self.cache.forget(tokens as i64 - 1);
            drawn = self.draw_ahead(tokens, true)?;
        }
        let rows = self.active.len();
        let ids: Vec<&Tensor> = drawn.iter().map(|drawn| &drawn.tokens).collect();
        let logps: Vec<&Tensor> = drawn.iter().map(|drawn| &drawn.logps).collect();
        let (ids, logps) = (host_ids(&Tensor::f_stack(&ids, 1)?)?, host_floats(&Tensor::f_stack(&logps, 1)?)?);
        if let Some(bad) = logps.iter().position(|logp| !logp.is_finite()) {
            return Err(not_finite(bad / tokens, rows));
        }
        let chosen: Vec<Chosen> =
            ids.into_iter().zip(logps).map(|(id, logp)| Chosen { token: id as u32, logp }).collect();
        Ok(chosen.chunks(tokens).map(<[Chosen]>::to_vec).collect())
    }

    /// Draws so many tokens one after the other without a look at them.
    fn draw_ahead(&mut self, tokens: usize, whole: bool) -> Result<Vec<Drawn>> {
        let rows = self.active.len();
        let draws: Vec<f64> = (0..tokens)
            .flat_map(|ahead| (0..rows).map(move |row| (row, ahead)))
            .map(|(row, ahead)| self.draw(row, ahead))
            .collect();
        let draws = upload(&draws, self.decoder.device)?.f_view([tokens as i64, rows as i64])?;
        let mut positions = self.positions()?;
        let mut drawn: Vec<Drawn> = Vec::with_capacity(tokens);
        for ahead in 0..tokens {
            let draws = draws.f_select(0, ahead as i64)?;
            let next = match drawn.last() {
                None => choose_on_device(&self.logits(&self.hidden)?, &self.sampling.choice, &draws, whole)?,
                Some(last) => {
                    let fed = Fed { tokens: last.tokens.f_unsqueeze(1)?, positions: positions.shallow_clone(), draws };
                    positions = positions.f_add_scalar(1)?;
                    self.draw_next(fed, whole)?
                }
            };
            drawn.push(next);
        }
        Ok(drawn)
    }

    /// Feeds one token a row, and draws the next.
    fn draw_next(&mut self, fed: Fed, whole: bool) -> Result<Drawn> {
        let recording = self.sampling.decoding.recording;
        if recording == Recording::None || whole {
            let hidden = self.feed(&fed.tokens, &fed.positions)?;
            return choose_on_device(&self.logits(&hidden)?, &self.sampling.choice, &fed.draws, whole);
        }
        let (rows, used) = (self.active.len() as i64, self.cache.used() + 1);
        let recorded = self.recorded.take().filter(|recorded| recorded.serves(rows, used));
        let keys = recorded.as_ref().map_or_else(|| keys_for(used, self.cache.capacity()), |recorded| recorded.keys);
        let (decoder, compute) = (self.decoder, &self.sampling.compute);
        let work = |fed: &Fed| {
            let pass = self.cache.at(&fed.positions, keys)?;
            let hidden = self.decoding_weights.feed_into(decoder, &fed.tokens, &fed.positions, &pass, compute)?;
            choose_on_device(&self.logits(&hidden)?, &self.sampling.choice, &fed.draws, false)
        };
        let mut recorded = match recorded {
            Some(recorded) => recorded,
            None => TokenWork::record(recording, decoder.device, &fed, keys, work)?,
        };
        let drawn = recorded.again(&fed, work)?;
        self.recorded = Some(recorded);
        self.cache.advance(rows, 1)?;
        Ok(drawn)
    }

    /// Takes what was chosen into the responses, lets rows that have ended go, and feeds the others' last tokens.
    fn look(&mut self, chosen: &[Vec<Chosen>]) -> Result<()> {
        let mut last: Vec<Option<u32>> = Vec::with_capacity(chosen.len());
        for (row, chosen) in chosen.iter().enumerate() {
            last.push(self.record(self.active[row], chosen));
        }
        let free: Vec<usize> = (0..last.len()).filter(|&row| last[row].is_none()).collect();
        self.admit(&free, &mut last)?;
        let going_on: Vec<usize> = (0..last.len()).filter(|&row| last[row].is_some()).collect();
        let kept = close_gaps(&going_on);
        if kept.len() < last.len() {
            self.active = kept.iter().map(|&row| self.active[row]).collect();
            self.cache.keep_rows(&kept)?;
        }
        if kept.is_empty() {
            return Ok(());
        }
        let tokens: Vec<i64> = kept.iter().filter_map(|&row| last[row].map(i64::from)).collect();
        let (tokens, positions) = (self.column(&tokens)?, self.positions()?);
        self.hidden = self.feed(&tokens, &positions)?;
        Ok(())
    }

    /// Adds tokens to a response until it ends. Returns its last one if it goes on.
    fn record(&mut self, request: usize, chosen: &[Chosen]) -> Option<u32> {
        for chosen in chosen {
            let generation = &mut self.generations[request];
            generation.tokens.push(chosen.token);
            generation.logps.push(chosen.logp);
            generation.ended = self.sampling.eos_ids.contains(&chosen.token);
            if generation.ended || self.tokens_left(request) == 0 {
                return None;
            }
        }
        self.generations[request].tokens.last().copied()
    }

    /// Gives free rows to requests that wait. All but the last token of their prompts are taken from a row that still holds
    /// them, its own last response's at best, or run through the decoder; the last is to be fed with the other rows' tokens.
    fn admit(&mut self, free: &[usize], last: &mut [Option<u32>]) -> Result<()> {
        let Sampling { compute, decoding, .. } = self.sampling;
        let requests = self.requests;
        // What rows hold of their prompts; of those that are to be run, until they are, still the last ones'.
        let beginning = |&request: &usize| requests[request].prompt_ids.split_last().map_or(&[][..], |(_, ids)| ids);
        let mut held: Vec<&[u32]> = self.active.iter().map(beginning).collect();
        let (mut free, mut prompts) = (free.to_vec(), Vec::new());
        while !free.is_empty() {
            let Some(request) = self.waiting.pop_front() else { break };
            let ids = beginning(&request);
            let holds = |row: usize| ids.is_empty() || (decoding.share_prompts && held[row].starts_with(ids));
            let own = free.iter().position(|&row| holds(row));
            let row = free.remove(own.unwrap_or(0));
            let source = if own.is_some() { Some(row) } else { (0..held.len()).find(|&row| holds(row)) };
            self.active[row] = request;
            last[row] = requests[request].prompt_ids.last().copied();
            match source {
                Some(from) => {
                    self.cache.copy_row(from, row, ids.len() as i64)?;
                    held[row] = ids;
                }
                None => prompts.push(Prompt { row, ids }),
            }
        }
        let Some(weights) = self.weights.as_ref().filter(|_| !prompts.is_empty()) else { return Ok(()) };
        let share = decoding.share_prompts;
        self.prompt_tokens += prefill(self.decoder, weights, &prompts, &mut self.cache, compute, share)?.tokens;
        Ok(())
    }

    fn feed(&mut self, tokens: &Tensor, positions: &Tensor) -> Result<Tensor> {
        self.decoding_weights.feed(self.decoder, tokens, positions, &mut self.cache, &self.sampling.compute)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.decoding_weights.logits(self.decoder, hidden, &self.sampling.compute)
    }

    /// The number that decides a row's next token, or one further ahead.
    fn draw(&self, row: usize, ahead: usize) -> f64 {
        let request = self.active[row];
        let index = self.generations[request].tokens.len() + ahead;
        random::uniform(self.requests[request].seed, TOKEN_STREAM, index as u64)
    }

    fn tokens_left(&self, request: usize) -> usize {
        self.requests[request].max_new_tokens - self.generations[request].tokens.len()
    }

    /// Positions of the rows' next tokens, (rows, 1).
    fn positions(&self) -> Result<Tensor> {
        self.column(self.cache.lengths())
    }

    fn column(&self, values: &[i64]) -> Result<Tensor> {
        Ok(upload(values, self.decoder.device)?.f_unsqueeze(1)?)
    }
}

/// Orders rising row numbers so that few rows move: a row that fits where it is stays, the last ones fill the gaps.
fn close_gaps(survivors: &[usize]) -> Vec<usize> {
    let count = survivors.len();
    let mut movers = survivors.iter().copied().filter(|&row| row >= count);
    let stays = |row: usize| survivors.binary_search(&row).is_ok();
    (0..count).filter_map(|row| if stays(row) { Some(row) } else { movers.next() }).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::{Device, Kind};

    use super::*;
    use crate::generate::{Choice, Decoding, Warpers};
    use crate::model::{Compute, Model};

    #[test]
    fn the_last_rows_fill_the_gaps() {
        assert_eq!(close_gaps(&[0, 1, 2]), [0, 1, 2]);
        assert_eq!(close_gaps(&[1, 2, 4, 6]), [4, 1, 2, 6]);
        assert_eq!(close_gaps(&[5]), [5]);
    }

    /// Responses of unequal lengths, `slots` of them at a time: their tokens, and how many tokens of prompts were computed.
    fn generated(model: &Model, prompts: &[&[u32]], decoding: Decoding) -> (Vec<Vec<u32>>, usize) {
        let _guard = tch::no_grad_guard();
        let request = |(seed, prompt): (u64, &&[u32])| Request {
            prompt_ids: prompt.to_vec(),
            max_new_tokens: 3 + 4 * (seed as usize % 3),
            seed,
        };
        let requests: Vec<Request> = (0..).zip(prompts).map(request).collect();
        let choice = Choice::Sample(Warpers { temperature: 0.9, top_k: Some(20), top_p: None });
        let sampling = Sampling { choice, eos_ids: vec![], compute: Compute::new(Kind::Float), decoding };
        let mut batch = Batch::start(&model.decoder, &model.parameters, &requests, &sampling).unwrap();
        batch.run().unwrap();
        (batch.generations.into_iter().map(|generation| generation.tokens).collect(), batch.prompt_tokens)
    }

    #[test]
    fn a_prompt_is_computed_once_for_all_its_responses() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/models/llama");
        let model = Model::load(Path::new(directory), Device::Cpu, Kind::Float).unwrap();
        let [short, long, other, single]: [&[u32]; 4] = [&[5, 6, 7, 8], &[5, 6, 7, 8, 9, 10], &[3, 4, 5], &[1]];
        let plain = Decoding { share_prompts: false, look_every: Some(1), pack_weights: false, ..Decoding::default() };
        let with = |slots: usize, decoding: Decoding| Decoding { concurrent_responses: Some(slots), ..decoding };
        let one_prompt = [long; 5];
        let mixed = [short, long, other, single, short, long, other, single];

        // Of prompts that come later the last token is fed with the other rows'.
        let (expected, computed) = generated(&model, &one_prompt, with(2, plain));
        assert_eq!(computed, 2 * 6 + 3 * 5);
        let (mixed_tokens, _) = generated(&model, &mixed, plain);
        for look_every in [1, 2, 5] {
            let fast = Decoding { look_every: Some(look_every), ..Decoding::default() };
            for recording in [Recording::None, Recording::Repeated] {
                let fast = Decoding { recording, ..fast };
                assert_eq!(generated(&model, &one_prompt, with(2, fast)), (expected.clone(), 6));
                for slots in 1..5 {
                    // The long one, which the short one begins, and the other without its last token.
                    assert_eq!(generated(&model, &mixed, with(slots, fast)), (mixed_tokens.clone(), 6 + 2), "{slots}");
                }
            }
        }
    }
}
