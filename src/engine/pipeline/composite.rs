//! Nodes that use composite operators, replaced by the nodes these are made of.
//!
//! The node `outer` becomes nodes named `outer/inner`. What it reads goes to the inner nodes that name its inputs; who
//! reads its outputs reads the inner ones behind them. The result has built-in operators alone, and is what a pipeline
//! without composites would have said.

use std::collections::BTreeMap;

use super::diagnostic::{Report, Span};
use super::document::check_keys;
use super::library::{Definition, Library};
use super::params::Params;
use super::schema::blame;
use super::yaml::{Content, Entry, Yaml};
use crate::operator::Registry;

/// A node with a built-in operator.
pub(crate) struct FlatNode {
    /// Its full name, and the node.
    pub entry: Entry,
    /// The uses of composite operators that it is in, the innermost first.
    pub uses: Vec<String>,
}

/// The nodes of a pipeline with every composite replaced.
pub(crate) fn flatten(nodes: &Yaml, library: &Library, registry: &Registry, report: &mut Report) -> Vec<FlatNode> {
    let mut flattener = Flattener { library, registry, flat: Vec::new() };
    let scope = Scope { prefix: String::new(), nodes, inputs: BTreeMap::new(), uses: Vec::new(), stack: Vec::new() };
    flattener.scope(&scope, report);
    report.set_context(&[]);
    flattener.flat
}

/// The outputs of flat nodes, each `node.port` by its full name, that `node` or `node.port` of a pipeline stands for.
pub(crate) fn outputs(
    reference: &Yaml,
    nodes: &Yaml,
    library: &Library,
    registry: &Registry,
    report: &mut Report,
) -> Vec<Yaml> {
    let scope = Scope { prefix: String::new(), nodes, inputs: BTreeMap::new(), uses: Vec::new(), stack: Vec::new() };
    Flattener { library, registry, flat: Vec::new() }.resolve(reference, &scope, report)
}

struct Flattener<'a> {
    library: &'a Library,
    registry: &'a Registry,
    flat: Vec<FlatNode>,
}

/// The nodes of the pipeline, or of one use of a composite operator.
struct Scope<'s> {
    /// Before names of nodes: empty, or ending in `/`.
    prefix: String,
    nodes: &'s Yaml,
    /// Sources from outside, by the input that they go to.
    inputs: BTreeMap<String, Vec<Yaml>>,
    uses: Vec<String>,
    /// The composite operators that this is inside of, the outermost first.
    stack: Vec<String>,
}

impl<'a> Flattener<'a> {
    fn scope(&mut self, scope: &Scope, report: &mut Report) {
        for entry in scope.nodes.entries() {
            report.set_context(&scope.uses);
            match self.definition(&entry.value) {
                Some(definition) => self.expand(entry, definition, scope, report),
                None => {
                    let entry = self.rewrite(entry, scope, report);
                    self.flat.push(FlatNode { entry, uses: scope.uses.clone() });
                }
            }
        }
    }

    /// The composite operator that a node uses.
    fn definition(&self, node: &Yaml) -> Option<&'a Definition> {
        self.library.get(node.get("op")?.value.as_str()?)
    }

    /// A node with a built-in operator, under its full name and with the full names of what it reads.
    fn rewrite(&self, entry: &Entry, scope: &Scope, report: &mut Report) -> Entry {
        let mut entry = Entry { key: format!("{}{}", scope.prefix, entry.key), ..entry.clone() };
        let op = entry.value.get("op").and_then(|op| op.value.as_str()).and_then(|op| self.registry.get(op));
        let has_from = op.is_some_and(|op| op.inputs.iter().any(|port| port.name == "from"));
        let Content::Mapping(keys) = &mut entry.value.content else { return entry };
        for key in keys.iter_mut().filter(|key| key.key == "in") {
            if names_ports(&key.value, has_from) {
                let Content::Mapping(ports) = &mut key.value.content else { continue };
                for port in ports {
                    port.value = self.sources(&port.value, scope, report);
                }
            } else {
                key.value = self.sources(&key.value, scope, report);
            }
        }
        entry
    }

    /// The sources of one input with full names. What reads several outputs at once becomes a list.
    fn sources(&self, value: &Yaml, scope: &Scope, report: &mut Report) -> Yaml {
        let content = match &value.content {
            Content::Sequence(items) => {
                Content::Sequence(items.iter().flat_map(|item| self.source(item, scope, report)).collect())
            }
            _ => {
                let mut found = self.source(value, scope, report);
                match (found.pop(), found.is_empty()) {
                    (Some(only), true) => return only,
                    (Some(last), false) => {
                        found.push(last);
                        Content::Sequence(found)
                    }
                    (None, _) => Content::Invalid,
                }
            }
        };
        Yaml { content, ..value.clone() }
    }

    /// A name, or a `{from, feedback}`, as what it stands for.
    fn source(&self, value: &Yaml, scope: &Scope, report: &mut Report) -> Vec<Yaml> {
        if value.as_str().is_some() {
            return self.resolve(value, scope, report);
        }
        let Some(from) = value.get("from").filter(|from| from.value.as_str().is_some()) else {
            return vec![value.clone()];
        };
        let mut sources = Vec::new();
        for found in self.resolve(&from.value, scope, report) {
            if found.as_str().is_none() {
                let place = report.place(found.span);
                report
                    .error(value.span, "this connection is delayed twice")
                    .note(format!("it is marked `feedback` where it comes from, too: {place}"))
                    .help("leave one of the marks out");
                continue;
            }
            let mut source = value.clone();
            if let Content::Mapping(entries) = &mut source.content {
                for entry in entries.iter_mut().filter(|entry| entry.key == "from") {
                    entry.value = found.clone();
                }
            }
            sources.push(source);
        }
        sources
    }

    /// What `node` or `node.port` stands for: outputs of flat nodes by their full names, or what comes from outside.
    fn resolve(&self, reference: &Yaml, scope: &Scope, report: &mut Report) -> Vec<Yaml> {
        let text = reference.as_str().unwrap_or_default();
        let (name, port) = match text.split_once('.') {
            Some((name, port)) => (name, Some(port)),
            None => (text, None),
        };
        if let Some(sources) = scope.inputs.get(name) {
            if let Some(port) = port {
                blame(report, reference, format!("`{name}` is an input, and has no output `{port}`"))
                    .help(format!("write `{name}`"));
            }
            return sources.clone();
        }
        match scope.nodes.get(name).and_then(|node| self.definition(&node.value)) {
            None => vec![written(reference, format!("{}{text}", scope.prefix))],
            Some(definition) => self.output(reference, definition, &format!("{}{name}/", scope.prefix), port, report),
        }
    }

    /// The inner outputs behind an output of the composite operator whose nodes have that prefix.
    fn output(
        &self,
        reference: &Yaml,
        definition: &Definition,
        prefix: &str,
        port: Option<&str>,
        report: &mut Report,
    ) -> Vec<Yaml> {
        let user = prefix.trim_end_matches('/');
        let output = match port {
            Some(port) => definition.outputs.iter().find(|output| output.key == port),
            None => definition.outputs.first(),
        };
        let Some(output) = output else {
            match port {
                Some(port) => {
                    let names: Vec<&str> = definition.outputs.iter().map(|output| output.key.as_str()).collect();
                    blame(report, reference, format!("`{user}` ({}) has no output `{port}`", definition.name))
                        .suggest(port, &names);
                }
                None => {
                    blame(report, reference, format!("`{user}` ({}) has no outputs", definition.name));
                }
            }
            return Vec::new();
        };
        let items = match &output.value.content {
            Content::Sequence(items) => items.as_slice(),
            _ => std::slice::from_ref(&output.value),
        };
        let mut found = Vec::new();
        for item in items {
            let text = item.as_str().unwrap_or_default();
            let (name, inner_port) = match text.split_once('.') {
                Some((name, port)) => (name, Some(port)),
                None => (text, None),
            };
            let node = definition.nodes.value.get(name);
            match node.map(|node| self.definition(&node.value)) {
                // Reported where the use is expanded.
                None => {}
                Some(None) => found.push(written(reference, format!("{prefix}{text}"))),
                Some(Some(inner)) => {
                    found.extend(self.output(reference, inner, &format!("{prefix}{name}/"), inner_port, report));
                }
            }
        }
        found
    }

    /// A node that uses a composite operator: the nodes inside.
    fn expand(&mut self, entry: &Entry, definition: &Definition, scope: &Scope, report: &mut Report) {
        let user = format!("{}{}", scope.prefix, entry.key);
        let op_span = entry.value.get("op").map_or(entry.key_span, |op| op.value.span);
        let mut stack = scope.stack.clone();
        stack.push(definition.name.clone());
        if let Some(start) = scope.stack.iter().position(|name| *name == definition.name) {
            let chain = stack[start..].join(" -> ");
            report.error(op_span, format!("operators are made of each other: {chain}"));
            return;
        }
        check_keys(&entry.value, &["op", "in", "with"], &format!("the node `{user}`"), report);
        let with = entry.value.get("with").filter(|with| !with.value.is_null());
        if let Some(with) = with.filter(|with| !matches!(with.value.content, Content::Mapping(_) | Content::Invalid)) {
            report.error(with.key_span, format!("`with` is a mapping, found {}", with.value.found()));
        }
        let inputs = self.inputs(entry, definition, &user, scope, report);
        let mut uses = vec![report.note_at(&format!("inside `{}`, which `{user}` uses", definition.name), op_span)];
        uses.extend(scope.uses.iter().cloned());
        // What is missing from `with` is a mistake of the use; what its values meet inside is seen from both.
        let mut params = Params::of_use(definition.declarations.clone(), with, &user, op_span, report);
        report.set_context(&uses);
        let nodes = params.fill(&definition.nodes.value, report);
        params.report_unused(report);
        check_nodes(&nodes, definition, report);
        let inner = Scope { prefix: format!("{user}/"), nodes: &nodes, inputs, uses, stack };
        self.scope(&inner, report);
    }

    /// What goes to each input of a composite operator.
    fn inputs(
        &self,
        entry: &Entry,
        definition: &Definition,
        user: &str,
        scope: &Scope,
        report: &mut Report,
    ) -> BTreeMap<String, Vec<Yaml>> {
        let names: Vec<&str> = definition.inputs.iter().map(|input| input.key.as_str()).collect();
        let mut given: BTreeMap<String, Vec<Yaml>> = BTreeMap::new();
        let input = entry.value.get("in").filter(|input| !input.value.is_null());
        if let Some(input) = input {
            let list = |value: &Yaml, report: &mut Report| match self.sources(value, scope, report) {
                Yaml { content: Content::Sequence(items), .. } => items,
                Yaml { content: Content::Invalid, .. } => Vec::new(),
                source => vec![source],
            };
            if names_ports(&input.value, names.contains(&"from")) {
                for port in input.value.entries() {
                    if !names.contains(&port.key.as_str()) {
                        report
                            .error(port.key_span, format!("`{}` has no input `{}`", definition.name, port.key))
                            .label("unknown input")
                            .suggest(&port.key, &names);
                    }
                    given.insert(port.key.clone(), list(&port.value, report));
                }
            } else if let Some(first) = names.first() {
                given.insert((*first).to_owned(), list(&input.value, report));
            } else {
                report
                    .error(input.key_span, format!("`{user}` has inputs, but `{}` takes none", definition.name))
                    .help("remove `in`");
            }
        }
        let span = input.map_or(entry.key_span, |input| input.key_span);
        for input in &definition.inputs {
            if !given.contains_key(&input.key) {
                let message = format!("the input `{}` of `{user}` ({}) is not connected", input.key, definition.name);
                report.error(span, message).label(format!("needs `{}`", input.key));
                given.insert(input.key.clone(), Vec::new());
            }
        }
        given
    }
}

/// The shape of a definition's `nodes`, and that its outputs name nodes inside.
fn check_nodes(nodes: &Yaml, definition: &Definition, report: &mut Report) {
    if nodes.entries().is_empty() {
        let message = format!("`nodes` of the operator `{}` is a mapping from names to nodes", definition.name);
        report.error(definition.nodes.key_span, message);
    }
    let names: Vec<&str> = nodes.entries().iter().map(|node| node.key.as_str()).collect();
    for output in &definition.outputs {
        let items = match &output.value.content {
            Content::Sequence(items) => items.as_slice(),
            _ => std::slice::from_ref(&output.value),
        };
        for item in items {
            let text = item.as_str().unwrap_or_default();
            let name = text.split_once('.').map_or(text, |(name, _)| name);
            if !names.contains(&name) && !text.is_empty() {
                report
                    .error(item.span, format!("there is no node `{name}` in `{}`", definition.name))
                    .suggest(name, &names);
            }
        }
    }
}

/// Whether the value of `in` is a mapping from ports, and not one connection.
fn names_ports(input: &Yaml, has_from: bool) -> bool {
    matches!(input.content, Content::Mapping(_)) && (has_from || input.get("from").is_none())
}

/// A reference under another name, at its place.
fn written(reference: &Yaml, name: String) -> Yaml {
    let content = Content::Scalar(serde_yaml::Value::String(name));
    Yaml { content, ..reference.clone() }
}

/// Where the node stands that a flat name is about: names of nodes in composites have `/` in them.
pub(crate) fn check_name(name: &str, span: Span, report: &mut Report) {
    if !name.split('/').all(super::interpolation::is_identifier) {
        report
            .error(span, format!("`{name}` is no name for a node"))
            .help("use letters, digits and `_`, not beginning with a digit");
    }
}
