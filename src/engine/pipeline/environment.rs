//! `env`: the environment variables that a pipeline may read, with their defaults.

use serde_yaml::Value;

use super::diagnostic::{Report, Span};
use super::interpolation::is_identifier;
use super::yaml::{Content, Yaml};

/// The variables declared.
pub(crate) struct Environment {
    list: Vec<Variable>,
    /// Whether this is a pipeline's, and not the inside of an operator.
    readable: bool,
}

struct Variable {
    name: String,
    span: Span,
    default: Yaml,
    used: bool,
}

impl Environment {
    /// No variables: what a composite operator sees.
    pub fn none() -> Self {
        Environment { list: Vec::new(), readable: false }
    }

    /// Read the `env` block of a pipeline.
    pub fn read(block: Option<&Yaml>, report: &mut Report) -> Self {
        let mut list = Vec::new();
        if let Some(block) = block {
            if !matches!(block.content, Content::Mapping(_)) && !block.is_null() {
                report
                    .error(block.span, format!("`env` is a mapping, found {}", block.found()))
                    .help("write `env: {NAME: default}`; without a default, the variable must be set");
            }
            for entry in block.entries() {
                if !is_identifier(&entry.key) {
                    report
                        .error(entry.key_span, format!("`{}` is no name for an environment variable", entry.key))
                        .help("use letters, digits and `_`, not beginning with a digit");
                }
                let mut default = entry.value.clone();
                if !matches!(default.content, Content::Scalar(_) | Content::Invalid) {
                    let message =
                        format!("the default of `{}` must be a single value, found {}", entry.key, default.found());
                    report.error(default.span, message);
                    default.content = Content::Invalid;
                }
                list.push(Variable { name: entry.key.clone(), span: entry.key_span, default, used: false });
            }
        }
        Environment { list, readable: true }
    }

    /// The value of a variable, which is YAML just as that of `-S` is.
    pub fn look_up(&mut self, name: &str, span: Span, report: &mut Report) -> Yaml {
        if !self.readable {
            report
                .error(span, format!("the inside of an operator cannot read `${{env.{name}}}`"))
                .help("declare a parameter, and give it the variable's value where the operator is used");
            return Yaml::new(span, Content::Invalid);
        }
        let names: Vec<String> = self.list.iter().map(|variable| variable.name.clone()).collect();
        let Some(variable) = self.list.iter_mut().find(|variable| variable.name == name) else {
            let diagnostic = report.error(span, format!("the environment variable `{name}` is not declared"));
            match super::closest(name, names.iter().map(String::as_str)) {
                Some(near) => diagnostic.help(format!("did you mean `{near}`?")),
                None => diagnostic.help(format!("declare it at the top: `env: {{{name}: DEFAULT}}`")),
            };
            return Yaml::new(span, Content::Invalid);
        };
        variable.used = true;
        match std::env::var(name) {
            Ok(text) => Yaml::new(variable.default.span, Content::Scalar(scalar(text))),
            Err(_) if variable.default.is_null() => {
                report
                    .error(variable.span, format!("the environment variable `{name}` is not set, and has no default"))
                    .help(format!("set it, or write `{name}: DEFAULT`"));
                variable.default.content = Content::Invalid;
                variable.default.clone()
            }
            Err(_) => variable.default.clone(),
        }
    }

    /// What gave a variable its value, where that is not the default.
    pub fn given(&self, name: &str) -> Option<String> {
        // Not the value itself: it may be a secret.
        std::env::var(name).ok().map(|_| "set in the environment".to_owned())
    }

    /// Warn of variables that nothing refers to.
    pub fn report_unused(&self, report: &mut Report) {
        for variable in self.list.iter().filter(|variable| !variable.used) {
            let name = &variable.name;
            report
                .warning(variable.span, format!("the environment variable `{name}` is not used"))
                .help(format!("write `${{env.{name}}}` where its value belongs, or remove it"));
        }
    }
}

/// A number, a truth value or null where the text is one, otherwise the text as it is.
fn scalar(text: String) -> Value {
    match serde_yaml::from_str(&text) {
        Ok(value @ (Value::Number(_) | Value::Bool(_) | Value::Null)) if !text.is_empty() => value,
        _ => Value::String(text),
    }
}
