//! `batcher`: pairs gathered into batches of bounded size and length.

use std::sync::Arc;

use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::plan::{Emits, NodePlan, PlanContext};
use sapo_flow_engine::{
    Batch, BuildContext, Define, Inputs, Metrics, Operator, OperatorError, Outputs, Pair, PortSpec, PortType, Prompt,
    Record, Segment, TokenId,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Configuration of [`Batcher`].
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Most pairs in one batch.
    pub batch_size: usize,
    /// Most tokens of a prompt with a response; longer responses are cut at their end, and counted.
    pub max_length: usize,
    /// How a step's pairs are divided when they fill several batches.
    #[serde(default)]
    pub bucketing: Bucketing,
    /// Where rejected responses come from: as given with the pairs, or the next pair's answer.
    #[serde(default)]
    pub rejected: Rejected,
}

/// Where rejected responses come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Rejected {
    /// The pairs have them, or have none.
    #[default]
    Given,
    /// The chosen response of the step's next pair: an answer that does not fit the prompt, from which KTO estimates how
    /// far the policy is from the reference.
    NextAnswer,
}

/// How a step's pairs are divided into batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Bucketing {
    /// In the order they arrive.
    #[default]
    None,
    /// Sorted by length, so that batches hold pairs of like length and little padding.
    Length,
}

/// Gathers pairs into batches.
pub struct Batcher {
    node: String,
    config: Config,
}

impl Define for Batcher {
    const NAME: &'static str = "batcher";
    const SUMMARY: &'static str = "Gathers pairs into batches of bounded size and length.";
    const DOCS: &'static str = "\
Divides all pairs of a step into batches of at most `batch_size`, in the same step: nothing is dropped, and nothing waits \
for a later step. A learner makes one update from all batches of a step, so `batch_size` bounds memory and does not change \
the result. Prompts are taken too, as pairs without a rejected response, for supervised fine-tuning.

`rejected: next_answer` gives each pair the chosen response of the step's next one as its rejected response (the last \
gets the first one's): what `objective: kto` compares single answers with. A step's only pair has no next one, and is left \
out and counted.

A prompt and a response together may have `max_length` tokens; a longer response is cut at its end. `bucketing: length` \
sorts a step's pairs by the length of their longer side first.

Metrics: `batcher/pairs`; `batcher/batches`; `batcher/truncated`, the number of responses cut; `batcher/padding`, the share \
of positions that padding to the longest response of each batch takes; with `rejected: next_answer` `batcher/unmatched`, \
the pairs left out.

State: none. It holds nothing that could be taken back: retractions concern earlier steps, whose batches have been learned \
from. A `replay_buffer` before it is where they have an effect.

Errors: a prompt alone has `max_length` tokens or more, so that a response would be empty.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/pairs.jsonl, tokenizer: models/smollm2, batch_size: 32}}
batches: {op: batcher, in: prompts.pairs, with: {batch_size: 8, max_length: 2048, bucketing: length}}
";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new(
        "pairs",
        &[PortType::Pairs, PortType::Prompts],
        "pairs, or prompts with their answers; any number of nodes",
    )
    .many()
    .honouring_retractions()];
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("batches", &[PortType::Batches], "the pairs of the step"),
        PortSpec::new("metrics", &[PortType::Metrics], "counts and padding"),
    ];
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        if config.batch_size == 0 {
            issues.push(ConfigIssue::new("batch_size", "expected 1 or more, found 0"));
        }
        if config.max_length < 2 {
            let message = format!("expected 2 or more (a prompt and a response), found {}", config.max_length);
            issues.push(ConfigIssue::new("max_length", message));
        }
        issues
    }

    fn plan(config: &Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        let arrives = context.input("pairs");
        let (most, max_length) = (config.batch_size as u64, config.max_length as u64);
        let emits = Emits {
            rows: arrives.rows,
            batch_size: Some(arrives.rows.map_or(most, |rows| rows.min(most))),
            max_length: Some(arrives.max_length.map_or(max_length, |tokens| tokens.min(max_length))),
            sample: arrives.sample,
            ..Emits::default()
        };
        Ok(NodePlan { emits, ..NodePlan::default() })
    }

    fn build(config: Config, context: &BuildContext) -> Result<Self, OperatorError> {
        Ok(Batcher { node: context.node.to_string(), config })
    }
}

impl Operator for Batcher {
    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let mut truncated = 0;
        let mut pairs = Vec::new();
        for (position, record) in inputs.take("pairs").into_iter().enumerate() {
            let pair = match record {
                Record::Pair(pair) => pair,
                Record::Prompt(prompt) => Arc::new(pair_of(&prompt, step, position as u32, &self.node)),
                _ => continue,
            };
            let (pair, cut) = fit(pair, self.config.max_length)?;
            truncated += cut;
            pairs.push(pair);
        }
        let mut unmatched = 0;
        if self.config.rejected == Rejected::NextAnswer {
            unmatched = usize::from(pairs.len() == 1);
            pairs = with_next_answers(pairs, self.config.max_length);
        }
        if self.config.bucketing == Bucketing::Length {
            pairs.sort_by_key(|pair| pair.prompt_ids.len() + longest_response(pair));
        }

        let mut outputs = Outputs::new();
        let chunks: Vec<&[Arc<Pair>]> = pairs.chunks(self.config.batch_size).collect();
        let values = [
            ("batcher/pairs", pairs.len() as f64),
            ("batcher/batches", chunks.len() as f64),
            ("batcher/truncated", truncated as f64),
            ("batcher/padding", padding(&chunks)),
        ];
        let unmatched =
            (self.config.rejected == Rejected::NextAnswer).then_some(("batcher/unmatched", unmatched as f64));
        for chunk in chunks {
            outputs.push("batches", Record::Batch(Arc::new(Batch { pairs: chunk.to_vec(), reference: None })));
        }
        let values = values.into_iter().chain(unmatched).map(|(name, value)| (name.to_string(), value)).collect();
        outputs.push("metrics", Record::Metrics(Arc::new(Metrics { values })));
        Ok(outputs)
    }
}

/// A prompt with its answer, to learn from without a rejected response.
fn pair_of(prompt: &Prompt, step: u64, position: u32, node: &str) -> Pair {
    Pair {
        step,
        position,
        origin: node.to_string(),
        source: prompt.source.clone(),
        row: prompt.row,
        prompt_ids: prompt.prompt_ids.clone(),
        chosen_ids: prompt.chosen_ids.clone(),
        rejected_ids: None,
        segment: None,
        weights_version: None,
        seed: None,
        values: prompt.values.clone(),
    }
}

/// The pair within `max_length`, and how many of its responses were cut for that.
fn fit(pair: Arc<Pair>, max_length: usize) -> Result<(Arc<Pair>, usize), Error> {
    let prompt = pair.prompt_ids.len();
    if prompt >= max_length {
        return Err(Error::Input(format!(
            "row {} (pair from `{}`, step {}): its prompt alone has {prompt} tokens, which leaves none of max_length \
             {max_length} for a response; raise max_length, or lower max_prompt_tokens of the source",
            pair.row, pair.origin, pair.step
        )));
    }
    let room = max_length - prompt;
    let responses = [Some(&pair.chosen_ids), pair.rejected_ids.as_ref()];
    let cut = responses.into_iter().flatten().filter(|ids| ids.len() > room).count();
    if cut == 0 {
        return Ok((pair, 0));
    }
    let head = |ids: &Vec<TokenId>| ids[..ids.len().min(room)].to_vec();
    let fitted = Pair {
        prompt_ids: pair.prompt_ids.clone(),
        chosen_ids: head(&pair.chosen_ids),
        rejected_ids: pair.rejected_ids.as_ref().map(head),
        segment: pair.segment.map(|segment| cut_segment(segment, room)),
        origin: pair.origin.clone(),
        source: pair.source.clone(),
        values: pair.values.clone(),
        ..*pair
    };
    Ok((Arc::new(fitted), cut))
}

/// Each pair with the next one's chosen response as its rejected one; none where there is no next one.
fn with_next_answers(pairs: Vec<Arc<Pair>>, max_length: usize) -> Vec<Arc<Pair>> {
    if pairs.len() < 2 {
        return Vec::new();
    }
    let next = pairs.iter().cycle().skip(1);
    let mismatched = pairs.iter().zip(next).map(|(pair, next)| {
        let room = max_length - pair.prompt_ids.len();
        let answer = next.chosen_ids.iter().copied().take(room).collect();
        Arc::new(Pair { rejected_ids: Some(answer), segment: None, ..Pair::clone(pair) })
    });
    mismatched.collect()
}

/// What remains of a segment when its response is cut to `room` tokens.
fn cut_segment(segment: Segment, room: usize) -> Segment {
    let end = segment.start + segment.len;
    let start = segment.start.min(room);
    Segment { start, len: end.min(room) - start, ended: segment.ended && end <= room }
}

fn longest_response(pair: &Pair) -> usize {
    pair.chosen_ids.len().max(pair.rejected_ids.as_ref().map_or(0, Vec::len))
}

/// The share of positions taken by padding when every sequence of a batch (a prompt with one response) is as long as
/// the longest.
fn padding(batches: &[&[Arc<Pair>]]) -> f64 {
    let (mut tokens, mut positions) = (0, 0);
    for batch in batches {
        let lengths: Vec<usize> = batch
            .iter()
            .flat_map(|pair| [Some(&pair.chosen_ids), pair.rejected_ids.as_ref()].map(|ids| (pair, ids)))
            .filter_map(|(pair, ids)| Some(pair.prompt_ids.len() + ids?.len()))
            .collect();
        tokens += lengths.iter().sum::<usize>();
        positions += lengths.len() * lengths.iter().max().unwrap_or(&0);
    }
    if positions == 0 { 0.0 } else { (positions - tokens) as f64 / positions as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Harness, pair};

    fn run(with: &str, records: Vec<Record>) -> Result<(Vec<Arc<Batch>>, Metrics), OperatorError> {
        let mut batcher = Harness::new().build::<Batcher>(with)?;
        let outputs = batcher.step(3, Inputs::new(vec![("pairs", records)]))?;
        let mut batches = Vec::new();
        let mut metrics = Metrics::default();
        for (port, record) in outputs.records {
            match record {
                Record::Batch(batch) if port == "batches" => batches.push(batch),
                Record::Metrics(values) if port == "metrics" => metrics = (*values).clone(),
                other => panic!("{port}: {other:?}"),
            }
        }
        Ok((batches, metrics))
    }

    fn record(pair: Pair) -> Record {
        Record::Pair(Arc::new(pair))
    }

    fn rows(batches: &[Arc<Batch>]) -> Vec<Vec<u64>> {
        batches.iter().map(|batch| batch.pairs.iter().map(|pair| pair.row).collect()).collect()
    }

    #[test]
    fn every_pair_of_a_step_is_emitted_in_it() {
        let pairs = (0..5).map(|row| record(pair(row, &[1], &[2, 3], Some(&[4])))).collect();
        let (batches, metrics) = run("{batch_size: 2, max_length: 8}", pairs).unwrap();
        assert_eq!(rows(&batches), [vec![0, 1], vec![2, 3], vec![4]]);
        assert_eq!(metrics.values["batcher/pairs"], 5.0);
        assert_eq!(metrics.values["batcher/batches"], 3.0);
        assert_eq!(metrics.values["batcher/truncated"], 0.0);
        // Each pair: 3 + 2 tokens in 3 + 3 positions.
        assert_eq!(metrics.values["batcher/padding"], 1.0 / 6.0);
    }

    #[test]
    fn a_step_without_pairs_has_no_batch() {
        let (batches, metrics) = run("{batch_size: 2, max_length: 8}", vec![]).unwrap();
        assert!(batches.is_empty());
        assert_eq!(metrics.values["batcher/padding"], 0.0);
    }

    #[test]
    fn length_buckets_hold_pairs_of_like_length() {
        let lengths: [(usize, usize); 4] = [(1, 9), (2, 1), (8, 1), (1, 1)];
        let pairs = || {
            let make = |(row, (chosen, rejected)): (usize, &(usize, usize))| {
                record(pair(row as u64, &[1], &vec![2; *chosen], Some(&vec![3; *rejected])))
            };
            lengths.iter().enumerate().map(make).collect()
        };
        let (batches, sorted) = run("{batch_size: 2, max_length: 20, bucketing: length}", pairs()).unwrap();
        assert_eq!(rows(&batches), [vec![3, 1], vec![2, 0]]);
        let (_, arrived) = run("{batch_size: 2, max_length: 20}", pairs()).unwrap();
        // 32 tokens; positions 4*3 + 4*10 sorted, 4*10 + 4*9 as they arrived.
        assert_eq!(sorted.values["batcher/padding"], 20.0 / 52.0);
        assert_eq!(arrived.values["batcher/padding"], 44.0 / 76.0);
    }

    #[test]
    fn long_responses_are_cut_and_counted() {
        let mut long = pair(7, &[1, 1], &[2, 3, 4, 5], Some(&[2, 8, 9, 5]));
        long.segment = Some(Segment { start: 1, len: 2, ended: false });
        let (batches, metrics) = run("{batch_size: 2, max_length: 4}", vec![record(long)]).unwrap();
        let pair = &batches[0].pairs[0];
        assert_eq!(pair.chosen_ids, [2, 3]);
        assert_eq!(pair.rejected_ids.as_deref(), Some([2, 8].as_slice()));
        assert_eq!(pair.segment, Some(Segment { start: 1, len: 1, ended: false }));
        assert_eq!(metrics.values["batcher/truncated"], 2.0);
    }

    #[test]
    fn a_prompt_that_leaves_no_room_is_an_error() {
        let error = run("{batch_size: 2, max_length: 3}", vec![record(pair(7, &[1, 1, 1], &[2], None))]).unwrap_err();
        assert!(error.to_string().starts_with("row 7 (pair from `data`, step 0): its prompt alone has 3 tokens"));
    }

    #[test]
    fn prompts_become_pairs_without_a_rejected_response() {
        let prompt = Prompt { epoch: 1, ..crate::testing::prompt(4, &[1], &[2, 3], Some(&[5])) };
        let (batches, _) = run("{batch_size: 2, max_length: 8}", vec![Record::Prompt(Arc::new(prompt))]).unwrap();
        let expected = Pair { step: 3, position: 0, origin: "node".into(), ..pair(4, &[1], &[2, 3], None) };
        assert_eq!(*batches[0].pairs[0], expected);
    }

    #[test]
    fn the_next_answer_can_be_the_rejected_one() {
        let answers: [&[u32]; 3] = [&[2, 3], &[4], &[5, 6, 7]];
        let pairs = |count: usize| -> Vec<Record> {
            let pair = |(row, answer): (usize, &&[u32])| record(pair(row as u64, &[1; 6], answer, None));
            answers[..count].iter().enumerate().map(pair).collect()
        };
        let with = "{batch_size: 2, max_length: 8, rejected: next_answer}";
        let (batches, metrics) = run(with, pairs(3)).unwrap();
        let rejected: Vec<_> =
            batches.iter().flat_map(|batch| &batch.pairs).map(|pair| pair.rejected_ids.clone().unwrap()).collect();
        // The third answer is cut to the 2 tokens that the prompt leaves.
        assert_eq!(rejected, [vec![4], vec![5, 6], vec![2, 3]]);
        assert_eq!((metrics.values["batcher/unmatched"], metrics.values["batcher/truncated"]), (0.0, 1.0));
        let (batches, metrics) = run(with, pairs(1)).unwrap();
        assert!(batches.is_empty());
        assert_eq!(metrics.values["batcher/unmatched"], 1.0);
    }

    #[test]
    fn ranges_are_checked() {
        let config: Config = serde_yaml::from_str("{batch_size: 0, max_length: 1}").unwrap();
        let keys: Vec<String> = Batcher::check(&config).into_iter().map(|issue| issue.key).collect();
        assert_eq!(keys, ["batch_size", "max_length"]);
        assert!(serde_yaml::from_str::<Config>("{batch_size: 2, max_length: 8, drop_last: true}").is_err());
    }
}
