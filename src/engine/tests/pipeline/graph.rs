//! Right pipelines and the graphs they become.

use crate::toy::{LOOP, around, complaints, read, read_with};

fn names(graph: &sapo_flow_engine::Graph) -> Vec<&str> {
    graph.nodes.iter().map(|node| node.name.as_str()).collect()
}

/// `from.port -> to.port` of every edge, with the staleness of feedback edges.
fn edges(graph: &sapo_flow_engine::Graph) -> Vec<String> {
    graph
        .edges
        .iter()
        .map(|edge| {
            let (from, to) = (&graph.nodes[edge.from_node].name, &graph.nodes[edge.to_node].name);
            let delay = edge.feedback.map_or(String::new(), |feedback| format!(" ({})", feedback.max_staleness));
            format!("{from}.{} -> {to}.{}{delay}", graph.output(edge).name, graph.input(edge).name)
        })
        .collect()
}

#[test]
fn the_loop_lowers() {
    let graph = read(LOOP).unwrap();
    assert_eq!(names(&graph), ["prompts", "segments", "replay", "batches", "learner", "ema", "metrics"]);
    assert_eq!(
        edges(&graph),
        [
            "prompts.prompts -> segments.prompts",
            "ema.weights -> segments.weights (0)",
            "segments.pairs -> replay.pairs",
            "replay.pairs -> batches.pairs",
            "batches.batches -> learner.batches",
            "learner.weights -> ema.weights",
            "learner.metrics -> metrics.metrics",
            "replay.metrics -> metrics.metrics",
        ]
    );
    assert_eq!(graph.feedback_edges().count(), 1);
    assert_eq!(graph.run.steps, Some(10));
    assert_eq!(graph.run.seed, 42);
    assert!(graph.warnings.list.is_empty());
}

#[test]
fn nodes_come_in_dependency_order_and_else_as_written() {
    let graph = read(&around(
        "  metrics: {op: metrics_sink, in: learner.metrics}
  learner: {op: learner, in: batches, with: {objective: dpo}}
  extra: {op: prompt_source, with: {path: b}}
  batches: {op: batcher, in: segments}
  segments: {op: segment_sampler, in: {prompts: prompts, weights: {from: learner, feedback: {max_staleness: 3}}}}
  prompts: {op: prompt_source, with: {path: a}}
",
    ))
    .unwrap();
    assert_eq!(names(&graph), ["extra", "prompts", "segments", "batches", "learner", "metrics"]);
    assert_eq!(graph.feedback_edges().next().and_then(|edge| edge.feedback).map(|f| f.max_staleness), Some(3));
}

#[test]
fn all_forms_of_in_are_read() {
    let graph = read(&around(
        "  prompts: {op: prompt_source, with: {path: a}}
  one: {op: segment_sampler, in: {prompts: prompts.prompts, weights: {from: ema}}}
  two: {op: segment_sampler, in: {prompts: {from: prompts}, weights: ema.weights}}
  replay: {op: replay_buffer, in: {pairs: [two, {from: one.pairs}]}}
  batches: {op: batcher, in: {from: replay}}
  learner: {op: learner, in: [batches], with: {objective: orpo}}
  ema: {op: ema, in: {from: learner, feedback: {max_staleness: 1}}, with: {decay: 0.5}}
  metrics: {op: metrics_sink, in: [learner.metrics]}
",
    ))
    .unwrap();
    assert_eq!(
        edges(&graph),
        [
            "learner.weights -> ema.weights (1)",
            "prompts.prompts -> one.prompts",
            "ema.weights -> one.weights",
            "prompts.prompts -> two.prompts",
            "ema.weights -> two.weights",
            "two.pairs -> replay.pairs",
            "one.pairs -> replay.pairs",
            "replay.pairs -> batches.pairs",
            "batches.batches -> learner.batches",
            "learner.metrics -> metrics.metrics",
        ]
    );
}

#[test]
fn the_resolved_pipeline_is_the_same_graph() {
    let text = LOOP.replace("rows.jsonl", "'$${x} and ${ema_decay}'");
    let first = read_with(&text, &[("max_staleness", "2"), ("ema_decay", "0.75")]).unwrap();
    let resolved = serde_yaml::to_string(&first.resolved).unwrap();
    assert!(!resolved.contains("params"), "{resolved}");
    let second = read(&resolved).unwrap();
    assert_eq!(first.edges, second.edges);
    assert_eq!(first.resolved, second.resolved);
    for (one, other) in first.nodes.iter().zip(&second.nodes) {
        assert_eq!((&one.name, &one.config), (&other.name, &other.config));
    }
    assert_eq!(second.nodes[0].config["path"], "${x} and 0.75");
    assert_eq!(second.nodes[5].config["decay"], 0.75);
    assert_eq!(second.feedback_edges().next().and_then(|edge| edge.feedback).map(|f| f.max_staleness), Some(2));
}

#[test]
fn anchors_aliases_and_merge_keys_work() {
    let graph = read(&around(
        "  prompts: &source
    op: prompt_source
    with: &settings {path: a, batch_size: 3}
  more:
    <<: *source
    with: {<<: *settings, path: b}
  same: {op: prompt_source, with: *settings}
",
    ))
    .unwrap();
    assert_eq!(graph.nodes[1].config, serde_yaml::from_str::<serde_yaml::Value>("{path: b, batch_size: 3}").unwrap());
    assert_eq!(graph.nodes[2].config, graph.nodes[0].config);
}

#[test]
fn unread_work_is_warned_of() {
    let nodes = "  prompts: {op: prompt_source, with: {path: a}}
  more: {op: prompt_source, with: {path: b}}
  segments: {op: segment_sampler, in: {prompts: prompts, weights: {from: learner, feedback: {max_staleness: 0}}}}
  batches: {op: batcher, in: segments}
  learner: {op: learner, in: batches, with: {objective: orpo}}
  ema: {op: ema, in: learner.weights, with: {decay: 0.5}}
  late: {op: ema, in: ema, with: {decay: 0.5}}
  metrics: {op: metrics_sink, in: learner.metrics}
";
    assert_eq!(
        complaints(&around(nodes)),
        [
            "5:3 nothing reads what `more` emits",
            "9:3 `ema` reaches no sink: what it computes is lost",
            "10:3 nothing reads what `late` emits",
        ]
    );
    let without_sink = around("  prompts: {op: prompt_source, with: {path: a}}\n");
    assert_eq!(complaints(&without_sink), ["4:3 the pipeline has no sink: nothing that it computes is kept"]);
}

#[test]
fn records_that_nobody_reads_are_warned_of_though_metrics_are_read() {
    // A buffer beside the loop, of which the sink hears.
    let beside =
        LOOP.replace("replay.metrics]}", "replay.metrics, other.metrics]}\n  other: {op: replay_buffer, in: segments}");
    assert_eq!(complaints(&beside), ["18:3 nothing reads `other.pairs`"]);
    // Of several outputs one is enough.
    let weights = LOOP.replace("in: [learner.metrics, replay.metrics]", "in: [replay.metrics]");
    assert_eq!(complaints(&weights), ["15:3 nothing reads `learner.metrics`"]);
}

#[test]
fn feedback_outside_a_cycle_is_warned_of() {
    let text = LOOP.replace("in: segments}", "in: {from: segments, feedback: {max_staleness: 1}}}");
    assert_eq!(complaints(&text), Vec::<String>::new());
    let text = LOOP.replace("in: [learner.metrics,", "in: [{from: learner.metrics, feedback: {max_staleness: 1}},");
    assert_eq!(complaints(&text), ["17:43 this `feedback` edge closes no cycle"]);
}
