//! `sapo-flow run --dry-run`: graph, steps, parameters and memory, without loading anything heavy.

use anyhow::anyhow;
use sapo_flow_engine::Graph;
use sapo_flow_engine::graph::Dtype;
use sapo_flow_engine::plan::{self, NodePlan};
use sapo_flow_training::device;

use super::{Outcome, report, terminal, validate};

/// Tell what a run would do.
pub fn show(name: &str, graph: &Graph) -> Outcome {
    let plans = plan::plan(graph).map_err(|errors| anyhow!(errors.join("\nerror: ")))?;
    let device = device::name(device::parse(&graph.run.device)?);
    let mut text = format!("{name}: {}\n\n", validate::size(graph));
    text += &report::table(&nodes(graph));
    text += &format!("\nsteps       {}\n", steps(graph, &plans));
    text += &format!("device      {device}, computing in {}, {}\n", graph.run.dtype, weights(graph, &plans));
    text += "workers     1: a run is one process with one dataflow worker, and a thread for each node that computes\n";
    text += &parameters(graph, &plans);
    text += &memory(graph, &plans);
    for (node, plan) in graph.nodes.iter().zip(&plans) {
        for note in &plan.notes {
            text += &format!("note        {}: {note}\n", node.name);
        }
    }
    terminal::print(&text)?;
    Ok(())
}

fn nodes(graph: &Graph) -> Vec<Vec<String>> {
    let mut rows = vec![["node", "operator", "reads"].map(str::to_owned).to_vec()];
    for (index, node) in graph.nodes.iter().enumerate() {
        let edges = graph.edges.iter().filter(|edge| edge.to_node == index);
        let reads: Vec<String> = edges
            .map(|edge| {
                let from = format!("{}.{}", graph.nodes[edge.from_node].name, graph.output(edge).name);
                match edge.feedback {
                    Some(feedback) => format!("{from} (feedback, max_staleness {})", feedback.max_staleness),
                    None => from,
                }
            })
            .collect();
        rows.push(vec![node.name.clone(), node.op.name.to_owned(), reads.join(", ")]);
    }
    rows
}

fn steps(graph: &Graph, plans: &[NodePlan]) -> String {
    let per_epoch = plans.iter().filter_map(|plan| plan.steps_per_epoch).max();
    match (graph.run.steps, graph.run.epochs, per_epoch) {
        (Some(steps), _, Some(per_epoch)) => format!("{steps} (an epoch has {per_epoch})"),
        (Some(steps), _, None) => steps.to_string(),
        (None, Some(epochs), Some(per_epoch)) => {
            format!("{} ({epochs} x {per_epoch})", epochs.saturating_mul(per_epoch))
        }
        (None, epochs, None) => format!("{} epochs of unknown length", epochs.unwrap_or_default()),
        (None, None, Some(_)) => "unknown".to_owned(),
    }
}

/// Types of weights.
fn weights(graph: &Graph, plans: &[NodePlan]) -> String {
    let in_bfloat16 = |plan: &NodePlan| plan.parameters.is_some() && plan.emits.dtype == Some(Dtype::Bfloat16);
    let names: Vec<&str> = (graph.nodes.iter().zip(plans))
        .filter(|(_, plan)| in_bfloat16(plan))
        .map(|(node, _)| node.name.as_str())
        .collect();
    match names[..] {
        [] => "master weights in float32".to_owned(),
        _ => format!("master weights in float32, those of {} in bfloat16", names.join(", ")),
    }
}

fn parameters(graph: &Graph, plans: &[NodePlan]) -> String {
    let counts = graph.nodes.iter().zip(plans).filter_map(|(node, plan)| Some((&node.name, plan.parameters?)));
    let parts: Vec<String> = counts.map(|(name, count)| format!("{name} {}", report::large_number(count))).collect();
    if parts.is_empty() { String::new() } else { format!("parameters  {}\n", parts.join(", ")) }
}

/// What the program takes besides large tensors: libtorch, tokenizers, small tensors, and what oneDNN keeps of the products it
/// has made: 0.34 to 0.45 GiB after fifty steps when measured.
const PROGRAM_BYTES: u64 = 12 << 25;

/// The sum for each device, and what each node keeps, and takes while it works, the largest first.
fn memory(graph: &Graph, plans: &[NodePlan]) -> String {
    let range = |expected: u64, most: u64| match (report::bytes(expected), report::bytes(most)) {
        (expected, most) if expected == most => most,
        (expected, most) => format!("{expected}, at most {most}"),
    };
    let mut text = String::new();
    for (device, (most, expected)) in plan::peak_memory(graph, plans) {
        let program = if device == "cpu" { PROGRAM_BYTES } else { 0 };
        text += &format!("memory      {device}: about {}\n", range(expected + program, most + program));
        let nodes = graph.nodes.iter().zip(plans);
        let mut nodes: Vec<_> = nodes.filter_map(|(node, plan)| Some((&node.name, plan.memory.as_ref()?))).collect();
        nodes.retain(|(_, memory)| memory.device == device);
        nodes.sort_by_key(|(_, memory)| std::cmp::Reverse(memory.kept + memory.working));
        for (name, memory) in nodes {
            let kept = (memory.kept > 0).then(|| format!("keeps {}", report::bytes(memory.kept)));
            let working = range(memory.working_expected, memory.working);
            let working = (memory.working > 0).then(|| format!("works with {working}"));
            let parts: Vec<String> = kept.into_iter().chain(working).collect();
            text += &format!("            {name} {}\n", parts.join("; "));
        }
        text += &match program {
            0 => "            besides, CUDA's context and its libraries take what they need\n".to_owned(),
            program => format!("            the program itself takes {}\n", report::bytes(program)),
        };
    }
    if !text.is_empty() {
        text += "            (about: at the step expected to take the most, by the lengths of the data's first rows; at \
                 most: where all sequences are as long as may be)\n";
    }
    text
}
