//! What is legal and still looks like a mistake.

use super::diagnostic::Report;
use super::order::leading_to;
use super::suggest::join_or;
use super::wiring::Draft;
use crate::operator::{PortSpec, Registry};
use crate::record::PortType;

/// For a pipeline without errors: warn of feedback marks that close no cycle, of work that reaches no sink, of nodes that are
/// read for their metrics alone, of metrics that are left out where others are written, and of models that are trained and
/// not kept.
pub(crate) fn check(drafts: &[Draft], registry: &Registry, report: &mut Report) {
    report_idle_feedback(drafts, report);
    report_lost_work(drafts, report);
    report_lost_records(drafts, registry, report);
    report_lost_metrics(drafts, report);
    report_lost_models(drafts, registry, report);
    report.set_context(&[]);
}

fn report_idle_feedback(drafts: &[Draft], report: &mut Report) {
    for (reader, draft) in drafts.iter().enumerate() {
        report.set_context(&draft.uses);
        for wire in &draft.wires {
            let Some(feedback) = wire.feedback else { continue };
            if !leading_to(vec![wire.from_node], drafts)[reader] {
                let steps = feedback.max_staleness + 1;
                let unit = if steps == 1 { "step" } else { "steps" };
                report
                    .warning(wire.span, "this `feedback` edge closes no cycle")
                    .label(format!("arrives {steps} {unit} late all the same"))
                    .help("leave `feedback` out unless the delay is meant");
            }
        }
    }
}

/// A sink is a node without outputs: what reaches none of them is computed for nothing.
fn report_lost_work(drafts: &[Draft], report: &mut Report) {
    let sinks: Vec<usize> = (0..drafts.len()).filter(|index| drafts[*index].outputs().is_empty()).collect();
    report.set_context(&[]);
    if sinks.is_empty() {
        if let Some(first) = drafts.first() {
            report
                .warning(first.span, "the pipeline has no sink: nothing that it computes is kept")
                .help("add a node that writes, such as one with `op: metrics_sink`");
        }
        return;
    }
    let useful = leading_to(sinks, drafts);
    for (index, draft) in drafts.iter().enumerate().filter(|(index, _)| !useful[*index]) {
        report.set_context(&draft.uses);
        let read = drafts.iter().any(|other| other.wires.iter().any(|wire| wire.from_node == index));
        if read {
            report.warning(draft.span, format!("`{}` reaches no sink: what it computes is lost", draft.name));
        } else {
            report.warning(draft.span, format!("nothing reads what `{}` emits", draft.name));
        }
    }
}

/// A node is there for what it makes. Where only its metrics are read, what they are about goes nowhere.
fn report_lost_records(drafts: &[Draft], registry: &Registry, report: &mut Report) {
    for (index, draft) in drafts.iter().enumerate() {
        let records: Vec<&PortSpec> = draft.outputs().iter().filter(|output| !carries_metrics(output)).collect();
        let read = read_outputs(index, drafts);
        // Of a node that nobody reads at all, and of models that nobody writes, more is told elsewhere.
        let told = read.is_empty() || (learns(draft) && !weights_writers(registry).is_empty());
        if records.is_empty() || told || records.iter().any(|output| read.contains(&output.name)) {
            continue;
        }
        let names: Vec<String> = records.iter().map(|output| format!("`{}.{}`", draft.name, output.name)).collect();
        report.set_context(&draft.uses);
        report.warning(draft.span, format!("nothing reads {}", join_or(&names))).label("only its metrics are read");
    }
}

/// The outputs of a node that others read.
fn read_outputs(index: usize, drafts: &[Draft]) -> Vec<&'static str> {
    let wires = drafts.iter().flat_map(|other| &other.wires).filter(|wire| wire.from_node == index);
    wires.map(|wire| drafts[index].outputs()[wire.from_port].name).collect()
}

/// Many outputs are there for those who want them. But where a sink gathers metrics, one that it lacks was forgotten.
fn report_lost_metrics(drafts: &[Draft], report: &mut Report) {
    let gathers = |draft: &Draft| {
        draft.outputs().is_empty()
            && draft.op.as_ref().is_some_and(|op| op.inputs.iter().any(|port| port.many && carries_metrics(port)))
    };
    let Some(sink) = drafts.iter().find(|draft| gathers(draft)) else { return };
    for (index, draft) in drafts.iter().enumerate() {
        let read = |port: usize| {
            let mut wires = drafts.iter().flat_map(|other| &other.wires);
            wires.any(|wire| (wire.from_node, wire.from_port) == (index, port))
        };
        // Of a node that nobody reads at all, that has been said.
        if (0..draft.outputs().len()).all(|port| !read(port)) {
            continue;
        }
        for (port, output) in draft.outputs().iter().enumerate().filter(|(_, output)| carries_metrics(output)) {
            if !read(port) {
                report.set_context(&draft.uses);
                report
                    .warning(draft.span, format!("nothing reads `{}.{}`", draft.name, output.name))
                    .help(format!("add it to what `{}` reads", sink.name));
            }
        }
    }
}

fn carries_metrics(port: &PortSpec) -> bool {
    port.types == [PortType::Metrics]
}

/// A learner makes weights out of something else. Where no sink takes them, or what is made of them, they end with the run.
fn report_lost_models(drafts: &[Draft], registry: &Registry, report: &mut Report) {
    let writers = weights_writers(registry);
    let Some(writer) = writers.first() else { return };
    for (index, draft) in drafts.iter().enumerate() {
        if learns(draft) && !is_written(index, drafts, &mut Vec::new()) {
            report.set_context(&draft.uses);
            report
                .warning(draft.span, format!("no node writes the model that `{}` trains", draft.name))
                .help(format!("add a node with `op: {writer}` that reads its weights"));
        }
    }
}

fn carry_weights(ports: &[PortSpec]) -> bool {
    ports.iter().any(|port| port.types.contains(&PortType::Weights))
}

/// The operators that keep weights for good.
fn weights_writers(registry: &Registry) -> Vec<&'static str> {
    registry.iter().filter(|op| op.outputs.is_empty() && carry_weights(op.inputs)).map(|op| op.name).collect()
}

fn learns(draft: &Draft) -> bool {
    carry_weights(draft.outputs()) && draft.op.as_ref().is_some_and(|op| !carry_weights(op.inputs))
}

/// Whether weights lead from a node to a sink.
fn is_written(from: usize, drafts: &[Draft], seen: &mut Vec<usize>) -> bool {
    if seen.contains(&from) {
        return false;
    }
    seen.push(from);
    let carries_weights = |port: usize| drafts[from].outputs()[port].types.contains(&PortType::Weights);
    drafts.iter().enumerate().any(|(reader, draft)| {
        draft.wires.iter().any(|wire| wire.from_node == from && carries_weights(wire.from_port))
            && (draft.outputs().is_empty() || is_written(reader, drafts, seen))
    })
}
