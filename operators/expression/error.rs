//! What is wrong with an expression, in words of people who write formulas.

use rhai::{EvalAltResult, Position};
use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::pipeline::closest;

use super::{MAX_ITEMS, MAX_TEXT_BYTES};

/// What is wrong with an expression, and where in its text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}{}", place(*line, *column), help.as_deref().map(|help| format!(" ({help})")).unwrap_or_default())]
pub struct ExpressionError {
    /// What was expected and what was found.
    pub message: String,
    /// What may have been meant.
    pub help: Option<String>,
    /// Line of the text, from 1; 0 where there is no place.
    pub line: usize,
    /// Column of the line, from 1.
    pub column: usize,
}

fn place(line: usize, column: usize) -> String {
    match line {
        0 => String::new(),
        1 => format!("at column {column}: "),
        _ => format!("at line {line}, column {column}: "),
    }
}

impl ExpressionError {
    /// Something wrong with the expression as a whole.
    pub fn whole(message: impl Into<String>) -> Self {
        ExpressionError { message: message.into(), help: None, line: 0, column: 0 }
    }

    /// Whether it is a limit that was reached.
    pub fn is_limit(&self) -> bool {
        self.message.starts_with("stopped after")
    }

    /// As something wrong with the text at a key.
    pub fn issue(self, key: impl Into<String>) -> ConfigIssue {
        let issue = ConfigIssue { help: self.help, ..ConfigIssue::new(key, self.message) };
        if self.line == 0 { issue } else { issue.within(self.line, self.column) }
    }

    pub(super) fn at(position: Position, message: String, help: Option<String>) -> Self {
        let (line, column) = (position.line().unwrap_or(0), position.position().unwrap_or(0));
        ExpressionError { message, help, line, column }
    }

    /// At a byte of the text.
    pub(super) fn at_byte(text: &str, byte: usize, message: String, help: Option<String>) -> Self {
        let before = &text[..byte];
        let line = 1 + before.matches('\n').count();
        let start = before.rfind('\n').map_or(0, |end| end + 1);
        ExpressionError { message, help, line, column: 1 + text[start..byte].chars().count() }
    }

    /// What went wrong in an evaluation; `functions` are the names that may have been meant where one is unknown.
    pub fn of<'a>(error: &EvalAltResult, functions: impl IntoIterator<Item = &'a str>) -> Self {
        let inner = error.unwrap_inner();
        let (message, help) = match inner {
            EvalAltResult::ErrorFunctionNotFound(signature, _) => unknown_function(signature, functions),
            EvalAltResult::ErrorTerminated(why, _) => (why.to_string(), None),
            EvalAltResult::ErrorPropertyNotFound(name, _) => (format!("there is no `{name}`"), None),
            EvalAltResult::ErrorRuntime(value, _) => (value.to_string(), None),
            EvalAltResult::ErrorMismatchDataType(expected, found, _)
            | EvalAltResult::ErrorMismatchOutputType(expected, found, _) => {
                (format!("expected {}, found {}", with_article(expected), with_article(found)), None)
            }
            EvalAltResult::ErrorIndexingType(found, _) => {
                let found = found.split(" [").next().unwrap_or(found);
                (format!("{} has no items to take by `[ ]`", with_article(found)), None)
            }
            EvalAltResult::ErrorDataTooLarge(what, _) => (too_large(what), None),
            other => (without_types(&error_without_place(other)).chars().take(300).collect(), None),
        };
        ExpressionError::at(inner.position(), message, help)
    }
}

/// Names of Rhai's types, the longest first, and what people call them.
const TYPES: [(&str, &str); 11] = [
    ("sapo_flow_operators::objectives::tensors::Value", "tensor"),
    ("&str | ImmutableString | String", "text"),
    ("ImmutableString", "text"),
    ("string", "text"),
    ("array", "list"),
    ("char", "text"),
    ("bool", "truth value"),
    ("map", "mapping"),
    ("i64", "number"),
    ("f64", "number"),
    ("()", "nothing"),
];

/// What people call a type of Rhai's.
fn type_name(of: &str) -> &str {
    TYPES.iter().find(|(name, _)| *name == of).map_or(of, |(_, ours)| ours)
}

/// A type of Rhai's as people name a value of it.
pub fn with_article(of: &str) -> String {
    match type_name(of) {
        "truth value" => "true or false".to_owned(),
        "nothing" => "nothing".to_owned(),
        name => format!("a {name}"),
    }
}

/// A message of Rhai's with its types as people call them, where it quotes some.
fn without_types(message: &str) -> String {
    TYPES.iter().fold(message.to_owned(), |message, (name, ours)| message.replace(&format!("'{name}'"), ours))
}

fn too_large(what: &str) -> String {
    match what.to_lowercase() {
        what if what.contains("string") || what.contains("text") => {
            format!("a text grew too large: at most {} KiB", MAX_TEXT_BYTES >> 10)
        }
        what if what.contains("map") => format!("a mapping grew too large: at most {MAX_ITEMS} entries"),
        _ => format!("a list grew too large: at most {MAX_ITEMS} items"),
    }
}

/// `name (type, type)` as Rhai writes it, for people.
fn unknown_function<'a>(signature: &str, functions: impl IntoIterator<Item = &'a str>) -> (String, Option<String>) {
    let (name, arguments) = signature.split_once(" (").unwrap_or((signature, ")"));
    let arguments = arguments.strip_suffix(')').unwrap_or(arguments);
    let arguments = arguments.split(", ").map(type_name).collect::<Vec<_>>().join(", ");
    let functions: Vec<&str> = functions.into_iter().collect();
    if !name.starts_with(|first: char| first.is_alphabetic() || first == '_') {
        return (format!("`{name}` does not work on ({arguments})"), None);
    }
    if functions.contains(&name) {
        return (format!("`{name}` does not take ({arguments})"), None);
    }
    let help = closest(name, functions).map(|near| format!("did you mean `{near}`?"));
    (format!("unknown function `{name}` of ({arguments})"), help)
}

fn error_without_place(error: &EvalAltResult) -> String {
    let text = error.to_string();
    match text.rfind(" (line ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}
