//! Programs and servers outside join the graph.

use std::fs;
use std::path::{Path, PathBuf};

use crate::workplace::{Results, Workplace};

/// A file of the repository.
fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The run's results, and those of the same run taken up from an older checkpoint.
fn run_and_resume(here: &Workplace, pipeline: &str, overrides: &[&str], step: u64) -> (Results, Results) {
    let whole = here.run(pipeline, "run", overrides);
    fs::write(here.path("run/checkpoints/latest"), format!("step-{step:08}")).unwrap();
    let said = here.sapo_flow(&["run", "--resume", "run"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    (whole, here.results("run"))
}

#[test]
fn a_python_program_scores_and_drops_pairs() {
    let here = Workplace::new();
    let text = fs::read_to_string(repository("examples/scored_pairs.yaml")).unwrap();
    let text = text
        .replace("dtype: bfloat16", "dtype: float32\n  device: cpu\n  threads: 1")
        .replace("{every: 50}", "{every: 2}")
        .replace("batch_size: 8, max_prompt_tokens: 128", "batch_size: 3, shuffle: false");
    here.write("p.yaml", &text);
    let scorer = format!("scorer={}", repository("examples/length_scorer.py").display());
    let overrides = [&scorer, "model=model", "data=pairs.jsonl", "target=6", "margin=0", "epochs=2"];
    let (whole, resumed) = run_and_resume(&here, "p.yaml", &overrides, 4);
    resumed.assert_same(&whole, "resumed from step 4");

    // Row r of the eight has a chosen answer of 5 + r % 7 words and a rejected one of 4 + r % 3.
    let score = |words: u64| -(words as f64 - 6.0).abs() / 6.0;
    let scores = |row: u64| (score(5 + row % 7), score(4 + row % 3));
    assert_eq!(whole.metrics.len(), 6);
    for (step, metrics) in whole.metrics.iter().enumerate() {
        let first = (step as u64 % 3) * 3;
        let rows = || (first..(first + 3).min(8)).map(scores);
        let kept: Vec<(f64, f64)> = rows().filter(|(chosen, rejected)| chosen >= rejected).collect();
        assert_eq!(metrics["scored/records"], rows().count() as f64, "step {step}");
        assert_eq!(metrics["scored/dropped"], (rows().count() - kept.len()) as f64, "step {step}");
        assert_eq!(metrics["batcher/pairs"], kept.len() as f64, "step {step}");
        if !kept.is_empty() {
            let mean = kept.iter().map(|(chosen, _)| chosen).sum::<f64>() / kept.len() as f64;
            let found = metrics["scored/chosen_score"].as_f64().unwrap();
            assert!((found - mean).abs() < 1e-12, "step {step}: {found} is not {mean}");
        }
    }
}

#[test]
fn a_program_that_fails_ends_the_run() {
    let here = Workplace::new();
    let program = "import sys\nsys.stdin.readline()\nprint('no reward today', file=sys.stderr)\nsys.exit(4)\n";
    here.write("judge.py", program);
    let nodes = "
  prompts: {op: prompt_source, with: {path: pairs.jsonl, tokenizer: model, batch_size: 3}}
  judged: {op: subprocess, in: prompts.pairs, with: {command: [python3, judge.py], tokenizer: model, restarts: 1}}
  samples: {op: sample_sink, in: judged, with: {tokenizer: model}}
  metrics: {op: metrics_sink, in: judged.metrics}
";
    here.pipeline("p.yaml", nodes);
    let said = here.sapo_flow(&["run", "p.yaml", "--run-dir", "out"]);
    assert_eq!(said.code, Some(1));
    let expected = "node `judged` at step 0: started again once, and still: `python3 judge.py` ended (exit status: 4) \
                    when 3 of 3 answers were missing; its standard error ended in\n    no reward today";
    assert!(said.stderr.contains(expected), "{}", said.stderr);
}
