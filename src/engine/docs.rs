//! The reference page of an operator, from the same declaration that validation and runs read.

use std::fmt::Write;

use schemars::Schema;
use serde::Serialize;
use serde_json::Value as Json;

use crate::operator::{OperatorSpec, PortSpec, Registry, Retractions};
use crate::pipeline::{describe, follow};

/// What there is to know about an operator.
#[derive(Clone, Debug, Serialize)]
pub struct OperatorDoc {
    /// The value of `op`.
    pub name: &'static str,
    /// One line.
    pub summary: &'static str,
    /// Markdown: what it does, its state, its errors.
    pub description: String,
    /// Inputs, the first of which `in: x` means.
    pub inputs: Vec<PortDoc>,
    /// Outputs, the first of which a bare node name means.
    pub outputs: Vec<PortDoc>,
    /// The keys under `with`.
    pub parameters: Vec<ParameterDoc>,
    /// Entries of `nodes`.
    pub example: &'static str,
    /// JSON Schema of `with`.
    pub schema: Schema,
}

/// An input or output.
#[derive(Clone, Debug, Serialize)]
pub struct PortDoc {
    /// Its name.
    pub name: &'static str,
    /// Types of records.
    pub types: Vec<String>,
    /// Inputs: whether the node is wrong without it.
    pub required: bool,
    /// Inputs: whether several edges may end here.
    pub many: bool,
    /// Inputs: whether retractions may arrive. Outputs: whether they may be emitted.
    pub retractions: bool,
    /// Outputs: the input whose type it takes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub follows: Option<&'static str>,
    /// One line.
    pub description: &'static str,
}

/// A key under `with`.
#[derive(Clone, Debug, Serialize)]
pub struct ParameterDoc {
    /// The key, dotted where nested.
    pub name: String,
    /// The type, in words.
    pub expects: String,
    /// Whether it must be given.
    pub required: bool,
    /// What holds without it.
    pub default: Option<Json>,
    /// What it means.
    pub description: String,
}

impl OperatorDoc {
    /// The page of an operator.
    pub fn of(spec: &OperatorSpec) -> Self {
        let schema = (spec.config_schema)();
        let mut parameters = Vec::new();
        collect(schema.as_value(), schema.as_value(), "", 0, &mut parameters);
        OperatorDoc {
            name: spec.name,
            summary: spec.summary,
            description: format!("{}\n\n{}", spec.docs.trim(), (spec.appendix)()).trim().to_owned(),
            inputs: spec.inputs.iter().map(PortDoc::of).collect(),
            outputs: spec.outputs.iter().map(PortDoc::of).collect(),
            parameters,
            example: spec.example.trim_matches('\n'),
            schema,
        }
    }

    /// For a terminal.
    pub fn to_text(&self) -> String {
        let mut text = format!("{}: {}\n\n{}\n", self.name, self.summary, wrapped(&self.description, ""));
        for (title, ports) in [("Inputs", &self.inputs), ("Outputs", &self.outputs)] {
            section(&mut text, title, ports.iter().map(|port| (port.heading(), port.description.to_owned())));
        }
        section(&mut text, "With", self.parameters.iter().map(|p| (p.heading(), p.description.clone())));
        text.push_str("\nExample\n\n");
        for line in self.example.lines() {
            text.push_str(format!("    {line}").trim_end());
            text.push('\n');
        }
        text
    }

    /// For a page.
    pub fn to_markdown(&self) -> String {
        let mut text = format!("## `{}`\n\n{}\n\n{}\n", self.name, self.summary, self.description);
        for (title, ports) in [("Inputs", &self.inputs), ("Outputs", &self.outputs)] {
            if !ports.is_empty() {
                let rows = ports.iter().map(|port| {
                    [format!("`{}`", port.name), port.types.join(" or "), port.traits(), port.description.to_owned()]
                });
                table(&mut text, title, &["port", "carries", "", "what"], rows);
            }
        }
        if !self.parameters.is_empty() {
            table(&mut text, "With", &PARAMETER_COLUMNS, self.parameters.iter().map(ParameterDoc::row));
        }
        let _ = write!(text, "\n### Example\n\n```yaml\n{}\n```\n", self.example);
        text
    }
}

impl PortDoc {
    fn of(port: &PortSpec) -> Self {
        PortDoc {
            name: port.name,
            types: port.types.iter().map(ToString::to_string).collect(),
            required: port.required,
            many: port.many,
            retractions: port.retractions != Retractions::None,
            follows: port.follows,
            description: port.doc,
        }
    }

    fn traits(&self) -> String {
        let words = [(!self.required, "optional"), (self.many, "many"), (self.retractions, "retractions")];
        let mut words: Vec<String> =
            words.iter().filter(|(holds, _)| *holds).map(|(_, word)| (*word).to_owned()).collect();
        words.extend(self.follows.map(|input| format!("as `{input}` has it")));
        words.join(", ")
    }

    fn heading(&self) -> String {
        let traits = self.traits();
        let traits = if traits.is_empty() { traits } else { format!(" ({traits})") };
        format!("{}: {}{traits}", self.name, self.types.join(" or "))
    }
}

/// What [`ParameterDoc::row`] holds.
pub(crate) const PARAMETER_COLUMNS: [&str; 4] = ["key", "type", "default", "what"];

impl ParameterDoc {
    pub(crate) fn row(&self) -> [String; 4] {
        let default = match (&self.default, self.required) {
            (_, true) => "required".to_owned(),
            (Some(default), _) => format!("`{default}`"),
            (None, _) => String::new(),
        };
        [format!("`{}`", self.name), self.expects.clone(), default, self.description.clone()]
    }

    pub(crate) fn heading(&self) -> String {
        let default = match (&self.default, self.required) {
            (_, true) => ", required".to_owned(),
            (Some(default), _) => format!(", default {default}"),
            (None, _) => String::new(),
        };
        format!("{}: {}{default}", self.name, self.expects)
    }
}

/// All operators in a markdown table.
pub fn operators_table(registry: &Registry) -> String {
    let mut text = String::from("| operator | takes | emits | what it does |\n|---|---|---|---|\n");
    let ports = |ports: &[PortSpec]| {
        let names: Vec<String> = ports
            .iter()
            .map(|port| {
                let mark = if port.required { "" } else { "?" };
                format!("`{}{mark}`", port.name)
            })
            .collect();
        names.join(", ")
    };
    for spec in registry.iter() {
        let row = [format!("`{}`", spec.name), ports(spec.inputs), ports(spec.outputs), spec.summary.to_owned()];
        text.push_str(&table_row(&row));
    }
    text
}

/// The parameters that a schema lists; those of nested objects follow their own, dotted.
fn collect(schema: &Json, root: &Json, prefix: &str, depth: usize, parameters: &mut Vec<ParameterDoc>) {
    let required: Vec<&str> = schema["required"].as_array().into_iter().flatten().filter_map(Json::as_str).collect();
    for (key, property) in schema["properties"].as_object().into_iter().flatten() {
        let target = follow(property, root);
        let described = property["description"].as_str().or(target["description"].as_str()).unwrap_or_default();
        let name = format!("{prefix}{key}");
        let nested = nested_objects(target, root);
        let parameter = ParameterDoc {
            name: name.clone(),
            expects: describe(property, root),
            required: required.contains(&key.as_str()),
            default: property.get("default").filter(|default| !default.is_null() && !default.is_object()).cloned(),
            description: described.split_whitespace().collect::<Vec<_>>().join(" "),
        };
        // Alternatives may share a key, such as the tag that tells them apart.
        match parameters.iter_mut().find(|other| other.name == parameter.name) {
            Some(same) if !same.expects.contains(&parameter.expects) => {
                same.expects = format!("{} or {}", same.expects, parameter.expects);
            }
            Some(_) => {}
            None => parameters.push(parameter),
        }
        // Configs nest two or three deep; a recursive type must not recurse here.
        if depth < 3 {
            for object in nested {
                collect(object, root, &format!("{name}."), depth + 1, parameters);
            }
        }
    }
}

/// The objects with properties that a value may be.
fn nested_objects<'a>(schema: &'a Json, root: &'a Json) -> Vec<&'a Json> {
    let schema = follow(schema, root);
    if schema["properties"].is_object() {
        return vec![schema];
    }
    let branches = schema["anyOf"].as_array().or(schema["oneOf"].as_array());
    branches.into_iter().flatten().flat_map(|branch| nested_objects(branch, root)).collect()
}

pub(crate) fn section(text: &mut String, title: &str, items: impl Iterator<Item = (String, String)>) {
    let items: Vec<_> = items.collect();
    if items.is_empty() {
        return;
    }
    let _ = write!(text, "\n{title}\n\n");
    for (heading, description) in items {
        let _ = writeln!(text, "    {heading}");
        if !description.is_empty() {
            let _ = writeln!(text, "{}", wrapped(&description, "        "));
        }
    }
}

/// Columns of a page of text.
const WIDTH: usize = 100;

/// The text with its long lines broken at blanks, each line after the indent. A line that was broken in the source, since the
/// next word would have made it too long, goes on with the next.
fn wrapped(text: &str, indent: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for line in unbroken(text) {
        let mut current = indent.to_owned();
        if line.len() + indent.len() <= WIDTH {
            current += &line;
        } else {
            for word in line.split_whitespace() {
                if current.len() > indent.len() && current.len() + word.len() >= WIDTH {
                    lines.push(std::mem::replace(&mut current, indent.to_owned()));
                }
                if current.len() > indent.len() {
                    current.push(' ');
                }
                current += word;
            }
        }
        lines.push(current.trim_end().to_owned());
    }
    lines.join("\n")
}

fn unbroken(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut before = 0;
    for line in text.lines() {
        let word = line.split_whitespace().next().unwrap_or_default();
        let begins = word.is_empty() || word == "-" || line.starts_with(' ');
        match lines.last_mut().filter(|_| !begins && before + 1 + word.len() > WIDTH) {
            Some(last) => {
                last.push(' ');
                last.push_str(line);
            }
            None => lines.push(line.to_owned()),
        }
        before = line.len();
    }
    lines
}

pub(crate) fn table<const N: usize>(
    text: &mut String,
    title: &str,
    head: &[&str; N],
    rows: impl Iterator<Item = [String; N]>,
) {
    let _ = write!(text, "\n### {title}\n\n");
    text.push_str(&table_row(&head.map(str::to_owned)));
    let _ = writeln!(text, "|{}", "---|".repeat(N));
    for row in rows {
        text.push_str(&table_row(&row));
    }
}

fn table_row(cells: &[String]) -> String {
    let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
    format!("| {} |\n", cells.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_are_broken_at_blanks() {
        let word = "x".repeat(39);
        assert_eq!(
            wrapped(&format!("{word} {word} {word}\n\n  short"), ""),
            format!("{word} {word}\n{word}\n\n  short")
        );
        assert_eq!(wrapped(&format!("{word} {word}"), "    "), format!("    {word} {word}"));
        assert_eq!(wrapped(&"y".repeat(120), "  "), format!("  {}", "y".repeat(120)));
    }

    #[test]
    fn lines_that_the_source_broke_go_on() {
        let (long, word) = ("x".repeat(95), "y".repeat(10));
        // The word did not fit, so the line goes on; a list, a paragraph and a short line end where they do.
        assert_eq!(
            wrapped(&format!("{long}\n{word} z\nshort\n- {word}"), ""),
            format!("{long}\n{word} z\nshort\n- {word}")
        );
        assert_eq!(wrapped(&format!("{word} {long}\n{word} z"), ""), format!("{word}\n{long}\n{word} z"));
        let half = "x ".repeat(50);
        assert_eq!(wrapped(&format!("{half}a b\nc {word}"), ""), format!("{}\na b c {word}", half.trim_end()));
        assert_eq!(wrapped(&format!("{half}a b\n- c"), ""), format!("{}\na b\n- c", half.trim_end()));
    }
}
