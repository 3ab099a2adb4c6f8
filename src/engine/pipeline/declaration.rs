//! A parameter as declared: by its default alone, which then decides its type, or spelled out as `{default, type, min, max,
//! choices, description}`.

use serde_json::{Map, Value as Json, json};

use super::diagnostic::{Report, Span};
use super::document::check_keys;
use super::interpolation::is_identifier;
use super::schema::blame;
use super::suggest::{closest, one_of};
use super::yaml::{Content, Entry, Yaml};

/// Types that can be spelled out, with their names in JSON Schema.
const TYPES: [(&str, &str); 6] = [
    ("integer", "integer"),
    ("number", "number"),
    ("text", "string"),
    ("boolean", "boolean"),
    ("list", "array"),
    ("mapping", "object"),
];
const KEYS: [&str; 6] = ["default", "type", "min", "max", "choices", "description"];

/// What a pipeline or a composite operator says of a parameter.
#[derive(Clone, Debug)]
pub(crate) struct Declaration {
    pub name: String,
    pub span: Span,
    /// None: a value must be given.
    pub default: Option<Yaml>,
    /// What a value must be, as a JSON Schema; None: anything.
    pub schema: Option<Json>,
    /// Whether that is so because of the default alone.
    pub inferred: bool,
    pub description: String,
}

/// Read a `params` block.
pub(crate) fn read(block: Option<&Yaml>, report: &mut Report) -> Vec<Declaration> {
    let Some(block) = block else { return Vec::new() };
    if !matches!(block.content, Content::Mapping(_)) && !block.is_null() {
        report.error(block.span, format!("`params` is a mapping, found {}", block.found()));
    }
    block.entries().iter().map(|entry| declaration(entry, report)).collect()
}

fn declaration(entry: &Entry, report: &mut Report) -> Declaration {
    let name = &entry.key;
    if !is_identifier(name) {
        report
            .error(entry.key_span, format!("`{name}` is no name for a parameter"))
            .help("use letters, digits and `_`, not beginning with a digit");
    }
    let mut declared = Declaration {
        name: name.clone(),
        span: entry.key_span,
        default: Some(entry.value.clone()),
        schema: widened_type_of(&entry.value).map(|kind| json!({"type": kind})),
        inferred: true,
        description: String::new(),
    };
    // A mapping with any of these keys but `description` alone is a declaration, others are themselves the default.
    if KEYS[..5].iter().any(|key| entry.value.get(key).is_some()) {
        check_keys(&entry.value, &KEYS, &format!("the parameter `{name}`"), report);
        declared.default = entry.value.get("default").map(|default| default.value.clone());
        declared.description = description(&entry.value, report);
        declared.schema = schema(&entry.value, report);
        declared.inferred = false;
    }
    declared
}

impl Declaration {
    /// Whether its values are text and nothing else, so that what a command line says needs no quotes to be.
    pub fn is_text(&self) -> bool {
        let Some(schema) = &self.schema else { return false };
        match schema["enum"].as_array() {
            Some(choices) => choices.iter().all(Json::is_string),
            None => schema["type"] == "string",
        }
    }
}

/// The text under `description`, or none.
pub(crate) fn description(yaml: &Yaml, report: &mut Report) -> String {
    let Some(entry) = yaml.get("description") else { return String::new() };
    match entry.value.as_str() {
        Some(text) => text.split_whitespace().collect::<Vec<_>>().join(" "),
        None => {
            blame(report, &entry.value, format!("`description` must be text, found {}", entry.value.found()));
            String::new()
        }
    }
}

/// A type's name in JSON Schema.
fn kind(word: &Yaml, report: &mut Report) -> Option<Json> {
    let text = word.as_str();
    let found = TYPES.iter().find(|(word, _)| Some(*word) == text);
    if found.is_none() {
        let words = TYPES.map(|(word, _)| word);
        let message = format!("`type` must be {}, found {}", one_of(&words), word.found());
        let diagnostic = blame(report, word, message);
        match text.and_then(|text| closest(text, words)) {
            Some(near) => diagnostic.help(format!("did you mean `{near}`?")),
            None => diagnostic.help("several are a list: `type: [integer, text]`"),
        };
    }
    found.map(|(_, kind)| json!(kind))
}

fn schema(yaml: &Yaml, report: &mut Report) -> Option<Json> {
    let mut schema = Map::new();
    if let Some(entry) = yaml.get("type") {
        let kinds = match &entry.value.content {
            Content::Sequence(items) if !items.is_empty() => {
                Json::Array(items.iter().map(|item| kind(item, report)).collect::<Option<_>>()?)
            }
            _ => kind(&entry.value, report)?,
        };
        schema.insert("type".to_owned(), kinds);
    } else if let Some(kind) = yaml.get("default").and_then(|default| type_of(&default.value)) {
        schema.insert("type".to_owned(), json!(kind));
    }
    for (key, keyword) in [("min", "minimum"), ("max", "maximum")] {
        let Some(entry) = yaml.get(key) else { continue };
        match serde_json::to_value(entry.value.to_value()) {
            Ok(bound) if bound.is_number() => {
                schema.insert(keyword.to_owned(), bound);
            }
            _ => {
                blame(report, &entry.value, format!("`{key}` must be a number, found {}", entry.value.found()));
            }
        }
    }
    if let Some(entry) = yaml.get("choices") {
        match serde_json::to_value(entry.value.to_value()) {
            Ok(Json::Array(choices)) if !choices.is_empty() => {
                schema.remove("type");
                schema.insert("enum".to_owned(), Json::Array(choices));
            }
            _ => {
                blame(report, &entry.value, format!("`choices` must be a list, found {}", entry.value.found()));
            }
        }
    }
    Some(Json::Object(schema))
}

/// The type that a default alone stands for. What is whole by default may have a fraction all the same; nothing, lists and
/// mappings say too little of what else there may be.
fn widened_type_of(default: &Yaml) -> Option<&'static str> {
    match type_of(default)? {
        "integer" => Some("number"),
        "array" | "object" => None,
        kind => Some(kind),
    }
}

/// The type of a default, unless it refers to other parameters.
fn type_of(default: &Yaml) -> Option<&'static str> {
    use serde_yaml::Value;
    match &default.content {
        Content::Scalar(Value::Bool(_)) => Some("boolean"),
        Content::Scalar(Value::Number(number)) => Some(if number.is_f64() { "number" } else { "integer" }),
        Content::Scalar(Value::String(text)) if !text.contains("${") => Some("string"),
        Content::Sequence(_) => Some("array"),
        Content::Mapping(_) => Some("object"),
        _ => None,
    }
}
