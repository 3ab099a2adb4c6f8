//! `run: {kernels: plain}` is the plain path everywhere, and gives the numbers of the fast ones.

use serde_json::Value;

use crate::workplace::{HEAD, Results, SAPO_ORPO, Workplace};

/// Relative to 1 where a number is below it: ten times what sums in another order come to in eight steps.
const TOLERANCE: f64 = 1e-5;

/// The run of these nodes as they are, and with plain kernels.
fn both(here: &Workplace, nodes: &str) -> [Results; 2] {
    let nodes = nodes.trim_start_matches('\n');
    here.write("p.yaml", &format!("{HEAD}{nodes}"));
    here.write("plain.yaml", &format!("{}{nodes}", HEAD.replace("dtype: float32", "dtype: float32\n  kernels: plain")));
    ["p", "plain"].map(|name| here.run(&format!("{name}.yaml"), name, &["steps=8"]))
}

/// All numbers of all steps.
#[track_caller]
fn assert_close(fast: &[Value], plain: &[Value]) {
    assert_eq!(fast.len(), plain.len());
    for (step, (fast, plain)) in fast.iter().zip(plain).enumerate() {
        let (fast, plain) = (fast.as_object().unwrap(), plain.as_object().unwrap());
        assert!(fast.contains_key("loss") && fast.keys().eq(plain.keys()), "step {step}: {fast:?} {plain:?}");
        for (name, plain) in plain {
            let (found, expected) = (fast[name].as_f64().unwrap(), plain.as_f64().unwrap());
            let bound = TOLERANCE * expected.abs().max(1.0);
            assert!((found - expected).abs() <= bound, "step {step}, {name}: {found}, plain {expected}");
        }
    }
}

#[test]
fn sapo_orpo_draws_the_same_tokens_and_learns_the_same() {
    let [fast, plain] = both(&Workplace::new(), SAPO_ORPO);
    assert_eq!(String::from_utf8_lossy(&fast.samples), String::from_utf8_lossy(&plain.samples));
    assert_close(&fast.metrics, &plain.metrics);
    // There are two paths.
    assert!(fast.models != plain.models);
}

/// Pairs from a file, scored by a reference model.
#[test]
fn dpo_learns_the_same() {
    let nodes = r#"
  prompts: {op: prompt_source, with: {path: pairs.jsonl, tokenizer: model, batch_size: 5}}
  batches: {op: batcher, in: prompts.pairs, with: {batch_size: 5, max_length: 48}}
  reference: {op: reference, in: batches.batches, with: {model: reference}}
  learner: {op: preference_learner, in: reference, with: {model: model, objective: dpo, learning_rate: 1e-3}}
  metrics: {op: metrics_sink, in: learner.metrics}
  policy: {op: checkpoint, in: learner.weights}
"#;
    let [fast, plain] = both(&Workplace::new(), nodes);
    assert_close(&fast.metrics, &plain.metrics);
    assert!(fast.models[0] != plain.models[0]);
}
