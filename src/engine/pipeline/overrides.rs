//! Values for params from outside of their block: `-S name=value`, and what a test gives.

use saphyr_parser::{Event, Parser};
use serde_yaml::Value;

use super::diagnostic::{Report, Span};
use super::yaml::{self, Content, Entry, Yaml};

/// A value for one parameter.
#[derive(Clone, Debug)]
pub(crate) struct Override {
    pub name: String,
    pub name_span: Span,
    pub value: Yaml,
    /// The value as the command line has it; None for one that stands in the file, where quotes tell text from others.
    pub text: Option<String>,
    /// What gave it, for people.
    pub given: String,
}

/// The `(name, value)` of `-S name=value`; values are YAML. A name that is given twice is an error.
pub(crate) fn from_command_line(overrides: &[(String, String)], report: &mut Report) -> Vec<Override> {
    let mut list: Vec<Override> = Vec::new();
    for (index, (name, text)) in overrides.iter().enumerate() {
        let name_span = Span { source: 1, line: index + 1, column: 4, width: name.chars().count() };
        let value_span = Span { column: 5 + name_span.width, width: text.chars().count(), ..name_span };
        if list.iter().any(|earlier| earlier.name == *name) {
            report.error(name_span, format!("the parameter `{name}` is overridden twice"));
            continue;
        }
        let value = match serde_yaml::from_str(text) {
            Ok(value) if !is_plain(&value) => {
                report.error(value_span, "keys are text, and tags have no meaning here");
                Yaml::new(value_span, Content::Invalid)
            }
            Ok(value) => unplaced(value, value_span),
            Err(error) => {
                report.error(value_span, yaml::refusal(&error));
                Yaml::new(value_span, Content::Invalid)
            }
        };
        let given = format!("-S {name}={text}");
        list.push(Override { name: name.clone(), name_span, value, text: Some(text.clone()), given });
    }
    list
}

/// What a mapping in the file gives, which goes before what the command line does.
pub(crate) fn from_entries(entries: &[Entry], before: &[Override], report: &Report) -> Vec<Override> {
    let others = before.iter().filter(|other| entries.iter().all(|entry| entry.key != other.name)).cloned();
    let given = entries.iter().map(|entry| Override {
        name: entry.key.clone(),
        name_span: entry.key_span,
        value: entry.value.clone(),
        text: None,
        given: format!("given at {}", report.place(entry.value.span)),
    });
    others.chain(given).collect()
}

/// The items of a list without its brackets, as `-S name=a,b` has them; None for those that are no single values.
pub(crate) fn item_texts(list: &str) -> Vec<Option<String>> {
    let (mut items, mut depth) = (Vec::new(), 0);
    for event in Parser::new_from_str(&format!("[{list}]")).map_while(|event| event.ok()) {
        match event.0 {
            Event::Scalar(text, ..) if depth == 1 => items.push(Some(text.into_owned())),
            Event::SequenceStart(..) | Event::MappingStart(..) => {
                if depth == 1 {
                    items.push(None);
                }
                depth += 1;
            }
            Event::SequenceEnd | Event::MappingEnd => depth -= 1,
            _ => {}
        }
    }
    items
}

/// Whether the pipeline has a parameter of that name; reported where it has none.
pub(crate) fn is_known<S: AsRef<str>>(name: &str, span: Span, names: &[S], report: &mut Report) -> bool {
    if names.iter().any(|known| known.as_ref() == name) {
        return true;
    }
    let diagnostic = report.error(span, format!("the pipeline has no parameter `{name}`"));
    if names.is_empty() {
        diagnostic.help("it has no `params` at all");
    } else {
        diagnostic.suggest(name, names);
    }
    false
}

/// Whether a value has no tags, and no keys but text.
fn is_plain(value: &Value) -> bool {
    match value {
        Value::Tagged(_) => false,
        Value::Sequence(items) => items.iter().all(is_plain),
        Value::Mapping(mapping) => mapping.iter().all(|(key, value)| key.is_string() && is_plain(value)),
        _ => true,
    }
}

/// A value all of which is at one place.
pub(crate) fn unplaced(value: Value, span: Span) -> Yaml {
    let content = match value {
        Value::Sequence(items) => Content::Sequence(items.into_iter().map(|item| unplaced(item, span)).collect()),
        Value::Mapping(mapping) => Content::Mapping(
            mapping
                .into_iter()
                .filter_map(|(key, value)| {
                    let key = key.as_str()?.to_owned();
                    Some(Entry { key, key_span: span, value: unplaced(value, span) })
                })
                .collect(),
        ),
        scalar => Content::Scalar(scalar),
    };
    Yaml::new(span, content)
}
