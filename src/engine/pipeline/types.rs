//! Types of edges: what outputs carry, and whether that fits where it arrives.

use std::collections::HashSet;

use serde_yaml::Value;

use super::config::{contains_invalid, report_issues};
use super::diagnostic::Report;
use super::schema::blame;
use super::suggest::join_or;
use super::wiring::{Connector, Draft, Wire};
use crate::operator::{Connections, PortSpec, Source};
use crate::record::PortType;

/// What an output carries: its own type, or the types of what arrives at the input that it follows; nothing where
/// that is not connected, or only with itself.
pub(crate) fn carried(drafts: &[Draft], node: usize, port: usize) -> Vec<PortType> {
    let (mut found, mut seen, mut waiting) = (Vec::new(), HashSet::new(), vec![(node, port)]);
    let allowed = drafts[node].outputs()[port].types;
    while let Some((node, port)) = waiting.pop() {
        if !seen.insert((node, port)) {
            continue;
        }
        let draft = &drafts[node];
        let output = &draft.outputs()[port];
        let Some(input) = output.follows else {
            found.extend(output.types.iter().copied().filter(|kind| allowed.contains(kind)));
            continue;
        };
        let followed = draft.op.as_ref().and_then(|op| op.inputs.iter().position(|port| port.name == input));
        let wires = draft.wires.iter().filter(|wire| Some(wire.to_port) == followed);
        waiting.extend(wires.map(|wire| (wire.from_node, wire.from_port)));
    }
    found.sort_by_key(|kind| allowed.iter().position(|other| other == kind));
    found.dedup();
    found
}

/// Ask every operator what it says to what it is connected with, where what it is connected with is known.
pub(crate) fn check_connections(drafts: &[Draft], report: &mut Report) {
    // Where some node's inputs are not understood, they may be any outputs.
    let all_known = drafts.iter().all(|draft| draft.op.is_some() && draft.wiring_is_valid && has_whole_input(draft));
    for (index, draft) in drafts.iter().enumerate() {
        let Some(op) = draft.op.as_ref().filter(|_| draft.config_is_valid && draft.wiring_is_valid) else { continue };
        let Some(connections) = connections(index, drafts).filter(|_| has_whole_input(draft)) else { continue };
        let config = draft.with.as_ref().map_or(Value::Null, |with| with.value.to_value());
        let mut issues = (op.check_connections)(&config, &connections);
        if !all_known {
            let outputs = op.outputs.iter().map(|output| output.name).collect();
            let with_all = (op.check_connections)(&config, &Connections { outputs, ..connections });
            issues.retain(|issue| with_all.contains(issue));
        }
        report.set_context(&draft.uses);
        report_issues(draft, issues, report);
    }
    report.set_context(&[]);
}

fn has_whole_input(draft: &Draft) -> bool {
    draft.input.as_ref().is_none_or(|input| !contains_invalid(&input.value))
}

/// What a node is connected with; None where it is not known what arrives.
fn connections(index: usize, drafts: &[Draft]) -> Option<Connections> {
    let draft = &drafts[index];
    let op = draft.op.as_ref()?;
    let readers = drafts.iter().flat_map(|other| &other.wires).filter(|wire| wire.from_node == index);
    let mut connections = Connections { node: draft.name.clone(), ..Connections::default() };
    connections.outputs.extend(readers.map(|wire| op.outputs[wire.from_port].name));
    connections.outputs.sort_unstable();
    connections.outputs.dedup();
    for wire in &draft.wires {
        let carried = carried(drafts, wire.from_node, wire.from_port);
        if carried.is_empty() {
            return None;
        }
        let (input, from) = (op.inputs[wire.to_port].name, &drafts[wire.from_node]);
        connections.inputs.extend(carried.into_iter().map(|kind| (input, kind)));
        let source = from.op.as_ref().map(|op| Source { input, node: from.name.clone(), op: op.name });
        connections.sources.extend(source);
    }
    Some(connections)
}

impl Connector<'_> {
    /// Report what arrives at the node and does not fit there.
    pub fn check_types(&self, report: &mut Report) {
        let draft = &self.drafts[self.consumer];
        for wire in &draft.wires {
            self.check_type(wire, report);
        }
        let followed = draft.outputs().iter().filter_map(|output| output.follows);
        for input in followed.filter_map(|name| draft.op.as_ref()?.inputs.iter().position(|port| port.name == name)) {
            self.check_one_type(input, report);
        }
    }

    fn check_type(&self, wire: &Wire, report: &mut Report) {
        let Some((op, input)) = self.input(wire.to_port) else { return };
        let from = &self.drafts[wire.from_node];
        let carried = carried(self.drafts, wire.from_node, wire.from_port);
        let output = &from.outputs()[wire.from_port];
        // Several types are an error of the node that emits them.
        let unclear = output.follows.is_some() && carried.len() > 1;
        if unclear || carried.iter().all(|kind| input.types.contains(kind)) {
            return;
        }
        let expected = types(input.types);
        let message = format!(
            "`{}.{}` carries {}, but the input `{}` of `{}` takes {expected}",
            from.name,
            output.name,
            types(&carried),
            input.name,
            op.name,
        );
        let diagnostic = blame(report, &wire.reference, message).label(format!("expected {expected}"));
        if let Some(candidates) = self.candidates(input) {
            diagnostic.help(candidates);
        }
    }

    /// An output has the type of what arrives at this input: report where that is several, or none at all.
    fn check_one_type(&self, port: usize, report: &mut Report) {
        let Some((op, input)) = self.input(port) else { return };
        let wires = || self.drafts[self.consumer].wires.iter().filter(|wire| wire.to_port == port);
        let mut arriving: Vec<PortType> = Vec::new();
        for wire in wires() {
            let carried = carried(self.drafts, wire.from_node, wire.from_port);
            if let (Some(first), Some(other)) = (arriving.first(), carried.iter().find(|kind| !arriving.contains(kind)))
            {
                let message = format!(
                    "the input `{}` of `{}` takes records of one type, found {first} and {other}",
                    input.name, op.name
                );
                blame(report, &wire.reference, message).label(format!("expected {first}, as before"));
                return;
            }
            arriving.extend(carried);
        }
        if let Some(wire) = wires().next().filter(|_| arriving.is_empty() && !report.has_errors()) {
            let message = format!("nothing tells what arrives at the input `{}` of `{}`", input.name, op.name);
            blame(report, &wire.reference, message).label("goes round in a circle");
        }
    }

    /// Outputs in the pipeline that the input could take.
    pub fn candidates(&self, input: &PortSpec) -> Option<String> {
        let others = self.drafts.iter().enumerate().filter(|(index, _)| *index != self.consumer);
        let names: Vec<String> = others
            .flat_map(|(index, draft)| {
                let fits = move |port: usize| {
                    let carried = carried(self.drafts, index, port);
                    !carried.is_empty() && carried.iter().all(|kind| input.types.contains(kind))
                };
                let fitting = draft.outputs().iter().enumerate().filter(move |(port, _)| fits(*port));
                fitting.map(|(_, output)| format!("`{}.{}`", draft.name, output.name))
            })
            .collect();
        let carry = if names.len() == 1 { "carries" } else { "carry" };
        (!names.is_empty())
            .then(|| format!("{} {carry} {}", join_or(&names).replace(" or ", " and "), types(input.types)))
    }
}

/// Types in words.
pub(crate) fn types(types: &[PortType]) -> String {
    join_or(&types.iter().map(PortType::to_string).collect::<Vec<_>>())
}
