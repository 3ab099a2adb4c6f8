//! Values against a JSON Schema as schemars derives it, with a place for every complaint.
//!
//! Knows the keywords that schemars writes for serde types: type, properties, required, additionalProperties, items,
//! enum, const, anyOf/oneOf/allOf, $ref, and the numeric and length bounds. An object with `properties` takes no
//! others, whether the schema says so or not: a key that nobody reads is a mistake.

use serde_json::Value as Json;
use serde_yaml::Value;

use super::diagnostic::{Diagnostic, Report, Span};
use super::suggest::join_or;
use super::yaml::{Content, Yaml};

/// Checks values against one schema and its definitions.
pub(crate) struct Validator<'a> {
    /// The whole schema, which `$ref`s point into.
    pub root: &'a Json,
}

impl Validator<'_> {
    /// Report what is wrong with `yaml`; `name` is what it is called in messages, and `key` where it is named.
    pub fn check(&self, yaml: &Yaml, name: &str, key: Span, report: &mut Report) {
        self.value(self.root, yaml, name, key, report);
    }

    /// The same, by a part of the schema.
    pub fn value(&self, schema: &Json, yaml: &Yaml, name: &str, key: Span, report: &mut Report) {
        if yaml.is_invalid() {
            return;
        }
        let schema = follow(schema, self.root);
        if let Some(branches) = alternatives(schema) {
            let fitting: Vec<&Json> = branches.iter().filter(|branch| self.fits(branch, yaml)).collect();
            match fitting.as_slice() {
                [] => self.mismatch(schema, yaml, name, report),
                [only] => self.value(only, yaml, name, key, report),
                several => self.several(several, yaml, name, key, report),
            }
        } else if !self.fits(schema, yaml) {
            self.mismatch(schema, yaml, name, report);
            return;
        }
        for part in schema["allOf"].as_array().into_iter().flatten() {
            self.value(part, yaml, name, key, report);
        }
        match &yaml.content {
            Content::Mapping(_) => self.object(schema, yaml, name, key, report),
            Content::Sequence(items) => {
                self.length(schema, items.len(), yaml, name, report);
                if schema["items"].is_object() {
                    for (index, item) in items.iter().enumerate() {
                        self.value(&schema["items"], item, &format!("{name}[{index}]"), item.span, report);
                    }
                }
            }
            Content::Scalar(Value::Number(number)) => {
                if let Some(bound) = broken_bound(schema, number.as_f64().unwrap_or(f64::NAN)) {
                    blame(report, yaml, format!("`{name}` must be {bound}, found {number}"))
                        .label(format!("must be {bound}"));
                }
            }
            _ => {}
        }
    }

    fn object(&self, schema: &Json, yaml: &Yaml, name: &str, key: Span, report: &mut Report) {
        let Some(properties) = schema["properties"].as_object() else {
            if schema["additionalProperties"].is_object() {
                for entry in yaml.entries() {
                    let inner = join(name, &entry.key);
                    self.value(&schema["additionalProperties"], &entry.value, &inner, entry.key_span, report);
                }
            }
            return;
        };
        let open = ["anyOf", "oneOf", "allOf", "unevaluatedProperties"].iter().any(|word| !schema[*word].is_null())
            || matches!(&schema["additionalProperties"], Json::Bool(true) | Json::Object(_));
        for entry in yaml.entries() {
            if let Some(property) = properties.get(&entry.key) {
                self.value(property, &entry.value, &join(name, &entry.key), entry.key_span, report);
            } else if !open {
                let known: Vec<&str> = properties.keys().map(String::as_str).collect();
                let place = if name.is_empty() { String::new() } else { format!(" in `{name}`") };
                report
                    .error(entry.key_span, format!("unknown key `{}`{place}", entry.key))
                    .label("unknown key")
                    .suggest(&entry.key, &known);
            }
        }
        for required in schema["required"].as_array().into_iter().flatten().filter_map(Json::as_str) {
            if yaml.get(required).is_none() {
                let expected = properties.get(required).map(|property| describe(property, self.root));
                report
                    .error(key, format!("the key `{}` is missing", join(name, required)))
                    .label(format!("needs `{required}`: {}", expected.unwrap_or_else(|| "a value".into())));
            }
        }
    }

    fn length(&self, schema: &Json, length: usize, yaml: &Yaml, name: &str, report: &mut Report) {
        if let Some(least) = schema["minItems"].as_u64().filter(|least| (length as u64) < *least) {
            blame(report, yaml, format!("`{name}` needs at least {least} items, found {length}"));
        }
        if let Some(most) = schema["maxItems"].as_u64().filter(|most| (length as u64) > *most) {
            blame(report, yaml, format!("`{name}` takes at most {most} items, found {length}"));
        }
    }

    fn mismatch(&self, schema: &Json, yaml: &Yaml, name: &str, report: &mut Report) {
        let expected = describe(schema, self.root);
        let words = words(schema, self.root);
        let message = format!("`{name}` must be {expected}, found {}", yaml.found());
        let diagnostic = blame(report, yaml, message).label(format!("expected {expected}"));
        if let Some(near) = yaml.as_str().and_then(|text| super::closest(text, words.iter().map(String::as_str))) {
            diagnostic.help(format!("did you mean `{near}`?"));
        } else if let Content::Scalar(value @ (Value::Bool(_) | Value::Number(_))) = &yaml.content {
            let text = Value::String(serde_yaml::to_string(value).unwrap_or_default().trim().to_owned());
            if self.fits(schema, &Yaml::new(yaml.span, Content::Scalar(text.clone()))) {
                diagnostic.help(format!("quotes make it text: {:?}", text.as_str().unwrap_or_default()));
            }
        }
    }

    /// Whether the value has the schema's type, or is one of its words. Says nothing of what is inside.
    fn fits(&self, schema: &Json, yaml: &Yaml) -> bool {
        let schema = follow(schema, self.root);
        if let Some(branches) = alternatives(schema) {
            return branches.iter().any(|branch| self.fits(branch, yaml));
        }
        if !schema["const"].is_null() {
            return equal(&schema["const"], yaml);
        }
        if let Some(words) = schema["enum"].as_array() {
            return words.iter().any(|word| equal(word, yaml));
        }
        match &schema["type"] {
            Json::String(kind) => has_type(kind, yaml),
            Json::Array(kinds) => kinds.iter().filter_map(Json::as_str).any(|kind| has_type(kind, yaml)),
            _ => true,
        }
    }

    /// A value that has the type of several alternatives: check it against the one whose tag it bears, or where they
    /// have no tag, against the one with the fewest complaints.
    fn several(&self, branches: &[&Json], yaml: &Yaml, name: &str, key: Span, report: &mut Report) {
        let Some(tag) = self.tag(branches) else {
            if let Some(branch) = branches.iter().min_by_key(|branch| self.complaints(branch, yaml)) {
                self.value(branch, yaml, name, key, report);
            }
            return;
        };
        let names: Vec<&str> =
            branches.iter().filter_map(|branch| self.property(branch, tag)["const"].as_str()).collect();
        let expected = super::suggest::one_of(&names);
        let inner = join(name, tag);
        match yaml.get(tag) {
            None => {
                report.error(key, format!("the key `{inner}` is missing")).label(format!("needs `{tag}`: {expected}"));
            }
            Some(entry) => {
                match branches.iter().find(|branch| equal(&self.property(branch, tag)["const"], &entry.value)) {
                    Some(branch) => self.value(branch, yaml, name, key, report),
                    None => {
                        let message = format!("`{inner}` must be {expected}, found {}", entry.value.found());
                        let diagnostic = blame(report, &entry.value, message).label(format!("expected {expected}"));
                        if let Some(near) = entry.value.as_str().and_then(|text| super::closest(text, names)) {
                            diagnostic.help(format!("did you mean `{near}`?"));
                        }
                    }
                }
            }
        }
    }

    /// The property that tells alternatives apart: a constant in each of them.
    fn tag<'b>(&'b self, branches: &[&'b Json]) -> Option<&'b String> {
        let has_tag = |branch: &Json, name: &str| !self.property(branch, name)["const"].is_null();
        let first = follow(branches.first()?, self.root)["properties"].as_object()?;
        first.keys().find(|name| branches.iter().all(|branch| has_tag(branch, name)))
    }

    fn property<'b>(&'b self, branch: &'b Json, name: &str) -> &'b Json {
        &follow(branch, self.root)["properties"][name]
    }

    /// How much would be wrong with the value as this alternative.
    pub fn complaints(&self, branch: &Json, yaml: &Yaml) -> usize {
        let mut scratch = Report::new("", "", &[]);
        self.value(branch, &unplaced(yaml), "", Span::default(), &mut scratch);
        scratch.errors()
    }
}

/// An error at a value, with a note where the value came from a parameter.
pub(crate) fn blame<'r>(report: &'r mut Report, yaml: &Yaml, message: String) -> &'r mut Diagnostic {
    let diagnostic = report.error(yaml.span, message);
    if let Some(parameter) = yaml.origin.as_ref().and_then(|origin| origin.blame()) {
        diagnostic.note(format!("{parameter} is {}", yaml.found()));
    }
    diagnostic
}

/// So many words are listed in full; of more only the first half of that number.
const MOST_WORDS: usize = 12;

fn quoted(words: &[String]) -> String {
    words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

/// What a schema asks for, in words.
pub(crate) fn describe(schema: &Json, root: &Json) -> String {
    let schema = follow(schema, root);
    if let Some(branches) = alternatives(schema) {
        let mut parts: Vec<String> = Vec::new();
        for branch in branches.iter().filter(|branch| branch["type"] != "null") {
            let part = describe(branch, root);
            if !parts.contains(&part) {
                parts.push(part);
            }
        }
        return join_or(&parts);
    }
    let words = words(schema, root);
    if !words.is_empty() {
        return match words.len() > MOST_WORDS {
            true => format!("{} or {} others", quoted(&words[..MOST_WORDS / 2]), words.len() - MOST_WORDS / 2),
            false => super::suggest::one_of(&words),
        };
    }
    let kinds: Vec<&str> = match &schema["type"] {
        Json::String(kind) => vec![kind],
        Json::Array(kinds) => kinds.iter().filter_map(Json::as_str).filter(|kind| *kind != "null").collect(),
        _ => Vec::new(),
    };
    let named: Vec<String> = kinds
        .iter()
        .map(|kind| match *kind {
            "integer" => "an integer".to_owned(),
            "number" => "a number".to_owned(),
            "string" => "text".to_owned(),
            "boolean" => "`true` or `false`".to_owned(),
            "array" if schema["items"].is_object() => format!("a list, each item {}", describe(&schema["items"], root)),
            "array" => "a list".to_owned(),
            "object" => "a mapping".to_owned(),
            other => other.to_owned(),
        })
        .collect();
    if named.is_empty() { "a value".to_owned() } else { join_or(&named) }
}

/// The schema that a `$ref` stands for.
pub(crate) fn follow<'a>(schema: &'a Json, root: &'a Json) -> &'a Json {
    let mut schema = schema;
    // A chain of references is short; a bound keeps a circular one from hanging.
    for _ in 0..16 {
        let Some(target) = schema["$ref"].as_str().and_then(|path| root.pointer(path.strip_prefix('#')?)) else {
            break;
        };
        schema = target;
    }
    schema
}

fn alternatives(schema: &Json) -> Option<&[Json]> {
    schema["anyOf"].as_array().or(schema["oneOf"].as_array()).map(Vec::as_slice)
}

/// The texts, numbers and truths that a schema allows, where it lists them.
fn words(schema: &Json, root: &Json) -> Vec<String> {
    let schema = follow(schema, root);
    let listed = schema["enum"].as_array().into_iter().flatten().chain(Some(&schema["const"]));
    let own = listed.filter_map(|word| match word {
        Json::String(text) => Some(text.clone()),
        Json::Number(_) | Json::Bool(_) => Some(word.to_string()),
        _ => None,
    });
    let nested = alternatives(schema).into_iter().flatten().flat_map(|branch| words(branch, root));
    own.chain(nested).collect()
}

fn equal(word: &Json, yaml: &Yaml) -> bool {
    match &yaml.content {
        Content::Scalar(value) => serde_json::to_value(value).is_ok_and(|value| value == *word),
        Content::Invalid => true,
        _ => false,
    }
}

fn has_type(kind: &str, yaml: &Yaml) -> bool {
    match (&yaml.content, kind) {
        (Content::Scalar(Value::Null), "null") => true,
        (Content::Scalar(Value::Bool(_)), "boolean") => true,
        (Content::Scalar(Value::String(_)), "string") => true,
        (Content::Scalar(Value::Number(_)), "number") => true,
        (Content::Scalar(Value::Number(number)), "integer") => !number.is_f64(),
        (Content::Sequence(_), "array") => true,
        (Content::Mapping(_), "object") => true,
        (Content::Invalid, _) => true,
        _ => false,
    }
}

/// The first numeric bound that a number breaks, in words. Not-a-number breaks all.
fn broken_bound(schema: &Json, number: f64) -> Option<String> {
    type Holds = fn(f64, f64) -> bool;
    let bounds: [(&str, &str, Holds); 4] = [
        ("minimum", "at least", |number, bound| number >= bound),
        ("maximum", "at most", |number, bound| number <= bound),
        ("exclusiveMinimum", "above", |number, bound| number > bound),
        ("exclusiveMaximum", "below", |number, bound| number < bound),
    ];
    let broken =
        bounds.iter().find(|(keyword, _, holds)| schema[*keyword].as_f64().is_some_and(|bound| !holds(number, bound)));
    broken.map(|(keyword, word, _)| format!("{word} {}", schema[*keyword]))
}

fn join(name: &str, key: &str) -> String {
    if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") }
}

/// The value without its places, so that a trial does not look up lines.
fn unplaced(yaml: &Yaml) -> Yaml {
    let content = match &yaml.content {
        Content::Sequence(items) => Content::Sequence(items.iter().map(unplaced).collect()),
        Content::Mapping(entries) => Content::Mapping(
            entries
                .iter()
                .map(|entry| super::yaml::Entry {
                    key: entry.key.clone(),
                    key_span: Span::default(),
                    value: unplaced(&entry.value),
                })
                .collect(),
        ),
        other => other.clone(),
    };
    Yaml::new(Span::default(), content)
}
