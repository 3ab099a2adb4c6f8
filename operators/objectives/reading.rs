//! A definition read from YAML: every mistake at its key, in one line.

use indexmap::IndexMap;
use sapo_flow_engine::pipeline::closest;
use serde_yaml::Value;

use super::definition::{Definition, Param, State, text};
use super::formula::Issue;

/// Keys of a definition, as written.
pub const KEYS: [&str; 9] =
    ["description", "use", "params", "let", "formula", "pair_weight", "rewards", "report", "state"];
const PARAM_KEYS: [&str; 7] = ["default", "min", "max", "above", "below", "choices", "description"];
const STATE_KEYS: [&str; 2] = ["initial", "next"];

impl Definition {
    /// Read a definition.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn read(value: &Value) -> Result<Self, Vec<Issue>> {
        let mut reader = Reader::default();
        let definition = reader.definition(value);
        if reader.issues.is_empty() { Ok(definition) } else { Err(reader.issues) }
    }
}

#[derive(Default)]
struct Reader {
    issues: Vec<Issue>,
}

impl Reader {
    fn definition(&mut self, value: &Value) -> Definition {
        self.check_keys("", value, "a definition", &KEYS);
        let mut definition = Definition {
            description: self.optional(value, "", "description", "a text").unwrap_or_default(),
            uses: self.optional(value, "", "use", "a definition's name"),
            formula: self.optional(value, "", "formula", EXPRESSION),
            pair_weight: self.optional(value, "", "pair_weight", EXPRESSION),
            rewards: value.get("rewards").and_then(|rewards| self.rewards(rewards)),
            named: self.expressions(value, "let"),
            report: self.expressions(value, "report"),
            ..Definition::default()
        };
        for (name, param) in self.entries(value, "params") {
            let param = self.param(&format!("params.{name}"), param);
            definition.params.extend(param.map(|param| (name, param)));
        }
        for (name, state) in self.entries(value, "state") {
            let state = self.state(&format!("state.{name}"), state);
            definition.state.extend(state.map(|state| (name, state)));
        }
        let params = definition.params.keys().map(|name| ("params", name.clone()));
        definition.own = params.chain(definition.named.keys().map(|name| ("let", name.clone()))).collect();
        definition
    }

    fn issue(&mut self, key: impl Into<String>, message: impl Into<String>) {
        self.issues.push(Issue::new(key, message));
    }

    /// Complain of keys that mean nothing, and of what is no mapping.
    fn check_keys(&mut self, place: &str, value: &Value, what: &str, known: &[&str]) {
        let Some(mapping) = value.as_mapping() else {
            return self.issue(place, format!("{what} is a mapping, found {}", text(value)));
        };
        for key in mapping.keys() {
            match key.as_str() {
                Some(key) if known.contains(&key) => {}
                Some(key) => {
                    let help = closest(key, known.iter().copied()).map(|near| format!("did you mean `{near}`?"));
                    let help = help.unwrap_or_else(|| format!("its keys are {}", known.join(", ")));
                    let issue = Issue::new(joined(place, key), format!("{what} has no `{key}`"));
                    self.issues.push(Issue { help: Some(help), ..issue });
                }
                None => self.issue(place, format!("keys are texts, found {}", text(key))),
            }
        }
    }

    /// A text, where the key is there.
    fn optional(&mut self, value: &Value, place: &str, key: &str, expected: &str) -> Option<String> {
        let found = value.get(key)?;
        let read = found.as_str().map(str::to_owned);
        if read.is_none() {
            self.issue(joined(place, key), format!("`{key}`: expected {expected}, found {}", text(found)));
        }
        read
    }

    /// Entries of a mapping under a key, whose names are texts.
    fn entries<'a>(&mut self, value: &'a Value, key: &str) -> Vec<(String, &'a Value)> {
        let Some(found) = value.get(key) else { return Vec::new() };
        let Some(mapping) = found.as_mapping() else {
            self.issue(key, format!("`{key}`: expected a mapping from names, found {}", text(found)));
            return Vec::new();
        };
        let mut entries = Vec::new();
        for (name, value) in mapping {
            match name.as_str() {
                Some(name) => entries.push((name.to_owned(), value)),
                None => self.issue(key, format!("`{key}`: names are texts, found {}", text(name))),
            }
        }
        entries
    }

    fn expressions(&mut self, value: &Value, key: &str) -> IndexMap<String, String> {
        let mut read = IndexMap::new();
        for (name, found) in self.entries(value, key) {
            match found.as_str() {
                Some(expression) => {
                    read.insert(name, expression.to_owned());
                }
                None => {
                    let message = format!("`{name}`: expected {EXPRESSION}, found {}", text(found));
                    self.issue(joined(key, &name), message);
                }
            }
        }
        read
    }

    fn rewards(&mut self, value: &Value) -> Option<[String; 2]> {
        let Some([chosen, rejected]) = value.as_sequence().map(Vec::as_slice) else {
            let found = value.as_sequence().map_or_else(|| text(value), |items| format!("a list of {}", items.len()));
            self.issue("rewards", format!("`rewards`: expected [chosen, rejected], two expressions, found {found}"));
            return None;
        };
        let mut expression = |index: usize, value: &Value| {
            if value.as_str().is_none() {
                let message = format!("`rewards`: expected {EXPRESSION}, found {}", text(value));
                self.issue(format!("rewards.{index}"), message);
            }
            value.as_str().map(str::to_owned)
        };
        let (chosen, rejected) = (expression(0, chosen), expression(1, rejected));
        Some([chosen?, rejected?])
    }

    fn param(&mut self, place: &str, value: &Value) -> Option<Param> {
        let Some(mapping) = value.as_mapping() else {
            let param = Param { default: value.clone(), ..Param::default() };
            let scalar = is_scalar(value);
            if !scalar {
                self.issue(
                    place,
                    format!("expected a number, a text, true or false, or a mapping, found {}", text(value)),
                );
            }
            return scalar.then_some(param);
        };
        self.check_keys(place, value, "a param", &PARAM_KEYS);
        let Some(default) = mapping.get("default") else {
            self.issue(place, "a param needs a `default`");
            return None;
        };
        if !is_scalar(default) {
            let message = format!("`default`: expected a number, a text, true or false, found {}", text(default));
            self.issue(joined(place, "default"), message);
        }
        let [min, max, above, below] = ["min", "max", "above", "below"].map(|key| self.number(value, place, key));
        let choices = match mapping.get("choices") {
            None => Vec::new(),
            Some(Value::Sequence(choices)) => choices.clone(),
            Some(other) => {
                self.issue(joined(place, "choices"), format!("`choices`: expected a list, found {}", text(other)));
                Vec::new()
            }
        };
        let description = self.optional(value, place, "description", "a text").unwrap_or_default();
        Some(Param { default: default.clone(), min, max, above, below, choices, description })
    }

    fn number(&mut self, value: &Value, place: &str, key: &str) -> Option<f64> {
        let found = value.get(key)?;
        if found.as_f64().is_none() {
            self.issue(joined(place, key), format!("`{key}`: expected a number, found {}", text(found)));
        }
        found.as_f64()
    }

    fn state(&mut self, place: &str, value: &Value) -> Option<State> {
        self.check_keys(place, value, "a state", &STATE_KEYS);
        let initial = self.number(value, place, "initial");
        let next = self.optional(value, place, "next", EXPRESSION);
        for key in STATE_KEYS.into_iter().filter(|key| value.is_mapping() && value.get(key).is_none()) {
            self.issue(place, format!("a state needs `{key}`"));
        }
        Some(State { initial: initial?, next: next? })
    }
}

const EXPRESSION: &str = "an expression, a text";

fn joined(place: &str, key: &str) -> String {
    if place.is_empty() { key.to_owned() } else { format!("{place}.{key}") }
}

fn is_scalar(value: &Value) -> bool {
    matches!(value, Value::Number(_) | Value::String(_) | Value::Bool(_))
}
