//! Composite operators as defined: in a pipeline under `operators`, and in the files it includes.

use std::path::{Path, PathBuf};

use super::declaration::{self, Declaration, description};
use super::diagnostic::{Report, Span};
use super::document::check_keys;
use super::interpolation::is_identifier;
use super::schema::blame;
use super::yaml::{self, Content, Entry, Yaml};
use crate::operator::Registry;

/// An operator made of others.
#[derive(Clone, Debug)]
pub(crate) struct Definition {
    pub name: String,
    pub span: Span,
    /// One line, for people.
    pub description: String,
    pub declarations: Vec<Declaration>,
    pub inputs: Vec<Entry>,
    /// Each with the `node.port` inside that emits it, or a list of these.
    pub outputs: Vec<Entry>,
    /// The entry `nodes`, parameters not filled in.
    pub nodes: Entry,
}

/// All that a pipeline defines or includes.
#[derive(Debug, Default)]
pub(crate) struct Library {
    pub list: Vec<Definition>,
}

impl Library {
    /// Read `include` and `operators` of a pipeline named `file`.
    pub fn read(root: &Yaml, file: &str, registry: &Registry, report: &mut Report) -> Self {
        let mut library = Library::default();
        let mut reader = Reader { library: &mut library, registry, chain: Vec::new(), done: Vec::new() };
        let path = Path::new(file);
        reader.chain.push((path.canonicalize().unwrap_or_else(|_| path.to_owned()), file.to_owned()));
        reader.file(root, path, report);
        library
    }

    /// Report operators that are made of themselves; whether there are any.
    pub fn report_recursion(&self, report: &mut Report) -> bool {
        let mut told: Vec<&str> = Vec::new();
        for definition in &self.list {
            let mut chain = vec![definition];
            if let Some(span) = self.leads_back(&mut chain) {
                let mut names: Vec<&str> = chain.iter().map(|link| link.name.as_str()).collect();
                if !names.iter().any(|name| told.contains(name)) {
                    told.extend(&names);
                    names.push(&definition.name);
                    report.error(span, format!("operators are made of each other: {}", names.join(" -> ")));
                }
            }
        }
        !told.is_empty()
    }

    /// Lengthen the chain until its last operator is made of its first; where that is written.
    fn leads_back<'l>(&'l self, chain: &mut Vec<&'l Definition>) -> Option<Span> {
        let last = chain[chain.len() - 1];
        for op in last.nodes.value.entries().iter().filter_map(|node| node.value.get("op")) {
            let Some(next) = op.value.as_str().and_then(|name| self.get(name)) else { continue };
            if next.name == chain[0].name {
                return Some(op.value.span);
            }
            if chain.iter().all(|link| link.name != next.name) {
                chain.push(next);
                if let Some(span) = self.leads_back(chain) {
                    return Some(span);
                }
                chain.pop();
            }
        }
        None
    }

    /// The definition of that name.
    pub fn get(&self, name: &str) -> Option<&Definition> {
        self.list.iter().find(|definition| definition.name == name)
    }
}

struct Reader<'a> {
    library: &'a mut Library,
    registry: &'a Registry,
    /// The files that are being read, each of which includes the next; and their names.
    chain: Vec<(PathBuf, String)>,
    done: Vec<PathBuf>,
}

impl Reader<'_> {
    fn file(&mut self, root: &Yaml, path: &Path, report: &mut Report) {
        if let Some(entry) = root.get("include") {
            let items = match &entry.value.content {
                Content::Sequence(items) => items.as_slice(),
                _ => std::slice::from_ref(&entry.value),
            };
            for item in items {
                self.include(item, path, report);
            }
        }
        let Some(entry) = root.get("operators") else { return };
        if !matches!(entry.value.content, Content::Mapping(_)) && !entry.value.is_null() {
            let message = format!("`operators` is a mapping from names to operators, found {}", entry.value.found());
            report.error(entry.value.span, message);
        }
        for entry in entry.value.entries() {
            self.define(entry, report);
        }
    }

    fn include(&mut self, item: &Yaml, from: &Path, report: &mut Report) {
        let Some(text) = item.as_str() else {
            blame(report, item, format!("`include` names files, found {}", item.found()));
            return;
        };
        let path = from.parent().unwrap_or(Path::new("")).join(text);
        let name = path.display().to_string();
        let contents = match std::fs::read_to_string(&path) {
            Ok(contents) => contents,
            Err(error) => {
                report
                    .error(item.span, format!("cannot read `{name}`: {error}"))
                    .note("paths of included files are relative to the file that includes them");
                return;
            }
        };
        let whole = path.canonicalize().unwrap_or_else(|_| path.clone());
        if let Some(start) = self.chain.iter().position(|(other, _)| *other == whole) {
            let mut names: Vec<&str> = self.chain[start..].iter().map(|(_, name)| name.as_str()).collect();
            names.push(names[0]);
            report.error(item.span, format!("files include each other: {}", names.join(" -> ")));
            return;
        }
        if self.done.contains(&whole) {
            return;
        }
        self.done.push(whole.clone());
        let source = report.add_source(&name, &contents);
        let Some(root) = yaml::parse(source, report) else { return };
        if !matches!(root.content, Content::Mapping(_)) {
            report.error(root.span, format!("an included file is a mapping, found {}", root.found()));
            return;
        }
        check_keys(&root, &["version", "include", "operators"], "an included file", report);
        self.chain.push((whole, name));
        self.file(&root, &path, report);
        self.chain.pop();
    }

    fn define(&mut self, entry: &Entry, report: &mut Report) {
        let name = &entry.key;
        if !is_identifier(name) {
            report
                .error(entry.key_span, format!("`{name}` is no name for an operator"))
                .help("use letters, digits and `_`, not beginning with a digit");
        }
        if self.registry.get(name).is_some() {
            report.error(entry.key_span, format!("`{name}` is a built-in operator")).help("choose another name");
            return;
        }
        if let Some(other) = self.library.get(name) {
            let note = format!("the first one is at {}", report.place(other.span));
            report.error(entry.key_span, format!("the operator `{name}` is defined twice")).note(note);
            return;
        }
        if !matches!(entry.value.content, Content::Mapping(_)) {
            let message = format!("the operator `{name}` is a mapping with `nodes`, found {}", entry.value.found());
            report.error(entry.key_span, message);
            return;
        }
        let known = ["description", "params", "inputs", "outputs", "nodes"];
        check_keys(&entry.value, &known, &format!("the operator `{name}`"), report);
        let Some(nodes) = entry.value.get("nodes") else {
            report.error(entry.key_span, format!("the operator `{name}` has no `nodes`"));
            return;
        };
        let definition = Definition {
            name: name.clone(),
            span: entry.key_span,
            description: description(&entry.value, report),
            declarations: declaration::read(entry.value.get("params").map(|params| &params.value), report),
            inputs: ports(entry.value.get("inputs"), report),
            outputs: ports(entry.value.get("outputs"), report),
            nodes: nodes.clone(),
        };
        check_ports(&definition, report);
        self.library.list.push(definition);
    }
}

/// The entries of `inputs` or `outputs`.
fn ports(entry: Option<&Entry>, report: &mut Report) -> Vec<Entry> {
    let Some(entry) = entry else { return Vec::new() };
    if !matches!(entry.value.content, Content::Mapping(_)) && !entry.value.is_null() {
        let help = match entry.key.as_str() {
            "inputs" => "write `inputs: {NAME: what it is for}`",
            _ => "write `outputs: {NAME: node.port}`",
        };
        report
            .error(entry.value.span, format!("`{}` is a mapping, found {}", entry.key, entry.value.found()))
            .help(help);
    }
    for port in entry.value.entries().iter().filter(|port| !is_identifier(&port.key)) {
        report
            .error(port.key_span, format!("`{}` is no name for a port", port.key))
            .help("use letters, digits and `_`, not beginning with a digit");
    }
    entry.value.entries().to_vec()
}

fn check_ports(definition: &Definition, report: &mut Report) {
    for input in &definition.inputs {
        if input.value.as_str().is_none() && !input.value.is_null() {
            let message = format!("an input is described in words, found {}", input.value.found());
            report.error(input.value.span, message);
        }
        if let Some(node) = definition.nodes.value.get(&input.key) {
            let note = format!("the node is at {}", report.place(node.key_span));
            report
                .error(input.key_span, format!("`{}` is both an input and a node of `{}`", input.key, definition.name))
                .note(note)
                .help("rename one: the nodes inside refer to both by name");
        }
        if !mentions(&definition.nodes.value, &input.key) {
            report.error(input.key_span, format!("no node of `{}` reads the input `{}`", definition.name, input.key));
        }
    }
    for output in &definition.outputs {
        let is_reference = match &output.value.content {
            Content::Sequence(items) => !items.is_empty() && items.iter().all(|item| item.as_str().is_some()),
            _ => output.value.as_str().is_some(),
        };
        if !is_reference {
            let message = format!("an output is `node.port` or a list of these, found {}", output.value.found());
            report.error(output.value.span, message);
        }
    }
}

/// Whether the `in` of any of the nodes names the input.
fn mentions(nodes: &Yaml, input: &str) -> bool {
    fn names(yaml: &Yaml, input: &str) -> bool {
        match &yaml.content {
            Content::Sequence(items) => items.iter().any(|item| names(item, input)),
            Content::Mapping(entries) => entries.iter().any(|entry| names(&entry.value, input)),
            _ => yaml.as_str() == Some(input),
        }
    }
    nodes.entries().iter().any(|node| node.value.get("in").is_some_and(|entry| names(&entry.value, input)))
}
