//! The top level of a pipeline, its `run` block and its nodes.

use std::sync::Arc;

use serde_yaml::Value;

use super::composite::{self, FlatNode};
use super::diagnostic::{Diagnostics, Report, Span};
use super::environment::Environment;
use super::interpolation::escape;
use super::library::Library;
use super::overrides::Override;
use super::params::Params;
use super::schema::{Validator, blame};
use super::wiring::{self, Draft};
use super::yaml::{self, Content, Entry, Yaml};
use super::{config, lints, order, retractions, types, written};
use crate::graph::{Graph, Node, RunSettings};
use crate::operator::{OperatorSpec, Registry};

/// A pipeline without errors.
pub(crate) struct Lowered {
    pub graph: Graph,
    /// The flat pipeline with all parameters filled in.
    pub filled: Yaml,
    /// Its nodes before composite operators were replaced.
    pub nodes: Yaml,
    pub params: Params,
    pub library: Library,
}

/// The mapping in the report's text; None where it is none.
pub(crate) fn root(report: &mut Report) -> Option<Yaml> {
    let root = yaml::parse(0, report)?;
    if !matches!(root.content, Content::Mapping(_)) {
        report
            .error(root.span, format!("a pipeline is a mapping, found {}", root.found()))
            .help("it has the keys `version`, `params`, `run` and `nodes`");
        return None;
    }
    Some(root)
}

/// The pipeline as a graph, and as a flat tree with all parameters filled in; None where something kept it from being
/// one.
pub(crate) fn lower(root: &Yaml, overrides: &[Override], registry: &Registry, report: &mut Report) -> Option<Lowered> {
    let top = Span { source: 0, line: 1, column: 1, width: 1 };
    let keys = ["version", "include", "env", "params", "operators", "run", "nodes", "sweep", "tests"];
    check_keys(root, &keys, "the pipeline", report);
    check_version(root, top, report);
    let file = report.name(0).to_owned();
    let library = Library::read(root, &file, registry, report);
    let recursive = library.report_recursion(report);
    let environment = Environment::read(root.get("env").map(|entry| &entry.value), report);
    let mut params = Params::read(root.get("params").map(|entry| &entry.value), environment, overrides, report);
    let mut filled = params.fill(&without_definitions(root), report);
    params.report_unused(report);

    let run = read_run(filled.get("run"), top, report);
    if recursive {
        return None;
    }
    let flat = read_nodes(filled.get("nodes"), top, &library, registry, report);
    let mut drafts: Vec<Draft> = flat.iter().map(|node| read_node(node, registry, &library, report)).collect();
    report.set_context(&[]);
    report_nested(&drafts, report);
    let nodes = filled.get("nodes").map(|nodes| nodes.value.clone());
    replace_nodes(&mut filled, &flat);
    wiring::connect(&mut drafts, report);
    retractions::check(&drafts, report);
    check_epochs(filled.get("run"), &drafts, report);
    types::check_connections(&drafts, report);
    written::check(&drafts, report);
    let order = order::dependency_order(&drafts, report)?;
    if report.has_errors() {
        return None;
    }
    lints::check(&drafts, registry, report);
    let graph = Graph {
        edges: wiring::edges(&drafts, &order),
        nodes: order.into_iter().filter_map(|index| node(&drafts[index])).collect(),
        run: run?,
        params: params.values().map(|(name, value)| (name.to_owned(), value)).collect(),
        resolved: filled.to_value_with(&escape),
        warnings: Diagnostics::default(),
    };
    Some(Lowered { graph, filled, nodes: nodes?, params, library })
}

/// An error for each key that is none of `known`.
pub(crate) fn check_keys(yaml: &Yaml, known: &[&str], place: &str, report: &mut Report) {
    for entry in yaml.entries().iter().filter(|entry| !known.contains(&entry.key.as_str())) {
        report
            .error(entry.key_span, format!("unknown key `{}` in {place}", entry.key))
            .label("unknown key")
            .suggest(&entry.key, known);
    }
}

fn check_version(root: &Yaml, top: Span, report: &mut Report) {
    match root.get("version") {
        None => {
            report.error(top, "the pipeline has no `version`").help("begin with `version: 1`");
        }
        Some(entry) if entry.value.to_value() == 1 => {}
        Some(entry) => {
            let message = format!("this sapo-flow reads pipelines of version 1, found {}", entry.value.found());
            report.error(entry.value.span, message).label("expected `1`");
        }
    }
}

/// The pipeline without what only serves to write it, to vary it and to test it.
fn without_definitions(root: &Yaml) -> Yaml {
    let definitions = ["include", "env", "params", "operators", "sweep", "tests"];
    let entries = root.entries().iter().filter(|entry| !definitions.contains(&entry.key.as_str())).cloned().collect();
    Yaml::new(root.span, Content::Mapping(entries))
}

/// Put the flat nodes in the place of those written.
fn replace_nodes(filled: &mut Yaml, flat: &[FlatNode]) {
    let Content::Mapping(entries) = &mut filled.content else { return };
    for entry in entries.iter_mut().filter(|entry| entry.key == "nodes") {
        entry.value.content = Content::Mapping(flat.iter().map(|node| node.entry.clone()).collect());
    }
}

fn read_run(entry: Option<&Entry>, top: Span, report: &mut Report) -> Option<RunSettings> {
    let Some(entry) = entry else {
        report
            .error(top, "the pipeline has no `run` block")
            .help("it needs at least `run: {steps: N}` or `run: {epochs: N}`");
        return None;
    };
    let before = report.errors();
    let schema = RunSettings::json_schema_root();
    Validator { root: &schema }.check(&entry.value, "run", entry.key_span, report);
    if let Some(device) =
        entry.value.get("device").filter(|device| device.value.as_str().is_some_and(|text| !is_device(text)))
    {
        let message = format!("`run.device` names no device: found {}", device.value.found());
        blame(report, &device.value, message).label("expected `auto`, `cpu`, `cuda` or `cuda:N`");
    }
    let given = |key: &str| entry.value.get(key).filter(|entry| !entry.value.is_null());
    match (given("epochs"), given("steps")) {
        (None, None) if report.errors() == before => {
            report
                .error(entry.key_span, "the `run` block does not say how long the run is")
                .label("needs `steps` or `epochs`");
        }
        (Some(epochs), Some(steps)) => {
            let (first, second) =
                if (epochs.key_span.line, epochs.key_span.column) <= (steps.key_span.line, steps.key_span.column) {
                    (epochs, steps)
                } else {
                    (steps, epochs)
                };
            let note = format!("`{}` is at {}", first.key, report.place(first.key_span));
            report
                .error(second.key_span, "`run` takes `steps` or `epochs`, not both")
                .note(note)
                .help("remove one of them");
        }
        _ => {}
    }
    if report.errors() > before {
        return None;
    }
    match serde_yaml::from_value(entry.value.to_value()) {
        Ok(settings) => Some(settings),
        Err(error) => {
            report.error(entry.key_span, format!("in `run`: {error}"));
            None
        }
    }
}

/// A run of so many epochs needs a source that tells how many steps one has. Not asked where some node is not understood.
fn check_epochs(run: Option<&Entry>, drafts: &[Draft], report: &mut Report) {
    let epochs = run.and_then(|run| run.value.get("epochs")).filter(|epochs| !epochs.value.is_null());
    let steps = run.and_then(|run| run.value.get("steps")).filter(|steps| !steps.value.is_null());
    let (Some(epochs), None) = (epochs, steps) else { return };
    let mut silent = Vec::new();
    for draft in drafts {
        let Some(op) = draft.op.as_ref().filter(|_| draft.config_is_valid) else { return };
        let config = draft.with.as_ref().map_or(Value::Null, |with| with.value.to_value());
        if (op.has_epochs)(&config) {
            return;
        }
        if op.inputs.is_empty() {
            silent.push(format!(
                "`{}` ({}) does not, with its settings: {}",
                draft.name,
                op.name,
                report.place(draft.span)
            ));
        }
    }
    let diagnostic = report
        .error(epochs.key_span, "no source tells how many steps an epoch has")
        .help("give `run: {steps: N}` instead of `epochs`");
    diagnostic.notes.extend(silent);
}

fn is_device(text: &str) -> bool {
    matches!(text, "auto" | "cpu" | "cuda")
        || text.strip_prefix("cuda:").is_some_and(|index| index.parse::<u16>().is_ok())
}

impl RunSettings {
    fn json_schema_root() -> serde_json::Value {
        schemars::SchemaGenerator::default().into_root_schema_for::<RunSettings>().to_value()
    }
}

fn read_nodes(
    entry: Option<&Entry>,
    top: Span,
    library: &Library,
    registry: &Registry,
    report: &mut Report,
) -> Vec<FlatNode> {
    let Some(entry) = entry else {
        report.error(top, "the pipeline has no `nodes`");
        return Vec::new();
    };
    if !matches!(entry.value.content, Content::Mapping(_) | Content::Invalid) || entry.value.entries().is_empty() {
        report
            .error(entry.key_span, format!("`nodes` is a mapping from names to nodes, found {}", entry.value.found()))
            .help("a node is written `name: {op: OPERATOR, in: ..., with: {...}}`");
    }
    composite::flatten(&entry.value, library, registry, report)
}

/// A node's directory in a checkpoint has its name, so that no node can stand inside of another.
fn report_nested(drafts: &[Draft], report: &mut Report) {
    for draft in drafts {
        let inside = |other: &&Draft| draft.name.strip_prefix(&other.name).is_some_and(|rest| rest.starts_with('/'));
        if let Some(other) = drafts.iter().find(inside) {
            report.error(
                draft.span,
                format!("`{}` is named as if it were inside of the node `{}`", draft.name, other.name),
            );
        }
    }
}

fn read_node(node: &FlatNode, registry: &Registry, library: &Library, report: &mut Report) -> Draft {
    let FlatNode { entry, uses } = node;
    report.set_context(uses);
    let name = &entry.key;
    composite::check_name(name, entry.key_span, report);
    let mut draft = Draft { uses: uses.clone(), ..Draft::new(name, entry.key_span) };
    if !matches!(entry.value.content, Content::Mapping(_)) {
        if !entry.value.is_invalid() {
            report.error(
                entry.key_span,
                format!("the node `{name}` is a mapping with `op`, found {}", entry.value.found()),
            );
        }
        return draft;
    }
    check_keys(&entry.value, &["op", "in", "with"], &format!("the node `{name}`"), report);
    draft.input = entry.value.get("in").cloned();
    draft.with = entry.value.get("with").cloned().filter(|with| !with.value.is_null());
    draft.op = read_operator(entry, registry, library, &mut draft, report);
    if let Some(op) = draft.op.clone() {
        draft.config_is_valid = config::check(&op, &draft, report);
    }
    draft
}

fn read_operator(
    entry: &Entry,
    registry: &Registry,
    library: &Library,
    draft: &mut Draft,
    report: &mut Report,
) -> Option<Arc<OperatorSpec>> {
    let name = &entry.key;
    let Some(op) = entry.value.get("op") else {
        report
            .error(entry.key_span, format!("the node `{name}` has no `op`"))
            .label("needs `op`: the name of an operator");
        return None;
    };
    draft.op_span = op.value.span;
    let Some(text) = op.value.as_str() else {
        if !op.value.is_invalid() {
            blame(report, &op.value, format!("`op` is the name of an operator, found {}", op.value.found()));
        }
        return None;
    };
    let spec = registry.get(text).cloned();
    if spec.is_none() {
        let composites = library.list.iter().map(|definition| definition.name.as_str());
        let names: Vec<&str> = registry.iter().map(|spec| spec.name).chain(composites).collect();
        blame(report, &op.value, format!("unknown operator `{text}`")).suggest(text, &names);
    }
    spec
}

fn node(draft: &Draft) -> Option<Node> {
    let config = draft.with.as_ref().map_or_else(|| Value::Mapping(Default::default()), |with| with.value.to_value());
    Some(Node { name: draft.name.clone(), op: draft.op.clone()?, config })
}
