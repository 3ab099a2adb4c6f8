//! `subprocess`: records as JSON lines to a program of one's own, and its answers back: how a Python reward model, judge
//! or filter joins the graph.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::{
    BuildContext, Define, Inputs, Metrics, NodePlan, Operator, OperatorError, Outputs, Placement, PlanContext,
    PortSpec, PortType, Record,
};
use sapo_flow_training::text::TextTokenizer;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::child::{Child, Failure, Program};
use crate::data::tokenizer_files;
use crate::item::{ITEMS, Item, Texts};
use crate::seconds::limit_issue;

mod protocol;

pub use protocol::Field;
use protocol::{Answer, request};

/// What `subprocess` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SubprocessConfig {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// A model directory with the tokenizer that the records were made with; needed for texts.
    #[serde(default)]
    pub tokenizer: Option<PathBuf>,
    /// What the program is told of a record: any of text, tokens, values, origin.
    #[serde(default = "default_send")]
    pub send: Vec<Field>,
    /// Records that are sent before an answer is waited for.
    #[serde(default = "default_batch_size")]
    #[schemars(range(min = 1))]
    pub batch_size: usize,
    /// Longest wait for the answers to one batch, in seconds; the first one includes the program's own start.
    #[serde(default = "default_timeout")]
    pub timeout_seconds: f64,
    /// How often the program is started again when it ends or takes too long over one batch.
    #[serde(default)]
    pub restarts: u32,
    /// Environment variables for the program, besides those of sapo-flow itself. Run directories keep a pipeline as it is:
    /// give secrets to sapo-flow's own environment instead.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
}

fn default_send() -> Vec<Field> {
    vec![Field::Text, Field::Values]
}

fn default_batch_size() -> usize {
    32
}

fn default_timeout() -> f64 {
    300.0
}

/// See the [module](self).
pub struct Subprocess {
    node: String,
    program: Program,
    send: Vec<Field>,
    batch_size: usize,
    restarts: u32,
    texts: Option<Texts>,
    child: Option<Child>,
}

/// What happened in a step, for its metrics.
#[derive(Default)]
struct Tally {
    records: usize,
    dropped: usize,
    restarts: u32,
    /// Sums and counts of the values that the program gave.
    values: BTreeMap<String, (f64, usize)>,
}

impl Tally {
    fn into_metrics(self, node: &str) -> Metrics {
        let mut metrics = Metrics::default();
        let mut set = |name: &str, value: f64| metrics.values.insert(format!("{node}/{name}"), value);
        for (name, (sum, count)) in &self.values {
            set(name, sum / *count as f64);
        }
        set("records", self.records as f64);
        set("dropped", self.dropped as f64);
        set("restarts", f64::from(self.restarts));
        metrics
    }
}

impl Subprocess {
    /// The program's answers to a batch; it is started again if it fails, as often as may be.
    fn ask(&mut self, requests: &[u8], answers: usize, tally: &mut Tally) -> Result<Vec<Vec<u8>>, OperatorError> {
        let mut restarted = 0;
        loop {
            let failure = match self.try_to_ask(requests, answers) {
                Ok(lines) => return Ok(lines),
                Err(failure) => failure,
            };
            self.child = None;
            if restarted == self.restarts {
                let again = if restarted == 1 { "once".into() } else { format!("{restarted} times") };
                let note = if restarted > 0 { format!("started again {again}, and still: ") } else { String::new() };
                return Err(format!("{note}{failure}").into());
            }
            restarted += 1;
            tally.restarts += 1;
            tracing::warn!(node = self.node, "started again: {failure}");
        }
    }

    fn try_to_ask(&mut self, requests: &[u8], answers: usize) -> Result<Vec<Vec<u8>>, Failure> {
        if self.child.is_none() {
            self.child = Some(Child::start(&self.program)?);
        }
        match &mut self.child {
            Some(child) => child.exchange(requests.to_vec(), answers),
            None => Ok(Vec::new()),
        }
    }

    fn about(&self, item: &Item, error: &str) -> String {
        format!("`{}` answered to {}: {error}", self.program.text(), item.label())
    }

    /// The record with what the answer adds; none where it is dropped.
    fn apply(&self, answer: Answer, mut item: Item, tally: &mut Tally) -> Result<Option<Item>, OperatorError> {
        for (name, value) in answer.values.numbers() {
            let entry = tally.values.entry(name.clone()).or_default();
            *entry = (entry.0 + value, entry.1 + 1);
        }
        if answer.drop {
            tally.dropped += 1;
            return Ok(None);
        }
        for (part, text) in answer.parts() {
            let texts = self.texts.as_ref().ok_or("a text as answer needs `tokenizer`");
            let ids = texts.map_err(OperatorError::from).and_then(|texts| texts.encode(part, text));
            let set = ids.and_then(|ids| item.set_ids(part, ids));
            set.map_err(|error| self.about(&item, &error.to_string()))?;
        }
        if !answer.values.is_empty() {
            item.values_mut().extend(answer.values);
        }
        Ok(Some(item))
    }

    /// The records of one batch, each with its place at the step, as they are after the program's answers.
    fn exchange(&mut self, step: u64, batch: &[(usize, Item)], tally: &mut Tally) -> Result<Answered, OperatorError> {
        let id = |place: usize| format!("{step}.{place}");
        let mut requests = Vec::new();
        for (place, item) in batch {
            requests.extend(request(&id(*place), item, &self.send, self.texts.as_ref())?);
        }
        let lines = self.ask(&requests, batch.len(), tally)?;
        let mut answered = Vec::with_capacity(batch.len());
        for ((place, item), line) in batch.iter().zip(&lines) {
            let answer = Answer::read(line, &id(*place)).map_err(|error| self.about(item, &error))?;
            answered.push((*place, self.apply(answer, item.clone(), tally)?));
        }
        Ok(answered)
    }
}

/// Records with their places; none where the program dropped one.
type Answered = Vec<(usize, Option<Item>)>;

impl Operator for Subprocess {
    fn start(&mut self, _: Inputs) -> Result<Outputs, OperatorError> {
        self.child = Some(Child::start(&self.program)?);
        Ok(Outputs::new())
    }

    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let mut tally = Tally::default();
        // What is no item, such as a retraction, stays in its place.
        let mut records: Vec<Result<Option<Item>, Record>> =
            inputs.take("records").into_iter().map(|record| Item::of(record).map(Some)).collect();
        let item = |(place, record): (usize, &Result<Option<Item>, _>)| Some((place, record.as_ref().ok()?.clone()?));
        let items: Vec<(usize, Item)> = records.iter().enumerate().filter_map(item).collect();
        tally.records = items.len();
        for batch in items.chunks(self.batch_size) {
            for (place, answered) in self.exchange(step, batch, &mut tally)? {
                records[place] = Ok(answered);
            }
        }
        let mut outputs = Outputs::new();
        for record in records {
            match record {
                Ok(Some(item)) => outputs.push("records", item.into_record()),
                Ok(None) => {}
                Err(other) => outputs.push("records", other),
            }
        }
        outputs.push("metrics", Record::Metrics(tally.into_metrics(&self.node).into()));
        Ok(outputs)
    }

    fn finish(&mut self) -> Result<(), OperatorError> {
        let Some(child) = self.child.take() else { return Ok(()) };
        match child.finish()? {
            0 => Ok(()),
            more => Err(format!("`{}` wrote {more} lines more than it was sent", self.program.text()).into()),
        }
    }
}

impl Define for Subprocess {
    const NAME: &'static str = "subprocess";
    const SUMMARY: &'static str =
        "Sends records to a program of your own, such as a reward model in Python, and takes its answers.";
    const DOCS: &'static str = "\
The program reads one JSON object a line from its standard input and writes one JSON line for each to its standard \
output, in the same order:

    -> {\"id\": \"7.0\", \"prompt\": \"...\", \"response\": \"...\", \"values\": {\"difficulty\": 0.5}}
    <- {\"id\": \"7.0\", \"values\": {\"score\": 0.3}}

It gets `prompt` with `response` (samples) or with `chosen` and, where there is one, `rejected` (prompts, pairs). A \
prompt's special tokens are written out, a response's are left out. `send` decides what it gets: `text`; `tokens` \
(`prompt_ids`, ...); `values`; `origin` (`source` and `row`, and except for prompts `origin`, `step`, `position`).

It answers with the `id` (unique within a run) and any of: `values`, numbers or texts by name, which are added to the record's; \
`\"drop\": true`, which takes the record out; `prompt`, `chosen`, `rejected` or `response`, texts in place of the record's, \
which get an EOS. `batch_size` lines are sent, then as many are waited for: a program may gather them, and must flush its \
output.

The program starts with the run and ends when its input does. Its standard error goes to the log (RUST_LOG=info shows it), \
the last lines of it into the message when something goes wrong. With `restarts`, a program that ends or takes too long is \
started again and sent the batch at hand once more. Retractions pass.

State: none. A program that keeps state of its own must restore it itself when a run resumes.
Errors: the program cannot be started, ends, or takes longer than `timeout_seconds` for a batch, after `restarts`; at \
once, since it would happen again: an answer that is no JSON object of that form, out of order, or with an empty text.
Metrics: NODE/records, NODE/dropped, NODE/restarts, and the mean of each value that the program gave, as NODE/NAME.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat_pairs.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8}}
scored:
  op: subprocess
  in: prompts.pairs
  with:
    command: [python3, examples/length_scorer.py, --target, '40']
    tokenizer: models/smollm2-135m-instruct
    timeout_seconds: 60
    restarts: 2
batches: {op: batcher, in: scored, with: {batch_size: 8, max_length: 2048}}
";
    const INPUTS: &'static [PortSpec] =
        &[PortSpec::new("records", ITEMS, "What to ask about, all of one type.").many().honouring_retractions()];
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("records", ITEMS, "The records with what the program said.")
            .following("records")
            .passing_retractions(),
        PortSpec::new("metrics", &[PortType::Metrics], "Counts, and means of the values."),
    ];
    const PLACEMENT: Placement = Placement::Device;
    type Config = SubprocessConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        let mut expect = |good: bool, key: &str, message: &str| {
            if !good {
                issues.push(ConfigIssue::new(key, message));
            }
        };
        let named = config.command.first().is_some_and(|name| !name.is_empty());
        expect(named, "command", "expected a program and its arguments, found none");
        expect(!config.send.is_empty(), "send", "expected some of text, tokens, values, origin, found none");
        if let Some(message) = limit_issue(config.timeout_seconds) {
            expect(false, "timeout_seconds", &message);
        }
        let silent = !config.send.contains(&Field::Text);
        expect(silent || config.tokenizer.is_some(), "tokenizer", "is needed, since `send` has text");
        for name in config.environment.keys().filter(|name| name.is_empty() || name.contains(['=', '\0'])) {
            expect(false, "environment", &format!("{name:?} is no name of an environment variable"));
        }
        issues
    }

    fn plan(_: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        Ok(NodePlan { emits: context.input("records"), ..NodePlan::default() })
    }

    fn files(config: &Self::Config) -> Vec<PathBuf> {
        // A script decides the answers as much as a model does.
        let scripts = config.command.iter().map(PathBuf::from).filter(|path| path.is_file());
        scripts.chain(config.tokenizer.iter().flat_map(|directory| tokenizer_files(directory))).collect()
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        let texts = match &config.tokenizer {
            Some(directory) => Some(Texts { tokenizer: TextTokenizer::load(directory)? }),
            None => None,
        };
        let program = Program {
            node: context.node.into(),
            command: config.command,
            environment: config.environment,
            time_limit: Duration::try_from_secs_f64(config.timeout_seconds)?,
        };
        Ok(Subprocess {
            node: context.node.into(),
            program,
            send: config.send,
            batch_size: config.batch_size,
            restarts: config.restarts,
            texts,
            child: None,
        })
    }
}

#[cfg(test)]
mod tests;
