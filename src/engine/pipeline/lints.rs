//! What is legal and still looks like a mistake.

use super::diagnostic::Report;
use super::order::reaches;
use super::wiring::Draft;

/// For a pipeline without errors: warn of feedback marks that close no cycle and of work that reaches no sink.
pub(crate) fn check(drafts: &[Draft], report: &mut Report) {
    report_idle_feedback(drafts, report);
    report_lost_work(drafts, report);
    report.set_context(&[]);
}

fn report_idle_feedback(drafts: &[Draft], report: &mut Report) {
    for (reader, draft) in drafts.iter().enumerate() {
        report.set_context(&draft.uses);
        for wire in &draft.wires {
            let Some(feedback) = wire.feedback else { continue };
            if !reaches(reader, wire.from_node, drafts) {
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
    for (index, draft) in drafts.iter().enumerate() {
        if sinks.iter().any(|sink| reaches(index, *sink, drafts)) {
            continue;
        }
        report.set_context(&draft.uses);
        let read = drafts.iter().any(|other| other.wires.iter().any(|wire| wire.from_node == index));
        if read {
            report.warning(draft.span, format!("`{}` reaches no sink: what it computes is lost", draft.name));
        } else {
            report.warning(draft.span, format!("nothing reads what `{}` emits", draft.name));
        }
    }
}
