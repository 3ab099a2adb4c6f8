//! `score`: a number for each record, by an expression.

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
use crate::item::{ITEMS, value_name_issue};
use crate::scorer::ScorerSettings;

/// What `score` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScoreConfig {
    /// The expression of the score, such as `avg_logps` or `-abs(response_len - 100)`.
    pub score: String,
    /// The name under which it joins the record's values.
    #[serde(default = "default_name", rename = "as")]
    pub name: String,
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

fn default_name() -> String {
    "score".into()
}

impl ScoreConfig {
    fn settings(&self) -> Settings {
        let (model, device, batch_size) = (self.model.clone(), self.device.clone(), self.batch_size);
        Settings {
            formulas: vec![("score".into(), self.score.clone(), Kind::Number)],
            tokenizer: self.tokenizer.clone(),
            writes_texts: false,
            scorer: ScorerSettings { model, device, batch_size },
        }
    }
}

/// See the [module](self).
pub struct Score {
    node: String,
    name: String,
    evaluator: Evaluator,
}

impl Operator for Score {
    fn start(&mut self, _: Inputs) -> Result<Outputs, OperatorError> {
        self.evaluator.start()?;
        Ok(Outputs::new())
    }

    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        let mut scores = Vec::new();
        for record in self.evaluator.evaluate(step, &mut inputs)? {
            match record {
                Evaluated::Item(mut item, outcomes) => {
                    if let [Outcome::Number(score)] = outcomes[..] {
                        scores.push(score);
                        item.values_mut().insert(self.name.clone(), score);
                    }
                    outputs.push("records", item.into_record());
                }
                Evaluated::Other(other) => outputs.push("records", other),
            }
        }
        let mut metrics = Metrics::default();
        if !scores.is_empty() {
            let mut set = |suffix: &str, value: f64| {
                metrics.values.insert(format!("{}/{}{suffix}", self.node, self.name), value);
            };
            set("", scores.iter().sum::<f64>() / scores.len() as f64);
            set("_min", scores.iter().copied().fold(f64::INFINITY, f64::min));
            set("_max", scores.iter().copied().fold(f64::NEG_INFINITY, f64::max));
        }
        outputs.push("metrics", Record::Metrics(metrics.into()));
        Ok(outputs)
    }
}

impl Define for Score {
    const NAME: &'static str = "score";
    const SUMMARY: &'static str =
        "Gives prompts, samples or pairs a number by an expression, such as a model's log-probability.";
    const DOCS: &'static str = "\
Evaluates `score` for each record and adds it to the record's numbers under the name `as`: `values.score` in expressions \
further on, and what operators that compare samples read. Names, functions and limits of expressions are those of `filter`.

With `weights` connected, the log-probabilities are those of a model in the run, such as the policy or its EMA; with \
`model`, those of a directory. Retractions pass.

State: none. Errors: those of `filter`; a score that is no finite number.
Metrics: NODE/NAME, NODE/NAME_min, NODE/NAME_max: mean, lowest and highest of the step's scores.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat_pairs.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8}}
easy:
  op: score
  in: prompts.pairs
  with: {score: chosen_avg_logps - rejected_avg_logps, as: margin, model: models/smollm2-135m-instruct}
batches: {op: batcher, in: easy, with: {batch_size: 8, max_length: 2048}}
";
    const INPUTS: &'static [PortSpec] = evaluation::INPUTS;
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("records", ITEMS, "The records with their scores.").following("records").passing_retractions(),
        PortSpec::new("metrics", &[PortType::Metrics], "Mean, lowest and highest score."),
    ];
    const PLACEMENT: Placement = Placement::Device;
    type Config = ScoreConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let mut issues = Vec::from_iter(value_name_issue("as", &config.name));
        issues.extend(config.settings().check());
        issues
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
        let evaluator = config.settings().build(context)?;
        Ok(Score { node: context.node.into(), name: config.name, evaluator })
    }
}
