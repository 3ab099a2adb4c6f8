//! The value of `objective`: a name, a name with params, a definition, a file with one, or a list of these.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::pipeline::closest;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde_json::{Map as JsonMap, Value as Json, json};
use serde_yaml::Value;

use super::built_in;
use super::definition::{Definition, Param, text};
use super::formula::{Formula, Issue};
use super::reading::KEYS;
use super::sum::{Sum, Term};

/// What is minimised, as written.
#[derive(Clone, Debug, Deserialize)]
#[serde(transparent)]
pub struct ObjectiveConfig(Value);

/// The key that this stands under.
const KEY: &str = "objective";

impl ObjectiveConfig {
    /// The objective.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn compile(&self) -> Result<Sum, Vec<ConfigIssue>> {
        let items = match &self.0 {
            Value::Sequence(items) => items.iter().enumerate().map(|(i, item)| (format!("{KEY}.{i}"), item)).collect(),
            value => vec![(KEY.to_owned(), value)],
        };
        let in_list = matches!(self.0, Value::Sequence(_));
        let mut issues = Vec::new();
        if items.is_empty() {
            issues.push(ConfigIssue::new(KEY, format!("`{KEY}` must have an objective, found an empty list")));
        }
        let mut terms: Vec<Term> = Vec::new();
        for (place, item) in items {
            match term(item, in_list) {
                Ok(mut term) => {
                    let same = terms.iter().filter(|other| other.name.split('#').next() == Some(&term.name)).count();
                    if same > 0 {
                        term.name = format!("{}#{}", term.name, same + 1);
                    }
                    terms.push(term);
                }
                Err(found) => issues.extend(found.into_iter().map(|issue| {
                    let key = if issue.key.is_empty() { place.clone() } else { format!("{place}.{}", issue.key) };
                    ConfigIssue { key, ..issue }
                })),
            }
        }
        if !terms.is_empty() && terms.iter().all(|term| term.weight == 0.0) {
            issues.push(ConfigIssue::new(KEY, format!("`{KEY}`: expected a weight above 0, found none")));
        }
        if issues.is_empty() { Ok(Sum::new(terms)) } else { Err(issues) }
    }

    /// The files that definitions are read from.
    pub fn files(&self) -> Vec<PathBuf> {
        let items = match &self.0 {
            Value::Sequence(items) => items.as_slice(),
            value => std::slice::from_ref(value),
        };
        items.iter().filter_map(|item| item.get("file")?.as_str().map(PathBuf::from)).collect()
    }
}

fn whole(message: impl Into<String>) -> Vec<Issue> {
    at("", message)
}

fn at(key: &str, message: impl Into<String>) -> Vec<Issue> {
    vec![Issue::new(key, message)]
}

/// One objective with its weight.
fn term(item: &Value, in_list: bool) -> Result<Term, Vec<Issue>> {
    let Value::Mapping(mapping) = item else {
        let Some(name) = item.as_str() else {
            return Err(whole(format!("an objective is a name or a mapping, found {}", text(item))));
        };
        let formula = compile(named(name).map_err(whole)?, &BTreeMap::new(), "")?;
        return Ok(Term { name: name.to_owned(), weight: 1.0, formula });
    };
    let mut given: BTreeMap<String, Value> = BTreeMap::new();
    for (key, value) in mapping {
        let key = key.as_str().ok_or_else(|| whole(format!("keys are texts, found {}", text(key))))?;
        given.insert(key.to_owned(), value.clone());
    }
    let weight = match given.remove("weight") {
        None => 1.0,
        Some(_) if !in_list => {
            return Err(at("weight", "`weight` is for the objectives of a list: alone, it has no effect"));
        }
        Some(value) => factor(&value).map_err(|expected| {
            at("weight", format!("`weight`: expected a number {expected}, found {}", text(&value)))
        })?,
    };
    let name = given.remove("name");
    if let Some(path) = given.remove("file") {
        let path = path.as_str().ok_or_else(|| at("file", "`file`: expected a path"))?.to_owned();
        if name.is_some() {
            return Err(at("name", "`name` and `file` exclude each other"));
        }
        let stem = Path::new(&path).file_stem().map_or(path.clone(), |stem| stem.to_string_lossy().into_owned());
        return Ok(Term { name: stem, weight, formula: from_file(Path::new(&path), &given)? });
    }
    if let Some(name) = name {
        let name = name.as_str().ok_or_else(|| at("name", "`name`: expected a text"))?.to_owned();
        let definition = named(&name).map_err(|error| at("name", error))?;
        return Ok(Term { formula: compile(definition, &given, "")?, name, weight });
    }
    let own: Value = Value::Mapping(mapping.iter().filter(|(key, _)| *key != "weight").map(owned).collect());
    if !given.contains_key("formula") && !given.contains_key("use") {
        let near = given.keys().find_map(|key| closest(key, KEYS.into_iter().chain(["name", "file"])));
        let help = near.map(|near| format!(" (did you mean `{near}`?)")).unwrap_or_default();
        return Err(whole(format!("an objective has a `name`, a `formula`, or a `file`, and this has none{help}")));
    }
    let definition = Definition::read(&own)?;
    let params: BTreeMap<String, Value> =
        definition.params.iter().map(|(name, param)| (name.clone(), param.default.clone())).collect();
    let definition = definition.whole().map_err(|error| at("use", error))?;
    // What is written here is written to be used.
    let formula = compile(definition, &params, "params.")?;
    Ok(Term { name: "formula".into(), weight, formula })
}

/// A factor of losses, which are float32; else what it should be. With 0 a loss is reported and not learned from: an end of
/// a sweep over weights.
fn factor(value: &Value) -> Result<f64, &'static str> {
    match value.as_f64().filter(|weight| weight.is_finite() && *weight >= 0.0) {
        Some(weight) if weight > f64::from(f32::MAX) => Err("of at most 3.4e38"),
        Some(weight) => Ok(weight),
        None => Err("of 0 or more"),
    }
}

fn owned((key, value): (&Value, &Value)) -> (Value, Value) {
    (key.clone(), value.clone())
}

/// A definition that comes along.
fn named(name: &str) -> Result<Definition, String> {
    let names: Vec<&str> = built_in::names().collect();
    match built_in::definition(name).filter(|_| names.contains(&name)) {
        Some(definition) => definition.whole(),
        None => {
            let help = closest(name, names.iter().copied()).map(|near| format!(" (did you mean `{near}`?)"));
            let help = help.unwrap_or_else(|| format!("; there are {}", names.join(", ")));
            Err(format!("there is no objective `{name}`{help}"))
        }
    }
}

/// The formula of a file's definition with these params. What is wrong with the file is told of its own keys.
fn from_file(path: &Path, given: &BTreeMap<String, Value>) -> Result<Formula, Vec<Issue>> {
    let unreadable = |error: String| at("file", format!("`file`: {}: {error}", path.display()));
    let in_file = |issues: Vec<Issue>| -> Vec<Issue> {
        let told = |issue: Issue| match given.contains_key(&issue.key) {
            true => issue,
            false => Issue { file: Some(Box::new((path.to_owned(), issue.key))), key: "file".into(), ..issue },
        };
        issues.into_iter().map(told).collect()
    };
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
    let value: Value = serde_yaml::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
    let definition = Definition::read(&value).map_err(in_file)?;
    let definition = definition.whole().map_err(|error| in_file(at("use", error)))?;
    compile(definition, given, "").map_err(in_file)
}

/// A formula with these params, whose keys stand under `prefix`.
fn compile(definition: Definition, given: &BTreeMap<String, Value>, prefix: &str) -> Result<Formula, Vec<Issue>> {
    let mut issues = Vec::new();
    let known: Vec<&str> = definition.params.keys().map(String::as_str).collect();
    for name in given.keys().filter(|name| !known.contains(&name.as_str())) {
        let help = closest(name, known.iter().copied()).map(|near| format!(" (did you mean `{near}`?)"));
        let help = help.unwrap_or_else(|| format!("; its params are {}", known.join(", ")));
        issues.push(Issue::new(name, format!("the objective has no param `{name}`{help}")));
    }
    if !issues.is_empty() {
        return Err(issues);
    }
    let prefixed = |issue: Issue| match given.contains_key(&issue.key) {
        true => Issue { key: format!("{prefix}{}", issue.key), ..issue },
        false => issue,
    };
    Formula::compile(&definition, given).map_err(|issues| issues.into_iter().map(prefixed).collect())
}

impl JsonSchema for ObjectiveConfig {
    fn schema_name() -> Cow<'static, str> {
        "Objective".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let names: Vec<&str> = built_in::names().collect();
        let with_params: Vec<Json> = names.iter().filter_map(|name| with_params(name)).collect();
        let usable: Vec<&str> = built_in::names_with_shared().collect();
        let one = json!({
            "type": "object",
            "minProperties": 1,
            "properties": {
                "name": {"enum": names, "description": "An objective that comes along; its params stand beside it."},
                "formula": {"type": "string", "description": "The loss of every pair."},
                "use": {"enum": usable, "description": "A definition that this one begins with."},
                "file": {"type": "string", "description": "A YAML file with a definition; its params stand beside it."},
                "weight": {"type": "number", "description": "In a list: the factor in the sum."},
            },
            "allOf": with_params,
        });
        json_schema!({
            "anyOf": [
                {"type": "string", "enum": names},
                one,
                {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string", "enum": names}, one]}},
            ],
        })
    }
}

/// What holds for the objective of that name.
fn with_params(name: &str) -> Option<Json> {
    let definition = built_in::definition(name)?.whole().ok()?;
    let mut properties = JsonMap::new();
    properties.insert("name".into(), json!({"const": name, "description": definition.description}));
    properties.insert("weight".into(), json!({"type": "number", "exclusiveMinimum": 0}));
    properties.extend(definition.params_read().map(|(name, param)| (name.clone(), of_param(param))));
    Some(json!({
        "if": {"type": "object", "required": ["name"], "properties": {"name": {"const": name}}},
        "then": {"additionalProperties": false, "properties": properties},
    }))
}

fn of_param(param: &Param) -> Json {
    let mut schema = JsonMap::new();
    if !param.description.is_empty() {
        schema.insert("description".into(), json!(param.description));
    }
    schema.insert("default".into(), serde_json::to_value(&param.default).unwrap_or_default());
    if !param.choices.is_empty() {
        schema.insert("enum".into(), serde_json::to_value(&param.choices).unwrap_or_default());
    } else if param.default.is_number() {
        schema.insert("type".into(), json!("number"));
    }
    let bounds = [
        ("minimum", param.min),
        ("maximum", param.max),
        ("exclusiveMinimum", param.above),
        ("exclusiveMaximum", param.below),
    ];
    schema.extend(bounds.iter().filter_map(|(word, bound)| Some(((*word).to_owned(), json!((*bound)?)))));
    Json::Object(schema)
}
