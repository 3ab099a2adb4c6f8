//! A parameter as declared: by its default alone, or spelled out as `{default, type, min, max, choices, description}`.

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
        schema: None,
        description: String::new(),
    };
    // A mapping with any of these keys but `description` alone is a declaration, others are themselves the default.
    if KEYS[..5].iter().any(|key| entry.value.get(key).is_some()) {
        check_keys(&entry.value, &KEYS, &format!("the parameter `{name}`"), report);
        declared.default = entry.value.get("default").map(|default| default.value.clone());
        declared.description = description(&entry.value, report);
        declared.schema = schema(&entry.value, report);
    }
    declared
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

fn schema(yaml: &Yaml, report: &mut Report) -> Option<Json> {
    let mut schema = Map::new();
    if let Some(entry) = yaml.get("type") {
        let text = entry.value.as_str();
        match TYPES.iter().find(|(word, _)| Some(*word) == text) {
            Some((_, kind)) => schema.insert("type".to_owned(), json!(kind)),
            None => {
                let words = TYPES.map(|(word, _)| word);
                let message = format!("`type` must be {}, found {}", one_of(&words), entry.value.found());
                let diagnostic = blame(report, &entry.value, message);
                if let Some(near) = text.and_then(|text| closest(text, words)) {
                    diagnostic.help(format!("did you mean `{near}`?"));
                }
                return None;
            }
        };
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
