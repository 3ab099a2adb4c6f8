//! `sapo-flow run --dry-run`: graph, steps, parameters and memory, without loading anything heavy.

use std::collections::BTreeMap;

use anyhow::anyhow;
use sapo_flow_engine::{Graph, NodePlan, PlanContext};

use super::{Outcome, report, terminal, validate};

/// Tell what a run would do.
pub fn show(name: &str, graph: &Graph) -> Outcome {
    let plans = plans(graph)?;
    let mut text = format!("{name}: {}\n\n", validate::size(graph));
    text += &report::table(&nodes(graph));
    text += &format!("\nsteps       {}\n", steps(graph, &plans));
    text += &format!(
        "device      {}, {} weights and activations\n",
        graph.run.device,
        format!("{:?}", graph.run.dtype).to_lowercase()
    );
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

/// What each node will take; all nodes that cannot tell, in one error.
fn plans(graph: &Graph) -> anyhow::Result<Vec<NodePlan>> {
    let mut errors = Vec::new();
    let mut plans = Vec::new();
    for node in &graph.nodes {
        match (node.op.plan)(&node.config, &PlanContext { node: &node.name, run: &graph.run }) {
            Ok(plan) => plans.push(plan),
            Err(error) => errors.push(format!("node `{}`: {error}", node.name)),
        }
    }
    if errors.is_empty() { Ok(plans) } else { Err(anyhow!(errors.join("\nerror: "))) }
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
        (None, Some(epochs), Some(per_epoch)) => format!("{} ({epochs} x {per_epoch})", epochs * per_epoch),
        (None, epochs, None) => format!("{} epochs of unknown length", epochs.unwrap_or_default()),
        (None, None, Some(_)) => "unknown".to_owned(),
    }
}

fn parameters(graph: &Graph, plans: &[NodePlan]) -> String {
    let counts = graph.nodes.iter().zip(plans).filter_map(|(node, plan)| Some((&node.name, plan.parameters?)));
    let parts: Vec<String> = counts.map(|(name, count)| format!("{name} {}", report::large_number(count))).collect();
    if parts.is_empty() { String::new() } else { format!("parameters  {}\n", parts.join(", ")) }
}

/// The sum for each device, and the nodes it is made of, the largest first.
fn memory(graph: &Graph, plans: &[NodePlan]) -> String {
    let mut devices: BTreeMap<&str, Vec<(u64, &str)>> = BTreeMap::new();
    for (node, plan) in graph.nodes.iter().zip(plans) {
        for (device, bytes) in &plan.peak_bytes {
            devices.entry(device).or_default().push((*bytes, &node.name));
        }
    }
    let mut text = String::new();
    for (device, mut nodes) in devices {
        nodes.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
        let total: u64 = nodes.iter().map(|(bytes, _)| bytes).sum();
        let parts: Vec<String> =
            nodes.iter().map(|(bytes, name)| format!("{name} {}", report::bytes(*bytes))).collect();
        text += &format!("memory      {device}: about {} at most ({})\n", report::bytes(total), parts.join(", "));
    }
    text
}
