//! The programs under `examples` work.

use std::fs;

use sapo_flow_engine::runtime::Outcome;
use serde_json::{Value, json};

use crate::workplace::Workplace;

#[allow(dead_code)]
#[path = "../../examples/custom_operator.rs"]
mod custom_operator;
#[allow(dead_code)]
#[path = "../../examples/score_pairs.rs"]
mod score_pairs;

#[test]
fn an_operator_of_ones_own_runs_in_a_pipeline() {
    let here = Workplace::new();
    // Answers of one to six words, and the EOS.
    let words = |count: usize| vec!["w7"; count].join(" ");
    let row = |count| json!({"prompt": "w9", "chosen": words(count)}).to_string() + "\n";
    here.write("rows.jsonl", &(1..=6).map(row).collect::<String>());
    let text = fs::canonicalize(here.path("rows.jsonl")).unwrap();
    let model = here.path("model");
    here.write(
        "short.yaml",
        &format!(
            "version: 1
run: {{steps: 1}}
nodes:
  prompts: {{op: prompt_source, with: {{path: '{}', tokenizer: '{}', batch_size: 6}}}}
  short: {{op: short_answers, in: prompts.prompts, with: {{max_tokens: 4}}}}
  batches: {{op: batcher, in: short, with: {{batch_size: 8, max_length: 16}}}}
  metrics: {{op: metrics_sink, in: batches.metrics}}
",
            text.display(),
            model.display()
        ),
    );
    let report = custom_operator::run(&here.path("short.yaml"), &here.path("out")).unwrap();
    assert_eq!((report.outcome, report.steps_done), (Outcome::Completed, 1));
    assert_eq!(here.metrics("out")[0]["batcher/pairs"], 3.0);
}

#[test]
fn pairs_are_scored() {
    let here = Workplace::new();
    let pair = |chosen: &str, rejected: &str| json!({"prompt": "w9 w8", "chosen": chosen, "rejected": rejected});
    let rows: [Value; 3] = [pair(" w7", " w7"), pair(" w7 w10", " w20"), pair(" w20", " w7 w10")];
    here.write("pairs.jsonl", &rows.map(|row| row.to_string()).join("\n"));
    let scores = score_pairs::score_file(&here.path("model"), &here.path("pairs.jsonl")).unwrap();
    assert_eq!(scores.len(), 3);
    assert!((scores[0].0 - scores[0].1).abs() < 1e-5);
    assert!((scores[1].0 - scores[2].1).abs() < 1e-5 && (scores[1].1 - scores[2].0).abs() < 1e-5);
    // About as likely as any other of the model's words: it was never trained.
    assert!(scores.iter().all(|(chosen, _)| (-10.0..-2.0).contains(chosen)), "{scores:?}");
}
