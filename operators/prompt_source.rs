//! `prompt_source`: rows of a data set, tokenized, a batch a step.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::plan::Emits;
use sapo_flow_engine::runtime::event::Event;
use sapo_flow_engine::{
    BuildContext, Define, Inputs, NodePlan, Operator, OperatorError, Outputs, Pair, PlanContext, PortSpec, PortType,
    Prompt, Record,
};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::Error;
use crate::data::shuffle::epoch_order;
use crate::data::{self, Columns, Identity, OnError, Part, Paths, Settings, files};

/// Configuration of [`PromptSource`].
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// A data file, a glob pattern, or a list of them: JSON Lines, JSON or Parquet.
    pub path: Paths,
    /// A model directory with the tokenizer and, as a rule, the chat template.
    pub tokenizer: PathBuf,
    /// Rows a step.
    pub batch_size: usize,
    /// Rows with longer prompts, in tokens, are dropped and counted; absent: none are.
    #[serde(default)]
    pub max_prompt_tokens: Option<usize>,
    /// The data's names for our columns, such as `{prompt: question, chosen: answer}`.
    #[serde(default)]
    pub columns: Columns,
    /// A chat template, or the path of a file with one, in place of the tokenizer's.
    #[serde(default)]
    pub chat_template: Option<String>,
    /// Whether every epoch has an order of its own, drawn from the run's seed; otherwise the files' order.
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// What happens when a row cannot be used: `stop` or `skip`.
    #[serde(default)]
    pub on_error: OnError,
    /// Leave every n-th row out, for an evaluator with the same path and the same value.
    #[serde(default)]
    pub hold_out_every: Option<u64>,
    /// Read this many rows at most, the first ones.
    #[serde(default)]
    pub limit: Option<usize>,
}

fn yes() -> bool {
    true
}

/// Emits the rows of a data set.
pub struct PromptSource {
    node: String,
    seed: u64,
    batch_size: usize,
    shuffle: bool,
    prompts: Vec<Arc<Prompt>>,
    identity: Identity,
    /// The epoch at hand and the order of its rows.
    order: Option<(u64, Vec<usize>)>,
}

const STATE_FILE: &str = "prompt_source.json";

impl Define for PromptSource {
    const NAME: &'static str = "prompt_source";
    const SUMMARY: &'static str = "Reads conversations or preference pairs, tokenized, a batch a step.";
    const DOCS: &'static str = "\
Reads `.jsonl`, `.json` (an array of rows) and `.parquet` files. A row is one of:

- `messages`: a conversation; its last assistant turn is the answer, all before it the prompt;
- `prompt` and `chosen`, with or without `rejected`: strings, taken as they are, or lists of messages; without `prompt` it \
is what `chosen` and `rejected` begin with;
- `real`, with or without `generated`: conversations that end in a person's and in a model's answer.

Conversations go through the chat template whole, so that the tokens are those the model meets; a prompt begins with \
exactly one BOS where the model has one, and an answer ends in exactly one EOS.

`prompts` carries every row with its answer; `pairs` the rows that have a rejected answer. Step t of an epoch emits rows \
t * batch_size on; an epoch has ceil(rows / batch_size) steps, so the last may be smaller. The order is a function of seed, \
node name and epoch.

State: none but a check: a resumed run must find the same data.

Errors: a row that is broken, has a wrong type or an empty answer, listed with file and line (`on_error: skip` leaves such \
rows out and counts them); no row left; `pairs` is used and no row has a rejected answer.";
    const EXAMPLE: &'static str = "\
prompts:
  op: prompt_source
  with: {path: data/chat.jsonl, tokenizer: models/smollm2, batch_size: 8, max_prompt_tokens: 1792, hold_out_every: 20}
batches: {op: batcher, in: prompts, with: {batch_size: 8, max_length: 2048}}
";
    const INPUTS: &'static [PortSpec] = &[];
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("prompts", &[PortType::Prompts], "every row: a prompt and its answer"),
        PortSpec::new("pairs", &[PortType::Pairs], "rows with a rejected answer, as pairs"),
    ];
    type Config = Config;

    fn check(config: &Config) -> Vec<ConfigIssue> {
        let mut issues = Vec::from_iter(config.columns.check());
        let mut at_least = |key: &str, least: u64, found: Option<u64>| {
            if let Some(found) = found.filter(|found| *found < least) {
                issues.push(ConfigIssue::new(key, format!("expected {least} or more, found {found}")));
            }
        };
        at_least("batch_size", 1, Some(config.batch_size as u64));
        at_least("max_prompt_tokens", 1, config.max_prompt_tokens.map(|tokens| tokens as u64));
        at_least("limit", 1, config.limit.map(|rows| rows as u64));
        at_least("hold_out_every", 2, config.hold_out_every);
        if config.path.as_slice().is_empty() {
            issues.push(ConfigIssue::new("path", "expected a file or a glob pattern, found an empty list"));
        }
        issues
    }

    fn plan(config: &Config, _: &PlanContext) -> Result<NodePlan, OperatorError> {
        let rows = data::count(&config.path, part(config), config.limit)?;
        let notes = vec![format!("{rows} rows, before any are dropped or skipped")];
        let batch_size = config.batch_size as u64;
        let average_row = data::average_row(&settings(config));
        let emits = Emits { rows: Some(batch_size), average_row, ..Emits::default() };
        Ok(NodePlan { steps_per_epoch: Some(rows.div_ceil(batch_size)), emits, notes, ..NodePlan::default() })
    }

    fn files(config: &Config) -> Vec<PathBuf> {
        let mut files = files::resolve(config.path.as_slice()).unwrap_or_default();
        files.extend(data::tokenizer_files(&config.tokenizer));
        files
    }

    fn steps_per_epoch(&self) -> Option<u64> {
        Some(self.prompts.len().div_ceil(self.batch_size) as u64)
    }

    fn build(config: Config, context: &BuildContext) -> Result<Self, OperatorError> {
        let loaded = data::load(&settings(&config))?;
        let mut sentences = loaded.report.sentences();
        if context.connected_outputs.contains(&"pairs") {
            let rejected = loaded.prompts.iter().filter(|prompt| prompt.rejected_ids.is_some()).count();
            if rejected == 0 {
                let message = "`pairs` is used, but no row has a rejected answer (`rejected`, or `generated`)";
                return Err(Error::Data(message.into()).into());
            }
            if rejected < loaded.prompts.len() {
                let without = loaded.prompts.len() - rejected;
                sentences.push(format!("{without} rows without a rejected answer, which `pairs` leaves out"));
            }
        }
        context.events.send(Event::Note { node: context.node.to_string(), message: sentences.join("; ") });
        Ok(PromptSource {
            node: context.node.to_string(),
            seed: context.run.seed,
            batch_size: config.batch_size,
            shuffle: config.shuffle,
            prompts: loaded.prompts,
            identity: loaded.identity,
            order: None,
        })
    }
}

/// What to read.
fn settings(config: &Config) -> Settings<'_> {
    Settings {
        paths: &config.path,
        columns: &config.columns,
        tokenizer: &config.tokenizer,
        chat_template: config.chat_template.as_deref(),
        max_prompt_tokens: config.max_prompt_tokens,
        part: part(config),
        limit: config.limit,
        on_error: config.on_error,
    }
}

impl Operator for PromptSource {
    fn step(&mut self, step: u64, _: Inputs) -> Result<Outputs, OperatorError> {
        let steps_per_epoch = self.prompts.len().div_ceil(self.batch_size) as u64;
        let (epoch, within) = (step / steps_per_epoch, step % steps_per_epoch);
        if self.order.as_ref().is_none_or(|(current, _)| *current != epoch) {
            self.order = Some((epoch, self.order_of(epoch)));
        }
        let mut outputs = Outputs::new();
        let rows = self.order.iter().flat_map(|(_, order)| order).skip(within as usize * self.batch_size);
        for (position, index) in (0..).zip(rows.take(self.batch_size)) {
            let prompt = Prompt { epoch, source: self.node.clone(), ..Prompt::clone(&self.prompts[*index]) };
            if let Some(rejected_ids) = &prompt.rejected_ids {
                let pair = Pair {
                    step,
                    position,
                    origin: self.node.clone(),
                    source: self.node.clone(),
                    row: prompt.row,
                    prompt_ids: prompt.prompt_ids.clone(),
                    chosen_ids: prompt.chosen_ids.clone(),
                    rejected_ids: Some(rejected_ids.clone()),
                    segment: None,
                    weights_version: None,
                    seed: None,
                    values: prompt.values.clone(),
                };
                outputs.push("pairs", Record::Pair(Arc::new(pair)));
            }
            outputs.push("prompts", Record::Prompt(Arc::new(prompt)));
        }
        Ok(outputs)
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let path = directory.join(STATE_FILE);
        Ok(fs::write(&path, serde_json::to_vec_pretty(&self.identity)?).map_err(Error::io(&path))?)
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let path = directory.join(STATE_FILE);
        let text = fs::read(&path).map_err(Error::io(&path))?;
        let stored = serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(self.identity.check(&stored)?)
    }
}

impl PromptSource {
    fn order_of(&self, epoch: u64) -> Vec<usize> {
        if self.shuffle {
            epoch_order(self.seed, &self.node, epoch, self.prompts.len())
        } else {
            (0..self.prompts.len()).collect()
        }
    }
}

fn part(config: &Config) -> Part {
    config.hold_out_every.map_or(Part::All, |hold_out_every| Part::Training { hold_out_every })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Harness, tiny_tokenizer};

    /// A source over these rows, its tokenizer's directory kept until it is built.
    fn source(harness: &Harness, rows: &str, with: &str) -> Result<PromptSource, OperatorError> {
        let tokenizer = tiny_tokenizer();
        let path = harness.write("rows.jsonl", rows);
        harness.build(&format!("{{path: '{path}', tokenizer: '{}', {with}}}", tokenizer.path().display()))
    }

    fn plain_rows(count: usize) -> String {
        "{\"prompt\": \"hi\", \"chosen\": \"a\"}\n".repeat(count)
    }

    fn with_rejected(count: usize) -> String {
        "{\"prompt\": \"hi\", \"chosen\": \"a\", \"rejected\": \"b\"}\n".repeat(count)
    }

    /// Rows and epochs of a step's prompts.
    fn emitted(source: &mut PromptSource, step: u64) -> Vec<(u64, u64)> {
        let outputs = source.step(step, Inputs::default()).unwrap();
        let prompt =
            |(_, record)| if let Record::Prompt(prompt) = record { Some((prompt.row, prompt.epoch)) } else { None };
        outputs.records.into_iter().filter_map(prompt).collect()
    }

    #[test]
    fn files_order_with_a_smaller_last_batch() {
        let harness = Harness::new();
        let mut source = source(&harness, &with_rejected(5), "batch_size: 2, shuffle: false").unwrap();
        assert_eq!(source.steps_per_epoch(), Some(3));
        assert_eq!(emitted(&mut source, 0), [(0, 0), (1, 0)]);
        assert_eq!(emitted(&mut source, 2), [(4, 0)]);
        assert_eq!(emitted(&mut source, 4), [(2, 1), (3, 1)]);
        assert_eq!(harness.notes(), ["5 rows read"]);
    }

    #[test]
    fn every_epoch_shuffles_all_rows_and_a_step_needs_no_step_before_it() {
        let harness = Harness::new();
        let mut first = source(&harness, &with_rejected(7), "batch_size: 2").unwrap();
        let epoch = |source: &mut PromptSource, steps: std::ops::Range<u64>| -> Vec<u64> {
            steps.flat_map(|step| emitted(source, step)).map(|(row, _)| row).collect()
        };
        let (zeroth, next) = (epoch(&mut first, 0..4), epoch(&mut first, 4..8));
        assert_ne!(zeroth, next);
        for rows in [&zeroth, &next] {
            let mut sorted = rows.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, Vec::from_iter(0..7));
        }
        let mut second = source(&harness, &with_rejected(7), "batch_size: 2").unwrap();
        assert_eq!(epoch(&mut second, 6..8), next[4..]);
    }

    #[test]
    fn pairs_carry_the_rejected_answers() {
        let harness = Harness::new();
        let rows = plain_rows(1) + &with_rejected(1);
        let mut source = source(&harness, &rows, "batch_size: 2, shuffle: false").unwrap();
        assert_eq!(harness.notes(), ["2 rows read; 1 rows without a rejected answer, which `pairs` leaves out"]);
        let outputs = source.step(1, Inputs::default()).unwrap();
        let pairs: Vec<Pair> = outputs
            .records
            .into_iter()
            .filter_map(|(port, record)| match record {
                Record::Pair(pair) if port == "pairs" => Some(Pair::clone(&pair)),
                _ => None,
            })
            .collect();
        let expected = Pair {
            step: 1,
            position: 1,
            origin: "node".into(),
            source: "node".into(),
            ..crate::testing::pair(1, &[0, 5], &[6, 1], Some(&[7, 1]))
        };
        assert_eq!(pairs, [expected]);
    }

    #[test]
    fn pairs_without_rejected_answers_are_an_error() {
        let error = source(&Harness::new(), &plain_rows(2), "batch_size: 2").err().unwrap();
        assert!(error.to_string().starts_with("`pairs` is used, but no row has a rejected answer"), "{error}");
    }

    #[test]
    fn a_resumed_run_needs_the_same_data() {
        let harness = Harness::new();
        let directory = harness.checkpoint();
        source(&harness, &with_rejected(2), "batch_size: 2").unwrap().snapshot(&directory).unwrap();
        source(&harness, &with_rejected(2), "batch_size: 2").unwrap().restore(&directory).unwrap();
        let error = source(&harness, &with_rejected(3), "batch_size: 2").unwrap().restore(&directory).unwrap_err();
        assert!(error.to_string().contains("rows.jsonl has changed"), "{error}");
        let limited = source(&harness, &with_rejected(2), "batch_size: 2, limit: 1").unwrap().restore(&directory);
        assert!(limited.unwrap_err().to_string().contains("other tokens"));
    }

    #[test]
    fn the_plan_counts_rows_without_a_tokenizer() {
        let harness = Harness::new();
        let path = harness.write("rows.jsonl", &plain_rows(9));
        let with = format!("{{path: ['{path}'], tokenizer: nowhere, batch_size: 3, hold_out_every: 4}}");
        let config: Config = serde_yaml::from_str(&with).unwrap();
        let run = sapo_flow_engine::RunSettings::default();
        let context = PlanContext { node: "node", run: &run, retained_versions: 1, inputs: Vec::new() };
        let plan = PromptSource::plan(&config, &context).unwrap();
        assert_eq!(plan.steps_per_epoch, Some(3));
        assert_eq!(plan.notes, ["7 rows, before any are dropped or skipped"]);
    }

    #[test]
    fn ranges_are_checked() {
        let with = "{path: [], tokenizer: t, batch_size: 0, max_prompt_tokens: 0, limit: 0, hold_out_every: 1, \
                    columns: {real: r, chosen: c}}";
        let config: Config = serde_yaml::from_str(with).unwrap();
        let keys: Vec<String> = PromptSource::check(&config).into_iter().map(|issue| issue.key).collect();
        assert_eq!(keys, ["columns", "batch_size", "max_prompt_tokens", "limit", "hold_out_every", "path"]);
    }
}
