//! Programs and servers outside join the graph, and so do expressions.

use std::fs;
use std::path::{Path, PathBuf};

use crate::server::Server;
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
        .replace("dtype: auto", "dtype: float32\n  device: cpu\n  threads: 1")
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
fn a_python_program_picks_the_best_of_the_policys_answers() {
    let here = Workplace::new();
    let text = fs::read_to_string(repository("examples/best_of_n.yaml")).unwrap();
    let on_cpu = "{epochs: 2, dtype: float32, device: cpu, threads: 1, checkpoint: {every: 2}}";
    here.write("p.yaml", &text.replace("{epochs: 1, dtype: auto, checkpoint: {every: 50}}", on_cpu));
    let scorer = format!("scorer={}", repository("examples/length_scorer.py").display());
    let (whole, resumed) =
        run_and_resume(&here, "p.yaml", &[&scorer, "model=model", "data=chats.jsonl", "tokens=24"], 6);
    resumed.assert_same(&whole, "resumed from step 6");
    assert!(whole.models[0] != fs::read(here.path("model/model.safetensors")).unwrap());
    // Four answers to each of 14 rows, twice.
    let total = |name: &str| whole.metrics.iter().map(|step| step[name].as_f64().unwrap()).sum::<f64>();
    assert_eq!((total("scored/records"), total("scored/dropped")), (112.0, 0.0));
    let lines: Vec<serde_json::Value> =
        String::from_utf8(whole.samples).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let far = |text: &serde_json::Value| {
        let words = text.as_str().unwrap().split_whitespace().filter(|word| word.starts_with('w')).count();
        words.abs_diff(12)
    };
    let pairs = lines.iter().filter(|line| line["chosen"].is_string()).count();
    assert!(pairs >= 14, "{pairs} pairs");
    assert!(lines.iter().all(|line| !line["chosen"].is_string() || far(&line["chosen"]) < far(&line["rejected"])));
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

/// Whether any file below a folder holds a text.
fn holds(folder: &Path, text: &str) -> bool {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).any(|path| match path.is_dir() {
        true => holds(&path, text),
        false => fs::read(&path).unwrap().windows(text.len()).any(|part| part == text.as_bytes()),
    })
}

/// A server's word for which answer is better decides what is chosen, and its own answers are scored.
const JUDGED: &str = r#"
  prompts: {op: prompt_source, with: {path: pairs.jsonl, tokenizer: model, batch_size: 4, shuffle: false}}
  candidates:
    op: openai_sampler
    in: prompts
    with: {server: {url: SERVER, model: tiny, api_key_env: TINY_KEY}, tokenizer: model, responses_per_prompt: 2, max_tokens: 2}
  long: {op: filter, in: candidates, with: {where: response_len > 2}}
  judged:
    op: openai_judge
    in: prompts.pairs
    with:
      server: {url: SERVER, model: tiny, api_key_env: TINY_KEY, retry_seconds: 0}
      tokenizer: model
      message: "{{ chosen }} {{ rejected }}"
      swap_below: 12
  batches: {op: batcher, in: judged, with: {batch_size: 4, max_length: 48}}
  learner: {op: preference_learner, in: batches.batches, with: {model: model, objective: orpo, learning_rate: 1e-3}}
  metrics: {op: metrics_sink, in: [learner.metrics, candidates.metrics, long.metrics, judged.metrics]}
  samples: {op: sample_sink, in: judged, with: {tokenizer: model, every: 1, count: 4}}
  policy: {op: checkpoint, in: learner.weights}
"#;

#[test]
fn a_server_answers_and_judges() {
    let here = Workplace::new();
    let server = Server::start(&["--key", "a-secret-key"]);
    here.pipeline("p.yaml", &JUDGED.replace("SERVER", &format!("'http://127.0.0.1:{}/v1'", server.port)));
    let run = |arguments: &[&str]| {
        let output = here.command(arguments).env("TINY_KEY", "a-secret-key").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["run", "p.yaml", "--run-dir", "run", "-S", "steps=7"]);
    let whole = here.results("run");
    fs::write(here.path("run/checkpoints/latest"), "step-00000003").unwrap();
    run(&["run", "--resume", "run"]);
    here.results("run").assert_same(&whole, "resumed from step 3");
    assert!(!holds(&here.path("run"), "a-secret-key"));
    assert!(server.requests().iter().all(|request| request["key"] == "a-secret-key"));

    // The judge says how many words both answers have: 5 + r % 7 and 4 + r % 3 in row r.
    let words = |row: u64| (5 + row % 7) + (4 + row % 3);
    for (step, metrics) in whole.metrics.iter().enumerate() {
        let rows = || (step as u64 % 2 * 4..).take(4);
        assert_eq!(metrics["judged/score"], rows().map(words).sum::<u64>() as f64 / 4.0, "step {step}");
        assert_eq!(metrics["judged/swapped"], rows().filter(|row| words(*row) < 12).count() as f64, "step {step}");
        // Two words at most, and an EOS where the server did not cut.
        let generated = metrics["candidates/generated_tokens"].as_f64().unwrap();
        assert!((16.0..=24.0).contains(&generated), "step {step}: {generated}");
        assert_eq!(metrics["long/kept"].as_f64().unwrap() + metrics["long/dropped"].as_f64().unwrap(), 8.0);
    }
    let swapped = String::from_utf8(whole.samples).unwrap();
    let line: serde_json::Value = serde_json::from_str(swapped.lines().next().unwrap()).unwrap();
    // Row 0 has 5 and 4 words, 9 in all: exchanged.
    let count =
        |part: &str| line[part].as_str().unwrap().split_whitespace().filter(|word| word.starts_with('w')).count();
    assert_eq!((line["row"].as_u64(), count("chosen"), count("rejected")), (Some(0), 4, 5));
}

#[test]
fn a_server_that_is_not_there_ends_the_run() {
    let here = Workplace::new();
    let mut server = Server::start(&[]);
    server.stop();
    let url = format!("http://127.0.0.1:{}/v1", server.port);
    let nodes = JUDGED.replace("SERVER", &format!("'{url}'")).replace(", api_key_env: TINY_KEY", "");
    here.pipeline(
        "p.yaml",
        &nodes
            .replace("model: tiny", "model: tiny, retries: 1, retry_seconds: 0")
            .replace(", retry_seconds: 0, retry_seconds: 0", ", retry_seconds: 0"),
    );
    let said = here.sapo_flow(&["run", "p.yaml", "--run-dir", "out"]);
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains("` at step 0: ") && said.stderr.contains(&url), "{}", said.stderr);
    assert!(said.stderr.contains("(tried 2 times)"), "{}", said.stderr);
}
