//! Online self-play by YAML alone: candidates of the policy, the best against the worst, and a buffer that holds no outdated
//! pair.

use serde_json::Value;

use crate::workplace::Workplace;

/// Candidates are compared by their length, which differs as far as the model ends them early.
pub const ONLINE: &str = r#"
  prompts: {op: prompt_source, with: {path: chats.jsonl, tokenizer: model, batch_size: 3}}
  candidates:
    op: sampler
    in: {prompts: prompts, weights: {from: learner.weights, feedback: {max_staleness: "${max_staleness}"}}}
    with: {responses_per_prompt: 6, max_new_tokens: 24, temperature: 1.5}
  recent: {op: window, in: candidates.samples, with: {steps: 7}}
  pairs: {op: best_worst, in: recent.records, with: {score: values.tokens, candidates: 8}}
  replay: {op: replay_buffer, in: pairs.pairs, with: {capacity: 100, draws: 3}}
  batches: {op: batcher, in: replay.pairs, with: {batch_size: 4, max_length: 48}}
  learner: {op: preference_learner, in: batches.batches, with: {model: model, objective: orpo, learning_rate: 1e-3}}
  metrics:
    op: metrics_sink
    in: [learner.metrics, candidates.metrics, recent.metrics, pairs.metrics, replay.metrics]
  samples: {op: sample_sink, in: pairs.pairs, with: {tokenizer: model, every: 1, count: 9}}
  policy: {op: checkpoint, in: learner.weights}
"#;

#[test]
fn a_displaced_pair_leaves_the_buffer() {
    let here = Workplace::new();
    here.pipeline("p.yaml", ONLINE);
    let results = here.run("p.yaml", "out", &["steps=20"]);
    let mut retracted = 0.0;
    let number = |step: &Value, name: &str| step[name].as_f64().unwrap_or_else(|| panic!("no {name} in {step}"));
    for step in &results.metrics {
        retracted += number(step, "pairs/retracted");
        assert_eq!(number(step, "buffer/retracted"), retracted);
        assert_eq!(number(step, "buffer/size"), number(step, "pairs/size"));
    }
    // 18 samples a step of a whole pass, 12 at the last step of each; the window holds the last seven steps.
    let sizes: Vec<f64> = results.metrics.iter().map(|step| number(step, "recent/size")).collect();
    let per_step = |step: usize| if step % 5 == 4 { 12.0 } else { 18.0 };
    let expected = |step: usize| (step.saturating_sub(6)..=step).map(per_step).sum::<f64>();
    assert_eq!(sizes, (0..20).map(expected).collect::<Vec<_>>());
    assert!(retracted > 0.0 && number(&results.metrics[19], "pairs/size") > 0.0);
}
