//! A formula evaluated once on made-up pairs: what it uses, and whether its results can be losses.

use std::collections::BTreeSet;

use rhai::{Dynamic, EvalAltResult, Map, Scope};
use sapo_flow_training::objectives::PairTensor;
use tch::Tensor;

use super::formula::{Binding, Issue, Output, Role, Sources, VALUES, readable};
use super::tensors::{ENGINE, Value};
use crate::expression::{Expression, ExpressionError, number, with_article};

/// Made-up pairs; more than one, so that a number of the whole step does not look like one of each pair.
const PAIRS: usize = 3;

/// What a trial found.
pub(super) struct Trial {
    /// The names used, each after those that it needs.
    pub bindings: Vec<(String, Binding)>,
    /// Names of the pairs' own numbers.
    pub values: BTreeSet<String>,
    /// Whether a pair's loss depends on other pairs.
    pub mixed: bool,
}

/// Evaluate all outputs.
pub(super) fn run(sources: &Sources, outputs: &[Output]) -> Result<Trial, Vec<Issue>> {
    let mut evaluation = Evaluation {
        sources,
        scope: Scope::new(),
        trial: Trial { bindings: Vec::new(), values: BTreeSet::new(), mixed: false },
        pending: Vec::new(),
    };
    let mut issues = Vec::new();
    for output in outputs {
        match evaluation.output(output) {
            Ok(()) => {}
            // One mistake in a shared name shows in everything that uses it: once is enough.
            Err(Mistake { name, error }) => {
                issues.push(error.issue(name.map_or_else(|| output.key.clone(), |name| format!("let.{name}"))));
                break;
            }
        }
    }
    if issues.is_empty() { Ok(evaluation.trial) } else { Err(issues) }
}

/// An error, and the named expression that it is in, where it is in one.
struct Mistake {
    name: Option<String>,
    error: ExpressionError,
}

impl From<ExpressionError> for Mistake {
    fn from(error: ExpressionError) -> Self {
        Mistake { name: None, error }
    }
}

struct Evaluation<'a> {
    sources: &'a Sources,
    scope: Scope<'static>,
    trial: Trial,
    /// Names whose expressions are being evaluated, to find those that need themselves.
    pending: Vec<String>,
}

impl Evaluation<'_> {
    fn output(&mut self, output: &Output) -> Result<(), Mistake> {
        let value = self.value(&mut |scope| output.evaluate(scope))?;
        let tensor = value.read_lock::<Value>().map(|value| (*value).clone());
        self.trial.mixed |= tensor.as_ref().is_some_and(Value::is_mixed);
        Ok(check(&output.role, tensor.as_ref(), &value)?)
    }

    /// A value, in which names are supplied as they are asked for.
    fn value(
        &mut self,
        evaluate: &mut dyn FnMut(&mut Scope) -> Result<Dynamic, Box<EvalAltResult>>,
    ) -> Result<Dynamic, Mistake> {
        loop {
            let error = match evaluate(&mut self.scope) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            match error.unwrap_inner() {
                EvalAltResult::ErrorVariableNotFound(name, _) => {
                    let name = name.clone();
                    self.supply(&name).ok_or_else(|| readable(&error))??;
                }
                EvalAltResult::ErrorPropertyNotFound(name, _)
                    if self.scope.contains(VALUES) && !self.trial.values.contains(name) =>
                {
                    self.trial.values.insert(name.clone());
                    let values = self.trial.values.iter();
                    let map: Map = values.map(|name| (name.into(), made_up(1.0, 0.5).into_dynamic())).collect();
                    self.scope.set_value(VALUES, map);
                }
                _ => return Err(readable(&error).into()),
            }
        }
    }

    /// Put a name's value into the scope; none if there is no such name.
    fn supply(&mut self, name: &str) -> Option<Result<(), Mistake>> {
        let binding = self.sources.binding(name)?;
        let value = match &binding {
            Binding::Tensor(tensor) => made_up_of(*tensor).into_dynamic(),
            Binding::Number => made_up(1.0, 1.0).into_dynamic(),
            Binding::Values => Map::new().into(),
            Binding::Constant(value) => value.clone(),
            Binding::State => Value::carried(self.sources.initial(name)),
            Binding::Named(expression) => match self.named(name, expression) {
                Ok(value) => value,
                Err(error) => return Some(Err(error)),
            },
        };
        self.scope.push_dynamic(name.to_owned(), value);
        self.trial.bindings.push((name.to_owned(), binding));
        Some(Ok(()))
    }

    fn named(&mut self, name: &str, expression: &Expression) -> Result<Dynamic, Mistake> {
        if self.pending.iter().any(|other| other == name) {
            let chain = self.pending.join("` needs `");
            let error = ExpressionError::whole(format!("`{chain}` needs `{name}`: a name cannot need itself"));
            return Err(Mistake { name: Some(name.to_owned()), error });
        }
        self.pending.push(name.to_owned());
        let value = self.value(&mut |scope| expression.evaluate(&ENGINE, scope));
        self.pending.pop();
        value.map_err(|Mistake { name: inner, error }| Mistake { name: inner.or_else(|| Some(name.to_owned())), error })
    }
}

/// Whether a value is what its role asks for.
fn check(role: &Role, tensor: Option<&Value>, value: &Dynamic) -> Result<(), ExpressionError> {
    let wrong =
        |expected: &str, found: String| Err(ExpressionError::whole(format!("expected {expected}, found {found}")));
    let shape = tensor.map(|value| value.tensor().size());
    let found = match (&shape, number(value)) {
        (Some(shape), _) if shape.is_empty() => "one number for all of them".to_owned(),
        (Some(shape), _) => format!("{shape:?} for {PAIRS} pairs"),
        (None, Some(number)) => format!("the number {number}"),
        (None, None) => with_article(value.type_name()),
    };
    let for_each_pair = shape.as_deref() == Some(&[PAIRS as i64]);
    let for_all = shape.as_deref() == Some(&[]);
    match role {
        Role::Loss if !for_each_pair => wrong("a loss for each pair (the learner takes their mean)", found),
        Role::Loss if !tensor.is_some_and(|value| value.tensor().requires_grad()) => {
            wrong("a loss that depends on the policy", "one without a gradient: there is nothing to learn".into())
        }
        Role::Weight if !for_each_pair && !for_all && number(value).is_none() => wrong("a factor for each pair", found),
        Role::ChosenReward | Role::RejectedReward if !for_each_pair => wrong("a reward for each pair", found),
        Role::Report(_) if !for_each_pair && !for_all => wrong("a number for each pair, or a mean of those", found),
        Role::Next(_) if !for_all && number(value).is_none() => wrong("one number", found),
        _ => Ok(()),
    }
}

/// Numbers of the made-up pairs, from `first` on.
fn made_up(first: f32, step: f32) -> Value {
    let values: Vec<f32> = (0..PAIRS).map(|pair| first + step * pair as f32).collect();
    Value::new(Tensor::from_slice(&values), false)
}

fn made_up_of(tensor: PairTensor) -> Value {
    use PairTensor::*;
    let (values, differentiable) = match tensor {
        ChosenLogps => (made_up(-20.0, 3.0), true),
        RejectedLogps => (made_up(-25.0, 2.0), true),
        RefChosenLogps => (made_up(-21.0, 2.0), false),
        RefRejectedLogps => (made_up(-24.0, 3.0), false),
        ChosenAvgLogps => (made_up(-2.0, 0.5), true),
        RejectedAvgLogps => (made_up(-2.5, 0.4), true),
        ChosenLen | RejectedLen => (made_up(8.0, 2.0), false),
        ChosenNll | SequenceNll => (made_up(2.0, 0.5), true),
        ChosenTailLogps | RejectedTailLogps => (made_up(-1.0, 0.5), true),
        ChosenCollisionEntropy | RejectedCollisionEntropy => (made_up(1.0, 0.5), false),
    };
    Value::new(values.tensor().set_requires_grad(differentiable), false)
}
