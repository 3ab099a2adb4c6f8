//! `params`: their defaults, `-S name=value`, and `${name}` in the rest of the pipeline.
//!
//! Interpolation sees parsed scalars, never text: a value cannot change the structure of the file. `${name}` alone
//! keeps the parameter's type, within other text it prints the value, `$${` is a literal `${`. An override is YAML of
//! any type: whether the type is right is for those to say who use the value, just as with a default.

use std::rc::Rc;

use serde_yaml::Value;

use super::diagnostic::{Report, Span};
use super::yaml::{Content, Yaml};

/// The parameters of a pipeline.
pub(crate) struct Params {
    list: Vec<Param>,
}

struct Param {
    name: String,
    span: Span,
    value: Yaml,
    /// The text of an override.
    given: Option<String>,
    state: State,
    used: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Written,
    Resolving,
    Resolved,
}

impl Params {
    /// Read the `params` block and apply the overrides.
    pub fn read(block: Option<&Yaml>, overrides: &[(String, String)], report: &mut Report) -> Self {
        let mut params = Params { list: Vec::new() };
        if let Some(block) = block {
            if !matches!(block.content, Content::Mapping(_)) && !block.is_null() {
                report.error(block.span, format!("`params` is a mapping, found {}", block.found()));
            }
            for entry in block.entries() {
                if !is_identifier(&entry.key) {
                    report
                        .error(entry.key_span, format!("`{}` is no name for a parameter", entry.key))
                        .help("use letters, digits and `_`, not beginning with a digit");
                }
                params.list.push(Param {
                    name: entry.key.clone(),
                    span: entry.key_span,
                    value: entry.value.clone(),
                    given: None,
                    state: State::Written,
                    used: false,
                });
            }
        }
        for (index, (name, value)) in overrides.iter().enumerate() {
            params.override_one(index, name, value, overrides, report);
        }
        for index in 0..params.list.len() {
            params.resolve(index, Vec::new(), report);
        }
        params
    }

    fn override_one(
        &mut self,
        index: usize,
        name: &str,
        text: &str,
        overrides: &[(String, String)],
        report: &mut Report,
    ) {
        let name_span = Span { source: 1, line: index + 1, column: 4, width: name.chars().count() };
        let value_span = Span { column: 5 + name_span.width, width: text.chars().count(), ..name_span };
        if overrides[..index].iter().any(|(earlier, _)| earlier == name) {
            report.error(name_span, format!("the parameter `{name}` is overridden twice"));
            return;
        }
        let names: Vec<String> = self.list.iter().map(|param| param.name.clone()).collect();
        let Some(param) = self.list.iter_mut().find(|param| param.name == name) else {
            let diagnostic = report.error(name_span, format!("the pipeline has no parameter `{name}`"));
            if names.is_empty() {
                diagnostic.help("it has no `params` at all");
            } else {
                diagnostic.suggest(name, &names);
            }
            return;
        };
        match serde_yaml::from_str(text) {
            Ok(value) if !is_plain(&value) => {
                report.error(value_span, "keys are text, and tags have no meaning here");
                param.value.content = Content::Invalid;
            }
            Ok(value) => {
                param.value = unplaced(value, value_span);
                param.given = Some(text.to_owned());
            }
            Err(error) => {
                report.error(value_span, format!("this is not YAML: {error}"));
                param.value.content = Content::Invalid;
            }
        }
    }

    /// Fill in the references of a parameter to others.
    fn resolve(&mut self, index: usize, mut chain: Vec<String>, report: &mut Report) {
        let param = &mut self.list[index];
        match param.state {
            State::Resolved => return,
            State::Resolving => {
                chain.push(param.name.clone());
                let start = chain.iter().position(|name| *name == param.name).unwrap_or(0);
                report.error(param.span, format!("parameters refer to each other: {}", chain[start..].join(" -> ")));
                param.value.content = Content::Invalid;
                param.state = State::Resolved;
                return;
            }
            State::Written => param.state = State::Resolving,
        }
        chain.push(param.name.clone());
        let value = param.value.clone();
        for name in names_in(&value) {
            if let Some(other) = self.list.iter().position(|param| param.name == name) {
                self.resolve(other, chain.clone(), report);
            }
        }
        let value = self.fill(&value, report);
        let param = &mut self.list[index];
        if param.state == State::Resolving {
            param.value = value;
            param.state = State::Resolved;
        }
    }

    /// The value with every `${name}` in it replaced.
    pub fn fill(&mut self, yaml: &Yaml, report: &mut Report) -> Yaml {
        let content = match &yaml.content {
            Content::Scalar(Value::String(text)) if text.contains("${") => return self.fill_text(text, yaml, report),
            Content::Sequence(items) => Content::Sequence(items.iter().map(|item| self.fill(item, report)).collect()),
            Content::Mapping(entries) => {
                let mut entries = entries.clone();
                for entry in &mut entries {
                    entry.value = self.fill(&entry.value, report);
                }
                Content::Mapping(entries)
            }
            other => other.clone(),
        };
        Yaml { content, ..yaml.clone() }
    }

    fn fill_text(&mut self, text: &str, yaml: &Yaml, report: &mut Report) -> Yaml {
        let pieces = match pieces(text) {
            Ok(pieces) => pieces,
            Err(message) => {
                report.error(yaml.span, message).help("write `${name}`; a literal `${` is `$${`");
                return Yaml::new(yaml.span, Content::Invalid);
            }
        };
        if let [Piece::Param(name)] = pieces.as_slice() {
            let value = self.look_up(name, yaml.span, report);
            return Yaml { parameter: Some(self.origin(name)), ..moved(&value, yaml.span) };
        }
        let mut filled = String::new();
        for piece in &pieces {
            match piece {
                Piece::Text(text) => filled.push_str(text),
                Piece::Param(name) => match self.look_up(name, yaml.span, report).content {
                    Content::Scalar(Value::String(text)) => filled.push_str(&text),
                    Content::Scalar(Value::Null) => filled.push_str("null"),
                    Content::Scalar(Value::Bool(truth)) => filled.push_str(&truth.to_string()),
                    Content::Scalar(Value::Number(number)) => filled.push_str(&number.to_string()),
                    Content::Scalar(_) | Content::Invalid => return Yaml::new(yaml.span, Content::Invalid),
                    Content::Sequence(_) | Content::Mapping(_) => {
                        report
                            .error(yaml.span, format!("`${{{name}}}` within text must be a single value"))
                            .help(format!("`{name}` is a list or a mapping: let `${{{name}}}` stand alone"));
                        return Yaml::new(yaml.span, Content::Invalid);
                    }
                },
            }
        }
        Yaml::new(yaml.span, Content::Scalar(Value::String(filled)))
    }

    fn look_up(&mut self, name: &str, span: Span, report: &mut Report) -> Yaml {
        if let Some(param) = self.list.iter_mut().find(|param| param.name == name) {
            param.used = true;
            return param.value.clone();
        }
        let names: Vec<&str> = self.list.iter().map(|param| param.name.as_str()).collect();
        report.error(span, format!("there is no parameter `{name}`")).suggest(name, &names);
        Yaml::new(span, Content::Invalid)
    }

    /// Where a value comes from, for messages about it.
    fn origin(&self, name: &str) -> Rc<str> {
        let param = self.list.iter().find(|param| param.name == name);
        match param.and_then(|param| param.given.as_ref()) {
            Some(text) => Rc::from(format!("`${{{name}}}` (-S {name}={text})")),
            None => Rc::from(format!("`${{{name}}}`")),
        }
    }

    /// Warn of parameters that nothing refers to.
    pub fn report_unused(&self, report: &mut Report) {
        for param in self.list.iter().filter(|param| !param.used) {
            report
                .warning(param.span, format!("the parameter `{}` is not used", param.name))
                .help(format!("write `${{{}}}` where its value belongs, or remove it", param.name));
        }
    }
}

/// Letters, digits and underscores, not beginning with a digit.
pub(crate) fn is_identifier(name: &str) -> bool {
    let mut characters = name.chars();
    characters.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && characters.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// The text so that interpolation gives it back.
pub(crate) fn escape(text: &str) -> String {
    text.replace("${", "$${")
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
fn unplaced(value: Value, span: Span) -> Yaml {
    let content = match value {
        Value::Sequence(items) => Content::Sequence(items.into_iter().map(|item| unplaced(item, span)).collect()),
        Value::Mapping(mapping) => Content::Mapping(
            mapping
                .into_iter()
                .filter_map(|(key, value)| {
                    let key = key.as_str()?.to_owned();
                    Some(super::yaml::Entry { key, key_span: span, value: unplaced(value, span) })
                })
                .collect(),
        ),
        scalar => Content::Scalar(scalar),
    };
    Yaml::new(span, content)
}

/// The same value as if it were written at `span`.
fn moved(yaml: &Yaml, span: Span) -> Yaml {
    if yaml.is_invalid() { Yaml::new(span, Content::Invalid) } else { unplaced(yaml.to_value(), span) }
}

/// Names that a value refers to.
fn names_in(yaml: &Yaml) -> Vec<String> {
    match &yaml.content {
        Content::Scalar(Value::String(text)) => pieces(text)
            .unwrap_or_default()
            .into_iter()
            .filter_map(|piece| if let Piece::Param(name) = piece { Some(name) } else { None })
            .collect(),
        Content::Sequence(items) => items.iter().flat_map(names_in).collect(),
        Content::Mapping(entries) => entries.iter().flat_map(|entry| names_in(&entry.value)).collect(),
        _ => Vec::new(),
    }
}

#[derive(Debug, PartialEq)]
enum Piece {
    Text(String),
    Param(String),
}

/// Cut a text at its `${name}`.
fn pieces(text: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut plain = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        if let Some(before) = rest[..start].strip_suffix('$') {
            plain.push_str(before);
            plain.push_str("${");
            rest = &rest[start + 2..];
            continue;
        }
        plain.push_str(&rest[..start]);
        let Some(end) = rest[start..].find('}') else {
            return Err(format!("`${{` in {text:?} is not closed by `}}`"));
        };
        let name = &rest[start + 2..start + end];
        if !is_identifier(name) {
            return Err(format!("`${{{name}}}` does not hold the name of a parameter"));
        }
        if !plain.is_empty() {
            pieces.push(Piece::Text(std::mem::take(&mut plain)));
        }
        pieces.push(Piece::Param(name.to_owned()));
        rest = &rest[start + end + 1..];
    }
    plain.push_str(rest);
    if !plain.is_empty() {
        pieces.push(Piece::Text(plain));
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_at_references() {
        let text = |text: &str| Piece::Text(text.to_owned());
        let param = |name: &str| Piece::Param(name.to_owned());
        assert_eq!(pieces("${a}").unwrap(), [param("a")]);
        assert_eq!(pieces("x/${a}-${b_2}.y").unwrap(), [text("x/"), param("a"), text("-"), param("b_2"), text(".y")]);
        assert_eq!(pieces("costs $5 and $${a}").unwrap(), [text("costs $5 and ${a}")]);
        assert_eq!(pieces("").unwrap(), []);
        assert!(pieces("${a").is_err());
        assert!(pieces("${}").is_err());
        assert!(pieces("${a b}").is_err());
        assert_eq!(pieces(&escape("${a} ${")).unwrap(), [text("${a} ${")]);
    }
}
