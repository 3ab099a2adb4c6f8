//! Programs and servers outside join the graph, and so do expressions.

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

#[test]
fn expressions_score_filter_and_change_pairs() {
    let here = Workplace::new();
    // Scored with the weights before the update, all pairs of a step in one batch: what the learner reports of them.
    let nodes = "
  prompts: {op: prompt_source, with: {path: pairs.jsonl, tokenizer: model, batch_size: 4, shuffle: false}}
  short: {op: filter, in: prompts.pairs, with: {where: words(chosen).len() < 10, tokenizer: model}}
  marked: {op: map, in: short, with: {set: {ratio: chosen_len / rejected_len}}}
  scored:
    op: score
    in: {records: marked, weights: {from: learner.weights, feedback: {max_staleness: 0}}}
    with: {score: chosen_avg_logps}
  batches: {op: batcher, in: scored, with: {batch_size: 4, max_length: 48}}
  learner: {op: preference_learner, in: batches.batches, with: {model: model, objective: orpo, learning_rate: 1e-3}}
  metrics: {op: metrics_sink, in: [learner.metrics, short.metrics, marked.metrics, scored.metrics]}
  policy: {op: checkpoint, in: learner.weights}
";
    here.pipeline("p.yaml", nodes);
    let (whole, resumed) = run_and_resume(&here, "p.yaml", &["steps=7"], 3);
    resumed.assert_same(&whole, "resumed from step 3");
    // Rows 0 to 7 have chosen answers of 5, 6, 7, 8, 9, 10, 11 and 5 words, rejected ones of 4, 5, 6, 4, 5, 6, 4 and 5;
    // the tokens are the words and the EOS.
    let ratios = [[6. / 5., 7. / 6., 8. / 7., 9. / 5.], [10. / 6., 6. / 6., 0., 0.]];
    for (step, metrics) in whole.metrics.iter().enumerate() {
        let kept = [4.0, 2.0][step % 2];
        assert_eq!((&metrics["short/kept"], &metrics["short/dropped"]), (&kept.into(), &(4.0 - kept).into()), "{step}");
        let close = |name: &str, expected: f64| {
            let found = metrics[name].as_f64().unwrap();
            assert!((found - expected).abs() < 1e-4, "step {step}: {name} is {found}, not {expected}");
        };
        close("marked/ratio", ratios[step % 2].iter().sum::<f64>() / kept);
        close("scored/score", metrics["logps/chosen"].as_f64().unwrap());
    }
}
