//! Expressions evaluated for every record of a step: what `map`, `filter` and `score` share.

use std::path::{Path, PathBuf};

use rhai::Engine;
use sapo_flow_engine::operator::{ConfigIssue, Connections};
use sapo_flow_engine::{BuildContext, Inputs, OperatorError, PortSpec, PortType, Record};
use sapo_flow_training::text::TextTokenizer;

use super::engine;
use super::records::{Facts, Formula, Kind, Name, Outcome};
use crate::data::tokenizer_files;
use crate::item::{ITEMS, Item, Texts};
use crate::scorer::{Scorer, ScorerSettings};

/// The inputs of an operator that evaluates expressions.
pub const INPUTS: &[PortSpec] = &[
    PortSpec::new("records", ITEMS, "Prompts, samples or pairs, all of one type.").many().honouring_retractions(),
    PortSpec::new("weights", &[PortType::Weights], "The model whose log-probabilities are read.").optional(),
];

/// What the config of such an operator says.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Key, text and kind of each expression.
    pub formulas: Vec<(String, String, Kind)>,
    /// Directory of the tokenizer, for texts.
    pub tokenizer: Option<PathBuf>,
    /// Whether texts are turned into tokens.
    pub writes_texts: bool,
    /// For log-probabilities.
    pub scorer: ScorerSettings,
}

impl Settings {
    /// The expressions, or what is wrong with them.
    fn read(&self, engine: &Engine, port_type: Option<PortType>) -> Result<Vec<Formula>, Vec<ConfigIssue>> {
        let read = |(key, text, kind): &(String, String, Kind)| Formula::read(engine, key, text, *kind, port_type);
        let (mut formulas, mut issues) = (Vec::new(), Vec::new());
        for formula in self.formulas.iter().map(read) {
            match formula {
                Ok(formula) => formulas.push(formula),
                Err(issue) => issues.push(issue),
            }
        }
        if issues.is_empty() { Ok(formulas) } else { Err(issues) }
    }

    /// For [`Define::check`](sapo_flow_engine::Define::check).
    pub fn check(&self) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        let formulas = match self.read(&engine(), None) {
            Ok(formulas) => formulas,
            Err(issues) => return issues,
        };
        let reading = formulas.iter().find_map(|formula| {
            let text = formula.uses.iter().find(|name| matches!(name, Name::Text(_)))?;
            Some(format!("is needed, since `{}` reads the text `{}`", formula.key, text.text()))
        });
        let writing = self.writes_texts.then(|| "is needed, since texts are set".to_owned());
        match (&self.tokenizer, reading.or(writing)) {
            (None, Some(why)) => issues.push(ConfigIssue::new("tokenizer", why)),
            (Some(_), None) => {
                issues.push(ConfigIssue::new("tokenizer", "would have no effect: no expression reads or sets a text"));
            }
            _ => {}
        }
        issues
    }

    /// For [`Define::check_connections`](sapo_flow_engine::Define::check_connections).
    pub fn check_connections(&self, connections: &Connections) -> Vec<ConfigIssue> {
        match self.read(&engine(), connections.input("records")) {
            Ok(formulas) => self.scorer.check(asks_for_logps(&formulas), connections),
            Err(issues) => issues,
        }
    }

    /// Files that decide what comes out.
    pub fn files(&self) -> Vec<PathBuf> {
        let tokenizer = self.tokenizer.iter().flat_map(|directory| tokenizer_files(directory));
        tokenizer.chain(self.scorer.model.clone()).collect()
    }

    /// The expressions, ready.
    ///
    /// # Errors
    /// When the tokenizer cannot be read, or there is no such device.
    pub fn build(&self, context: &BuildContext) -> Result<Evaluator, OperatorError> {
        let engine = engine();
        let formulas = self.read(&engine, None).map_err(|issues| {
            issues.iter().map(|issue| format!("`{}`: {issue}", issue.key)).collect::<Vec<_>>().join("; ")
        })?;
        let load = |directory: &Path| TextTokenizer::load(directory).map(|tokenizer| Texts { tokenizer });
        let texts = self.tokenizer.as_deref().map(load).transpose()?;
        let scorer = match asks_for_logps(&formulas) {
            true => Some(Scorer::new(self.scorer.clone(), context)?),
            false => None,
        };
        Ok(Evaluator { engine, formulas, texts, scorer })
    }
}

fn asks_for_logps(formulas: &[Formula]) -> bool {
    formulas.iter().any(|formula| formula.uses.iter().any(|name| name.is_logps()))
}

/// See the [module](self).
pub struct Evaluator {
    engine: Engine,
    formulas: Vec<Formula>,
    /// For parts that are set as texts.
    pub texts: Option<Texts>,
    scorer: Option<Scorer>,
}

/// A record of a step.
pub enum Evaluated {
    /// With what each expression came to, in their order.
    Item(Item, Vec<Outcome>),
    /// A retraction, which passes.
    Other(Record),
}

impl Evaluator {
    /// Load what the expressions need.
    ///
    /// # Errors
    /// When the model cannot be loaded.
    pub fn start(&mut self) -> Result<(), OperatorError> {
        self.scorer.as_mut().map_or(Ok(()), Scorer::start)
    }

    /// The records of a step, in order.
    ///
    /// # Errors
    /// With the record and the expression.
    pub fn evaluate(&self, step: u64, inputs: &mut Inputs) -> Result<Vec<Evaluated>, OperatorError> {
        let weights = inputs.weights("weights");
        let records: Vec<Result<Item, Record>> = inputs.take("records").into_iter().map(Item::of).collect();
        let items: Vec<&Item> = records.iter().filter_map(|record| record.as_ref().ok()).collect();
        let mut logps = match &self.scorer {
            Some(scorer) if !items.is_empty() => scorer.logps(&items, weights.as_ref())?.into_iter(),
            _ => Vec::new().into_iter(),
        };
        let mut evaluated = Vec::with_capacity(records.len());
        for record in records {
            evaluated.push(match record {
                Ok(item) => {
                    let facts = Facts { item: &item, step, texts: self.texts.as_ref(), logps: logps.next() };
                    let outcomes = self.formulas.iter().map(|formula| formula.evaluate(&self.engine, &facts));
                    let outcomes = outcomes.collect::<Result<Vec<_>, _>>();
                    let outcomes = outcomes.map_err(|error| format!("{}: {error}", item.label()))?;
                    Evaluated::Item(item, outcomes)
                }
                Err(other) => Evaluated::Other(other),
            });
        }
        Ok(evaluated)
    }
}

#[cfg(test)]
mod tests;
