//! `distinct`: one record of each key.

use sapo_flow_engine::PortSpec;
use sapo_flow_engine::relation::{Elements, Results};
use schemars::JsonSchema;
use serde::Deserialize;

use super::key::{Field, Fields};
use super::ranking::{Member, first};
use super::{METRICS, RECORDS, Shape};

/// What `distinct` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What records are told apart by: row, prompt, response, chosen, rejected, origin, values.NAME, or a list of these.
    pub by: Fields,
}

/// See the [module](self).
pub struct Distinct;

impl Shape for Distinct {
    const NAME: &'static str = "distinct";
    const SUMMARY: &'static str = "Lets the first record of each key pass.";
    const DOCS: &'static str = "\
Of the records that agree in `by`, the first to arrive is emitted, and no other while it is there. When it is taken back, it \
is retracted, and the next one takes its place.

State: all records that have arrived and were not taken back; it is in checkpoints. `window` before it bounds that.
Metrics: NODE/size, NODE/inserted, NODE/retracted.
Errors: a record that lacks a field of `by`, or has NaN there.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/pairs.jsonl, tokenizer: models/smollm2, batch_size: 8}}
once: {op: distinct, in: prompts.pairs, with: {by: prompt}}
replay: {op: replay_buffer, in: once, with: {draws: 8}}
";
    const INPUTS: &'static [PortSpec] =
        &[PortSpec::new("records", RECORDS, "records of one type; any number of nodes").many().honouring_retractions()];
    const OUTPUTS: &'static [PortSpec] =
        &[PortSpec::new("records", RECORDS, "one record of each key").following("records").retracting(), METRICS];
    type Config = Config;

    fn fields(config: &Config, _: &str) -> Vec<(&'static str, Field)> {
        config.by.named("by")
    }

    fn relate<'scope>(config: &Config, elements: Elements<'scope>) -> Results<'scope> {
        let by = config.by.clone();
        let groups = elements.map(move |element| (by.key(&element.record), Member::in_order(&element)));
        first(groups, 1).map(|(_, member)| member.arrival.to_vec())
    }
}
