//! Where retractions may flow: an edge that may carry them must not end at an input that would go on as if nothing had been
//! taken back.

use super::diagnostic::Report;
use super::wiring::Draft;
use crate::operator::Retractions;

/// Report every edge that may carry retractions to an input that does not honour them.
pub(crate) fn check(drafts: &[Draft], report: &mut Report) {
    for draft in drafts {
        let Some(op) = &draft.op else { continue };
        report.set_context(&draft.uses);
        for wire in &draft.wires {
            let input = &op.inputs[wire.to_port];
            if input.retractions == Retractions::Honoured {
                continue;
            }
            let Some(origin) = origin(drafts, wire.from_node, wire.from_port) else { continue };
            let from = &drafts[wire.from_node];
            let output = from.outputs()[wire.from_port].name;
            let message = format!(
                "`{}.{output}` may take back what it emitted, but the input `{}` of `{}` ({}) cannot: it would go on with \
                 records that are no longer there",
                from.name, input.name, draft.name, op.name
            );
            let name = &drafts[origin].name;
            let takers = "operators that keep or pass on what can be taken back, such as `replay_buffer`, can";
            report.error(wire.span, message).label("may carry retractions").help(if origin == wire.from_node {
                takers.to_owned()
            } else {
                format!("the retractions come from `{name}`; {takers}")
            });
        }
    }
    report.set_context(&[]);
}

/// The node whose retractions an output may carry, if there is one.
fn origin(drafts: &[Draft], node: usize, port: usize) -> Option<usize> {
    let mut seen = vec![false; drafts.len()];
    let mut waiting = vec![(node, port)];
    while let Some((node, port)) = waiting.pop() {
        let draft = &drafts[node];
        let Some(op) = &draft.op else { continue };
        match op.outputs[port].retractions {
            Retractions::Emitted => {
                let config = draft.with.as_ref().map(|with| with.value.to_value()).unwrap_or_default();
                if (op.retracts)(&config) {
                    return Some(node);
                }
            }
            Retractions::PassedOn if !std::mem::replace(&mut seen[node], true) => {
                waiting.extend(draft.wires.iter().map(|wire| (wire.from_node, wire.from_port)));
            }
            _ => {}
        }
    }
    None
}
