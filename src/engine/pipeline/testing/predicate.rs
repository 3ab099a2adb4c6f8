//! What a test expects of a value: another value, or what holds of it.

use serde_json::Value as Json;
use serde_yaml::Value;

use crate::pipeline::diagnostic::{Report, Span};
use crate::pipeline::schema::{Validator, describe, follow};
use crate::pipeline::suggest::closest;
use crate::pipeline::yaml::{Content, Entry, Yaml};

const WORDS: [&str; 8] = ["min", "max", "approx", "within", "contains", "length", "not", "one_of"];

/// What is expected of a value.
pub(super) struct Predicate {
    span: Span,
    kind: Kind,
}

enum Kind {
    /// It is this: null, a truth, a number or text.
    Is(Json),
    /// It is a list of as many items, each as expected.
    Items(Vec<Predicate>),
    /// It is a mapping that has these entries, and perhaps others.
    Fields(Vec<Field>),
    /// All of these hold.
    Holds(Vec<(Span, Test)>),
}

/// An entry of a mapping.
struct Field {
    key: String,
    /// Whether any name would do as far as the schema goes, as for metrics: only records can tell that there is no such.
    open: bool,
    predicate: Predicate,
}

enum Test {
    Min(f64),
    Max(f64),
    Approx { value: f64, within: f64 },
    Contains(Predicate),
    Length(Predicate),
    Not(Predicate),
    OneOf(Vec<Predicate>),
}

/// Something that is not as expected.
pub(super) struct Mismatch {
    /// The expectation.
    pub span: Span,
    /// What was found, and where in the record.
    pub message: String,
    pub help: Option<String>,
}

/// Reads expectations of values with one schema and its definitions.
pub(super) struct Reader<'a> {
    pub root: &'a Json,
}

impl Reader<'_> {
    /// What is written as what it expects of a value of that schema, which is called `name`.
    pub fn read(&self, schema: &Json, yaml: &Yaml, name: &str, report: &mut Report) -> Predicate {
        let schema = self.without_null(follow(schema, self.root), yaml);
        let is_mapping = schema["properties"].is_object() || schema["additionalProperties"].is_object();
        let kind = match &yaml.content {
            Content::Mapping(entries) if is_mapping => {
                Kind::Fields(entries.iter().filter_map(|entry| self.field(schema, entry, name, report)).collect())
            }
            Content::Mapping(entries) => Kind::Holds(self.tests(schema, entries, yaml, name, report)),
            Content::Sequence(items) if schema["items"].is_object() => {
                let item = |(index, item)| self.read(&schema["items"], item, &format!("{name}[{index}]"), report);
                Kind::Items(items.iter().enumerate().map(item).collect())
            }
            Content::Scalar(value) => {
                Validator { root: self.root }.value(schema, yaml, name, yaml.span, report);
                Kind::Is(serde_json::to_value(value).unwrap_or_default())
            }
            _ => {
                Validator { root: self.root }.value(schema, yaml, name, yaml.span, report);
                Kind::Is(Json::Null)
            }
        };
        Predicate { span: yaml.span, kind }
    }

    /// Of alternatives, the one that is not null.
    fn without_null<'s>(&'s self, schema: &'s Json, yaml: &Yaml) -> &'s Json {
        let branches = schema["anyOf"].as_array().map(Vec::as_slice).unwrap_or_default();
        let mut values = branches.iter().filter(|branch| branch["type"] != "null");
        match (values.next(), yaml.is_null()) {
            (Some(value), false) => follow(value, self.root),
            _ => schema,
        }
    }

    fn field(&self, schema: &Json, entry: &Entry, name: &str, report: &mut Report) -> Option<Field> {
        let (property, open) = match schema["properties"].get(&entry.key) {
            Some(property) => (property, false),
            None if schema["additionalProperties"].is_object() => (&schema["additionalProperties"], true),
            None => {
                let known: Vec<&String> =
                    schema["properties"].as_object().into_iter().flatten().map(|(k, _)| k).collect();
                report
                    .error(entry.key_span, format!("there is no field `{}` in `{name}`", entry.key))
                    .label("unknown field")
                    .suggest(&entry.key, &known);
                return None;
            }
        };
        let predicate = self.read(property, &entry.value, &format!("{name}.{}", entry.key), report);
        Some(Field { key: entry.key.clone(), open, predicate: Predicate { span: entry.value.span, ..predicate } })
    }

    fn tests(
        &self,
        schema: &Json,
        entries: &[Entry],
        yaml: &Yaml,
        name: &str,
        report: &mut Report,
    ) -> Vec<(Span, Test)> {
        let mut tests = Vec::new();
        for entry in entries {
            let value = &entry.value;
            let test = match entry.key.as_str() {
                "min" => self.number(schema, entry, name, report).map(Test::Min),
                "max" => self.number(schema, entry, name, report).map(Test::Max),
                "approx" => self.number(schema, entry, name, report).and_then(|number| {
                    let within = match yaml.get("within") {
                        Some(within) => self.number(schema, within, name, report)?,
                        None => 1e-6 * number.abs().max(1.0),
                    };
                    Some(Test::Approx { value: number, within })
                }),
                "within" if yaml.get("approx").is_some() => continue,
                "contains" => self.contains(schema, entry, name, report).map(Test::Contains),
                "length" => self.length(schema, entry, name, report).map(Test::Length),
                "not" => Some(Test::Not(self.read(schema, value, name, report))),
                "one_of" => match &value.content {
                    Content::Sequence(items) if !items.is_empty() => {
                        Some(Test::OneOf(items.iter().map(|item| self.read(schema, item, name, report)).collect()))
                    }
                    _ => {
                        report.error(value.span, format!("`one_of` is a list of values, found {}", value.found()));
                        None
                    }
                },
                word => {
                    report
                        .error(entry.key_span, format!("`{word}` says nothing about `{name}`"))
                        .label(format!("expected {}, or what holds of it", describe(schema, self.root)))
                        .suggest(word, &WORDS);
                    None
                }
            };
            tests.extend(test.map(|test| (entry.key_span, test)));
        }
        if entries.is_empty() {
            report.error(yaml.span, format!("this expects nothing of `{name}`"));
        }
        tests
    }

    fn number(&self, schema: &Json, entry: &Entry, name: &str, report: &mut Report) -> Option<f64> {
        if !is_number(schema) {
            let expected = describe(schema, self.root);
            report.error(entry.key_span, format!("`{}` is for numbers, and `{name}` is {expected}", entry.key));
            return None;
        }
        match &entry.value.content {
            Content::Scalar(Value::Number(number)) => number.as_f64(),
            _ => {
                let found = entry.value.found();
                report.error(entry.value.span, format!("`{}` must be a number, found {found}", entry.key));
                None
            }
        }
    }

    fn contains(&self, schema: &Json, entry: &Entry, name: &str, report: &mut Report) -> Option<Predicate> {
        if schema["items"].is_object() {
            return Some(self.read(&schema["items"], &entry.value, &format!("{name}[..]"), report));
        }
        if schema["type"] == "string" {
            return Some(self.read(schema, &entry.value, name, report));
        }
        let expected = describe(schema, self.root);
        report.error(entry.key_span, format!("`contains` is for lists and texts, and `{name}` is {expected}"));
        None
    }

    fn length(&self, schema: &Json, entry: &Entry, name: &str, report: &mut Report) -> Option<Predicate> {
        if !is_list(schema) && schema["type"] != "string" {
            let expected = describe(schema, self.root);
            report.error(entry.key_span, format!("`length` is for lists and texts, and `{name}` is {expected}"));
            return None;
        }
        let count = serde_json::json!({"type": "integer", "minimum": 0});
        Some(Reader { root: &count }.read(&count, &entry.value, &format!("the length of {name}"), report))
    }
}

fn has_type(schema: &Json, kind: &str) -> bool {
    schema["type"] == kind || schema["type"].as_array().is_some_and(|kinds| kinds.iter().any(|other| other == kind))
}

fn is_number(schema: &Json) -> bool {
    has_type(schema, "number") || has_type(schema, "integer")
}

fn is_list(schema: &Json) -> bool {
    has_type(schema, "array")
}

impl Predicate {
    /// What about `value`, which is called `name`, is not as expected.
    pub fn check(&self, value: &Json, name: &str, found: &mut Vec<Mismatch>) {
        match &self.kind {
            Kind::Is(expected) if equal(expected, value) => {}
            Kind::Is(expected) => self.mismatch(format!("expected `{name}` to be {expected}, found {value}"), found),
            Kind::Items(items) => {
                let values = value.as_array().map(Vec::as_slice).unwrap_or_default();
                if values.len() != items.len() || !value.is_array() {
                    let count = items.len();
                    return self.mismatch(format!("expected `{name}` to have {count} items, found {value}"), found);
                }
                for (index, (item, value)) in items.iter().zip(values).enumerate() {
                    item.check(value, &format!("{name}[{index}]"), found);
                }
            }
            Kind::Fields(fields) => {
                let Some(values) = value.as_object() else {
                    return self.mismatch(format!("expected `{name}` to be a mapping, found {value}"), found);
                };
                for Field { key, predicate, .. } in fields {
                    match values.get(key) {
                        Some(value) => predicate.check(value, &format!("{name}.{key}"), found),
                        None => predicate.lacking(name, key, values.keys(), found),
                    }
                }
            }
            Kind::Holds(tests) => {
                for (span, test) in tests {
                    if let Some(expected) = test.broken_by(value) {
                        let message = format!("expected `{name}` to be {expected}, found {value}");
                        found.push(Mismatch { span: *span, message, help: None });
                    }
                }
            }
        }
    }

    /// Whether it is all as expected.
    pub fn holds(&self, value: &Json) -> bool {
        let mut found = Vec::new();
        self.check(value, "", &mut found);
        found.is_empty()
    }

    /// Report fields that none of `values` has, of those for which any name would do. Where what is expected must *not*
    /// hold (`denied`), or need not, a misspelt name would satisfy it.
    pub fn check_names(&self, values: &[&Json], name: &str, denied: bool, found: &mut Vec<Mismatch>) {
        match &self.kind {
            Kind::Is(_) => {}
            Kind::Items(items) => {
                for (index, item) in items.iter().enumerate() {
                    let values: Vec<&Json> = values.iter().filter_map(|value| value.get(index)).collect();
                    item.check_names(&values, &format!("{name}[{index}]"), denied, found);
                }
            }
            Kind::Fields(fields) => {
                for Field { key, open, predicate } in fields {
                    let inner: Vec<&Json> = values.iter().filter_map(|value| value.get(key)).collect();
                    if inner.is_empty() && *open && denied && !values.is_empty() {
                        let known =
                            values.iter().filter_map(|value| value.as_object()).flat_map(|fields| fields.keys());
                        predicate.lacking(name, key, known, found);
                    }
                    predicate.check_names(&inner, &format!("{name}.{key}"), denied, found);
                }
            }
            Kind::Holds(tests) => {
                for (_, test) in tests {
                    match test {
                        Test::Not(other) => other.check_names(values, name, true, found),
                        Test::OneOf(others) => {
                            others.iter().for_each(|other| other.check_names(values, name, true, found));
                        }
                        Test::Contains(item) => {
                            let items: Vec<&Json> =
                                values.iter().filter_map(|value| value.as_array()).flatten().collect();
                            item.check_names(&items, &format!("{name}[..]"), denied, found);
                        }
                        Test::Min(_) | Test::Max(_) | Test::Approx { .. } | Test::Length(_) => {}
                    }
                }
            }
        }
    }

    /// That `name` has no `key`, of which something is expected.
    fn lacking<'k>(&self, name: &str, key: &str, known: impl Iterator<Item = &'k String>, found: &mut Vec<Mismatch>) {
        let near = closest(key, known.map(String::as_str));
        found.push(Mismatch {
            span: self.span,
            message: format!("`{name}` has no `{key}`"),
            help: near.map(|near| format!("did you mean `{near}`?")),
        });
    }

    fn mismatch(&self, message: String, found: &mut Vec<Mismatch>) {
        found.push(Mismatch { span: self.span, message, help: None });
    }
}

impl Test {
    /// What it expects, if the value is otherwise.
    fn broken_by(&self, value: &Json) -> Option<String> {
        let number = value.as_f64();
        let (holds, expected) = match self {
            Test::Min(bound) => (number.is_some_and(|number| number >= *bound), format!("at least {bound}")),
            Test::Max(bound) => (number.is_some_and(|number| number <= *bound), format!("at most {bound}")),
            Test::Approx { value, within } => {
                (number.is_some_and(|number| (number - value).abs() <= *within), format!("within {within} of {value}"))
            }
            Test::Contains(item) => {
                let holds = match (value, &item.kind) {
                    (Json::Array(items), _) => items.iter().any(|value| item.holds(value)),
                    (Json::String(text), Kind::Is(Json::String(part))) => text.contains(part.as_str()),
                    _ => false,
                };
                (holds, "something that contains this".to_owned())
            }
            Test::Length(length) => {
                let count = match value {
                    Json::Array(items) => Some(items.len()),
                    Json::String(text) => Some(text.chars().count()),
                    _ => None,
                };
                let holds = count.is_some_and(|count| length.holds(&Json::from(count)));
                (holds, "of this length".to_owned())
            }
            Test::Not(other) => (!other.holds(value), "something else".to_owned()),
            Test::OneOf(others) => (others.iter().any(|other| other.holds(value)), "one of these".to_owned()),
        };
        (!holds).then_some(expected)
    }
}

/// Numbers are equal where their values are, whole or not.
fn equal(expected: &Json, value: &Json) -> bool {
    match (expected, value) {
        (Json::Number(expected), Json::Number(value)) => expected == value || expected.as_f64() == value.as_f64(),
        _ => expected == value,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Fields that nothing has, where the expectation is held against these values.
    fn unknown(expected: &str, values: &[Json]) -> Vec<String> {
        let schema = json!({"type": "object", "properties": {
            "pairs": {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "number"}}},
        }});
        let mut report = Report::new("p.yaml", expected, &[]);
        let yaml = crate::pipeline::yaml::parse(0, &mut report).expect("it is YAML");
        let predicate = Reader { root: &schema }.read(&schema, &yaml, "it", &mut report);
        assert!(!report.has_errors());
        let mut found = Vec::new();
        predicate.check_names(&values.iter().collect::<Vec<_>>(), "it", false, &mut found);
        found.into_iter().map(|mismatch| mismatch.message).collect()
    }

    #[test]
    fn names_count_where_they_need_not_hold() {
        let values = [json!({"pairs": [{"score": 1}, {"rank": 2}]}), json!({"pairs": []})];
        for (expected, lacking) in [
            ("pairs: {not: {contains: {scor: 1}}}", vec!["`it.pairs[..]` has no `scor`"]),
            ("pairs: {not: {contains: {rank: 1}}}", vec![]),
            ("pairs: {one_of: [[{scor: 1}], [{score: 1}, {rank: 2}]]}", vec!["`it.pairs[0]` has no `scor`"]),
            // What must hold fails by itself.
            ("pairs: {contains: {scor: 1}}", vec![]),
        ] {
            assert_eq!(unknown(expected, &values), lacking, "{expected}");
        }
    }
}
