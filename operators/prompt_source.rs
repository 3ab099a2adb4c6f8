//! `prompt_source`: rows of a data set, tokenized, a batch a step.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::plan::Emits;
use sapo_flow_engine::runtime::event::{Event, EventSender};
use sapo_flow_engine::{
    BuildContext, Define, Inputs, NodePlan, Operator, OperatorError, Outputs, Pair, PlanContext, PortSpec, PortType,
    Prompt, Record, Retracted, Retraction,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::data::recording::Place;
use crate::data::shuffle::epoch_order;
use crate::data::{self, Columns, Identity, Loaded, OnError, Part, Paths, Settings, Tokens};
use crate::watched::{Watched, describe};

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
    /// A chat template, or the path of a file with one, in place of the tokenizer's. What writes the date (`strftime_now`)
    /// has that of the run's beginning.
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
    /// Whether to follow the files while they are edited; `{replay: FILE}` repeats the edits of another run, from its
    /// recording, and reads neither `path` nor anything else of the data.
    #[serde(default)]
    pub watch: Watch,
}

/// Whether data is edited while the run goes on.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected true, false or {replay: FILE}")]
pub enum Watch {
    /// Whether to follow the files.
    Files(bool),
    /// Repeat what another run recorded.
    Recording(Replay),
}

/// What to repeat.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Replay {
    /// A recording: `edits/NODE.jsonl` of a run directory.
    pub replay: PathBuf,
}

impl Default for Watch {
    fn default() -> Self {
        Watch::Files(false)
    }
}

impl Watch {
    fn is_on(&self) -> bool {
        !matches!(self, Watch::Files(false))
    }

    fn replay(&self) -> Option<&Path> {
        match self {
            Watch::Files(_) => None,
            Watch::Recording(Replay { replay }) => Some(replay),
        }
    }
}

fn yes() -> bool {
    true
}

/// Emits the rows of a data set.
pub struct PromptSource {
    node: String,
    seed: u64,
    config: Config,
    rows: Rows,
    events: EventSender,
}

/// Where a step's rows come from.
enum Rows {
    /// From the data as it was when the run began.
    Fixed {
        rows: Tokens,
        identity: Identity,
        /// The epoch at hand and the order of its rows.
        order: Option<(u64, Vec<usize>)>,
    },
    /// From data that is being edited.
    Watched(Box<Watched>),
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

With `watch: true` the files (JSON Lines) are looked at once a step while the run goes on. Rows that are added come first at \
the next step, and belong to every later pass over the data; a row that is removed or edited is taken back, with everything \
that stems from it in operators that keep it, and an edited row comes anew, with another number. Lines at a file's end count \
at once, a last line when it has its end or is whole; other changes count when a file looks the same at two steps in \
succession, since editors empty files before they write them. `on_error` holds for rows that are added, too. Since such data \
has no fixed number of rows, the run needs `run: {steps: N}`. Every edit is recorded with its step and the rows' text in \
`edits/NODE.jsonl` of the run directory, and in checkpoints: a resumed run repeats what was recorded after its checkpoint and \
then follows the files again, and `watch: {replay: FILE}` repeats a whole run.

The tokens of 16 MiB of data or more are kept in a file, in `tokens` of the folder `$SAPO_FLOW_CACHE` or else of \
`~/.cache/sapo-flow`, named after all that decides them: later runs find them there, and read rows as they need them. Such files \
can be deleted at any time; with an empty `SAPO_FLOW_CACHE` there are none, and all rows are in memory.

State: none but a check, that a resumed run finds the same data; with `watch` the rows and what is left of the pass.

Errors: a row that is broken, has a wrong type or an empty answer, listed with file and line (`on_error: skip` leaves such \
rows out and counts them); no row left; `pairs` is used and no row has a rejected answer.";
    const EXAMPLE: &'static str = "\
prompts:
  op: prompt_source
  with: {path: data/chat.jsonl, tokenizer: models/smollm2, batch_size: 8, max_prompt_tokens: 1792}
batches: {op: batcher, in: prompts, with: {batch_size: 8, max_length: 2048}}
";
    const INPUTS: &'static [PortSpec] = &[];
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("prompts", &[PortType::Prompts], "every row: a prompt and its answer").retracting(),
        PortSpec::new("pairs", &[PortType::Pairs], "rows with a rejected answer, as pairs").retracting(),
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
        if config.watch.is_on() {
            if config.limit.is_some() {
                issues.push(ConfigIssue::new(
                    "limit",
                    "expected no limit together with watch: which rows are the first?",
                ));
            }
            let lines = |path: &&String| path.ends_with(".jsonl") || path.ends_with(".ndjson");
            if let Some(path) = config.path.as_slice().iter().find(|path| !lines(path)) {
                let message = format!("expected .jsonl or .ndjson files, which can be followed, found {path}");
                issues.push(ConfigIssue::new("path", message));
            }
        }
        if config.path.as_slice().is_empty() {
            issues.push(ConfigIssue::new("path", "expected a file or a glob pattern, found an empty list"));
        }
        issues
    }

    fn has_epochs(config: &Config) -> bool {
        !config.watch.is_on()
    }

    fn retracts(config: &Config) -> bool {
        config.watch.is_on()
    }

    fn plan(config: &Config, _: &PlanContext) -> Result<NodePlan, OperatorError> {
        if config.watch.is_on() {
            let emits = Emits { rows: Some(config.batch_size as u64), ..Emits::default() };
            let notes = vec!["rows come and go while the run goes on".into()];
            return Ok(NodePlan { emits, notes, ..NodePlan::default() });
        }
        let rows = data::count(&config.path, part(config), config.limit)?;
        let notes = vec![format!("{}, before any are dropped or skipped", data::rows(rows as usize))];
        let batch_size = config.batch_size as u64;
        let sample = data::sample(&settings(config))?;
        let emits = Emits { rows: Some(batch_size), sample, ..Emits::default() };
        Ok(NodePlan { steps_per_epoch: Some(rows.div_ceil(batch_size)), emits, notes, ..NodePlan::default() })
    }

    fn files(config: &Config) -> Vec<PathBuf> {
        // What is followed may change; what is repeated may not.
        let (tokenizer, chat_template) = (&config.tokenizer, config.chat_template.as_deref());
        match &config.watch {
            Watch::Files(false) => data::all_files(&config.path, tokenizer, chat_template),
            watch => {
                let recording = watch.replay().map(Path::to_path_buf);
                recording.into_iter().chain(data::text_files(tokenizer, chat_template)).collect()
            }
        }
    }

    fn steps_per_epoch(&self) -> Option<u64> {
        match &self.rows {
            Rows::Fixed { rows, .. } => Some(rows.len().div_ceil(self.config.batch_size) as u64),
            Rows::Watched(_) => None,
        }
    }

    fn build(config: Config, context: &BuildContext) -> Result<Self, OperatorError> {
        let settings = settings(&config);
        let (rows, report, kept) = if config.watch.is_on() {
            let path = context.run_directory.join("edits").join(format!("{}.jsonl", context.node));
            let order = (context.node, context.run.seed, config.shuffle);
            let (watched, report) = Watched::begin(&settings, config.watch.replay(), path, order, context.resumed)?;
            (Rows::Watched(Box::new(watched)), report, None)
        } else {
            let Loaded { rows, report, kept, identity } = data::load(&settings)?;
            (Rows::Fixed { rows, identity, order: None }, report, kept)
        };
        let (node, events) = (context.node.to_string(), context.events.clone());
        let source = PromptSource { node, seed: context.run.seed, config, rows, events };
        let mut sentences = report.sentences();
        sentences.extend(kept);
        if context.connected_outputs.contains(&"pairs") {
            sentences.extend(source.check_pairs()?);
        }
        // A resumed run has read no row of watched data yet.
        if source.steps_per_epoch().is_some() || !context.resumed {
            source.tell(sentences.join("; "));
        }
        Ok(source)
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
        let mut outputs = Outputs::new();
        let batch_size = self.config.batch_size;
        let rows = match &mut self.rows {
            Rows::Watched(watched) => {
                let moment = watched.step(&settings(&self.config), step, batch_size)?;
                moment.note.into_iter().for_each(|note| self.tell(note));
                self.retract(&moment.removed, &mut outputs);
                moment.rows
            }
            Rows::Fixed { rows, order, .. } => {
                let steps_per_epoch = rows.len().div_ceil(batch_size) as u64;
                let (epoch, within) = (step / steps_per_epoch, step % steps_per_epoch);
                if order.as_ref().is_none_or(|(current, _)| *current != epoch) {
                    let drawn = match self.config.shuffle {
                        true => epoch_order(self.seed, &self.node, epoch, rows.len()),
                        false => (0..rows.len()).collect(),
                    };
                    *order = Some((epoch, drawn));
                }
                let order = order.iter().flat_map(|(_, order)| order).skip(within as usize * batch_size);
                let row = |index: &usize| Ok(Arc::new(Prompt { epoch, ..Prompt::clone(&*rows.row(*index)?) }));
                order.take(batch_size).map(row).collect::<Result<_, Error>>()?
            }
        };
        for (position, prompt) in (0..).zip(rows) {
            self.emit(step, position, &prompt, &mut outputs);
        }
        Ok(outputs)
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        match &self.rows {
            Rows::Watched(watched) => Ok(watched.snapshot(directory)?),
            Rows::Fixed { identity, .. } => {
                let path = directory.join(STATE_FILE);
                Ok(fs::write(&path, serde_json::to_vec_pretty(identity)?).map_err(Error::io(&path))?)
            }
        }
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        match &mut self.rows {
            Rows::Watched(watched) => Ok(watched.restore(&settings(&self.config), directory)?),
            Rows::Fixed { identity, .. } => {
                let path = directory.join(STATE_FILE);
                let text = fs::read(&path).map_err(Error::io(&path))?;
                let stored = serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))?;
                Ok(identity.check(&stored)?)
            }
        }
    }
}

impl PromptSource {
    fn tell(&self, message: String) {
        self.events.send(Event::Note { node: self.node.clone(), message });
    }

    /// Refuse a use of `pairs` that nothing can come of; what else there is to tell of it.
    fn check_pairs(&self) -> Result<Option<String>, Error> {
        let Rows::Fixed { rows, .. } = &self.rows else { return Ok(None) };
        if rows.with_rejected() == 0 {
            let message = "`pairs` is used, but no row has a rejected answer (`rejected`, or `generated`)";
            return Err(Error::Data(message.into()));
        }
        let without = rows.len() - rows.with_rejected();
        Ok((without > 0)
            .then(|| format!("{} without a rejected answer, which `pairs` leaves out", data::rows(without))))
    }

    /// Take rows back, on both outputs.
    fn retract(&self, removed: &[(Arc<Prompt>, Place)], outputs: &mut Outputs) {
        for (prompt, place) in removed {
            let of = Retracted::Row { source: self.node.clone(), row: prompt.row };
            let because = format!("{} (row {} of `{}`) was removed or edited", describe(place), prompt.row, self.node);
            for (port, port_type) in [("prompts", PortType::Prompts), ("pairs", PortType::Pairs)] {
                let retraction = Retraction { port_type, of: of.clone(), because: Some(because.clone()) };
                outputs.push(port, Record::Retraction(retraction));
            }
        }
    }

    fn emit(&self, step: u64, position: u32, prompt: &Prompt, outputs: &mut Outputs) {
        let prompt = Prompt { source: self.node.clone(), ..prompt.clone() };
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
}

fn part(config: &Config) -> Part {
    config.hold_out_every.map_or(Part::All, |hold_out_every| Part::Training { hold_out_every })
}

#[cfg(test)]
mod tests;
