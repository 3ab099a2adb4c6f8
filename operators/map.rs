//! `map`: sets numbers and parts of records by expressions.

use std::collections::BTreeMap;
use std::path::PathBuf;

use sapo_flow_engine::operator::{ConfigIssue, Connections};
use sapo_flow_engine::{
    BuildContext, Define, Inputs, Metrics, NodePlan, Operator, OperatorError, Outputs, Placement, PlanContext,
    PortSpec, PortType, Record,
};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::expression::evaluation::{self, Evaluated, Evaluator, Settings};
use crate::expression::records::{Kind, Name, Outcome};
use crate::item::{ITEMS, Item, Part, value_name_issue};
use crate::scorer::ScorerSettings;

/// What `map` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MapConfig {
    /// What to set to which expression: a number or a text under any name, a part's text (`prompt`, `response`, `chosen`, `rejected`), or
    /// tokens (`prompt_ids` and the like).
    pub set: BTreeMap<String, String>,
    /// A model directory with the tokenizer that the records were made with; needed where texts are read or set.
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

/// What an expression sets.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Value(String),
    Text(Part),
    Ids(Part),
}

impl Target {
    fn of(name: &str) -> Self {
        let parts = [Part::Prompt, Part::Chosen, Part::Rejected, Part::Response];
        let text = parts.iter().find(|part| part.name() == name).map(|part| Target::Text(*part));
        let ids = || parts.iter().find(|part| part.ids_name() == name).map(|part| Target::Ids(*part));
        text.or_else(ids).unwrap_or_else(|| Target::Value(name.to_owned()))
    }

    fn kind(&self) -> Kind {
        match self {
            Target::Value(_) => Kind::Value,
            Target::Text(_) => Kind::Text,
            Target::Ids(_) => Kind::Ids,
        }
    }

    fn part(&self) -> Option<Part> {
        match self {
            Target::Value(_) => None,
            Target::Text(part) | Target::Ids(part) => Some(*part),
        }
    }
}

impl MapConfig {
    fn targets(&self) -> Vec<Target> {
        self.set.keys().map(|name| Target::of(name)).collect()
    }

    fn settings(&self) -> Settings {
        let (model, device, batch_size) = (self.model.clone(), self.device.clone(), self.batch_size);
        let formula = |(name, text): (&String, &String)| (format!("set.{name}"), text.clone(), Target::of(name).kind());
        Settings {
            formulas: self.set.iter().map(formula).collect(),
            tokenizer: self.tokenizer.clone(),
            writes_texts: self.targets().iter().any(|target| matches!(target, Target::Text(_))),
            scorer: ScorerSettings { model, device, batch_size },
        }
    }
}

/// See the [module](self).
pub struct Map {
    node: String,
    targets: Vec<Target>,
    evaluator: Evaluator,
}

impl Map {
    fn set(&self, item: &mut Item, target: &Target, outcome: Outcome) -> Result<(), OperatorError> {
        match (target, outcome) {
            (Target::Value(name), Outcome::Number(number)) => {
                item.values_mut().insert(name.clone(), number);
            }
            (Target::Value(name), Outcome::Text(text)) => item.values_mut().insert_text(name.clone(), text),
            (Target::Text(part), Outcome::Text(text)) => {
                let texts = self.evaluator.texts.as_ref().ok_or("texts need `tokenizer`")?;
                // A text that is as it was keeps its tokens: there may be several ways to write one.
                let same = item.ids(*part).map(|ids| texts.decode(*part, ids)).transpose()?.as_ref() == Some(&text);
                if !same {
                    item.set_ids(*part, texts.encode(*part, &text)?)?;
                }
            }
            (Target::Ids(part), Outcome::Ids(ids)) => {
                if ids.is_empty() {
                    return Err(format!("the {} is empty", part.name()).into());
                }
                item.set_ids(*part, ids)?;
            }
            (target, outcome) => return Err(format!("{target:?} cannot be {outcome:?}").into()),
        }
        Ok(())
    }
}

impl Operator for Map {
    fn start(&mut self, _: Inputs) -> Result<Outputs, OperatorError> {
        self.evaluator.start()?;
        Ok(Outputs::new())
    }

    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        let mut sums: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        for record in self.evaluator.evaluate(step, &mut inputs)? {
            match record {
                Evaluated::Item(mut item, outcomes) => {
                    let label = item.label();
                    for (target, outcome) in self.targets.iter().zip(outcomes) {
                        if let (Target::Value(name), Outcome::Number(number)) = (target, &outcome) {
                            let sum = sums.entry(format!("{}/{name}", self.node)).or_default();
                            *sum = (sum.0 + number, sum.1 + 1.0);
                        }
                        self.set(&mut item, target, outcome).map_err(|error| format!("{label}: {error}"))?;
                    }
                    outputs.push("records", item.into_record());
                }
                Evaluated::Other(other) => outputs.push("records", other),
            }
        }
        let values = sums.into_iter().map(|(name, (sum, count))| (name, sum / count)).collect();
        outputs.push("metrics", Record::Metrics(Metrics { values }.into()));
        Ok(outputs)
    }
}

impl Define for Map {
    const NAME: &'static str = "map";
    const SUMMARY: &'static str = "Sets numbers, texts or tokens of prompts, samples or pairs by expressions.";
    const DOCS: &'static str = "\
Every expression under `set` sees the record as it arrives. A name of a part (`prompt`, `chosen`, `rejected`, `response`) \
takes a text, which needs `tokenizer` and gets an EOS if it is a response; a text that stays the same keeps its tokens. \
`prompt_ids` and the like take lists of tokens as they are. Any other name is that of a number or a text which joins the \
record's values: truths count as 1 and 0. Names, functions and limits of expressions are those of `filter`. Retractions pass.

A response that is set anew no longer counts as generated by a model of the run.

State: none. Errors: those of `filter`; an empty text; a number that is not finite; a part that records of this type lack.
Metrics: NODE/NAME, the mean of each number that is set.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat_pairs.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8}}
marked:
  op: map
  in: prompts.pairs
  with:
    set:
      length_ratio: chosen_len / max(rejected_len, 1)
      chosen: chosen.trim()
    tokenizer: models/smollm2-135m-instruct
batches: {op: batcher, in: marked, with: {batch_size: 8, max_length: 2048}}
";
    const INPUTS: &'static [PortSpec] = evaluation::INPUTS;
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("records", ITEMS, "The records with what was set.").following("records").passing_retractions(),
        PortSpec::new("metrics", &[PortType::Metrics], "Means of the numbers that were set."),
    ];
    const PLACEMENT: Placement = Placement::Device;
    type Config = MapConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        if config.set.is_empty() {
            issues.push(ConfigIssue::new("set", "expected names with expressions, found none"));
        }
        let values = config.set.keys().filter(|name| matches!(Target::of(name), Target::Value(_)));
        for name in values {
            let key = format!("set.{name}");
            if Name::all().iter().any(|known| known.text() == name) {
                issues.push(ConfigIssue::new(key, format!("`{name}` follows from the record, and cannot be set")));
            } else {
                issues.extend(value_name_issue(&key, name));
            }
        }
        for part in [Part::Prompt, Part::Chosen, Part::Rejected, Part::Response] {
            if config.set.contains_key(part.name()) && config.set.contains_key(part.ids_name()) {
                let message = format!("is set along with `{}`: leave out one of them", part.name());
                issues.push(ConfigIssue::new(format!("set.{}", part.ids_name()), message));
            }
        }
        issues.extend(config.settings().check());
        issues
    }

    fn check_connections(config: &Self::Config, connections: &Connections) -> Vec<ConfigIssue> {
        let mut issues = config.settings().check_connections(connections);
        let Some(port_type) = connections.input("records") else { return issues };
        for part in config.targets().iter().filter_map(Target::part).filter(|part| !Part::of(port_type).contains(part))
        {
            let names = [part.name(), part.ids_name()];
            let name = names.into_iter().find(|name| config.set.contains_key(*name)).unwrap_or_default();
            issues.push(ConfigIssue::new(format!("set.{name}"), format!("{port_type} have no `{}`", part.name())));
        }
        issues
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
        Ok(Map { node: context.node.into(), targets: config.targets(), evaluator })
    }
}
