//! `in` blocks: from names to typed edges.

use std::sync::Arc;

use serde_yaml::Value;

use super::diagnostic::{Report, Span};
use super::document::check_keys;
use super::schema::blame;
use super::types::{carried, types};
use super::yaml::{Content, Entry, Yaml};
use crate::graph::{Edge, Feedback};
use crate::operator::{OperatorSpec, PortSpec};

/// A node while it is being read.
pub(crate) struct Draft {
    pub name: String,
    pub span: Span,
    pub op: Option<Arc<OperatorSpec>>,
    pub op_span: Span,
    pub input: Option<Entry>,
    pub with: Option<Entry>,
    /// The uses of composite operators that it is in, for messages.
    pub uses: Vec<String>,
    /// Whether the `with` block has no complaint of its own.
    pub config_is_valid: bool,
    /// Whether the `in` block has none: it has been connected, to what the operator takes.
    pub wiring_is_valid: bool,
    /// The edges that end here, once connected.
    pub wires: Vec<Wire>,
}

/// An edge, seen from its consumer.
pub(crate) struct Wire {
    pub from_node: usize,
    pub from_port: usize,
    pub to_port: usize,
    pub span: Span,
    /// `node` or `node.port`, as written.
    pub reference: Yaml,
    pub feedback: Option<Feedback>,
}

impl Draft {
    pub fn new(name: &str, span: Span) -> Self {
        Draft {
            name: name.to_owned(),
            span,
            op: None,
            op_span: span,
            input: None,
            with: None,
            uses: Vec::new(),
            config_is_valid: false,
            wiring_is_valid: false,
            wires: Vec::new(),
        }
    }

    pub fn outputs(&self) -> &'static [PortSpec] {
        self.op.as_ref().map_or(&[], |op| op.outputs)
    }
}

/// The edges of the graph whose nodes are `order`.
pub(crate) fn edges(drafts: &[Draft], order: &[usize]) -> Vec<Edge> {
    let mut position = vec![0; drafts.len()];
    for (place, index) in order.iter().enumerate() {
        position[*index] = place;
    }
    let wires = order.iter().flat_map(|index| drafts[*index].wires.iter().map(move |wire| (*index, wire)));
    wires
        .map(|(to, wire)| Edge {
            from_node: position[wire.from_node],
            from_port: wire.from_port,
            to_node: position[to],
            to_port: wire.to_port,
            port_type: carried(drafts, wire.from_node, wire.from_port)[0],
            feedback: wire.feedback,
        })
        .collect()
}

/// Resolve the `in` block of every node.
pub(crate) fn connect(drafts: &mut [Draft], report: &mut Report) {
    for index in 0..drafts.len() {
        report.set_context(&drafts[index].uses);
        let before = report.errors();
        let (wires, whole) = Connector { drafts, consumer: index }.connect(report);
        drafts[index].wires = wires;
        drafts[index].wiring_is_valid = whole && report.errors() == before;
    }
    // What an output carries may depend on what arrives at its node.
    for index in 0..drafts.len() {
        report.set_context(&drafts[index].uses);
        let before = report.errors();
        Connector { drafts, consumer: index }.check_types(report);
        drafts[index].wiring_is_valid &= report.errors() == before;
    }
    report.set_context(&[]);
}

/// One use of an output, as written.
struct Source<'y> {
    /// `node` or `node.port`.
    reference: &'y Yaml,
    feedback: Option<Feedback>,
}

/// Connects the inputs of one node.
pub(super) struct Connector<'d> {
    pub drafts: &'d [Draft],
    pub consumer: usize,
}

impl Connector<'_> {
    /// The edges that end at the node, and whether these are all that is written.
    fn connect(&self, report: &mut Report) -> (Vec<Wire>, bool) {
        let draft = &self.drafts[self.consumer];
        let (mut wires, mut whole) = (Vec::new(), true);
        // Ports that are written, whether or not what is written makes sense.
        let mut written = Vec::new();
        if let Some(input) = &draft.input {
            for (port, value) in self.ports(input, report) {
                let sources = sources(value, report);
                if let Some(port) = port {
                    written.push(port);
                    self.check_count(port, value, sources.len(), report);
                }
                for source in sources {
                    let found = self.resolve(source.reference, report);
                    let (Some((from_node, from_port)), Some(to_port)) = (found, port) else {
                        whole = false;
                        continue;
                    };
                    let wire = Wire {
                        from_node,
                        from_port,
                        to_port,
                        span: source.reference.span,
                        reference: source.reference.clone(),
                        feedback: source.feedback,
                    };
                    self.check_duplicate(&wire, &wires, report);
                    wires.push(wire);
                }
            }
        }
        self.check_required(&written, report);
        (wires, whole)
    }

    /// The values under `in` by input port; None for a port that there is not.
    fn ports<'y>(&self, input: &'y Entry, report: &mut Report) -> Vec<(Option<usize>, &'y Yaml)> {
        let draft = &self.drafts[self.consumer];
        let Some(op) = &draft.op else {
            // Without the operator the ports are unknown, but the nodes named can still be checked.
            let is_short = !matches!(input.value.content, Content::Mapping(_)) || input.value.get("from").is_some();
            let values: Vec<&Yaml> =
                if is_short { vec![&input.value] } else { input.value.entries().iter().map(|e| &e.value).collect() };
            return values.into_iter().map(|value| (None, value)).collect();
        };
        if op.inputs.is_empty() && !input.value.is_null() {
            report
                .error(input.key_span, format!("`{}` has inputs, but `{}` takes none", draft.name, op.name))
                .help("remove `in`");
            return Vec::new();
        }
        let is_map = matches!(input.value.content, Content::Mapping(_));
        let names_ports =
            is_map && (input.value.get("from").is_none() || op.inputs.iter().any(|port| port.name == "from"));
        if input.value.is_null() {
            return Vec::new();
        }
        if !names_ports {
            return vec![(Some(0), &input.value)];
        }
        let names: Vec<&str> = op.inputs.iter().map(|port| port.name).collect();
        let mut ports = Vec::new();
        for entry in input.value.entries() {
            let port = names.iter().position(|name| *name == entry.key);
            if port.is_none() {
                report
                    .error(entry.key_span, format!("`{}` has no input `{}`", op.name, entry.key))
                    .label("unknown input")
                    .suggest(&entry.key, &names);
            }
            ports.push((port, &entry.value));
        }
        ports
    }

    /// The output that `node` or `node.port` names.
    fn resolve(&self, reference: &Yaml, report: &mut Report) -> Option<(usize, usize)> {
        let text = reference.as_str()?;
        let (node_name, port_name) = match text.split_once('.') {
            Some((node, port)) => (node, Some(port)),
            None => (text, None),
        };
        let Some(index) = self.drafts.iter().position(|draft| draft.name == node_name) else {
            let names: Vec<&str> = self.drafts.iter().map(|draft| draft.name.as_str()).collect();
            blame(report, reference, format!("there is no node `{node_name}`")).suggest(node_name, &names);
            return None;
        };
        let op = self.drafts[index].op.as_ref()?;
        if op.outputs.is_empty() {
            blame(report, reference, format!("`{node_name}` ({}) has no outputs", op.name));
            return None;
        }
        let Some(port_name) = port_name else { return Some((index, 0)) };
        let port = op.outputs.iter().position(|port| port.name == port_name);
        if port.is_none() {
            let names: Vec<&str> = op.outputs.iter().map(|port| port.name).collect();
            blame(report, reference, format!("`{node_name}` ({}) has no output `{port_name}`", op.name))
                .suggest(port_name, &names);
        }
        port.map(|port| (index, port))
    }

    pub fn input(&self, port: usize) -> Option<(&OperatorSpec, &PortSpec)> {
        let op = self.drafts[self.consumer].op.as_ref()?;
        Some((op, op.inputs.get(port)?))
    }

    fn check_count(&self, port: usize, value: &Yaml, count: usize, report: &mut Report) {
        let Some((op, input)) = self.input(port) else { return };
        if count > 1 && !input.many {
            let message = format!("the input `{}` of `{}` takes one edge, found {count}", input.name, op.name);
            report.error(value.span, message).label("expected one");
        }
        if count == 0 && matches!(&value.content, Content::Sequence(items) if items.is_empty()) && input.required {
            report.error(value.span, format!("the input `{}` of `{}` needs an edge", input.name, op.name));
        }
    }

    fn check_duplicate(&self, wire: &Wire, wires: &[Wire], report: &mut Report) {
        let same = |other: &&Wire| {
            (other.from_node, other.from_port, other.to_port) == (wire.from_node, wire.from_port, wire.to_port)
        };
        if let Some(first) = wires.iter().find(same) {
            let from = &self.drafts[wire.from_node];
            let note = format!("the first one is at {}", report.place(first.span));
            report
                .error(wire.span, format!("`{}.{}` is connected twice", from.name, from.outputs()[wire.from_port].name))
                .note(note);
        }
    }

    fn check_required(&self, written: &[usize], report: &mut Report) {
        let draft = &self.drafts[self.consumer];
        let Some(op) = &draft.op else { return };
        for (index, input) in op.inputs.iter().enumerate() {
            if input.required && !written.contains(&index) {
                let span = draft.input.as_ref().map_or(draft.span, |input| input.key_span);
                let message = format!("the input `{}` of `{}` ({}) is not connected", input.name, draft.name, op.name);
                let diagnostic = report.error(span, message).label(format!("needs {}", types(input.types)));
                if let Some(candidates) = self.candidates(input) {
                    diagnostic.help(candidates);
                }
            }
        }
    }
}

/// The sources written for one input: a name, a `{from, feedback}`, or a list of these.
fn sources<'y>(value: &'y Yaml, report: &mut Report) -> Vec<Source<'y>> {
    match &value.content {
        Content::Sequence(items) => items.iter().filter_map(|item| source(item, report)).collect(),
        _ => source(value, report).into_iter().collect(),
    }
}

fn source<'y>(value: &'y Yaml, report: &mut Report) -> Option<Source<'y>> {
    match &value.content {
        Content::Scalar(Value::String(_)) => Some(Source { reference: value, feedback: None }),
        Content::Invalid => None,
        Content::Mapping(_) => {
            check_keys(value, &["from", "feedback"], "this connection", report);
            let feedback = value.get("feedback").and_then(|entry| read_feedback(entry, report));
            let Some(from) = value.get("from") else {
                report.error(value.span, "this connection has no `from`").label("needs `from`: a node");
                return None;
            };
            if from.value.as_str().is_none() {
                if !from.value.is_invalid() {
                    let message = format!("`from` is `node` or `node.port`, found {}", from.value.found());
                    blame(report, &from.value, message);
                }
                return None;
            }
            Some(Source { reference: &from.value, feedback })
        }
        _ => {
            blame(report, value, format!("a connection is `node` or `node.port`, found {}", value.found()));
            None
        }
    }
}

/// `{max_staleness: N}`. A broken one still marks the edge, so that its cycle is not reported as well.
fn read_feedback(entry: &Entry, report: &mut Report) -> Option<Feedback> {
    let broken = Some(Feedback { max_staleness: 0 });
    if entry.value.is_invalid() {
        return broken;
    }
    if !matches!(entry.value.content, Content::Mapping(_)) {
        report
            .error(entry.value.span, format!("`feedback` is a mapping, found {}", entry.value.found()))
            .help("write `feedback: {max_staleness: 0}`");
        return broken;
    }
    check_keys(&entry.value, &["max_staleness"], "`feedback`", report);
    let Some(staleness) = entry.value.get("max_staleness") else {
        report
            .error(entry.key_span, "`feedback` has no `max_staleness`")
            .label("needs `max_staleness`: steps the consumer may run ahead");
        return broken;
    };
    match &staleness.value.content {
        Content::Scalar(Value::Number(number)) if number.is_u64() => {
            let max_staleness = number.as_u64().unwrap_or_default();
            if max_staleness > Feedback::MAX_STALENESS {
                let most = Feedback::MAX_STALENESS;
                let message = format!("`max_staleness` is at most {most} steps, found {max_staleness}");
                blame(report, &staleness.value, message);
                return broken;
            }
            Some(Feedback { max_staleness })
        }
        Content::Invalid => broken,
        _ => {
            let message = format!("`max_staleness` is a number of steps, found {}", staleness.value.found());
            blame(report, &staleness.value, message).label("expected an integer, 0 or more");
            broken
        }
    }
}
