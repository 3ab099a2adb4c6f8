//! The flat pipeline as YAML, with a comment on every value: where it came from.

use std::rc::Rc;

use serde_json::Value as Json;
use serde_yaml::Value;

use super::diagnostic::{Report, Span};
use super::interpolation::escape;
use super::schema::follow;
use super::yaml::{Content, Entry, Origin, Yaml};
use crate::graph::RunSettings;
use crate::operator::Registry;

/// The text of a filled, flat pipeline without errors. It reads as the same pipeline.
pub(crate) fn to_text(filled: &Yaml, registry: &Registry, report: &Report) -> String {
    let mut filled = filled.clone();
    let Content::Mapping(entries) = &mut filled.content else { return String::new() };
    for entry in entries {
        match entry.key.as_str() {
            "run" => {
                let schema = schemars::SchemaGenerator::default().into_root_schema_for::<RunSettings>().to_value();
                add_defaults(&mut entry.value, &schema, &schema);
            }
            "nodes" => {
                let Content::Mapping(nodes) = &mut entry.value.content else { continue };
                nodes.iter_mut().for_each(|node| add_operator_defaults(node, registry));
            }
            _ => {}
        }
    }
    let mut text = String::new();
    for (line, comment) in lines(&filled, report) {
        text += &if comment.is_empty() { format!("{line}\n") } else { format!("{line} # {comment}\n") };
    }
    text
}

fn add_operator_defaults(node: &mut Entry, registry: &Registry) {
    let op = node.value.get("op").and_then(|op| op.value.as_str()).and_then(|op| registry.get(op));
    let Some(schema) = op.map(|op| (op.config_schema)().to_value()) else { return };
    let Content::Mapping(keys) = &mut node.value.content else { return };
    keys.retain(|key| key.key != "with" || !key.value.is_null());
    if keys.iter().all(|key| key.key != "with") {
        let nothing = Yaml::new(Span::default(), Content::Mapping(Vec::new()));
        keys.push(Entry { key: "with".to_owned(), key_span: Span::default(), value: nothing });
    }
    for key in keys.iter_mut().filter(|key| key.key == "with") {
        add_defaults(&mut key.value, &schema, &schema);
    }
    keys.retain(|key| key.key != "with" || !key.value.entries().is_empty());
}

/// Add what a schema says of keys that are not there.
fn add_defaults(yaml: &mut Yaml, schema: &Json, root: &Json) {
    let Content::Mapping(entries) = &mut yaml.content else { return };
    for (key, property) in follow(schema, root)["properties"].as_object().into_iter().flatten() {
        match entries.iter_mut().find(|entry| entry.key == *key) {
            Some(entry) => add_defaults(&mut entry.value, property, root),
            None => {
                if let Some(value) = property.get("default").and_then(default) {
                    entries.push(Entry { key: key.clone(), key_span: Span::default(), value });
                }
            }
        }
    }
}

/// A default; none where it is the absence of a value.
fn default(json: &Json) -> Option<Yaml> {
    let content = match json {
        Json::Null => return None,
        Json::Object(entries) => {
            let entry = |(key, value): (&String, &Json)| {
                Some(Entry { key: key.clone(), key_span: Span::default(), value: default(value)? })
            };
            Content::Mapping(entries.iter().filter_map(entry).collect())
        }
        Json::Array(items) => Content::Sequence(items.iter().filter_map(default).collect()),
        scalar => Content::Scalar(serde_yaml::to_value(scalar).ok()?),
    };
    let place = "default".to_owned();
    let origin = Origin { written: String::new(), whole: false, given: None, place, pieces: Vec::new(), before: None };
    Some(Yaml { origin: Some(Rc::new(origin)), ..Yaml::new(Span::default(), content) })
}

/// The lines of a value, each with its comment.
fn lines(yaml: &Yaml, report: &Report) -> Vec<(String, String)> {
    let mut found = Vec::new();
    match &yaml.content {
        Content::Mapping(entries) if !entries.is_empty() => {
            for entry in entries {
                let key = scalar(&Value::String(entry.key.clone()));
                let nested = is_nested(&entry.value);
                for (index, (line, comment)) in lines(&entry.value, report).into_iter().enumerate() {
                    match (index, nested) {
                        (0, false) => found.push((format!("{key}: {line}"), comment)),
                        (0, true) => {
                            found.push((format!("{key}:"), whole_origin(&entry.value)));
                            found.push((format!("  {line}"), comment));
                        }
                        _ => found.push((format!("  {line}"), comment)),
                    }
                }
            }
        }
        Content::Sequence(items) if !items.is_empty() => {
            for item in items {
                for (index, (line, comment)) in lines(item, report).into_iter().enumerate() {
                    found.push((format!("{}{line}", if index == 0 { "- " } else { "  " }), comment));
                }
            }
        }
        Content::Mapping(_) => found.push(("{}".to_owned(), comment(yaml, report))),
        Content::Sequence(_) => found.push(("[]".to_owned(), comment(yaml, report))),
        Content::Scalar(value) => found.push((scalar(value), comment(yaml, report))),
        Content::Invalid => found.push(("null".to_owned(), String::new())),
    }
    found
}

fn is_nested(yaml: &Yaml) -> bool {
    match &yaml.content {
        Content::Mapping(entries) => !entries.is_empty(),
        Content::Sequence(items) => !items.is_empty(),
        _ => false,
    }
}

/// A scalar on one line.
fn scalar(value: &Value) -> String {
    let value = match value {
        Value::String(text) => Value::String(escape(text)),
        other => other.clone(),
    };
    let text = serde_yaml::to_string(&value).unwrap_or_default();
    match &value {
        // Text of several lines, quoted as JSON does, which YAML reads.
        Value::String(string) if text.trim_end().contains('\n') => Value::String(string.clone())
            .as_str()
            .and_then(|string| serde_json::to_string(string).ok())
            .unwrap_or_default(),
        _ => text.trim_end().to_owned(),
    }
}

fn whole_origin(yaml: &Yaml) -> String {
    yaml.origin.as_deref().map(chain).unwrap_or_default()
}

/// Where a value came from. Parts of a default or of a parameter's value say nothing of their own.
fn comment(yaml: &Yaml, report: &Report) -> String {
    match &yaml.origin {
        Some(origin) => chain(origin),
        None if yaml.span.line == 0 => String::new(),
        None => report.place(yaml.span),
    }
}

fn chain(origin: &Origin) -> String {
    let mut own = if origin.written.is_empty() {
        origin.place.clone()
    } else if origin.whole {
        format!("{}, {}", one_line(&origin.written), one_line(&source(origin)))
    } else {
        format!("{:?} at {}", origin.written, origin.place)
    };
    for piece in &origin.pieces {
        let name = piece.written.trim_start_matches("${").trim_end_matches('}');
        own += &format!(", {name}: {}", one_line(&source(piece)));
        if let Some(before) = &piece.before {
            own += &format!(" ({})", chain(before));
        }
    }
    match &origin.before {
        Some(before) => format!("{own}; {}", chain(before)),
        None => own,
    }
}

/// What gave a parameter its value.
fn source(origin: &Origin) -> String {
    origin.given.clone().unwrap_or_else(|| format!("default at {}", origin.place))
}

fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}
