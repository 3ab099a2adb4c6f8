//! `join`: every two records with the same key, as a pair.

use sapo_flow_engine::relation::{Elements, Results};
use sapo_flow_engine::{PortSpec, PortType, Record};
use schemars::JsonSchema;
use serde::Deserialize;

use super::key::{Field, Fields};
use super::ranking::{at_input, touch};
use super::{METRICS, Place, RECORDS, Shape, compared};

/// What `join` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The key of `chosen`: row, prompt, response, chosen, rejected, origin, values.NAME, or a list of these.
    #[serde(default = "by_row")]
    pub by: Fields,
    /// The key of `rejected`; absent: the same.
    #[serde(default)]
    pub rejected_by: Option<Fields>,
}

fn by_row() -> Fields {
    Fields::one(Field::Row)
}

/// See the [module](self).
pub struct Join;

impl Shape for Join {
    const NAME: &'static str = "join";
    const SUMMARY: &'static str =
        "Makes a pair of every two records with the same key: one's response chosen, the other's rejected.";
    const DOCS: &'static str = "\
Every record of `chosen` meets every record of `rejected` that has the same key. The pair has the prompt, row and response of \
the first, and the response of the second as the rejected one. Of a prompt the answer counts as its response; of a pair the \
chosen one at `chosen`, the rejected one at `rejected`. Their values are kept as `values.chosen_NAME` and \
`values.rejected_NAME`. A pair is retracted when one of its records is taken back.

Prompts joined with samples of a model give SPIN's pairs: the data's answer against the model's.

State: all records that have arrived and were not taken back; it is in checkpoints. `window` before it bounds that.
Metrics: NODE/size, NODE/inserted, NODE/retracted.
Errors: a record that lacks a field of its key, or has NaN there; a pair without a rejected response at `rejected`.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/good.jsonl, tokenizer: models/smollm2, batch_size: 8}}
bad: {op: prompt_source, with: {path: data/bad.jsonl, tokenizer: models/smollm2, batch_size: 8}}
pairs: {op: join, in: {chosen: prompts, rejected: bad}, with: {by: prompt}}
replay: {op: replay_buffer, in: pairs, with: {draws: 8}}
";
    const INPUTS: &'static [PortSpec] = &[
        PortSpec::new("chosen", RECORDS, "the better responses; any number of nodes").many().honouring_retractions(),
        PortSpec::new("rejected", RECORDS, "the worse responses; any number of nodes").many().honouring_retractions(),
    ];
    const OUTPUTS: &'static [PortSpec] =
        &[PortSpec::new("pairs", &[PortType::Pairs], "one for every two that match").retracting(), METRICS];
    const PARTS: usize = 2;
    type Config = Config;

    fn fields(config: &Config, input: &str) -> Vec<(&'static str, Field)> {
        match &config.rejected_by {
            Some(fields) if input == "rejected" => fields.named("rejected_by"),
            _ => config.by.named("by"),
        }
    }

    fn relate<'scope>(config: &Config, elements: Elements<'scope>) -> Results<'scope> {
        let keyed = |port: u32, by: Fields| {
            let elements = at_input(elements.clone(), port);
            elements.map(move |element| (by.key(&element.record), element.arrival.to_numbers()))
        };
        let rejected_by = config.rejected_by.clone().unwrap_or_else(|| config.by.clone());
        keyed(0, config.by.clone()).join_map(keyed(1, rejected_by), |_, chosen, rejected| {
            touch(2);
            [*chosen, *rejected].concat()
        })
    }

    fn record(place: Place, parts: &[&Record], _: &[u64]) -> Result<Record, String> {
        compared::pair(place, parts[0], parts[1])
    }
}
