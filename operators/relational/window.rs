//! `window`: the records of the last steps, first in, first out.

use sapo_flow_engine::PortSpec;
use sapo_flow_engine::relation::{Elements, Results};
use schemars::JsonSchema;
use serde::Deserialize;

use super::key::Field;
use super::ranking::touch;
use super::{METRICS, RECORDS, Shape};

/// What `window` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Steps that a record stays, the one at which it arrives included.
    #[schemars(range(min = 1))]
    pub steps: u64,
}

/// See the [module](self).
pub struct Window;

impl Shape for Window {
    const NAME: &'static str = "window";
    const SUMMARY: &'static str = "Keeps records for a number of steps, and then takes them back.";
    const DOCS: &'static str = "\
A record passes at the step at which it arrives, and is retracted `steps` steps later: first in, first out. So operators \
after it see the last `steps` steps only.

State: the records of the last `steps` steps; it is in checkpoints.
Metrics: NODE/size, NODE/inserted, NODE/retracted.
Errors: none.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/pairs.jsonl, tokenizer: models/smollm2, batch_size: 8}}
recent: {op: window, in: prompts.pairs, with: {steps: 100}}
once: {op: distinct, in: recent, with: {by: chosen}}
replay: {op: replay_buffer, in: once, with: {draws: 8}}
";
    const INPUTS: &'static [PortSpec] =
        &[PortSpec::new("records", RECORDS, "records of one type; any number of nodes").many().honouring_retractions()];
    const OUTPUTS: &'static [PortSpec] =
        &[PortSpec::new("records", RECORDS, "those of the last steps").following("records").retracting(), METRICS];
    type Config = Config;

    fn fields(_: &Config, _: &str) -> Vec<(&'static str, Field)> {
        Vec::new()
    }

    fn stays(config: &Config) -> Option<u64> {
        Some(config.steps)
    }

    fn relate<'scope>(_: &Config, elements: Elements<'scope>) -> Results<'scope> {
        elements.map(|element| {
            touch(1);
            element.arrival.to_numbers().to_vec()
        })
    }
}
