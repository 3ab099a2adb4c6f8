//! A pipeline with a composite operator trains, and resumes to the bytes of a run that nothing interrupted.

use std::fs;
use std::path::Path;

use crate::workplace::Workplace;

const NODES: &str = r#"
  prompts: {op: prompt_source, with: {path: chats.jsonl, tokenizer: model, batch_size: 3}}
  augment:
    op: self_augment
    in: {prompts: prompts, weights: learner.weights}
    with:
      segment_tokens: 4
      max_length: 48
      max_prompt_tokens: 24
      max_staleness: "${max_staleness}"
  replay: {op: replay_buffer, in: augment.pairs, with: {capacity: 10, draws: 3}}
  batches: {op: batcher, in: replay.pairs, with: {batch_size: 2, max_length: 48}}
  learner: {op: preference_learner, in: batches.batches, with: {model: model, objective: orpo, learning_rate: 1e-3}}
  metrics: {op: metrics_sink, in: [learner.metrics, augment.metrics, replay.metrics]}
  policy: {op: checkpoint, in: learner.weights}
  average: {op: checkpoint, in: augment.weights}
"#;

#[test]
fn composites_train_and_resume_to_the_byte() {
    let here = Workplace::new();
    let library = Path::new(env!("CARGO_MANIFEST_DIR")).join("operators/self_augment.yaml");
    here.pipeline("p.yaml", NODES);
    let text = fs::read_to_string(here.path("p.yaml")).unwrap();
    here.write("p.yaml", &text.replacen("nodes:", &format!("include: {}\nnodes:", library.display()), 1));
    let whole = here.run("p.yaml", "run", &[]);
    // Back to the stored state before the newest: the steps after it are done again.
    let checkpoints = here.path("run/checkpoints");
    assert!(checkpoints.join("step-00000012/nodes/augment/ema").is_dir());
    fs::write(checkpoints.join("latest"), "step-00000012").unwrap();
    let said = here.sapo_flow(&["run", "--resume", "run"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    here.results("run").assert_same(&whole, "resumed from step 12");
    assert!(whole.models[0] != fs::read(here.path("model/model.safetensors")).unwrap());
}
