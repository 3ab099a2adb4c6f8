//! Expressions over prompts, samples and pairs: the names that stand for what a record holds, and what may come of them.

use rhai::{Array, Dynamic, Engine, EvalAltResult, Map, Scope};
use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::{OperatorError, PortType, TokenId};

use super::functions::{NAMES, text_of};
use super::{Expression, ExpressionError, number, with_article};
use crate::item::{ITEMS, Item, Part, Texts};

/// What an expression may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    /// The step at which the expression is evaluated.
    Step,
    /// The data row.
    Row,
    /// The pass over the data.
    Epoch,
    /// The node that read the data row.
    Source,
    /// The node that made the record.
    Origin,
    /// Its numbers and texts: `values.NAME`.
    Values,
    /// Whether a model of this run wrote a response.
    Generated,
    /// Updates since the weights that wrote it; 0 where none did.
    Staleness,
    /// First rewritten token of the rejected response; 0 where none is.
    SegmentStart,
    /// Rewritten tokens of the rejected response; 0 where none are.
    SegmentTokens,
    /// Whether there is a rejected response.
    HasRejected,
    /// A part as text.
    Text(Part),
    /// A part's tokens.
    Ids(Part),
    /// A part's number of tokens.
    Len(Part),
    /// A response's summed log-probability, in nats.
    Logps(Part),
    /// The same per token.
    AvgLogps(Part),
}

impl Name {
    /// As it is written.
    pub const fn text(self) -> &'static str {
        match self {
            Name::Step => "step",
            Name::Row => "row",
            Name::Epoch => "epoch",
            Name::Source => "source",
            Name::Origin => "origin",
            Name::Values => "values",
            Name::Generated => "generated",
            Name::Staleness => "staleness",
            Name::SegmentStart => "segment_start",
            Name::SegmentTokens => "segment_tokens",
            Name::HasRejected => "has_rejected",
            Name::Text(part) => part.name(),
            Name::Ids(part) => part.ids_name(),
            Name::Len(part) => part.len_name(),
            Name::Logps(Part::Chosen) => "chosen_logps",
            Name::Logps(Part::Rejected) => "rejected_logps",
            Name::Logps(_) => "logps",
            Name::AvgLogps(Part::Chosen) => "chosen_avg_logps",
            Name::AvgLogps(Part::Rejected) => "rejected_avg_logps",
            Name::AvgLogps(_) => "avg_logps",
        }
    }

    /// The names for records of a type.
    pub fn of(port_type: PortType) -> Vec<Name> {
        let mut names = vec![Name::Step, Name::Row, Name::Source, Name::Values];
        names.extend(match port_type {
            PortType::Prompts => vec![Name::Epoch, Name::HasRejected],
            PortType::Samples => vec![Name::Origin, Name::Generated, Name::Staleness],
            _ => vec![
                Name::Origin,
                Name::Generated,
                Name::Staleness,
                Name::SegmentStart,
                Name::SegmentTokens,
                Name::HasRejected,
            ],
        });
        for part in Part::of(port_type) {
            names.extend([Name::Text(*part), Name::Ids(*part), Name::Len(*part)]);
            if *part != Part::Prompt {
                names.extend([Name::Logps(*part), Name::AvgLogps(*part)]);
            }
        }
        names
    }

    /// All names there are.
    pub fn all() -> Vec<Name> {
        let mut names: Vec<Name> = Vec::new();
        for name in ITEMS.iter().flat_map(|port_type| Name::of(*port_type)) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    /// Whether it needs a model's log-probabilities.
    pub fn is_logps(self) -> bool {
        matches!(self, Name::Logps(_) | Name::AvgLogps(_))
    }
}

/// What an expression must come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Truth,
    /// A finite number; truths count as 1 and 0.
    Number,
    /// A text.
    Text,
    /// A number as above, or a text.
    Value,
    /// A list of token ids.
    Ids,
}

/// What an expression came to.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Of [`Kind::Truth`].
    Truth(bool),
    /// Of [`Kind::Number`].
    Number(f64),
    /// Of [`Kind::Text`].
    Text(String),
    /// Of [`Kind::Ids`].
    Ids(Vec<TokenId>),
}

impl Kind {
    fn outcome(self, value: &Dynamic) -> Result<Outcome, ExpressionError> {
        let found = || match value.type_name() {
            "bool" => format!("the truth value {value}"),
            "i64" | "f64" => format!("the number {value}"),
            other => with_article(other),
        };
        let (outcome, expected) = match self {
            Kind::Truth => (value.as_bool().ok().map(Outcome::Truth), "true or false"),
            Kind::Number => {
                let truth = value.as_bool().ok().map(f64::from);
                let number = truth.or_else(|| number(value)).filter(|number| number.is_finite());
                (number.map(Outcome::Number), "a finite number")
            }
            Kind::Value if value.is_string() => return Kind::Text.outcome(value),
            Kind::Value => return Kind::Number.outcome(value),
            Kind::Text => (text_of(value).map(|text| Outcome::Text(text.into())), "a text"),
            Kind::Ids => (ids(value).map(Outcome::Ids), "a list of token ids"),
        };
        outcome.ok_or_else(|| ExpressionError::whole(format!("expected {expected}, found {}", found())))
    }
}

fn ids(value: &Dynamic) -> Option<Vec<TokenId>> {
    let list = value.read_lock::<Array>()?;
    list.iter().map(|id| TokenId::try_from(id.as_int().ok()?).ok()).collect()
}

/// Log-probabilities of a record's responses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Logps {
    /// Sum and mean of the chosen, or only, response, in nats.
    pub first: (f64, f64),
    /// The same of the rejected response; 0 where there is none.
    pub rejected: (f64, f64),
}

/// An expression under a key, with the names that it uses.
#[derive(Clone, Debug)]
pub struct Formula {
    /// The key under `with`.
    pub key: String,
    /// What it must come to.
    pub kind: Kind,
    /// The names in it.
    pub uses: Vec<Name>,
    expression: Expression,
    /// Names that it reads from `values`, as far as its text tells.
    values: Vec<String>,
}

/// So many values of an expression are tried out as numbers and as texts.
const MOST_VALUES: usize = 5;

/// What there is to know of a record while an expression is evaluated.
pub struct Facts<'a> {
    /// The record.
    pub item: &'a Item,
    /// The step.
    pub step: u64,
    /// For its texts.
    pub texts: Option<&'a Texts>,
    /// Where a model has scored it.
    pub logps: Option<Logps>,
}

impl Formula {
    /// Read an expression over records of one type, or of any.
    ///
    /// # Errors
    /// With its place in the text: what it says is no expression, unknown, or never of that kind.
    pub fn read(
        engine: &Engine,
        key: &str,
        text: &str,
        kind: Kind,
        port_type: Option<PortType>,
    ) -> Result<Self, ConfigIssue> {
        let names = port_type.map_or_else(Name::all, Name::of);
        let compile = |left_out: Option<Name>| {
            let known = names.iter().filter(|name| Some(**name) != left_out).map(|name| name.text());
            Expression::compile(engine, text, known)
        };
        let wrong = |error: ExpressionError| error.issue(key);
        let expression = compile(None).map_err(wrong)?;
        // An expression that cannot do without a name uses it.
        let uses = names.iter().copied().filter(|name| compile(Some(*name)).is_err()).collect();
        let formula = Formula { key: key.to_owned(), kind, uses, expression, values: values_named(text) };
        formula.try_out(engine).map_err(wrong)?;
        Ok(formula)
    }

    /// Evaluate it on made-up records: shows types that can never be right, and work without end. Whether a value is a
    /// number or a text is for the data to say: each in turn is made up as either.
    fn try_out(&self, engine: &Engine) -> Result<(), ExpressionError> {
        let mut first = None;
        for texts in 0..1_u32 << self.values.len().min(MOST_VALUES) {
            match self.try_with(engine, texts) {
                Ok(()) => return Ok(()),
                Err(error) if error.is_limit() => return Err(error),
                Err(error) => first = first.or(Some(error)),
            }
        }
        first.map_or(Ok(()), Err)
    }

    fn try_with(&self, engine: &Engine, texts: u32) -> Result<(), ExpressionError> {
        let mut scope = Scope::new();
        for name in &self.uses {
            scope.push_dynamic(name.text(), self.made_up(*name, texts));
        }
        match self.expression.evaluate(engine, &mut scope) {
            Ok(value) => self.kind.outcome(&value).map(drop),
            Err(error) => match error.unwrap_inner() {
                // Depends on what is in a record.
                EvalAltResult::ErrorPropertyNotFound(..)
                | EvalAltResult::ErrorArithmetic(..)
                | EvalAltResult::ErrorArrayBounds(..)
                | EvalAltResult::ErrorStringBounds(..)
                | EvalAltResult::ErrorIndexNotFound(..)
                | EvalAltResult::ErrorRuntime(..) => Ok(()),
                _ => Err(ExpressionError::of(&error, NAMES.iter().copied())),
            },
        }
    }

    /// A value for a name; of `values` those are texts whose bit is set.
    fn made_up(&self, name: Name, texts: u32) -> Dynamic {
        let value = |index: usize| match texts >> index.min(MOST_VALUES) & 1 {
            1 => Dynamic::from("some text"),
            _ => Dynamic::from(1.0),
        };
        match name {
            Name::Generated | Name::HasRejected => true.into(),
            Name::Source | Name::Origin => "node".into(),
            Name::Text(_) => "some text".into(),
            Name::Ids(_) => list(&[5, 6, 7]),
            Name::Logps(_) | Name::AvgLogps(_) => (-1.5).into(),
            Name::Values => {
                let values = self.values.iter().enumerate();
                values.map(|(index, name)| (name.as_str().into(), value(index))).collect::<Map>().into()
            }
            _ => 3_i64.into(),
        }
    }

    /// What it comes to for a record.
    ///
    /// # Errors
    /// With the key: a value that the record lacks, another kind than expected, or a limit.
    pub fn evaluate(&self, engine: &Engine, facts: &Facts) -> Result<Outcome, OperatorError> {
        let mut scope = Scope::new();
        for name in &self.uses {
            scope.push_dynamic(name.text(), facts.value(*name)?);
        }
        let value = self.expression.evaluate(engine, &mut scope).map_err(|error| {
            let said = ExpressionError::of(&error, NAMES.iter().copied());
            let there: Vec<&str> = facts.item.values().names().map(String::as_str).collect();
            match error.unwrap_inner() {
                EvalAltResult::ErrorPropertyNotFound(..) => {
                    let there = if there.is_empty() { "none".into() } else { there.join(", ") };
                    format!("`{}`: {said}; the record's values are: {there}", self.key)
                }
                _ => format!("`{}`: {said}", self.key),
            }
        })?;
        Ok(self.kind.outcome(&value).map_err(|error| format!("`{}`: {error}", self.key))?)
    }
}

impl Facts<'_> {
    fn value(&self, name: Name) -> Result<Dynamic, OperatorError> {
        let count = |count: usize| Dynamic::from(i64::try_from(count).unwrap_or(i64::MAX));
        let whole = |number: u64| Dynamic::from(i64::try_from(number).unwrap_or(i64::MAX));
        let segment = match self.item {
            Item::Pair(pair) => pair.segment,
            _ => None,
        };
        let logps = || self.logps.ok_or("log-probabilities need `model`, or weights");
        Ok(match name {
            Name::Step => whole(self.step),
            Name::Row => whole(self.item.row()),
            Name::Epoch => match self.item {
                Item::Prompt(prompt) => whole(prompt.epoch),
                _ => return Err("only prompts have an `epoch`".into()),
            },
            Name::Source => self.item.source().into(),
            Name::Origin => self.item.made().map_or("", |(origin, ..)| origin).into(),
            Name::Values => {
                let values = self.item.values();
                let numbers = values.numbers().map(|(name, number)| (name.as_str().into(), number.into()));
                let texts = values.texts().map(|(name, text)| (name.as_str().into(), text.clone().into()));
                numbers.chain(texts).collect::<Map>().into()
            }
            Name::Generated => self.item.weights_version().is_some().into(),
            Name::Staleness => {
                whole(self.item.weights_version().map_or(0, |version| self.step.saturating_sub(version)))
            }
            Name::SegmentStart => count(segment.map_or(0, |segment| segment.start)),
            Name::SegmentTokens => count(segment.map_or(0, |segment| segment.len)),
            Name::HasRejected => self.item.ids(Part::Rejected).is_some().into(),
            Name::Text(part) => match self.item.ids(part) {
                Some(ids) => self.texts.ok_or("texts need `tokenizer`")?.decode(part, ids)?.into(),
                None => "".into(),
            },
            Name::Ids(part) => list(self.item.ids(part).unwrap_or_default()),
            Name::Len(part) => count(self.item.ids(part).map_or(0, <[TokenId]>::len)),
            Name::Logps(Part::Rejected) => logps()?.rejected.0.into(),
            Name::Logps(_) => logps()?.first.0.into(),
            Name::AvgLogps(Part::Rejected) => logps()?.rejected.1.into(),
            Name::AvgLogps(_) => logps()?.first.1.into(),
        })
    }
}

fn list(ids: &[TokenId]) -> Dynamic {
    ids.iter().map(|id| Dynamic::from(i64::from(*id))).collect::<Array>().into()
}

/// Names after `values.` in a text, each once.
fn values_named(text: &str) -> Vec<String> {
    let name = |rest: &str| -> String {
        rest.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect()
    };
    let mut names: Vec<String> = text.split("values.").skip(1).map(name).filter(|name| !name.is_empty()).collect();
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests;
