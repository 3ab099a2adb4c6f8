//! The graph as mermaid and dot.

use crate::toy::{around, read};

const NODES: &str = "  end: {op: prompt_source, with: {path: a}}
  segments: {op: segment_sampler, in: {prompts: end, weights: {from: ema, feedback: {max_staleness: 2}}}}
  batches: {op: batcher, in: segments}
  learner: {op: learner, in: batches, with: {objective: orpo}}
  ema: {op: ema, in: learner, with: {decay: 0.5}}
  metrics: {op: metrics_sink, in: learner.metrics}
";

#[test]
fn mermaid() {
    assert_eq!(
        read(&around(NODES)).unwrap().to_mermaid(),
        r#"flowchart LR
    node-end["end<br/><small>prompt_source</small>"]
    segments["segments<br/><small>segment_sampler</small>"]
    batches["batches<br/><small>batcher</small>"]
    learner["learner"]
    ema["ema"]
    metrics["metrics<br/><small>metrics_sink</small>"]
    node-end -->|"Prompts"| segments
    ema -.->|"Weights<br/>max_staleness 2"| segments
    segments -->|"Pairs"| batches
    batches -->|"Batches"| learner
    learner -->|"Weights"| ema
    learner -->|"Metrics"| metrics
"#
    );
}

#[test]
fn dot() {
    assert_eq!(
        read(&around(NODES)).unwrap().to_dot(),
        r#"digraph pipeline {
    rankdir=LR;
    node [shape=box];
    "end" [label="end\nprompt_source"];
    "segments" [label="segments\nsegment_sampler"];
    "batches" [label="batches\nbatcher"];
    "learner" [label="learner"];
    "ema" [label="ema"];
    "metrics" [label="metrics\nmetrics_sink"];
    "end" -> "segments" [label="Prompts"];
    "ema" -> "segments" [label="Weights\nmax_staleness 2", style=dashed, constraint=false];
    "segments" -> "batches" [label="Pairs"];
    "batches" -> "learner" [label="Batches"];
    "learner" -> "ema" [label="Weights"];
    "learner" -> "metrics" [label="Metrics"];
}
"#
    );
}
