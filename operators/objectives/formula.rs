//! An objective's formulas, compiled: which numbers of pairs they need, and their values on tensors.
//!
//! Which names a formula uses is found by evaluating it once on a few made-up pairs: a name that is missing is supplied,
//! and the evaluation begins again. Params decide which branches are taken and tensors never do, so what one evaluation
//! uses all of them use. The same evaluation finds results that are no losses.

use std::collections::{BTreeMap, BTreeSet};

use rhai::{Dynamic, EvalAltResult, Map, Scope};
use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_training::objectives::{Needs, PairLosses, PairNumbers, PairTensor};
use serde_yaml::Value as Yaml;
use tch::{Kind, Tensor};

use super::definition::Definition;
use super::tensors::{ENGINE, FUNCTIONS, Value};
use super::trial;
use crate::expression::{Expression, ExpressionError, number};

/// Numbers that come with every pair, and what they are.
pub const RECORD_NUMBERS: [(&str, &str); 3] = [
    ("staleness", "steps between the weights that generated the pair and the step it was generated at; else 0"),
    ("age", "steps since the pair was generated"),
    ("segment_tokens", "tokens of the rejected response that a sampler wrote as a segment; else 0"),
];

/// The mapping with the pairs' own numbers: `values.score`.
pub const VALUES: &str = "values";

/// Something wrong with a definition, at a key of it.
pub type Issue = ConfigIssue;

/// A definition with its params set, ready to be evaluated.
#[derive(Debug)]
pub struct Formula {
    /// What its expressions name, in an order in which each needs those before it alone.
    bindings: Vec<(String, Binding)>,
    /// Names of the pairs' own numbers.
    values: BTreeSet<String>,
    /// The loss, its weight, rewards, metrics and next states, each with its key.
    outputs: Vec<Output>,
    needs: Needs,
}

#[derive(Debug)]
pub(super) enum Binding {
    Tensor(PairTensor),
    Number,
    Values,
    Constant(Dynamic),
    State,
    Named(Expression),
}

/// What an expression's value is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Loss,
    Weight,
    ChosenReward,
    RejectedReward,
    Report(String),
    Next(String),
}

#[derive(Debug)]
pub(super) struct Output {
    pub role: Role,
    /// Where the definition has it.
    pub key: String,
    expression: Expression,
}

impl Formula {
    /// Compile a definition, with these of its params set.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn compile(definition: &Definition, given: &BTreeMap<String, Yaml>) -> Result<Self, Vec<Issue>> {
        let mut issues = Vec::new();
        let sources = Sources::read(definition, given, &mut issues);
        let outputs = outputs(definition, &sources, &mut issues);
        issues.extend(definition.unread().filter(|(_, name)| !given.contains_key(*name)).map(|(group, name)| {
            Issue::new(format!("{group}.{name}"), format!("`{name}` has no effect: the formula never reads it"))
        }));
        if !issues.is_empty() {
            return Err(issues);
        }
        let trial = trial::run(&sources, &outputs)?;
        for name in given.keys().filter(|name| !trial.bindings.iter().any(|(used, _)| used == *name)) {
            issues.push(Issue::new(name, format!("`{name}` has no effect: with these params nothing reads it")));
        }
        if !issues.is_empty() {
            return Err(issues);
        }
        let mut needs = Needs { whole_step: trial.mixed || !definition.state.is_empty(), ..Needs::default() };
        needs.state = definition.state.iter().map(|(name, state)| (name.clone(), state.initial)).collect();
        for (name, binding) in &trial.bindings {
            match binding {
                Binding::Tensor(tensor) => {
                    needs.tensors.insert(*tensor);
                }
                Binding::Number => {
                    needs.numbers.insert(name.clone());
                }
                _ => {}
            }
        }
        needs.numbers.extend(trial.values.iter().map(|name| format!("{VALUES}.{name}")));
        Ok(Formula { bindings: trial.bindings, values: trial.values, outputs, needs })
    }

    /// What it is computed from.
    pub fn needs(&self) -> &Needs {
        &self.needs
    }

    /// Losses and reports of some pairs.
    ///
    /// # Errors
    /// What torch or Rhai says of it.
    pub fn losses(&self, pairs: &PairNumbers) -> Result<PairLosses, ExpressionError> {
        let mut scope = Scope::new();
        for (name, binding) in &self.bindings {
            let value = self.value(name, binding, pairs, &mut scope)?;
            scope.push_constant_dynamic(name.clone(), value);
        }
        let mut found: Vec<(&Role, Dynamic)> = Vec::with_capacity(self.outputs.len());
        for output in &self.outputs {
            found.push((&output.role, evaluated(&output.expression, &mut scope)?));
        }
        collect(found, pairs, &self.needs)
    }

    fn value(
        &self,
        name: &str,
        binding: &Binding,
        pairs: &PairNumbers,
        scope: &mut Scope,
    ) -> Result<Dynamic, ExpressionError> {
        let missing = || ExpressionError::whole(format!("`{name}` was not computed"));
        let tensor = |tensor: Option<&Tensor>| {
            let tensor = tensor.ok_or_else(missing)?;
            Ok(Dynamic::from(Value::new(tensor.shallow_clone(), false)))
        };
        match binding {
            Binding::Tensor(of) => tensor(pairs.tensors.get(of)),
            Binding::Number => tensor(pairs.numbers.get(name)),
            Binding::Constant(value) => Ok(value.clone()),
            Binding::State => pairs.state.get(name).map(|value| Value::carried(*value)).ok_or_else(missing),
            Binding::Named(expression) => evaluated(expression, scope),
            Binding::Values => {
                let mut map = Map::new();
                for name in &self.values {
                    map.insert(name.into(), tensor(pairs.numbers.get(&format!("{VALUES}.{name}")))?);
                }
                Ok(map.into())
            }
        }
    }
}

fn evaluated(expression: &Expression, scope: &mut Scope) -> Result<Dynamic, ExpressionError> {
    expression.evaluate(&ENGINE, scope).map_err(|error| readable(&error))
}

/// An evaluation's error as people read it.
pub(super) fn readable(error: &EvalAltResult) -> ExpressionError {
    let mut error = ExpressionError::of(error, FUNCTIONS);
    if error.message == "expected true or false, found a tensor" {
        error.message = "a tensor is not true or false".into();
        error.help = Some("`where(condition, a, b)` chooses for each pair".into());
    }
    error
}

/// The outputs' values as losses, with what is reported by default.
fn collect(found: Vec<(&Role, Dynamic)>, pairs: &PairNumbers, needs: &Needs) -> Result<PairLosses, ExpressionError> {
    let tensor = |value: &Dynamic| -> Result<Tensor, ExpressionError> {
        let tensor = value.read_lock::<Value>().map(|value| value.tensor());
        let scalar = || Some(Tensor::from(number(value)?).to_kind(Kind::Double));
        tensor.or_else(scalar).ok_or_else(|| ExpressionError::whole("expected a tensor or a number"))
    };
    let torch = |error: tch::TchError| ExpressionError::whole(sapo_flow_training::Error::from(error).to_string());
    let mut losses = None;
    let (mut report, mut rewards, mut state) = (Vec::new(), Vec::new(), Vec::new());
    for (role, value) in &found {
        match role {
            Role::Loss => losses = Some(tensor(value)?),
            // A weight of 1 changes nothing.
            Role::Weight if number(value) == Some(1.0) => {}
            Role::Weight => {
                let own = losses.take().ok_or_else(|| ExpressionError::whole("a weight without a loss"))?;
                losses = Some(own.f_mul(&tensor(value)?.f_detach().map_err(torch)?).map_err(torch)?);
            }
            Role::ChosenReward | Role::RejectedReward => rewards.push(tensor(value)?),
            Role::Report(name) => report.push((name.clone(), tensor(value)?)),
            Role::Next(name) => state.push((name.clone(), tensor(value)?)),
        }
    }
    if let [chosen, rejected] = rewards.as_slice() {
        let accurate = chosen.f_gt_tensor(rejected).and_then(|more| more.f_to_kind(chosen.kind())).map_err(torch)?;
        report.push(("rewards/accuracies".into(), accurate));
        report.push(("rewards/margins".into(), chosen.f_sub(rejected).map_err(torch)?));
    }
    for (name, tensor) in ["rewards/chosen", "rewards/rejected"].into_iter().zip(rewards) {
        report.push((name.into(), tensor));
    }
    for (name, choices) in DEFAULT_REPORTS {
        let tensor = choices.iter().find(|of| needs.tensors.contains(of)).and_then(|of| pairs.tensors.get(of));
        if let Some(tensor) = tensor.filter(|_| report.iter().all(|(other, _)| other != name)) {
            report.push((name.into(), tensor.shallow_clone()));
        }
    }
    let losses = losses.ok_or_else(|| ExpressionError::whole("there is no loss"))?;
    Ok(PairLosses { losses, report, state })
}

/// Log-probabilities that are reported where the formula names them, as TRL does: sums, or else means.
const DEFAULT_REPORTS: [(&str, [PairTensor; 2]); 2] = [
    ("logps/chosen", [PairTensor::ChosenLogps, PairTensor::ChosenAvgLogps]),
    ("logps/rejected", [PairTensor::RejectedLogps, PairTensor::RejectedAvgLogps]),
];

/// What the names in a definition's expressions stand for.
pub(super) struct Sources {
    constants: BTreeMap<String, Dynamic>,
    named: BTreeMap<String, Expression>,
    state: BTreeMap<String, f64>,
}

impl Sources {
    fn read(definition: &Definition, given: &BTreeMap<String, Yaml>, issues: &mut Vec<Issue>) -> Self {
        let mut constants = BTreeMap::new();
        for (name, param) in &definition.params {
            match param.value(given.get(name)) {
                Ok(value) => {
                    constants.insert(name.clone(), value);
                }
                Err(expected) => issues.push(Issue::new(name, expected)),
            }
        }
        let groups = [
            ("params", definition.params.keys().collect::<Vec<_>>()),
            ("let", definition.named.keys().collect()),
            ("state", definition.state.keys().collect()),
        ];
        let mut seen: BTreeMap<&str, &str> = BTreeMap::new();
        for (group, names) in groups {
            for name in names {
                if let Some(what) = built_in_name(name).or_else(|| seen.insert(name, group).map(|_| "twice in use")) {
                    let message = format!("`{name}` cannot be a name here: it is {what}");
                    issues.push(Issue::new(format!("{group}.{name}"), message));
                }
            }
        }
        let state = definition.state.iter().map(|(name, state)| (name.clone(), state.initial)).collect();
        let mut sources = Sources { constants, named: BTreeMap::new(), state };
        for (name, text) in &definition.named {
            match sources.compile(text, definition) {
                Ok(expression) => {
                    sources.named.insert(name.clone(), expression);
                }
                Err(error) => issues.push(error.issue(format!("let.{name}"))),
            }
        }
        sources
    }

    /// Read an expression in which all names of the definition may occur.
    fn compile(&self, text: &str, definition: &Definition) -> Result<Expression, ExpressionError> {
        let tensors = PairTensor::ALL.iter().map(|tensor| tensor.name());
        let numbers = RECORD_NUMBERS.iter().map(|(name, _)| *name);
        let own = definition.params.keys().chain(definition.named.keys()).chain(definition.state.keys());
        Expression::compile(&ENGINE, text, tensors.chain(numbers).chain([VALUES]).chain(own.map(String::as_str)))
    }

    /// What a name stands for, if anything.
    pub fn binding(&self, name: &str) -> Option<Binding> {
        if let Some(tensor) = PairTensor::ALL.into_iter().find(|tensor| tensor.name() == name) {
            return Some(Binding::Tensor(tensor));
        }
        if RECORD_NUMBERS.iter().any(|(number, _)| *number == name) {
            return Some(Binding::Number);
        }
        if name == VALUES {
            return Some(Binding::Values);
        }
        let constant = || self.constants.get(name).cloned().map(Binding::Constant);
        let named = || self.named.get(name).cloned().map(Binding::Named);
        constant().or_else(named).or_else(|| self.state.get(name).map(|_| Binding::State))
    }

    /// What a state is at first.
    pub fn initial(&self, name: &str) -> f64 {
        self.state.get(name).copied().unwrap_or_default()
    }
}

/// What a name means everywhere, if it does.
fn built_in_name(name: &str) -> Option<&'static str> {
    let identifier = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !identifier {
        return Some("not letters, digits and `_`");
    }
    if PairTensor::ALL.iter().any(|tensor| tensor.name() == name) {
        return Some("a number of every pair");
    }
    if name == VALUES || RECORD_NUMBERS.iter().any(|(number, _)| *number == name) {
        return Some("a number that pairs bring along");
    }
    (["name", "file", "weight"].contains(&name)).then_some("a key beside the params")
}

/// The expressions to evaluate at every step, the loss first.
fn outputs(definition: &Definition, sources: &Sources, issues: &mut Vec<Issue>) -> Vec<Output> {
    if definition.formula.is_none() {
        issues.push(Issue::new("formula", "a definition needs a `formula`: the loss of every pair"));
    }
    let mut texts: Vec<(Role, String, &String)> = Vec::new();
    texts.extend(definition.formula.iter().map(|text| (Role::Loss, "formula".to_owned(), text)));
    texts.extend(definition.pair_weight.iter().map(|text| (Role::Weight, "pair_weight".to_owned(), text)));
    if let Some([chosen, rejected]) = &definition.rewards {
        texts.push((Role::ChosenReward, "rewards.0".to_owned(), chosen));
        texts.push((Role::RejectedReward, "rewards.1".to_owned(), rejected));
    }
    let report = definition.report.iter();
    texts.extend(report.map(|(name, text)| (Role::Report(name.clone()), format!("report.{name}"), text)));
    let state = definition.state.iter();
    texts.extend(state.map(|(name, state)| (Role::Next(name.clone()), format!("state.{name}.next"), &state.next)));
    let mut outputs = Vec::new();
    for (role, key, text) in texts {
        match sources.compile(text, definition) {
            Ok(expression) => outputs.push(Output { role, key, expression }),
            Err(error) => issues.push(error.issue(key)),
        }
    }
    outputs
}

impl Output {
    /// The expression's value.
    pub fn evaluate(&self, scope: &mut Scope) -> Result<Dynamic, Box<EvalAltResult>> {
        self.expression.evaluate(&ENGINE, scope)
    }
}
