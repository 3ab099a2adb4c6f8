//! What goes in and out of a composite operator: found from the nodes inside, as validation would find it at a use.

use std::sync::Arc;

use serde_yaml::Value;

use super::composite;
use super::diagnostic::{Report, Span};
use super::library::{Definition, Library};
use super::types::carried;
use super::wiring::{self, Draft};
use super::yaml::{Content, Entry, Yaml};
use crate::operator::{OperatorSpec, PortSpec, Registry};
use crate::record::PortType;

/// An input or output.
pub(crate) struct Port {
    /// Types that all its readers take, or that it carries.
    pub types: Vec<PortType>,
    /// Inputs: whether several edges may end here.
    pub many: bool,
    /// Outputs: what the outputs inside say of themselves.
    pub docs: Vec<&'static str>,
}

/// The node that uses the operator.
const USER: &str = "it";

/// What an input stands for while nobody is connected: an output of any type.
const ANY: &[PortSpec] = &[PortSpec::new(
    "records",
    &[PortType::Prompts, PortType::Samples, PortType::Pairs, PortType::Batches, PortType::Weights, PortType::Metrics],
    "what comes from outside",
)];

/// The inputs and outputs of an operator, in its order. Where something inside is wrong they have no types.
pub(crate) fn infer(
    definition: &Definition,
    library: &Library,
    registry: &Registry,
    report: &Report,
) -> (Vec<Port>, Vec<Port>) {
    let mut scratch = report.without_findings();
    let nodes = user(definition);
    let flat = composite::flatten(&nodes, library, registry, &mut scratch);
    let mut drafts: Vec<Draft> = Vec::new();
    for input in &definition.inputs {
        let outside = registry.iter().next().map(|any| Arc::new(outside(any)));
        drafts.push(Draft { op: outside, ..Draft::new(&outside_name(&input.key), input.key_span) });
    }
    for node in &flat {
        let op = node.entry.value.get("op").and_then(|op| op.value.as_str()).and_then(|op| registry.get(op)).cloned();
        let input = node.entry.value.get("in").cloned();
        drafts.push(Draft { op, input, ..Draft::new(&node.entry.key, node.entry.key_span) });
    }
    wiring::connect(&mut drafts, &mut scratch);
    let inputs = (0..definition.inputs.len()).map(|index| input(index, &drafts)).collect();
    let output = |output: &Entry| {
        let reference = text(output.key_span, format!("{USER}.{}", output.key));
        let behind = composite::outputs(&reference, &nodes, library, registry, &mut scratch);
        output_of(&behind, &drafts)
    };
    (inputs, definition.outputs.iter().map(output).collect())
}

/// What an input takes: what all who read it inside take.
fn input(index: usize, drafts: &[Draft]) -> Port {
    let readers = drafts.iter().flat_map(|draft| draft.wires.iter().map(move |wire| (draft, wire)));
    let ports = readers.filter(|(_, wire)| wire.from_node == index);
    let mut ports = ports.filter_map(|(draft, wire)| Some(&draft.op.as_ref()?.inputs[wire.to_port]));
    let Some(first) = ports.next() else { return Port { types: Vec::new(), many: false, docs: Vec::new() } };
    let mut port = Port { types: first.types.to_vec(), many: first.many, docs: Vec::new() };
    for other in ports {
        port.types.retain(|kind| other.types.contains(kind));
        port.many &= other.many;
    }
    port
}

/// What an output carries that stands for these outputs of nodes inside.
fn output_of(behind: &[Yaml], drafts: &[Draft]) -> Port {
    let mut port = Port { types: Vec::new(), many: false, docs: Vec::new() };
    for reference in behind {
        let Some((name, inner)) = reference.as_str().map(|text| text.split_once('.').unwrap_or((text, ""))) else {
            continue;
        };
        let Some(index) = drafts.iter().position(|draft| draft.name == name) else { continue };
        let outputs = drafts[index].outputs();
        let place = if inner.is_empty() { Some(0) } else { outputs.iter().position(|output| output.name == inner) };
        let Some((place, output)) = place.and_then(|place| Some((place, outputs.get(place)?))) else { continue };
        for kind in carried(drafts, index, place) {
            if !port.types.contains(&kind) {
                port.types.push(kind);
            }
        }
        if !port.docs.contains(&output.doc) {
            port.docs.push(output.doc);
        }
    }
    port
}

/// A pipeline's nodes: one, which uses the operator.
fn user(definition: &Definition) -> Yaml {
    let span = definition.span;
    let mapping = |entries: Vec<Entry>| Yaml::new(span, Content::Mapping(entries));
    let entry = |key: &str, value: Yaml| Entry { key: key.to_owned(), key_span: span, value };
    let inputs =
        definition.inputs.iter().map(|input| entry(&input.key, text(span, outside_name(&input.key)))).collect();
    let op = entry("op", text(span, definition.name.clone()));
    mapping(vec![entry(USER, mapping(vec![op, entry("in", mapping(inputs))]))])
}

/// The node that stands for what is outside. No node of a pipeline can have such a name.
fn outside_name(input: &str) -> String {
    format!("({input})")
}

fn outside(any: &OperatorSpec) -> OperatorSpec {
    OperatorSpec { name: "outside", inputs: &[], outputs: ANY, ..any.clone() }
}

fn text(span: Span, text: String) -> Yaml {
    Yaml::new(span, Content::Scalar(Value::String(text)))
}
