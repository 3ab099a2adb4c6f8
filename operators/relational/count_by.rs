//! `count_by`: how many records share a key.

use std::sync::Arc;

use differential_dataflow::operators::count::CountTotal;
use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::record::{Pair, Prompt, Sample};
use sapo_flow_engine::relation::{Elements, Results};
use sapo_flow_engine::{PortSpec, Record};
use schemars::JsonSchema;
use serde::Deserialize;

use super::key::{Field, Fields};
use super::ranking::{Member, first, touch};
use super::{METRICS, Place, RECORDS, Shape};

/// What `count_by` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What records are counted by: row, prompt, response, chosen, rejected, origin, values.NAME, or a list of these.
    pub by: Fields,
}

/// The value that holds the count.
const COUNT: &str = "count";

/// See the [module](self).
pub struct CountBy;

impl Shape for CountBy {
    const NAME: &'static str = "count_by";
    const SUMMARY: &'static str = "Counts the records of each key.";
    const DOCS: &'static str = "\
For each key one record is emitted, the first that arrived with it, with the number of records that have the key as \
`values.count`. When the number changes, the record is retracted and emitted anew, as the same record with another number.

State: all records that have arrived and were not taken back; it is in checkpoints. `window` before it bounds that.
Metrics: NODE/size (keys), NODE/inserted, NODE/retracted.
Errors: a record that lacks a field of `by`, or has NaN there.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/pairs.jsonl, tokenizer: models/smollm2, batch_size: 8}}
counts: {op: count_by, in: prompts.pairs, with: {by: prompt}}
often: {op: top_k, in: counts, with: {k: 100, score: values.count}}
";
    const INPUTS: &'static [PortSpec] =
        &[PortSpec::new("records", RECORDS, "records of one type; any number of nodes").many().honouring_retractions()];
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("records", RECORDS, "the first record of each key, with its count")
            .following("records")
            .retracting(),
        METRICS,
    ];
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigIssue> {
        let empty = config.by.0.is_empty();
        empty.then(|| ConfigIssue::new("by", "expected a field, found an empty list")).into_iter().collect()
    }

    fn fields(config: &Config, _: &str) -> Vec<(&'static str, Field)> {
        config.by.named("by")
    }

    fn relate<'scope>(config: &Config, elements: Elements<'scope>) -> Results<'scope> {
        let by = config.by.clone();
        let groups = elements.map(move |element| (by.key(&element.record), Member::in_order(&element)));
        let counts = groups.clone().map(|(key, _)| key).count_total();
        first(groups, 1).join_map(counts, |_, member, count| {
            touch(1);
            vec![member.arrival[0], member.arrival[1], *count as u64]
        })
    }

    fn record(_: Place, parts: &[&Record], numbers: &[u64]) -> Result<Record, String> {
        let count = numbers[0] as f64;
        let mut values = match parts[0] {
            Record::Prompt(prompt) => prompt.values.clone(),
            Record::Sample(sample) => sample.values.clone(),
            Record::Pair(pair) => pair.values.clone(),
            other => return Ok(other.clone()),
        };
        values.insert(COUNT.into(), count);
        Ok(match parts[0] {
            Record::Prompt(prompt) => Record::Prompt(Arc::new(Prompt { values, ..Prompt::clone(prompt) })),
            Record::Sample(sample) => Record::Sample(Arc::new(Sample { values, ..Sample::clone(sample) })),
            Record::Pair(pair) => Record::Pair(Arc::new(Pair { values, ..Pair::clone(pair) })),
            other => other.clone(),
        })
    }
}
