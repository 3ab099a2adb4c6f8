//! YAML as a tree in which every value knows its place.
//!
//! serde_yaml decides what the text means. It keeps no positions, so saphyr-parser reads the same text once more for
//! them, and the two are laid over each other. Merge keys (`<<`) are applied; duplicate keys and tags are errors.

use std::collections::HashMap;
use std::rc::Rc;

use saphyr_parser::{Event, Parser, Span as Marks};
use serde_yaml::Value;

use super::diagnostic::{Report, Span};

/// A value and its place.
#[derive(Clone, Debug)]
pub(crate) struct Yaml {
    pub span: Span,
    pub content: Content,
    /// Where the value comes from, if it is that of a parameter.
    pub origin: Option<Rc<Origin>>,
}

/// The parameter that a value comes from.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// `${name}`, or the text with references in it.
    pub written: String,
    /// Whether the value is that of one parameter, and not text around some.
    pub whole: bool,
    /// What gave the parameter its value, where that is not its default: `-S name=value`.
    pub given: Option<String>,
    /// Where the value stands: `file:line:column`.
    pub place: String,
    /// For text around some: what each of these comes from.
    pub pieces: Vec<Origin>,
    /// Where that value comes from in turn, if it was itself a parameter's.
    pub before: Option<Rc<Origin>>,
}

impl Origin {
    /// For messages about the value: `` `${name}` (-S name=value) ``.
    pub fn blame(&self) -> Option<String> {
        self.whole.then(|| match &self.given {
            Some(given) => format!("`{}` ({given})", self.written),
            None => format!("`{}`", self.written),
        })
    }
}

/// A value.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// Null, boolean, number or string.
    Scalar(Value),
    Sequence(Vec<Yaml>),
    Mapping(Vec<Entry>),
    /// What is wrong has been reported: nothing more is to be said about it.
    Invalid,
}

/// A key and its value.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub key: String,
    pub key_span: Span,
    pub value: Yaml,
}

impl Yaml {
    pub fn new(span: Span, content: Content) -> Self {
        Yaml { span, content, origin: None }
    }

    pub fn as_str(&self) -> Option<&str> {
        match &self.content {
            Content::Scalar(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    pub fn is_null(&self) -> bool {
        matches!(self.content, Content::Scalar(Value::Null))
    }

    pub fn is_invalid(&self) -> bool {
        matches!(self.content, Content::Invalid)
    }

    /// Entries of a mapping; none of anything else.
    pub fn entries(&self) -> &[Entry] {
        match &self.content {
            Content::Mapping(entries) => entries,
            _ => &[],
        }
    }

    /// The entry of a mapping.
    pub fn get(&self, key: &str) -> Option<&Entry> {
        self.entries().iter().find(|entry| entry.key == key)
    }

    /// The value without its places. Strings pass through `text`.
    pub fn to_value_with(&self, text: &impl Fn(&str) -> String) -> Value {
        match &self.content {
            Content::Scalar(Value::String(string)) => Value::String(text(string)),
            Content::Scalar(value) => value.clone(),
            Content::Sequence(items) => items.iter().map(|item| item.to_value_with(text)).collect(),
            Content::Mapping(entries) => Value::Mapping(
                entries.iter().map(|e| (Value::String(e.key.clone()), e.value.to_value_with(text))).collect(),
            ),
            Content::Invalid => Value::Null,
        }
    }

    /// The value without its places.
    pub fn to_value(&self) -> Value {
        self.to_value_with(&str::to_owned)
    }

    /// What it is, for an error message.
    pub fn found(&self) -> String {
        match &self.content {
            Content::Scalar(Value::Null) => "nothing".to_owned(),
            Content::Scalar(Value::String(text)) => format!("the text {text:?}"),
            Content::Scalar(Value::Number(number)) => format!("the number {number}"),
            Content::Scalar(Value::Bool(truth)) => format!("`{truth}`"),
            Content::Sequence(items) if items.is_empty() => "an empty list".to_owned(),
            Content::Sequence(_) => "a list".to_owned(),
            Content::Mapping(entries) if entries.is_empty() => "an empty mapping".to_owned(),
            _ => "a mapping".to_owned(),
        }
    }
}

/// Read one of the report's sources. None when it cannot be read at all; other mistakes are reported and read past.
pub(crate) fn parse(source: usize, report: &mut Report) -> Option<Yaml> {
    let text = report.text(source).trim_start_matches('\u{feff}').to_owned();
    let before = report.errors();
    let located = locate(&text, source, report);
    let value = match serde_yaml::from_str::<Value>(&text) {
        Ok(value) => value,
        Err(_) if report.errors() > before => return None,
        Err(error) => {
            let place = error.location().map_or((1, 1), |place| (place.line(), place.column()));
            let message = refusal(&error);
            let span = Span { source, line: place.0, column: place.1, width: 1 };
            let text = text.lines().nth(span.line.saturating_sub(1)).unwrap_or_default();
            let diagnostic = report.error(span, message);
            if text.contains("${") {
                diagnostic.help("within `{ }` and `[ ]`, references need quotes: \"${name}\"");
            }
            return None;
        }
    };
    match located {
        Ok(located) => Some(join(value, &located, report)),
        Err((span, message)) => {
            report.error(span, format!("this is not YAML: {message}"));
            None
        }
    }
}

/// What serde_yaml refuses, without the place, which is told otherwise.
pub(crate) fn refusal(error: &serde_yaml::Error) -> String {
    let message = error.to_string();
    let message = message.split(" at line ").next().unwrap_or(&message);
    // Integers are read as 128 bits where they do not fit 64, and then there is no value for them.
    match message.split_once("invalid type: integer `").and_then(|(_, rest)| rest.split_once('`')) {
        Some((number, _)) => format!("the integer {number} has more than 64 bits; with a point it is a number"),
        None => format!("this is not YAML: {message}"),
    }
}

/// A node of the text, before it is known what its scalars mean.
struct Located {
    span: Span,
    /// Of scalars.
    text: String,
    /// Items of a sequence; keys and values of a mapping in turn.
    children: Vec<Rc<Located>>,
}

enum Open {
    Sequence,
    Mapping,
}

/// Places of everything in the text, found from the parser's events.
fn locate(text: &str, source: usize, report: &mut Report) -> Result<Rc<Located>, (Span, String)> {
    let mut anchors: HashMap<usize, Rc<Located>> = HashMap::new();
    // A frame for each collection that is still open; the bottom one receives the document.
    let mut stack: Vec<(Open, usize, Located)> = vec![(Open::Sequence, 0, Located::at(Span::default()))];
    for event in Parser::new_from_str(text) {
        let (event, marks) = event.map_err(|error| {
            let mark = error.marker();
            (Span { source, line: mark.line(), column: mark.col() + 1, width: 1 }, error.info().to_owned())
        })?;
        let span = span_of(source, &marks);
        let done = match event {
            Event::Scalar(text, _, anchor, tag) => {
                reject_tag(tag.as_deref(), span, report);
                (anchor, Rc::new(Located { text: text.into_owned(), ..Located::at(span) }))
            }
            Event::Alias(anchor) => match anchors.get(&anchor) {
                Some(node) => (0, node.clone()),
                None => return Err((span, "this alias stands inside its own anchor".to_owned())),
            },
            Event::SequenceStart(anchor, tag) => {
                reject_tag(tag.as_deref(), span, report);
                stack.push((Open::Sequence, anchor, Located::at(span)));
                continue;
            }
            Event::MappingStart(anchor, tag) => {
                reject_tag(tag.as_deref(), span, report);
                stack.push((Open::Mapping, anchor, Located::at(span)));
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let (open, anchor, node) = stack.pop().expect("the parser closes only what it opened");
                if matches!(open, Open::Mapping) {
                    report_duplicates(&node, report);
                }
                (anchor, Rc::new(node))
            }
            _ => continue,
        };
        let (anchor, node) = done;
        if anchor != 0 {
            anchors.insert(anchor, node.clone());
        }
        stack.last_mut().expect("the bottom frame is never popped").2.children.push(node);
    }
    let (_, _, bottom) = stack.swap_remove(0);
    Ok(bottom
        .children
        .into_iter()
        .next()
        .unwrap_or_else(|| Rc::new(Located::at(Span { source, line: 1, column: 1, width: 1 }))))
}

impl Located {
    fn at(span: Span) -> Self {
        Located { span, text: String::new(), children: Vec::new() }
    }
}

fn span_of(source: usize, marks: &Marks) -> Span {
    Span { source, line: marks.start.line(), column: marks.start.col() + 1, width: marks.len().max(1) }
}

fn reject_tag(tag: Option<&saphyr_parser::Tag>, span: Span, report: &mut Report) {
    if tag.is_some() {
        report.error(span, "a tag has no meaning here").help("leave out the word that begins with `!`");
    }
}

fn report_duplicates(mapping: &Located, report: &mut Report) {
    let mut seen: HashMap<&str, Span> = HashMap::new();
    for key in mapping.children.iter().step_by(2).filter(|key| key.children.is_empty()) {
        if let Some(first) = seen.get(key.text.as_str()) {
            let note = format!("the first one is at {}", report.place(*first));
            report.error(key.span, format!("the key `{}` is given twice", key.text)).note(note);
        } else {
            seen.insert(&key.text, key.span);
        }
    }
}

/// Lay a value over the places of its text.
fn join(value: Value, located: &Located, report: &mut Report) -> Yaml {
    let content = match value {
        Value::Sequence(items) => Content::Sequence(
            items.into_iter().zip(&located.children).map(|(item, place)| join(item, place, report)).collect(),
        ),
        Value::Mapping(mapping) => {
            let mut entries = Vec::new();
            for ((key, value), places) in mapping.into_iter().zip(located.children.chunks(2)) {
                let [key_place, value_place] = places else { continue };
                match key {
                    Value::String(key) => {
                        entries.push(Entry { key, key_span: key_place.span, value: join(value, value_place, report) });
                    }
                    other => {
                        let found = Yaml::new(key_place.span, Content::Scalar(other)).found();
                        report.error(key_place.span, format!("keys are text, found {found}"));
                    }
                }
            }
            merge(&mut entries, report);
            Content::Mapping(entries)
        }
        Value::Tagged(_) => Content::Invalid,
        scalar => Content::Scalar(scalar),
    };
    Yaml::new(located.span, content)
}

/// Replace `<<` by the entries of the mappings under it that are not there already.
fn merge(entries: &mut Vec<Entry>, report: &mut Report) {
    let Some(index) = entries.iter().position(|entry| entry.key == "<<") else { return };
    let merged = entries.remove(index).value;
    let parts = match merged.content {
        Content::Sequence(items) => items,
        _ => vec![merged],
    };
    for part in parts {
        match part.content {
            Content::Mapping(others) => {
                for other in others {
                    if entries.iter().all(|entry| entry.key != other.key) {
                        entries.push(other);
                    }
                }
            }
            _ => {
                report.error(part.span, format!("`<<` merges mappings, found {}", part.found()));
            }
        }
    }
}
