//! The reference page of a composite operator, from its definition.

use std::fmt::Write;

use serde::Serialize;
use serde_json::Value as Json;

use super::composite_ports::{self, Port};
use super::declaration::Declaration;
use super::diagnostic::Report;
use super::library::{Definition, Library};
use super::schema::describe;
use super::yaml::{Content, Entry};
use crate::docs::{PARAMETER_COLUMNS, ParameterDoc, section, table};
use crate::operator::{PortSpec, Registry};

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
    /// A pipeline's `include` and `nodes`, with nodes that are named after their operators.
    pub example: String,
}

/// An input or output of a composite operator.
#[derive(Clone, Debug, Serialize)]
pub struct CompositePort {
    /// Its name.
    pub name: String,
    /// Types of records, as the nodes inside have it.
    pub types: Vec<String>,
    /// Inputs: whether several edges may end here.
    pub many: bool,
    /// What it is; of an output also the `node.port` inside.
    pub description: String,
}

impl CompositeDoc {
    pub(super) fn of(definition: &Definition, library: &Library, registry: &Registry, report: &Report) -> Self {
        let (inputs, outputs) = composite_ports::infer(definition, library, registry, report);
        let parameter = |declared: &Declaration| ParameterDoc {
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
        let port = |(entry, port): (&Entry, &Port), description: String| CompositePort {
            name: entry.key.clone(),
            types: port.types.iter().map(ToString::to_string).collect(),
            many: port.many,
            description,
        };
        let input =
            |(entry, found): (&Entry, &Port)| port((entry, found), entry.value.as_str().unwrap_or_default().to_owned());
        let output = |(entry, found): (&Entry, &Port)| port((entry, found), output_description(entry, found));
        CompositeDoc {
            name: definition.name.clone(),
            summary: definition.description.clone(),
            place: report.place(definition.span),
            inputs: definition.inputs.iter().zip(&inputs).map(input).collect(),
            outputs: definition.outputs.iter().zip(&outputs).map(output).collect(),
            parameters: definition.declarations.iter().map(parameter).collect(),
            example: example(definition, &inputs, registry, report.name(definition.span.source)),
        }
    }

    /// For a terminal.
    pub fn to_text(&self) -> String {
        let mut text = format!("{}: {}\n\ndefined at {}\n", self.name, self.summary, self.place);
        for (title, ports) in [("Inputs", &self.inputs), ("Outputs", &self.outputs)] {
            section(&mut text, title, ports.iter().map(|port| (port.heading(), port.description.clone())));
        }
        section(&mut text, "With", self.parameters.iter().map(|p| (p.heading(), p.description.clone())));
        text.push_str("\nExample\n\n");
        self.example.lines().for_each(|line| text.push_str(&format!("    {line}\n")));
        text
    }

    /// For a page.
    pub fn to_markdown(&self) -> String {
        let mut text = format!("## `{}`\n\n{}\n", self.name, self.summary);
        for (title, ports) in [("Inputs", &self.inputs), ("Outputs", &self.outputs)] {
            let rows = ports.iter().map(|port| {
                let many = if port.many { "many" } else { "" };
                let types = port.types.join(" or ");
                [format!("`{}`", port.name), types, many.to_owned(), port.description.clone()]
            });
            if !ports.is_empty() {
                table(&mut text, title, &["port", "carries", "", "what"], rows);
            }
        }
        if !self.parameters.is_empty() {
            table(&mut text, "With", &PARAMETER_COLUMNS, self.parameters.iter().map(ParameterDoc::row));
        }
        let _ = write!(text, "\n### Example\n\n```yaml\n{}```\n", self.example);
        text
    }
}

impl CompositePort {
    fn heading(&self) -> String {
        let many = if self.many { " (many)" } else { "" };
        format!("{}: {}{many}", self.name, self.types.join(" or "))
    }
}

/// What the outputs behind it say, and which they are.
fn output_description(entry: &Entry, port: &Port) -> String {
    let behind = match &entry.value.content {
        Content::Sequence(items) => items.as_slice(),
        _ => std::slice::from_ref(&entry.value),
    };
    let behind: Vec<String> = behind.iter().filter_map(|item| Some(format!("`{}`", item.as_str()?))).collect();
    match port.docs.is_empty() {
        true => behind.join(", "),
        false => format!("{} ({})", port.docs.join("; "), behind.join(", ")),
    }
}

/// A node that uses the operator, with what it can read and with every parameter: its default, or what it has to be.
fn example(definition: &Definition, inputs: &[Port], registry: &Registry, file: &str) -> String {
    let source = |port: &Port| {
        let emits = |output: &PortSpec| output.follows.is_none() && output.types.iter().all(|t| port.types.contains(t));
        registry.iter().find_map(|op| Some(format!("{}.{}", op.name, op.outputs.iter().find(|o| emits(o))?.name)))
    };
    let name = &definition.name;
    let mut text = format!("include: {file}\nnodes:\n  {name}:\n    op: {name}\n");
    let reads = definition.inputs.iter().zip(inputs);
    let reads: Vec<String> =
        reads.map(|(input, port)| format!("{}: {}", input.key, source(port).unwrap_or("NODE".to_owned()))).collect();
    if !reads.is_empty() {
        text += &format!("    in: {{{}}}\n", reads.join(", "));
    }
    let value = |declared: &Declaration| match &declared.default {
        Some(default) => serde_json::to_string(&default.to_value()).unwrap_or_default(),
        None => declared.name.to_uppercase(),
    };
    if !definition.declarations.is_empty() {
        text += "    with:\n";
        definition.declarations.iter().for_each(|d| text += &format!("      {}: {}\n", d.name, value(d)));
    }
    text
}
