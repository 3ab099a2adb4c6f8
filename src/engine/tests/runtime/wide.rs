//! Graphs with a node of many inputs, of which the runtime looks at one while that one is incomplete.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use sapo_flow_engine::OperatorSpec;
use sapo_flow_engine::graph::Graph;
use sapo_flow_engine::record::PortType;
use sapo_flow_engine::runtime::checkpoint::LoadedCheckpoint;
use sapo_flow_engine::runtime::{Outcome, RunOptions, run};

use crate::toys::{Learner, edge, expected, node, run_fresh, self_play};

/// Learners beside the first one, which learn the same.
const OTHERS: usize = 20;

/// `self_play` with a sink that all learners write to. Those that are slow, by `salt`, each are in a way of their own.
fn wide(max_staleness: u64, salt: u64) -> Graph {
    let mut graph = self_play(max_staleness, salt, "");
    let sink = graph.nodes.pop().expect("the sink comes last");
    for other in 0..OTHERS {
        let config = format!("salt: {}", salt * other as u64);
        graph.nodes.push(node(&format!("other{other}"), OperatorSpec::of::<Learner>(), &config));
        graph.edges.push(edge((1, 0), (3 + other, 0), PortType::Pairs, None));
        graph.edges.push(edge((3 + other, 1), (0, 0), PortType::Metrics, None));
    }
    graph.nodes.push(sink);
    let last = graph.nodes.len() - 1;
    graph.edges.iter_mut().filter(|edge| edge.port_type == PortType::Metrics).for_each(|edge| edge.to_node = last);
    graph
}

/// What the sink sees: of every step the same from all.
fn seen_by_all(max_staleness: u64) -> String {
    let lines = expected(max_staleness, 20);
    lines.lines().flat_map(|line| std::iter::repeat_n(line, OTHERS + 1)).collect::<Vec<_>>().join("\n")
}

#[test]
fn all_of_a_step_arrives_at_it() {
    for (max_staleness, salt, workers) in [(0, 0, 1), (2, 3, 1), (1, 5, 2)] {
        let (_, seen) = run_fresh(&wide(max_staleness, salt), workers).expect("the run completes");
        assert_eq!(seen, seen_by_all(max_staleness), "{max_staleness} {salt} {workers}");
    }
}

#[test]
fn an_interrupt_ends_it_and_the_rest_follows() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let interrupt = Arc::new(AtomicBool::new(true));
    let graph = wide(1, 3);
    let report = run(&graph, RunOptions { interrupt, ..RunOptions::new(directory.path()) }).expect("it ends well");
    assert!(matches!(report.outcome, Outcome::Interrupted { .. }));
    let resume = LoadedCheckpoint::latest(directory.path(), &graph).expect("it is whole");
    assert!(resume.is_some());
    run(&graph, RunOptions { resume, ..RunOptions::new(directory.path()) }).expect("the rest completes");
    assert_eq!(fs::read_to_string(directory.path().join("seen.txt")).expect("the sink wrote it"), seen_by_all(1));
}
