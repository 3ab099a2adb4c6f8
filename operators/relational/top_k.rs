//! `top_k`: the records with the highest or lowest scores.

use sapo_flow_engine::PortSpec;
use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::relation::{Elements, Results};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::key::{Field, Fields, Part};
use super::ranking::{Member, first};
use super::{METRICS, RECORDS, SCORE, Shape};

/// What `top_k` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Records kept of each group.
    #[schemars(range(min = 1))]
    pub k: usize,
    /// The number they are ranked by: values.NAME.
    pub score: Field,
    /// Which end is kept: highest or lowest.
    #[serde(default)]
    pub keep: Keep,
    /// What groups agree in: row, prompt, response, chosen, rejected, origin, values.NAME, or a list of these; absent: all
    /// records are one group.
    #[serde(default)]
    pub by: Fields,
}

/// Which end of a ranking is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// The largest numbers.
    #[default]
    Highest,
    /// The smallest numbers.
    Lowest,
}

/// Checks that a score is a number.
pub fn check_score(score: &Field) -> Option<ConfigIssue> {
    let number = matches!(score, Field::Value(_));
    (!number).then(|| ConfigIssue::new("score", format!("expected values.NAME, a number, found `{score}`")))
}

/// See the [module](self).
pub struct TopK;

impl Shape for TopK {
    const NAME: &'static str = "top_k";
    const SUMMARY: &'static str = "Keeps the records with the highest or lowest scores, of all or of each group.";
    const DOCS: &'static str = "\
Of each group that agrees in `by`, the `k` records with the highest (or lowest) `score` are there; of equal scores the first \
to arrive. A record that a better one displaces is retracted, and comes back when that one is taken back.

State: all records that have arrived and were not taken back; it is in checkpoints. `window` before it bounds that.
Metrics: NODE/size, NODE/inserted, NODE/retracted.
Errors: a record without a score, with NaN, or without a field of `by`.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/pairs.jsonl, tokenizer: models/smollm2, batch_size: 8}}
counts: {op: count_by, in: prompts.pairs, with: {by: prompt}}
often: {op: top_k, in: counts, with: {k: 100, score: values.count}}
";
    const INPUTS: &'static [PortSpec] =
        &[PortSpec::new("records", RECORDS, "records of one type; any number of nodes").many().honouring_retractions()];
    const OUTPUTS: &'static [PortSpec] =
        &[PortSpec::new("records", RECORDS, "those that are kept").following("records").retracting(), METRICS];
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
        let Config { k, score, keep, by } = config.clone();
        let groups = elements.map(move |element| {
            let score = match score.of(&element.record) {
                Ok(Part::Number(number)) => number,
                _ => 0,
            };
            let rank = if keep == Keep::Highest { !score } else { score };
            let member = Member { rank: [rank, 0], arrival: element.arrival.to_numbers(), score };
            (by.key(&element.record), member)
        });
        first(groups, k).map(|(_, member)| member.arrival.to_vec())
    }
}
