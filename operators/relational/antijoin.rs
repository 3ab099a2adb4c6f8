//! `antijoin`: records by whether another collection has their key.

use differential_dataflow::operators::ThresholdTotal;
use sapo_flow_engine::PortSpec;
use sapo_flow_engine::relation::{Elements, Results};
use schemars::JsonSchema;
use serde::Deserialize;

use super::key::{Field, Fields};
use super::ranking::{at_input, touch};
use super::{METRICS, RECORDS, Shape};

/// What `antijoin` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The key of `records`: row, prompt, response, chosen, rejected, origin, values.NAME, or a list of these.
    pub by: Fields,
    /// The key of what arrives at `keys`; absent: the same.
    #[serde(default)]
    pub keys_by: Option<Fields>,
}

/// See the [module](self).
pub struct Antijoin;

impl Shape for Antijoin {
    const NAME: &'static str = "antijoin";
    const SUMMARY: &'static str = "Lets records pass whose key is not among another input's keys.";
    const DOCS: &'static str = "\
A record of `records` is there while `keys` has none with the same key. It is emitted and retracted as keys come and go.

State: all records and keys that have arrived and were not taken back; it is in checkpoints.
Metrics: NODE/size, NODE/inserted, NODE/retracted.
Errors: a record that lacks a field of its key, or has NaN there.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/pairs.jsonl, tokenizer: models/smollm2, batch_size: 8}}
listed: {op: prompt_source, with: {path: data/listed.jsonl, tokenizer: models/smollm2, batch_size: 8}}
kept: {op: antijoin, in: {records: prompts.pairs, keys: listed}, with: {by: prompt}}
replay: {op: replay_buffer, in: kept, with: {draws: 8}}
";
    const INPUTS: &'static [PortSpec] = &[
        PortSpec::new("records", RECORDS, "records of one type; any number of nodes").many().honouring_retractions(),
        PortSpec::new("keys", RECORDS, "what has the keys; any number of nodes").many().honouring_retractions(),
    ];
    const OUTPUTS: &'static [PortSpec] =
        &[PortSpec::new("records", RECORDS, "those that pass").following("records").retracting(), METRICS];
    type Config = Config;

    fn fields(config: &Config, input: &str) -> Vec<(&'static str, Field)> {
        match &config.keys_by {
            Some(fields) if input == "keys" => fields.named("keys_by"),
            _ => config.by.named("by"),
        }
    }

    fn relate<'scope>(config: &Config, elements: Elements<'scope>) -> Results<'scope> {
        let (by, keys_by) = (config.by.clone(), config.keys_by.clone().unwrap_or_else(|| config.by.clone()));
        let keys =
            at_input(elements.clone(), 1).map(move |element| (keys_by.key(&element.record), ())).distinct_total();
        let records = at_input(elements, 0).map(move |element| (by.key(&element.record), element.arrival.to_numbers()));
        let found = records.clone().join_map(keys, |_, arrival, ()| {
            touch(1);
            arrival.to_vec()
        });
        // A record that comes together with its key is added and subtracted at once, and never seen outside.
        records.map(|(_, arrival)| arrival.to_vec()).concat(found.negate())
    }
}
