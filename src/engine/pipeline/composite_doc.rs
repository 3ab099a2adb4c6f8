//! The reference page of a composite operator, from its definition.

use std::fmt::Write;

use serde::Serialize;
use serde_json::Value as Json;

use super::diagnostic::Report;
use super::library::Definition;
use super::schema::describe;
use crate::docs::{PARAMETER_COLUMNS, ParameterDoc, table};

/// What there is to know about a composite operator.
#[derive(Clone, Debug, Serialize)]
pub struct CompositeDoc {
    /// The value of `op`.
    pub name: String,
    /// One line.
    pub summary: String,
    /// Where it is defined: `file:line:column`.
    pub place: String,
    /// Inputs, the first of which `in: x` means.
    pub inputs: Vec<CompositePort>,
    /// Outputs, the first of which a bare node name means.
    pub outputs: Vec<CompositePort>,
    /// The keys under `with`.
    pub parameters: Vec<ParameterDoc>,
}

/// An input or output of a composite operator.
#[derive(Clone, Debug, Serialize)]
pub struct CompositePort {
    /// Its name.
    pub name: String,
    /// What an input is for; what an output comes from.
    pub description: String,
}

impl CompositeDoc {
    pub(super) fn of(definition: &Definition, report: &Report) -> Self {
        let ports = |entries: &[super::yaml::Entry]| {
            let description = |value: &super::yaml::Yaml| match value.to_value() {
                serde_yaml::Value::Null => String::new(),
                serde_yaml::Value::String(text) => text,
                serde_yaml::Value::Sequence(items) => {
                    items.iter().filter_map(|item| item.as_str()).collect::<Vec<_>>().join(", ")
                }
                _ => String::new(),
            };
            let port = |entry: &super::yaml::Entry| CompositePort {
                name: entry.key.clone(),
                description: description(&entry.value),
            };
            entries.iter().map(port).collect()
        };
        let parameter = |declared: &super::declaration::Declaration| ParameterDoc {
            name: declared.name.clone(),
            expects: declared.schema.as_ref().map_or("any value".to_owned(), |schema| describe(schema, schema)),
            required: declared.default.is_none(),
            default: declared
                .default
                .as_ref()
                .and_then(|default| serde_json::to_value(default.to_value()).ok())
                .filter(|default| *default != Json::Null),
            description: declared.description.clone(),
        };
        CompositeDoc {
            name: definition.name.clone(),
            summary: definition.description.clone(),
            place: report.place(definition.span),
            inputs: ports(&definition.inputs),
            outputs: ports(&definition.outputs),
            parameters: definition.declarations.iter().map(parameter).collect(),
        }
    }

    /// For a terminal.
    pub fn to_text(&self) -> String {
        let mut text = format!("{}: {}\n\ndefined at {}\n", self.name, self.summary, self.place);
        let ports = |ports: &[CompositePort]| {
            ports.iter().map(|port| (port.name.clone(), port.description.clone())).collect::<Vec<_>>()
        };
        let parameters = self.parameters.iter().map(|p| (p.heading(), p.description.clone())).collect();
        let sections = [("Inputs", ports(&self.inputs)), ("Outputs", ports(&self.outputs)), ("With", parameters)];
        for (title, items) in sections {
            if !items.is_empty() {
                let _ = write!(text, "\n{title}\n\n");
            }
            for (heading, description) in items {
                let separator = if description.is_empty() { "" } else { " - " };
                let _ = writeln!(text, "    {heading}{separator}{description}");
            }
        }
        text
    }

    /// For a page.
    pub fn to_markdown(&self) -> String {
        let mut text = format!("## `{}`\n\n{}\n", self.name, self.summary);
        for (title, ports) in [("Inputs", &self.inputs), ("Outputs", &self.outputs)] {
            let rows = ports.iter().map(|port| [format!("`{}`", port.name), port.description.clone()]);
            if !ports.is_empty() {
                table(&mut text, title, &["port", "what"], rows);
            }
        }
        if !self.parameters.is_empty() {
            table(&mut text, "With", &PARAMETER_COLUMNS, self.parameters.iter().map(ParameterDoc::row));
        }
        text
    }
}
