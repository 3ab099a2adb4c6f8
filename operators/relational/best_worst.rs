//! `best_worst`: the best and the worst of a prompt's newest samples, as a pair.
//!
//! Online DPO as in "Direct Language Model Alignment from Online AI Feedback" (arXiv 2402.04792), with two samples; with
//! more of them the pairs of RSO (arXiv 2309.06657) with first-rank, and of best-against-worst self-play.

use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::relation::{Elements, Results};
use sapo_flow_engine::{PortSpec, PortType, Record};
use schemars::JsonSchema;
use serde::Deserialize;

use super::key::{Field, Fields, Part};
use super::ranking::{Member, first, newest_first, touch};
use super::top_k::check_score;
use super::{METRICS, Place, SCORE, Shape, compared};

/// What `best_worst` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The number that samples are compared by: values.NAME, higher is better.
    pub score: Field,
    /// How many of a prompt's samples are compared, the newest ones.
    #[schemars(range(min = 2))]
    pub candidates: usize,
    /// What samples of one prompt agree in.
    #[serde(default = "by_row")]
    pub by: Fields,
}

fn by_row() -> Fields {
    Fields::one(Field::Row)
}

/// See the [module](self).
pub struct BestWorst;

impl Shape for BestWorst {
    const NAME: &'static str = "best_worst";
    const SUMMARY: &'static str = "Makes a pair of the best and the worst of each prompt's newest samples.";
    const DOCS: &'static str = "\
Of the newest `candidates` samples of each prompt, the one with the highest `score` is the chosen response and the one with \
the lowest the rejected one; of equal scores the older sample counts. Where all have the same score there is no pair. The \
samples' values are kept as `values.chosen_NAME` and `values.rejected_NAME`.

Each prompt has one pair at most: when a new sample is better than the best or worse than the worst, or when one of the two \
is no longer among the newest, the pair is retracted and the new one emitted. A `replay_buffer` after this then holds the \
current pair of every prompt and no outdated one; without one, a learner gets each pair when it is new.

State: all samples that have arrived and were not taken back; it is in checkpoints. `window` before it bounds that.
Metrics: NODE/size (pairs), NODE/inserted, NODE/retracted.
Errors: a sample without the score, or with NaN.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat.jsonl, tokenizer: models/smollm2, batch_size: 8}}
samples:
  op: sampler
  in: {prompts: prompts, weights: {from: learner.weights, feedback: {max_staleness: 0}}}
  with: {responses_per_prompt: 4, max_new_tokens: 64}
pairs: {op: best_worst, in: samples, with: {score: values.tokens, candidates: 4}}
batches: {op: batcher, in: pairs, with: {batch_size: 8, max_length: 2048}}
learner: {op: preference_learner, in: batches, with: {model: models/smollm2, objective: orpo, learning_rate: 5e-7}}
";
    const INPUTS: &'static [PortSpec] =
        &[PortSpec::new("samples", &[PortType::Samples], "scored; any number of nodes").many().honouring_retractions()];
    const OUTPUTS: &'static [PortSpec] =
        &[PortSpec::new("pairs", &[PortType::Pairs], "one for each prompt").retracting(), METRICS];
    const PARTS: usize = 2;
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigIssue> {
        check_score(&config.score).into_iter().collect()
    }

    fn fields(config: &Config, _: &str) -> Vec<(&'static str, Field)> {
        let mut fields = config.by.named("by");
        fields.push((SCORE, config.score.clone()));
        fields
    }

    fn relate<'scope>(config: &Config, elements: Elements<'scope>) -> Results<'scope> {
        let Config { score, candidates, by } = config.clone();
        let groups = elements.map(move |element| {
            let score = match score.of(&element.record) {
                Ok(Part::Number(number)) => number,
                _ => 0,
            };
            let (rank, arrival) = (newest_first(element.arrival), element.arrival.to_numbers());
            (by.key(&element.record), Member { rank, arrival, score })
        });
        let ends = first(groups, candidates).reduce(|_, members, ends| {
            touch(members.len());
            let members = || members.iter().map(|(member, _)| *member);
            let best = members().min_by_key(|member| (!member.score, member.arrival));
            let worst = members().min_by_key(|member| (member.score, member.arrival));
            if let (Some(best), Some(worst)) = (best, worst)
                && best.score > worst.score
            {
                ends.push(([best.arrival, worst.arrival].concat(), 1));
            }
        });
        ends.map(|(_, result)| result)
    }

    fn record(place: Place, parts: &[&Record], _: &[u64]) -> Result<Record, String> {
        compared::pair(place, parts[0], parts[1])
    }
}
