//! Dependency order, and the chains of cycles that no feedback edge delays.

use std::collections::VecDeque;

use super::diagnostic::Report;
use super::wiring::{Draft, Wire};

/// Indices of the nodes so that each comes after all it reads without delay; among those ready, as written.
/// None, and an error for each cycle, where there is no such order.
pub(crate) fn dependency_order(drafts: &[Draft], report: &mut Report) -> Option<Vec<usize>> {
    let mut placed = vec![false; drafts.len()];
    let mut order = Vec::with_capacity(drafts.len());
    let ready =
        |index: usize, placed: &[bool]| !placed[index] && immediate(&drafts[index]).all(|wire| placed[wire.from_node]);
    while let Some(next) = (0..drafts.len()).find(|index| ready(*index, &placed)) {
        placed[next] = true;
        order.push(next);
    }
    let mut told = vec![false; drafts.len()];
    for index in (0..drafts.len()).filter(|index| !placed[*index]) {
        if told[index] {
            continue;
        }
        if let Some(cycle) = cycle_through(index, drafts) {
            for (node, _) in &cycle {
                told[*node] = true;
            }
            report_cycle(&cycle, drafts, report);
        }
    }
    (order.len() == drafts.len()).then_some(order)
}

/// Edges that carry what their emitter does in the same step.
fn immediate(draft: &Draft) -> impl Iterator<Item = &Wire> {
    draft.wires.iter().filter(|wire| wire.feedback.is_none())
}

/// A shortest cycle through a node: each element is a node and the wire by which the next one reads it.
fn cycle_through<'d>(start: usize, drafts: &'d [Draft]) -> Option<Vec<(usize, &'d Wire)>> {
    // Breadth first along the flow; `reached` holds where each node was entered from.
    let mut reached: Vec<Option<(usize, &'d Wire)>> = drafts.iter().map(|_| None).collect();
    let mut queue = VecDeque::from([start]);
    while let Some(node) = queue.pop_front() {
        for (reader, draft) in drafts.iter().enumerate() {
            if reached[reader].is_some() {
                continue;
            }
            if let Some(wire) = immediate(draft).find(|wire| wire.from_node == node) {
                reached[reader] = Some((node, wire));
                queue.push_back(reader);
            }
        }
    }
    let mut cycle = vec![reached[start]?];
    while cycle[0].0 != start {
        let before = reached[cycle[0].0]?;
        cycle.insert(0, before);
    }
    Some(cycle)
}

fn report_cycle(cycle: &[(usize, &Wire)], drafts: &[Draft], report: &mut Report) {
    let name = |(node, wire): &(usize, &Wire)| {
        let draft = &drafts[*node];
        match draft.outputs() {
            [_] => draft.name.clone(),
            outputs => format!("{}.{}", draft.name, outputs[wire.from_port].name),
        }
    };
    let mut chain: Vec<String> = cycle.iter().map(name).collect();
    chain.push(drafts[cycle[0].0].name.clone());
    // The last edge leads back to the node written first: the one most likely meant to be delayed.
    let (last, wire) = cycle[cycle.len() - 1];
    let reader = &drafts[cycle[0].0];
    let port = reader.op.as_ref().map_or("in", |op| op.inputs[wire.to_port].name);
    let from = name(&(last, wire));
    report.set_context(&reader.uses);
    report
        .error(wire.span, format!("a cycle without `feedback`: {}", chain.join(" -> ")))
        .label("every step would wait for itself")
        .help(format!("delay one of its edges, such as `{port}: {{from: {from}, feedback: {{max_staleness: 0}}}}`"));
    report.set_context(&[]);
}

/// For each node whether what it emits can reach one of these, over edges of any kind. These themselves do.
pub(crate) fn leading_to(ends: Vec<usize>, drafts: &[Draft]) -> Vec<bool> {
    let mut leads = vec![false; drafts.len()];
    let mut stack = ends;
    while let Some(node) = stack.pop() {
        if !std::mem::replace(&mut leads[node], true) {
            stack.extend(drafts[node].wires.iter().map(|wire| wire.from_node));
        }
    }
    leads
}
