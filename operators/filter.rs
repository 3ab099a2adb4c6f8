//! `filter`: lets records pass for which an expression holds.

use std::path::PathBuf;

use sapo_flow_engine::operator::{ConfigIssue, Connections};
use sapo_flow_engine::{
    BuildContext, Define, Inputs, Metrics, NodePlan, Operator, OperatorError, Outputs, Placement, PlanContext,
    PortSpec, PortType, Record,
};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::expression::evaluation::{self, Evaluated, Evaluator, Settings};
use crate::expression::records::{Kind, Outcome};
use crate::item::ITEMS;
use crate::scorer::ScorerSettings;

/// What `filter` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FilterConfig {
    /// The expression that is true for records that pass, such as `response_len < 200 && values.score > 0`.
    #[serde(rename = "where")]
    pub condition: String,
    /// A model directory with the tokenizer that the records were made with; needed where texts are read.
    #[serde(default)]
    pub tokenizer: Option<PathBuf>,
    /// Directory of the model whose log-probabilities are read, where no weights are connected.
    #[serde(default)]
    pub model: Option<PathBuf>,
    /// Where that model computes; absent: the run's device.
    #[serde(default)]
    pub device: Option<String>,
    /// Records that go through that model, or the weights', at a time (default 8).
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub batch_size: Option<usize>,
}

impl FilterConfig {
    fn settings(&self) -> Settings {
        let (model, device, batch_size) = (self.model.clone(), self.device.clone(), self.batch_size);
        Settings {
            formulas: vec![("where".into(), self.condition.clone(), Kind::Truth)],
            tokenizer: self.tokenizer.clone(),
            writes_texts: false,
            scorer: ScorerSettings { model, device, batch_size },
        }
    }
}

/// See the [module](self).
pub struct Filter {
    node: String,
    evaluator: Evaluator,
}

impl Operator for Filter {
    fn start(&mut self, _: Inputs) -> Result<Outputs, OperatorError> {
        self.evaluator.start()?;
        Ok(Outputs::new())
    }

    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        let (mut kept, mut dropped) = (0, 0);
        for record in self.evaluator.evaluate(step, &mut inputs)? {
            match record {
                Evaluated::Item(item, outcomes) if outcomes == [Outcome::Truth(true)] => {
                    kept += 1;
                    outputs.push("records", item.into_record());
                }
                Evaluated::Item(..) => dropped += 1,
                Evaluated::Other(other) => outputs.push("records", other),
            }
        }
        let counts = [("kept", kept), ("dropped", dropped)];
        let values = counts.map(|(name, count)| (format!("{}/{name}", self.node), f64::from(count)));
        outputs.push("metrics", Record::Metrics(Metrics { values: values.into() }.into()));
        Ok(outputs)
    }
}

impl Define for Filter {
    const NAME: &'static str = "filter";
    const SUMMARY: &'static str = "Lets prompts, samples or pairs pass for which an expression is true.";
    const DOCS: &'static str = "\
The language of expressions is Rhai's without functions of one's own, modules and output: numbers (`/` divides exactly), \
texts, lists, `&& || !`, `if a { b } else { c }`, `let`, `for`. Values of different kinds cannot be compared. Functions, of \
numbers: `abs`, `min`, `max`, `clamp`, `exp`, `log`, `sqrt`, `sigmoid`, `round`, `floor` and the like; of texts: `len`, \
`contains`, `starts_with`, `ends_with`, `index_of`, `to_lower`, `to_upper`, `trim`, `replace`, `sub_string`, `split`, \
`words`, `chars`, `parse_float`; of lists: `len`, `contains`, `index_of`, `extract`, `push`, `pop`, `reverse`, `sort`. These \
names stand for what a record holds:

- `step`, `row`, `source` (the node that read the row); `epoch` (prompts);
- `prompt`, `response` (samples), `chosen` and `rejected` (prompts, pairs): texts, which need `tokenizer`; a prompt's special \
tokens are written out, a response's are left out;
- `prompt_ids`, `prompt_len` and the like: tokens and how many; `has_rejected`;
- `values.NAME`: the record's numbers and texts, such as `values.category == \"math\"` with `columns: {values: [category]}` of \
`prompt_source`; `\"NAME\" in values` asks whether there is one;
- `origin`, `generated`, `staleness` (samples, pairs), `segment_start`, `segment_tokens` (pairs): how it was made;
- `logps`, `avg_logps` (samples), `chosen_logps`, `chosen_avg_logps`, `rejected_logps`, `rejected_avg_logps` (prompts, \
pairs): log-probabilities in nats, summed and per token, under the model of `model` or of the weights that arrive; without \
a rejected response 0.

An evaluation may take a million operations, work on long texts and lists included (256 bytes or 64 items count as one), \
make 32 MiB of data, and hold a mebibyte in a text and 65536 items in a list: an expression can neither hang nor exhaust a \
run. Retractions pass.

State: none. Errors: an unknown name or a wrong type, before the run; a value that a record lacks, or a limit, in it.
Metrics: NODE/kept and NODE/dropped, in records.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat_pairs.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8}}
good:
  op: filter
  in: prompts.pairs
  with:
    where: has_rejected && chosen_len < 200 && !chosen.contains(\"sorry\")
    tokenizer: models/smollm2-135m-instruct
batches: {op: batcher, in: good, with: {batch_size: 8, max_length: 2048}}
";
    const INPUTS: &'static [PortSpec] = evaluation::INPUTS;
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("records", ITEMS, "Those that pass.").following("records").passing_retractions(),
        PortSpec::new("metrics", &[PortType::Metrics], "How many pass."),
    ];
    const PLACEMENT: Placement = Placement::Device;
    type Config = FilterConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        config.settings().check()
    }

    fn check_connections(config: &Self::Config, connections: &Connections) -> Vec<ConfigIssue> {
        config.settings().check_connections(connections)
    }

    fn plan(config: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        let memory = config.settings().scorer.memory(context)?;
        Ok(NodePlan { memory, emits: context.input("records"), ..NodePlan::default() })
    }

    fn files(config: &Self::Config) -> Vec<PathBuf> {
        config.settings().files()
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        Ok(Filter { node: context.node.into(), evaluator: config.settings().build(context)? })
    }
}
