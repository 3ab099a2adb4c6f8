//! The programs and pipelines under `examples` work, and what is promised to be short is.

use std::fs;
use std::path::Path;

use sapo_flow_engine::runtime::Outcome;
use serde_json::{Value, json};

use crate::resume::kill_and_resume_in;
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

/// An example, as p.yaml for the tiny model. Without warnings.
fn write_example(here: &Workplace, name: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("examples").join(name)).unwrap();
    let run = "{epochs: 1, dtype: auto, checkpoint: {every: 50}}";
    assert!(text.contains(run), "{name}");
    let library = format!("include: {}", root.join("operators").display());
    let small = text
        .replace(run, "{steps: 12, dtype: float32, device: cpu, threads: 1, checkpoint: {every: 3, keep: 2}}")
        .replace("include: ../operators", &library)
        .replace("learning_rate: 5.0e-6", "learning_rate: 1e-3")
        .replace("learning_rate: 2.0e-6", "learning_rate: 1e-3");
    here.write("p.yaml", &small);
    let said = here.sapo_flow(&["validate", "p.yaml"]);
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""), "{name}: {}", said.stdout);
    text
}

/// A new objective, best-of-n self-play with a Python scorer, and SAPO without a buffer: each under thirty lines, and as
/// exact as any other pipeline after a kill.
#[test]
fn three_algorithms_under_thirty_lines_survive_kills() {
    let scorer = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/length_scorer.py");
    let scorer = format!("scorer={}", scorer.display());
    let cases: [(&str, &[&str]); 3] = [
        ("new_objective.yaml", &["data=pairs.jsonl"]),
        ("best_of_n.yaml", &["data=chats.jsonl", "tokens=12", &scorer]),
        ("sapo_without_buffer.yaml", &["data=chats.jsonl", "segment_tokens=4", "max_staleness=1"]),
    ];
    for (seed, (name, overrides)) in (1..).zip(cases) {
        let here = Workplace::new();
        let text = write_example(&here, name);
        assert!(text.lines().count() < 30, "{name}");
        let mut all = vec!["model=model"];
        all.extend(overrides);
        kill_and_resume_in(&here, &all, 3, seed);
        let losses: Vec<f64> = here.metrics("whole").iter().filter_map(|step| step["loss"].as_f64()).collect();
        assert!(losses.len() > 6 && losses.first() != losses.last(), "{name}: {losses:?}");
    }
}

#[test]
fn xpo_sets_the_policys_responses_against_the_first_models() {
    let here = Workplace::new();
    write_example(&here, "xpo.yaml");
    let results = here.run("p.yaml", "out", &["model=model", "data=chats.jsonl", "tokens=12"]);
    // A response of each model to each of the rows, four a step and two in the fourth.
    let scored: Vec<f64> = results.metrics.iter().map(|step| step["fresh/size"].as_f64().unwrap()).collect();
    assert_eq!(scored, [8., 8., 8., 4., 8., 8., 8., 4., 8., 8., 8., 4.]);
    // Pairs say how old the model of the rejected response was: the policy is fresh, the first model as old as the run.
    let staleness = results
        .metrics
        .iter()
        .enumerate()
        .filter_map(|(step, metrics)| Some((step as f64, metrics["staleness"].as_f64()?)));
    let staleness: Vec<(f64, f64)> = staleness.filter(|(step, _)| *step > 0.0).collect();
    assert!(staleness.iter().all(|(step, staleness)| [0.0, *step].contains(staleness)), "{staleness:?}");
    assert!(staleness.iter().any(|(_, staleness)| *staleness > 0.0), "{staleness:?}");
    let mean = |name: &str| results.metrics.iter().map(|step| step[name].as_f64().unwrap()).sum::<f64>() / 12.0;
    assert_eq!((mean("own_marked/reference"), mean("others_marked/reference")), (0.0, 1.0));
}
