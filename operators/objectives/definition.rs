//! What an objective is in YAML: named numbers of every pair, params, and expressions over them.

use std::collections::BTreeSet;

use indexmap::IndexMap;
use rhai::Dynamic;
use sapo_flow_engine::pipeline::closest;
use serde_yaml::Value;

use super::built_in;

/// An objective as written.
#[derive(Clone, Debug, Default)]
pub struct Definition {
    /// What it is, for people.
    pub description: String,
    /// Another definition to begin with: all of it holds here too, where nothing of the same name replaces it.
    pub uses: Option<String>,
    /// Numbers and words that its users may set.
    pub params: IndexMap<String, Param>,
    /// Expressions by name, for use in others: `let`.
    pub named: IndexMap<String, String>,
    /// The loss of every pair.
    pub formula: Option<String>,
    /// A factor of every pair's loss, without a gradient.
    pub pair_weight: Option<String>,
    /// The implicit rewards of the chosen and the rejected response.
    pub rewards: Option<[String; 2]>,
    /// Further metrics by name.
    pub report: IndexMap<String, String>,
    /// Numbers carried from step to step.
    pub state: IndexMap<String, State>,
    /// Which of its params and named expressions stand here, and not in what it uses: key and name.
    pub own: Vec<(&'static str, String)>,
}

/// A number carried from step to step.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// What it is at the first step.
    pub initial: f64,
    /// What it is at the next one.
    pub next: String,
}

/// A param: its default, or that and what may be set.
#[derive(Clone, Debug, Default)]
pub struct Param {
    /// A number or a word.
    pub default: Value,
    /// Least value.
    pub min: Option<f64>,
    /// Largest value.
    pub max: Option<f64>,
    /// What it must exceed.
    pub above: Option<f64>,
    /// What it must stay below.
    pub below: Option<f64>,
    /// All there is to choose from.
    pub choices: Vec<Value>,
    /// What it means.
    pub description: String,
}

impl Definition {
    /// With what it uses filled in.
    ///
    /// # Errors
    /// When it uses something that is not there.
    pub fn whole(self) -> Result<Definition, String> {
        let Some(name) = &self.uses else { return Ok(self) };
        let Some(base) = built_in::definition(name) else {
            let names: Vec<&str> = built_in::names_with_shared().collect();
            let help = closest(name, names.iter().copied()).map(|near| format!(" (did you mean `{near}`?)"));
            return Err(format!("there is no definition `{name}` to use{}", help.unwrap_or_default()));
        };
        let base = base.whole()?;
        let own_params = self.params.into_iter().map(|(name, param)| {
            let param = param.within(base.params.get(&name), &name)?;
            Ok((name, param))
        });
        let own_params: IndexMap<String, Param> = own_params.collect::<Result<_, String>>()?;
        let description = if self.description.is_empty() { base.description } else { self.description };
        Ok(Definition {
            description,
            uses: None,
            params: joined(base.params, own_params),
            named: joined(base.named, self.named),
            formula: self.formula.or(base.formula),
            pair_weight: self.pair_weight.or(base.pair_weight),
            rewards: self.rewards.or(base.rewards),
            report: joined(base.report, self.report),
            state: joined(base.state, self.state),
            own: self.own,
        })
    }

    /// The params that its expressions read, whatever their values.
    pub fn params_read(&self) -> impl Iterator<Item = (&String, &Param)> {
        let names = self.names_read();
        self.params.iter().filter(move |(name, _)| names.contains(name.as_str()))
    }

    /// Of its own params and named expressions those that nothing reads, whatever the params' values: key and name.
    pub fn unread(&self) -> impl Iterator<Item = (&'static str, &String)> {
        let names = self.names_read();
        self.own.iter().filter(move |(_, name)| !names.contains(name.as_str())).map(|(key, name)| (*key, name))
    }

    /// All that looks like a name in what is evaluated at a step.
    fn names_read(&self) -> BTreeSet<&str> {
        let mut waiting: Vec<&String> =
            self.formula.iter().chain(&self.pair_weight).chain(self.report.values()).collect();
        waiting.extend(self.rewards.iter().flatten());
        waiting.extend(self.state.values().map(|state| &state.next));
        let mut names: BTreeSet<&str> = BTreeSet::new();
        while let Some(text) = waiting.pop() {
            for name in text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
                if names.insert(name) {
                    waiting.extend(self.named.get(name));
                }
            }
        }
        names
    }
}

fn joined<T>(mut base: IndexMap<String, T>, own: IndexMap<String, T>) -> IndexMap<String, T> {
    base.extend(own);
    base
}

impl Param {
    /// As a new default of a param that there is already: with its bounds, choices and description, where it has none itself.
    ///
    /// # Errors
    /// When the default is beyond these.
    fn within(mut self, base: Option<&Param>, name: &str) -> Result<Param, String> {
        let has_bounds = self.min.or(self.max).or(self.above).or(self.below).is_some() || !self.choices.is_empty();
        let Some(base) = base.filter(|_| !has_bounds) else { return Ok(self) };
        (self.min, self.max, self.above, self.below) = (base.min, base.max, base.above, base.below);
        self.choices.clone_from(&base.choices);
        if self.description.is_empty() {
            self.description.clone_from(&base.description);
        }
        let _: Dynamic = self.value(None).map_err(|message| format!("`{name}`: {message}"))?;
        Ok(self)
    }

    /// The value that holds where `given` is set, for expressions.
    ///
    /// # Errors
    /// What was expected instead.
    pub fn value(&self, given: Option<&Value>) -> Result<Dynamic, String> {
        let value = given.unwrap_or(&self.default);
        if !self.choices.is_empty() {
            if self.choices.contains(value) {
                return Ok(dynamic(value).unwrap_or_default());
            }
            let words: Vec<String> = self.choices.iter().map(text).collect();
            let near = value.as_str().and_then(|word| closest(word, words.iter().map(String::as_str)));
            let help = near.map(|near| format!(" (did you mean `{near}`?)")).unwrap_or_default();
            return Err(format!("expected one of {}, found {}{help}", words.join(", "), text(value)));
        }
        if self.default.is_number() {
            let bounds = self.bounds();
            let expected = if bounds.is_empty() { "a number".to_owned() } else { format!("a number {bounds}") };
            let number = value.as_f64().filter(|number| self.admits(*number));
            return number.map(Dynamic::from).ok_or_else(|| format!("expected {expected}, found {}", text(value)));
        }
        // Of a definition's own default `reading` has made sure.
        let same = std::mem::discriminant(value) == std::mem::discriminant(&self.default);
        match dynamic(value).filter(|_| same) {
            Some(value) => Ok(value),
            None => Err(format!("expected a value like {}, found {}", text(&self.default), text(value))),
        }
    }

    fn admits(&self, number: f64) -> bool {
        number.is_finite()
            && self.min.is_none_or(|min| number >= min)
            && self.max.is_none_or(|max| number <= max)
            && self.above.is_none_or(|above| number > above)
            && self.below.is_none_or(|below| number < below)
    }

    /// The bounds in words.
    pub fn bounds(&self) -> String {
        let bounds = [("at least", self.min), ("above", self.above), ("at most", self.max), ("below", self.below)];
        let words = bounds.iter().filter_map(|(word, bound)| Some(format!("{word} {}", (*bound)?)));
        words.collect::<Vec<_>>().join(" and ")
    }
}

fn dynamic(value: &Value) -> Option<Dynamic> {
    match value {
        Value::Number(number) => number.as_f64().map(Dynamic::from),
        Value::String(text) => Some(Dynamic::from(text.clone())),
        Value::Bool(truth) => Some(Dynamic::from(*truth)),
        _ => None,
    }
}

/// A value as YAML writes it; a list or a mapping by that word.
pub fn text(value: &Value) -> String {
    match value {
        Value::Sequence(_) => "a list".to_owned(),
        Value::Mapping(_) => "a mapping".to_owned(),
        Value::Null => "nothing".to_owned(),
        value => serde_yaml::to_string(value).unwrap_or_default().trim().to_owned(),
    }
}
