//! `params`: their defaults, `-S name=value`, and `${name}` in the rest of the pipeline.
//!
//! Interpolation sees parsed scalars, never text: a value cannot change the structure of the file. `${name}` alone
//! keeps the parameter's type, within other text it prints the value, `$${` is a literal `${`. A value must be what the
//! declaration says; that of a plain parameter is of the type of its default (a number where that is one, whole or not, and
//! anything where it is nothing, a list or a mapping).

use std::rc::Rc;

use serde_yaml::Value;

use super::declaration::{self, Declaration};
use super::diagnostic::{Report, Span};
use super::environment::Environment;
use super::interpolation::{Piece, names_in, pieces};
use super::overrides::{Override, is_known, unplaced};
use super::schema::{Validator, describe};
use super::yaml::{Content, Entry, Origin, Yaml};

/// The parameters of a pipeline, or of one use of a composite operator.
pub(crate) struct Params {
    list: Vec<Param>,
    environment: Environment,
}

struct Param {
    declared: Declaration,
    value: Yaml,
    /// What gave it its value, where that is not the default.
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
    /// Read the `params` block of a pipeline and apply the overrides.
    pub fn read(block: Option<&Yaml>, environment: Environment, overrides: &[Override], report: &mut Report) -> Self {
        let mut params = Params::declared(declaration::read(block, report), environment);
        for given in overrides {
            params.override_one(given, report);
        }
        for param in params.list.iter().filter(|param| param.given.is_none() && param.declared.default.is_none()) {
            let name = &param.declared.name;
            if param.value.is_null() {
                report
                    .error(param.declared.span, format!("the parameter `{name}` has no value"))
                    .help(format!("give it one with `-S {name}=VALUE`, or write a `default`"));
            }
        }
        params.resolve_all(report);
        params
    }

    /// The parameters of a composite operator where a node uses it: `with` has the values, the node is called `user` and
    /// stands at `span`.
    pub fn of_use(
        declarations: Vec<Declaration>,
        with: Option<&Entry>,
        user: &str,
        span: Span,
        report: &mut Report,
    ) -> Self {
        let mut params = Params::declared(declarations, Environment::none());
        let names: Vec<String> = params.list.iter().map(|param| param.declared.name.clone()).collect();
        for entry in with.into_iter().flat_map(|with| with.value.entries()) {
            let Some(param) = params.list.iter_mut().find(|param| param.declared.name == entry.key) else {
                report
                    .error(entry.key_span, format!("unknown key `{}`", entry.key))
                    .label("unknown key")
                    .suggest(&entry.key, &names);
                continue;
            };
            param.given = Some(format!("given at {}", report.place(entry.value.span)));
            param.value = entry.value.clone();
            // What the user of an operator wrote belongs to the pipeline, where it was filled in already.
            param.state = State::Resolved;
        }
        let key = with.map_or(span, |with| with.key_span);
        for param in params.list.iter().filter(|param| param.given.is_none() && param.declared.default.is_none()) {
            let name = &param.declared.name;
            let expected =
                param.declared.schema.as_ref().map_or("a value".to_owned(), |schema| describe(schema, schema));
            report
                .error(key, format!("the key `{name}` of `{user}` is missing"))
                .label(format!("needs `{name}`: {expected}"));
        }
        params.resolve_all(report);
        params
    }

    fn declared(declarations: Vec<Declaration>, environment: Environment) -> Self {
        let param = |declared: Declaration| {
            let missing = || Yaml::new(declared.span, Content::Scalar(Value::Null));
            let value = declared.default.clone().unwrap_or_else(missing);
            Param { declared, value, given: None, state: State::Written, used: false }
        };
        Params { list: declarations.into_iter().map(param).collect(), environment }
    }

    /// Fill in references of parameters to each other, and hold the values against the declarations.
    fn resolve_all(&mut self, report: &mut Report) {
        for index in 0..self.list.len() {
            self.resolve(index, Vec::new(), report);
            let param = &mut self.list[index];
            let missing = param.given.is_none() && param.declared.default.is_none();
            if missing {
                param.value.content = Content::Invalid;
            } else if let Some(schema) = &param.declared.schema {
                let before = report.errors();
                Validator { root: schema }.check(&param.value, &param.declared.name, param.declared.span, report);
                if report.errors() > before {
                    if let (true, Some(default)) = (param.declared.inferred, &param.declared.default) {
                        let place = report.place(default.span);
                        let note = format!("its default is {}: {place}", default.found());
                        let help = "a parameter that takes several types says so: `type: [integer, text]`";
                        report.last_error().note(note).help.get_or_insert_with(|| help.to_owned());
                    }
                    param.value.content = Content::Invalid;
                }
            }
        }
    }

    fn override_one(&mut self, given: &Override, report: &mut Report) {
        let names: Vec<String> = self.list.iter().map(|param| param.declared.name.clone()).collect();
        if !is_known(&given.name, given.name_span, &names, report) {
            return;
        }
        let Some(param) = self.list.iter_mut().find(|param| param.declared.name == given.name) else { return };
        param.value = match &given.text {
            Some(text) => from_text(text, &given.value, &param.declared, report),
            None => given.value.clone(),
        };
        param.given = Some(given.given.clone());
    }

    /// Fill in the references of a parameter to others.
    fn resolve(&mut self, index: usize, mut chain: Vec<String>, report: &mut Report) {
        let param = &mut self.list[index];
        match param.state {
            State::Resolved => return,
            State::Resolving => {
                chain.push(param.declared.name.clone());
                let start = chain.iter().position(|name| *name == param.declared.name).unwrap_or(0);
                report.error(
                    param.declared.span,
                    format!("parameters refer to each other: {}", chain[start..].join(" -> ")),
                );
                param.value.content = Content::Invalid;
                param.state = State::Resolved;
                return;
            }
            State::Written => param.state = State::Resolving,
        }
        chain.push(param.declared.name.clone());
        let value = param.value.clone();
        for name in names_in(&value) {
            if let Some(other) = self.list.iter().position(|param| param.declared.name == name) {
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
            let origin = self.origin(name, &value, report);
            return Yaml { origin: Some(Rc::new(origin)), ..moved(&value, yaml.span) };
        }
        let (mut filled, mut origins) = (String::new(), Vec::<Origin>::new());
        for piece in &pieces {
            let name = match piece {
                Piece::Text(text) => {
                    filled.push_str(text);
                    continue;
                }
                Piece::Param(name) => name,
            };
            let value = self.look_up(name, yaml.span, report);
            let origin = self.origin(name, &value, report);
            if origins.iter().all(|other| other.written != origin.written) {
                origins.push(origin);
            }
            match value.content {
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
            }
        }
        let origin = (!origins.is_empty()).then(|| Origin {
            written: text.to_owned(),
            whole: false,
            given: None,
            place: report.place(yaml.span),
            pieces: origins,
            before: None,
        });
        Yaml { origin: origin.map(Rc::new), ..Yaml::new(yaml.span, Content::Scalar(Value::String(filled))) }
    }

    fn look_up(&mut self, name: &str, span: Span, report: &mut Report) -> Yaml {
        if let Some(variable) = name.strip_prefix("env.") {
            return self.environment.look_up(variable, span, report);
        }
        if let Some(param) = self.list.iter_mut().find(|param| param.declared.name == name) {
            param.used = true;
            return param.value.clone();
        }
        let names: Vec<&str> = self.list.iter().map(|param| param.declared.name.as_str()).collect();
        report.error(span, format!("there is no parameter `{name}`")).suggest(name, &names);
        Yaml::new(span, Content::Invalid)
    }

    /// Where a parameter's value comes from.
    fn origin(&self, name: &str, value: &Yaml, report: &Report) -> Origin {
        let param = self.list.iter().find(|param| param.declared.name == name);
        let given = match name.strip_prefix("env.") {
            Some(variable) => self.environment.given(variable),
            None => param.and_then(|param| param.given.clone()),
        };
        Origin {
            written: format!("${{{name}}}"),
            whole: true,
            given,
            place: report.place(value.span),
            pieces: Vec::new(),
            before: value.origin.clone(),
        }
    }

    /// The parameters with their values, in the order declared.
    pub fn values(&self) -> impl Iterator<Item = (&str, Value)> {
        self.list.iter().map(|param| (param.declared.name.as_str(), param.value.to_value()))
    }

    /// Warn of parameters and environment variables that nothing refers to.
    pub fn report_unused(&self, report: &mut Report) {
        for param in self.list.iter().filter(|param| !param.used) {
            let name = &param.declared.name;
            report
                .warning(param.declared.span, format!("the parameter `{name}` is not used"))
                .help(format!("write `${{{name}}}` where its value belongs, or remove it"));
        }
        self.environment.report_unused(report);
    }
}

/// What a command line gives: YAML, but for parameters that are text, which take what is written.
fn from_text(text: &str, value: &Yaml, declared: &Declaration, report: &mut Report) -> Yaml {
    match &value.content {
        Content::Scalar(Value::String(_)) => value.clone(),
        Content::Scalar(_) if declared.is_text() => {
            Yaml { content: Content::Scalar(Value::String(text.trim().to_owned())), ..value.clone() }
        }
        Content::Scalar(Value::Null) if text.trim().is_empty() => {
            let name = &declared.name;
            report
                .error(value.span, format!("`{name}` is given no value"))
                .help(format!("write `{name}=null` if none is meant"));
            Yaml::new(value.span, Content::Invalid)
        }
        _ => value.clone(),
    }
}

/// The same value as if it were written at `span`.
fn moved(yaml: &Yaml, span: Span) -> Yaml {
    if yaml.is_invalid() { Yaml::new(span, Content::Invalid) } else { unplaced(yaml.to_value(), span) }
}
