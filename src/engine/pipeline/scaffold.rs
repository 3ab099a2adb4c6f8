//! A first pipeline of given operators: wired by the types of their ports, with the settings of their examples.

use std::sync::Arc;

use serde_yaml::{Mapping, Value};

use super::suggest::closest;
use crate::operator::{Connections, OperatorSpec, PortSpec, Registry, Source};
use crate::record::PortType;

/// A pipeline with these operators, in this order, and with those that they need to have every input connected.
///
/// An input reads the nearest node before it that emits what it takes, or else the last one after it; what leads
/// back to an earlier node within a cycle becomes feedback. Readers are added for what nothing reads, and sinks for models
/// that are trained and for metrics.
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
    draft.add_readers()?;
    draft.add_sinks()?;
    draft.mark_feedback();
    draft.to_text().map_err(|error| error.to_string())
}

/// A pipeline that is being put together.
pub(super) struct Draft<'r> {
    pub nodes: Vec<Node>,
    registry: &'r Registry,
}

pub(super) struct Node {
    pub name: String,
    pub spec: Arc<OperatorSpec>,
    pub wires: Vec<Wire>,
    connected: bool,
}

pub(super) struct Wire {
    pub input: &'static str,
    pub from: String,
    pub output: &'static str,
    pub feedback: bool,
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
                if self.nodes[self.position(&name)].wires.iter().any(|wire| wire.input == input.name) {
                    continue;
                }
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
                // What is nearest; sinks that take all there is are connected once all is there.
                let nearest = emitters.into_iter().next().filter(|_| !gathers(&spec));
                let Some((from, output)) = nearest else { continue };
                let at = self.position(&name);
                self.nodes[at].wires.push(Wire { input: input.name, from, output, feedback: false });
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

    /// Where a node stands.
    pub fn position(&self, name: &str) -> usize {
        self.nodes.iter().position(|node| node.name == name).unwrap_or(0)
    }

    /// Nodes that emit what the input of a node takes, the best first, each with its first such output.
    fn emitters(&self, consumer: &str, input: &PortSpec) -> Vec<(String, &'static str)> {
        let at = self.position(consumer);
        let (before, after) = self.nodes.split_at(at);
        // Nodes that hand on what they take would go round in a circle, with nothing to begin with.
        let has =
            |ports: &[PortSpec]| ports.iter().any(|port| port.types.iter().any(|kind| input.types.contains(kind)));
        let hands_on = |node: &Node| has(node.spec.inputs) && has(node.spec.outputs);
        let later = after.iter().skip(1).rev().filter(|node| !(hands_on(&self.nodes[at]) && hands_on(node)));
        let nearest = before.iter().rev().chain(later);
        let all = nearest.filter_map(|node| Some((node.name.clone(), self.fitting(node, input)?)));
        // Inputs are different things: where one reads from is no place for another.
        let taken = |name: &str| self.nodes[at].wires.iter().any(|wire| wire.from == name);
        all.filter(|(name, _)| !taken(name)).collect()
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
    pub fn carried(&self, node: &Node, output: &PortSpec) -> Vec<PortType> {
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

    /// Give every node a reader that makes something; what a sink takes needs none.
    fn add_readers(&mut self) -> Result<(), String> {
        while let Some((spec, wire)) = self.nodes.iter().find_map(|node| self.reader_to_add(node)) {
            let mut node = self.node(&spec);
            node.wires.push(wire);
            self.nodes.push(node);
            self.connect_all()?;
        }
        Ok(())
    }

    /// The simplest operator that reads a node's records, where nothing does and no sink can, and the edge between them.
    fn reader_to_add(&self, node: &Node) -> Option<(Arc<OperatorSpec>, Wire)> {
        let unread = self.unread(node);
        let takes = |spec: &OperatorSpec, kind: PortType| spec.inputs.iter().any(|input| input.types.contains(&kind));
        let kept = |kind: PortType| {
            let mut sinks = self.registry.iter().filter(|spec| spec.outputs.is_empty());
            kind != PortType::Metrics && sinks.any(|sink| takes(sink, kind))
        };
        if unread.is_empty() || unread.iter().any(|kind| kept(*kind)) {
            return None;
        }
        let required = |spec: &OperatorSpec| spec.inputs.iter().filter(|input| input.required).count();
        let reads = |spec: &OperatorSpec| spec.inputs.first().is_some_and(|input| self.fitting(node, input).is_some());
        let makes = |spec: &OperatorSpec| {
            let mut made = spec.outputs.iter().filter(|output| output.follows.is_none());
            made.any(|output| output.types.iter().any(|kind| kept(*kind)))
        };
        let able = self.registry.iter().filter(|spec| reads(spec) && makes(spec));
        let spec = able.min_by_key(|spec| required(spec))?.clone();
        let input = spec.inputs.first()?;
        let output = self.fitting(node, input)?;
        Some((spec, Wire { input: input.name, from: node.name.clone(), output, feedback: false }))
    }

    /// What a node's outputs carry, metrics aside, where nothing reads any of it.
    fn unread(&self, node: &Node) -> Vec<PortType> {
        let outputs = || node.spec.outputs.iter().filter(|output| output.types != [PortType::Metrics]);
        let is_read = |output: &PortSpec| {
            let mut wires = self.nodes.iter().flat_map(|other| &other.wires);
            wires.any(|wire| wire.from == node.name && wire.output == output.name)
        };
        if outputs().any(is_read) {
            return Vec::new();
        }
        outputs().flat_map(|output| self.carried(node, output)).collect()
    }

    /// Add a sink for records that nothing reads, for each model that is trained, and for metrics.
    fn add_sinks(&mut self) -> Result<(), String> {
        let names: Vec<String> = self.nodes.iter().map(|node| node.name.clone()).collect();
        for name in &names {
            let unread = self.unread(&self.nodes[self.position(name)]);
            self.add_sink(name, &unread);
        }
        for name in &names {
            if self.is_learner(&self.nodes[self.position(name)]) && !self.is_written(name, &mut Vec::new()) {
                self.add_sink(name, &[PortType::Weights]);
            }
        }
        if let Some(emitter) = self.nodes.iter().find(|node| node.spec.outputs.iter().any(is_metrics)) {
            let name = emitter.name.clone();
            self.add_sink(&name, &[PortType::Metrics]);
        }
        self.gather();
        Ok(())
    }

    /// Connect a sink with a node: one that gathers, which may be there, or one of its own.
    fn add_sink(&mut self, name: &str, kinds: &[PortType]) {
        let fits = |input: &PortSpec| kinds.iter().any(|kind| input.types.contains(kind));
        let sinks = || self.registry.iter().filter(|spec| spec.outputs.is_empty() && spec.inputs.iter().any(fits));
        if sinks().any(|sink| gathers(sink) && self.nodes.iter().any(|node| node.spec.name == sink.name)) {
            return;
        }
        let Some(spec) = sinks().next().cloned() else { return };
        let mut sink = Node { connected: true, ..self.node(&spec) };
        if !gathers(&spec) {
            let from = &self.nodes[self.position(name)];
            let wire = spec.inputs.iter().find_map(|input| Some((input.name, self.fitting(from, input)?)));
            let wire = wire.map(|(input, output)| Wire { input, from: name.to_owned(), output, feedback: false });
            sink.wires.extend(wire);
        }
        self.nodes.push(sink);
    }

    /// Connect the sinks that take all there is. Of a source, that is what is used of it; what a
    /// sink would refuse beside the others stays out.
    fn gather(&mut self) {
        for index in 0..self.nodes.len() {
            let spec = self.nodes[index].spec.clone();
            if !gathers(&spec) {
                continue;
            }
            let name = self.nodes[index].name.clone();
            for input in spec.inputs {
                let all = self.emitters(&name, input);
                let is_used = |(name, output): &&(String, &'static str)| {
                    let node = &self.nodes[self.position(name)];
                    let mut wires = self.nodes.iter().flat_map(|other| &other.wires);
                    !node.spec.inputs.is_empty()
                        || !self.unread(node).is_empty()
                        || wires.any(|wire| wire.from == *name && wire.output == *output)
                };
                let used: Vec<_> = all.iter().filter(is_used).cloned().collect();
                let mut emitters = if used.is_empty() { all } else { used };
                let mut connections = Connections::default();
                emitters.retain(|(name, _)| {
                    let op = self.nodes[self.position(name)].spec.name;
                    connections.sources.push(Source { input: input.name, node: name.clone(), op });
                    let fits = (spec.check_connections)(&Mapping::new().into(), &connections).is_empty();
                    if !fits {
                        connections.sources.pop();
                    }
                    fits
                });
                let wire = |(from, output)| Wire { input: input.name, from, output, feedback: false };
                self.nodes[index].wires.extend(emitters.into_iter().map(wire));
            }
        }
    }

    fn is_learner(&self, node: &Node) -> bool {
        let weights = |ports: &[PortSpec]| ports.iter().any(|port| port.types.contains(&PortType::Weights));
        weights(node.spec.outputs) && !weights(node.spec.inputs)
    }

    /// Whether a node's weights lead to a sink.
    fn is_written(&self, name: &str, seen: &mut Vec<String>) -> bool {
        if seen.iter().any(|other| other == name) {
            return false;
        }
        seen.push(name.to_owned());
        let from = &self.nodes[self.position(name)];
        let carries = |wire: &Wire| {
            let mut outputs = from.spec.outputs.iter().filter(|output| output.name == wire.output);
            wire.from == name && outputs.any(|output| output.types.contains(&PortType::Weights))
        };
        let readers = self.nodes.iter().filter(|node| node.wires.iter().any(carries));
        readers.into_iter().any(|node| node.spec.outputs.is_empty() || self.is_written(&node.name, seen))
    }
}

/// Whether it is a sink that takes all that there is of some type.
fn gathers(spec: &OperatorSpec) -> bool {
    spec.outputs.is_empty() && spec.inputs.iter().all(|input| input.many)
}

fn is_metrics(output: &PortSpec) -> bool {
    output.types == [PortType::Metrics]
}

/// An operator's first output that an input can take, whatever it is connected with.
fn fitting(spec: &OperatorSpec, input: &PortSpec) -> Option<&'static str> {
    let fits = |output: &&PortSpec| output.types.iter().all(|kind| input.types.contains(kind));
    spec.outputs.iter().find(fits).map(|output| output.name)
}
