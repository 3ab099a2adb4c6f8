//! A first pipeline of given operators: wired by the types of their ports, with the settings of their examples.

use std::sync::Arc;

use serde_yaml::{Mapping, Value};

use super::suggest::closest;
use crate::operator::{Connections, OperatorSpec, PortSpec, Registry, Source};
use crate::record::PortType;

/// A pipeline with these operators, in this order, and with those that they need to have every input connected.
///
/// An input reads the nearest node before it that emits what it takes, or else the last one after it; what leads
/// back to an earlier node within a cycle becomes feedback. Sinks are added for what nothing reads.
///
/// # Errors
/// When there is no operator of a name, or nothing that emits what one needs.
pub fn scaffold(operators: &[String], registry: &Registry) -> Result<String, String> {
    let mut draft = Draft { nodes: Vec::new(), registry };
    for name in operators {
        let Some(spec) = registry.get(name) else {
            let near = closest(name, registry.iter().map(|spec| spec.name));
            let hint = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
            return Err(format!("there is no operator `{name}`{hint}"));
        };
        let node = draft.node(spec);
        draft.nodes.push(node);
    }
    draft.connect_all()?;
    draft.add_sinks()?;
    draft.mark_feedback();
    draft.to_text().map_err(|error| error.to_string())
}

struct Draft<'r> {
    nodes: Vec<Node>,
    registry: &'r Registry,
}

struct Node {
    name: String,
    spec: Arc<OperatorSpec>,
    wires: Vec<Wire>,
    connected: bool,
}

struct Wire {
    input: &'static str,
    from: String,
    output: &'static str,
    feedback: bool,
}

impl Draft<'_> {
    fn node(&self, spec: &Arc<OperatorSpec>) -> Node {
        let same = self.nodes.iter().filter(|node| node.spec.name == spec.name).count();
        let name = if same == 0 { spec.name.to_owned() } else { format!("{}_{}", spec.name, same + 1) };
        Node { name, spec: spec.clone(), wires: Vec::new(), connected: false }
    }

    fn connect_all(&mut self) -> Result<(), String> {
        while let Some(index) = self.nodes.iter().position(|node| !node.connected) {
            self.nodes[index].connected = true;
            let (name, spec) = (self.nodes[index].name.clone(), self.nodes[index].spec.clone());
            for input in spec.inputs.iter().filter(|input| input.required) {
                let input = &self.narrowed(&spec, input);
                let mut emitters = self.emitters(&name, input);
                if emitters.is_empty() {
                    let added = self.emitter_to_add(input).ok_or_else(|| {
                        format!("nothing emits what the input `{}` of `{}` takes", input.name, spec.name)
                    })?;
                    let at = self.place_to_add(&name, input);
                    let node = self.node(&added);
                    self.nodes.insert(at, node);
                    emitters = self.emitters(&name, input);
                }
                // A sink takes all there is, others what is nearest.
                let all = input.many && spec.outputs.is_empty();
                emitters.truncate(if all { usize::MAX } else { 1 });
                for (from, output) in emitters {
                    let at = self.position(&name);
                    self.nodes[at].wires.push(Wire { input: input.name, from, output, feedback: false });
                }
            }
        }
        Ok(())
    }

    /// An input that decides what its operator emits, of the one type that arrives there in the operator's example: the
    /// example's settings may be for records of that type.
    fn narrowed(&self, spec: &OperatorSpec, input: &PortSpec) -> PortSpec {
        let decides = spec.outputs.iter().any(|output| output.follows == Some(input.name));
        let kind = if decides { self.example_type(spec, input) } else { None };
        let only = |kind: PortType| input.types.iter().position(|other| *other == kind);
        PortSpec { types: kind.and_then(only).map_or(input.types, |at| &input.types[at..=at]), ..*input }
    }

    /// What arrives at an input in the operator's own example.
    fn example_type(&self, spec: &OperatorSpec, input: &PortSpec) -> Option<PortType> {
        let example: Mapping = serde_yaml::from_str(spec.example).ok()?;
        let node = example.values().find(|node| node["op"] == spec.name)?;
        let reference = match &node["in"] {
            Value::Mapping(ports) => ports.get(input.name)?,
            Value::Sequence(several) => several.first()?,
            only => only,
        };
        let (from, port) = match reference.as_str()?.split_once('.') {
            Some((from, port)) => (from, Some(port)),
            None => (reference.as_str()?, None),
        };
        let emitter = self.registry.get(example.get(from)?["op"].as_str()?)?;
        let output = emitter.outputs.iter().find(|output| port.is_none_or(|port| port == output.name))?;
        output.types.first().copied().filter(|_| output.follows.is_none())
    }

    fn position(&self, name: &str) -> usize {
        self.nodes.iter().position(|node| node.name == name).unwrap_or(0)
    }

    /// Nodes that emit what the input of a node takes, the best first, each with its first such output.
    fn emitters(&self, consumer: &str, input: &PortSpec) -> Vec<(String, &'static str)> {
        let at = self.position(consumer);
        let (before, after) = self.nodes.split_at(at);
        let nearest = before.iter().rev().chain(after.iter().skip(1).rev());
        nearest.filter_map(|node| Some((node.name.clone(), self.fitting(node, input)?))).collect()
    }

    /// A node's first output that an input can take.
    fn fitting(&self, node: &Node, input: &PortSpec) -> Option<&'static str> {
        let fits = |output: &&PortSpec| {
            let carried = self.carried(node, output);
            !carried.is_empty() && carried.iter().all(|kind| input.types.contains(kind))
        };
        node.spec.outputs.iter().find(fits).map(|output| output.name)
    }

    /// What an output carries; nothing where it has the type of an input that is not connected yet.
    fn carried(&self, node: &Node, output: &PortSpec) -> Vec<PortType> {
        let Some(input) = output.follows else { return output.types.to_vec() };
        let Some(wire) = node.wires.iter().find(|wire| wire.input == input) else { return Vec::new() };
        // Connected to a node that was connected before, so that this comes to an end.
        let emitter = &self.nodes[self.position(&wire.from)];
        let port = emitter.spec.outputs.iter().find(|port| port.name == wire.output);
        port.map_or_else(Vec::new, |port| self.carried(emitter, port))
    }

    /// The simplest operator that emits what an input takes and does not itself need that.
    fn emitter_to_add(&self, input: &PortSpec) -> Option<Arc<OperatorSpec>> {
        let required = |spec: &OperatorSpec| spec.inputs.iter().filter(|input| input.required).count();
        let needs_it =
            |spec: &OperatorSpec| spec.inputs.iter().any(|other| other.types.iter().any(|t| input.types.contains(t)));
        let able = self.registry.iter().filter(|spec| fitting(spec, input).is_some() && !needs_it(spec));
        able.min_by_key(|spec| required(spec)).cloned()
    }

    /// Where a node goes that emits what a node's input takes: before it; but where that is weights, and they are there to make
    /// data with, behind all that handles these, for it learns from what comes out.
    fn place_to_add(&self, name: &str, input: &PortSpec) -> usize {
        let at = self.position(name);
        let is_data = |kind: &PortType| !matches!(kind, PortType::Weights | PortType::Metrics);
        let makes_data = self.nodes[at].spec.outputs.iter().any(|output| output.types.iter().any(is_data));
        if !input.types.contains(&PortType::Weights) || !makes_data {
            return at;
        }
        self.nodes.iter().rposition(|node| !node.spec.outputs.is_empty()).map_or(at, |last| last + 1)
    }

    /// Mark what leads back to an earlier node within a cycle: every cycle has such an edge.
    fn mark_feedback(&mut self) {
        for index in 0..self.nodes.len() {
            for wire in 0..self.nodes[index].wires.len() {
                let from = &self.nodes[index].wires[wire].from;
                let marked = self.position(from) > index && self.reaches(&self.nodes[index].name, from);
                self.nodes[index].wires[wire].feedback = marked;
            }
        }
    }

    /// Whether what `from` emits reaches `to`.
    fn reaches(&self, from: &str, to: &str) -> bool {
        let mut waiting = vec![to];
        let mut seen: Vec<&str> = Vec::new();
        while let Some(name) = waiting.pop() {
            if name == from {
                return true;
            }
            if !seen.contains(&name) {
                seen.push(name);
                let wires = &self.nodes[self.position(name)].wires;
                waiting.extend(wires.iter().map(|wire| wire.from.as_str()));
            }
        }
        false
    }

    fn add_sinks(&mut self) -> Result<(), String> {
        let is_read = |node: &Node| self.nodes.iter().any(|other| other.wires.iter().any(|w| w.from == node.name));
        let unread: Vec<Vec<PortType>> = self
            .nodes
            .iter()
            .filter(|node| !node.spec.outputs.is_empty() && !is_read(node))
            .map(|node| node.spec.outputs.iter().flat_map(|output| self.carried(node, output)).collect())
            .collect();
        for carried in unread {
            let takes = |sink: &&Arc<OperatorSpec>| {
                let fits = |input: &PortSpec| carried.iter().any(|kind| input.types.contains(kind));
                sink.outputs.is_empty() && sink.inputs.iter().any(fits)
            };
            let present = self.nodes.iter().any(|node| takes(&&node.spec) && node.spec.inputs.iter().all(|i| i.many));
            if let Some(sink) = self.registry.iter().find(takes).filter(|_| !present) {
                let node = self.node(sink);
                self.nodes.push(node);
                self.connect_all()?;
            }
        }
        Ok(())
    }

    /// The settings of a node in its operator's own example; or where these do not go with what the node reads, those
    /// in the example of that.
    fn settings(&self, node: &Node) -> Result<Option<Value>, serde_yaml::Error> {
        let own = example_settings(&node.spec, node.spec.example)?;
        let mut connections = Connections::default();
        let mut examples = Vec::new();
        for wire in &node.wires {
            let from = &self.nodes[self.position(&wire.from)];
            let output = from.spec.outputs.iter().find(|output| output.name == wire.output);
            let carried = output.map_or_else(Vec::new, |output| self.carried(from, output));
            connections.inputs.extend(carried.into_iter().map(|kind| (wire.input, kind)));
            connections.sources.push(Source { input: wire.input, node: from.name.clone(), op: from.spec.name });
            examples.push(from.spec.example);
        }
        let fits = |with: &Value| (node.spec.check_connections)(with, &connections).is_empty();
        if own.as_ref().is_none_or(fits) {
            return Ok(own);
        }
        for example in examples {
            if let Some(with) = example_settings(&node.spec, example)?.filter(fits) {
                return Ok(Some(with));
            }
        }
        Ok(own)
    }

    fn to_text(&self) -> Result<String, serde_yaml::Error> {
        let mut nodes = Mapping::new();
        for node in &self.nodes {
            let mut entry = Mapping::new();
            entry.insert("op".into(), node.spec.name.into());
            if !node.wires.is_empty() {
                entry.insert("in".into(), Value::Mapping(inputs(node)));
            }
            if let Some(with) = self.settings(node)? {
                entry.insert("with".into(), with);
            }
            nodes.insert(node.name.as_str().into(), Value::Mapping(entry));
        }
        let mut pipeline = Mapping::new();
        pipeline.insert("nodes".into(), Value::Mapping(nodes));
        let nodes = serde_yaml::to_string(&pipeline)?;
        Ok(format!(
            "# Settings are those of the operators' examples: set paths and sizes to yours, then `sapo-flow validate FILE`.\n\
             version: 1\n\nrun:\n  seed: 42\n  steps: 100\n\n{nodes}"
        ))
    }
}

/// An operator's first output that an input can take, whatever it is connected with.
fn fitting(spec: &OperatorSpec, input: &PortSpec) -> Option<&'static str> {
    let fits = |output: &&PortSpec| output.types.iter().all(|kind| input.types.contains(kind));
    spec.outputs.iter().find(fits).map(|output| output.name)
}

fn inputs(node: &Node) -> Mapping {
    let mut inputs = Mapping::new();
    for input in node.spec.inputs {
        let mut sources: Vec<Value> =
            node.wires.iter().filter(|wire| wire.input == input.name).map(|wire| wire.to_value()).collect();
        match sources.len() {
            0 => {}
            1 => {
                inputs.insert(input.name.into(), sources.remove(0));
            }
            _ => {
                inputs.insert(input.name.into(), Value::Sequence(sources));
            }
        }
    }
    inputs
}

impl Wire {
    fn to_value(&self) -> Value {
        let from = Value::String(format!("{}.{}", self.from, self.output));
        if !self.feedback {
            return from;
        }
        let feedback = Mapping::from_iter([("max_staleness".into(), 0.into())]);
        Value::Mapping(Mapping::from_iter([("from".into(), from), ("feedback".into(), Value::Mapping(feedback))]))
    }
}

/// The settings of an operator's node in an example.
pub(crate) fn example_settings(spec: &OperatorSpec, example: &str) -> Result<Option<Value>, serde_yaml::Error> {
    let example: Mapping = serde_yaml::from_str(example)?;
    let node = example.values().find(|node| node["op"] == spec.name);
    Ok(node.and_then(|node| node.get("with")).cloned())
}
