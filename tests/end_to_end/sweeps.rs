//! Sweeps: every combination is a run, a failure stops no other, and what was stopped goes on.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::workplace::Workplace;

/// Offline ORPO, two steps of which take a moment.
const NODES: &str = r#"
  prompts: {op: prompt_source, with: {path: "${data}", tokenizer: model, batch_size: 2}}
  batches: {op: batcher, in: prompts.pairs, with: {batch_size: 2, max_length: 48}}
  learner: {op: preference_learner, in: batches, with: {model: model, objective: orpo, learning_rate: "${learning_rate}"}}
  metrics: {op: metrics_sink, in: [learner.metrics, batches.metrics]}
  policy: {op: checkpoint, in: learner.weights}
"#;

fn workplace(sweep: &str) -> Workplace {
    let here = Workplace::new();
    here.pipeline("p.yaml", NODES);
    let text = fs::read_to_string(here.path("p.yaml")).unwrap();
    let params = "params: {seed: 7, steps: 3, learning_rate: 1e-3, data: pairs.jsonl";
    let text = text.replacen("params: {seed: 7, steps: 16, max_staleness: 0", params, 1);
    here.write("p.yaml", &format!("{text}{sweep}"));
    here
}

fn read_json(here: &Workplace, path: &str) -> Value {
    let text = fs::read_to_string(here.path(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    serde_json::from_str(&text).unwrap()
}

fn processes(here: &Workplace, run: &str) -> usize {
    read_json(here, &format!("{run}/manifest.json"))["processes"].as_array().map_or(0, Vec::len)
}

#[test]
fn every_combination_is_the_run_it_says() {
    let here = workplace("");
    let arguments = ["sweep", "p.yaml", "-S", "learning_rate=1e-3,1e-2", "-S", "steps=2", "--repeat", "2"];
    let list = here.sapo_flow(&[&arguments[..], &["--dry-run"]].concat());
    let names = [
        "learning_rate=0.001,seed=7",
        "learning_rate=0.001,seed=8",
        "learning_rate=0.01,seed=7",
        "learning_rate=0.01,seed=8",
    ];
    assert_eq!(list.stdout, format!("{}\n4 runs\n", names.join("\n")));
    let said = here.sapo_flow(&[&arguments[..], &["--sweep-dir", "s", "--jobs", "2"]].concat());
    assert_eq!(said.code, Some(0), "{}", said.stderr);

    // A run of the sweep is the run that `run` makes.
    here.run("p.yaml", "alone", &["steps=2", "learning_rate=1e-2"]);
    let model = |run: &str| fs::read(here.path(run).join("policy/final/model.safetensors")).unwrap();
    assert!(model(&format!("s/{}", names[2])) == model("alone"));
    assert!(model(&format!("s/{}", names[0])) != model("alone"));
    for (name, seed) in names.iter().zip([7, 8, 7, 8]) {
        let manifest = read_json(&here, &format!("s/{name}/manifest.json"));
        assert_eq!(manifest["seed"], seed);
        assert_eq!(manifest["params"]["steps"], 2);
        assert_eq!(manifest["processes"][0]["ended"]["outcome"], "finished");
    }
    // The table at the end: the mean of the last losses of each learning rate.
    let last = |name: &str| here.metrics(&format!("s/{name}")).last().unwrap()["loss"].as_f64().unwrap();
    let table = here.sapo_flow(&["runs", "table", "s", "--format", "json"]);
    let table: Value = serde_json::from_str(&table.stdout).unwrap();
    assert_eq!(table.as_array().unwrap().len(), 2);
    for (group, pair) in [(0, [names[0], names[1]]), (1, [names[2], names[3]])] {
        let mean = (last(pair[0]) + last(pair[1])) / 2.0;
        assert!((table[group]["metrics"]["loss"]["mean"].as_f64().unwrap() - mean).abs() < 1e-12, "{table}");
        assert_eq!(table[group]["seeds"], json!([7, 8]));
    }
    assert!(said.stdout.contains("learning_rate  n             loss\n0.001          2  "), "{}", said.stdout);
}

#[test]
fn a_failure_stops_no_other_and_is_tried_again() {
    let here = workplace("sweep: {list: [{data: later.jsonl}, {data: pairs.jsonl}]}\n");
    let said = here.sapo_flow(&["sweep", "p.yaml", "--sweep-dir", "s"]);
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    assert!(said.stderr.contains("data=later.jsonl: failed: error: "), "{}", said.stderr);
    assert!(said.stderr.contains("1 of 2 runs failed"), "{}", said.stderr);
    assert_eq!(processes(&here, "s/data=pairs.jsonl"), 1);
    // What is finished stays as it is; what failed is tried again.
    fs::copy(here.path("pairs.jsonl"), here.path("later.jsonl")).unwrap();
    let said = here.sapo_flow(&["sweep", "--resume", "s"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(said.stderr.contains("data=pairs.jsonl: finished before"), "{}", said.stderr);
    assert!(said.stderr.contains("data=later.jsonl: finished\n"), "{}", said.stderr);
    assert_eq!(processes(&here, "s/data=pairs.jsonl"), 1);
}

#[test]
fn an_edited_pipeline_does_not_go_on_as_the_same_sweep() {
    let here = workplace("sweep: {grid: {learning_rate: [1e-3, 1e-2]}}\n");
    let said = here.sapo_flow(&["sweep", "p.yaml", "--sweep-dir", "s", "-S", "steps=1"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    let text = fs::read_to_string(here.path("p.yaml")).unwrap();
    here.write("p.yaml", &text.replace("max_length: 48", "max_length: 47"));
    let said = here.sapo_flow(&["sweep", "--resume", "s"]);
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains("p.yaml has changed since the sweep in s began"), "{}", said.stderr);
    here.write("p.yaml", &text);
    assert_eq!(here.sapo_flow(&["sweep", "--resume", "s"]).code, Some(0));
    let said = here.sapo_flow(&["sweep", "p.yaml", "-S", "learning_rat=1,2"]);
    assert_eq!(said.code, Some(78));
    assert!(said.stderr.contains("did you mean `learning_rate`?"), "{}", said.stderr);
    let said = here.sapo_flow(&["sweep", "p.yaml", "--sweep-dir", "s"]);
    assert!(said.code == Some(1) && said.stderr.contains("is not empty"), "{}", said.stderr);
}

#[test]
fn an_interrupted_sweep_goes_on_to_the_same_bytes() {
    let here = workplace("sweep: {grid: {learning_rate: [1e-3, 1e-2]}}\n");
    let whole = here.sapo_flow(&["sweep", "p.yaml", "--sweep-dir", "whole", "-S", "steps=40"]);
    assert_eq!(whole.code, Some(0), "{}", whole.stderr);
    let mut command = here.command(&["sweep", "p.yaml", "--sweep-dir", "s", "-S", "steps=40"]);
    let mut sweep = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut said = BufReader::new(sweep.stderr.take().unwrap()).lines().map(Result::unwrap);
    // Interrupted as soon as the first run has begun: at whatever step it is, or before.
    said.find(|line| line.ends_with(": begun")).unwrap();
    let kill = Command::new("kill").args(["-INT", &sweep.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let rest: Vec<String> = said.collect();
    assert_eq!(sweep.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(rest.iter().any(|line| line.contains("go on with: sapo-flow sweep --resume s")), "{rest:?}");
    assert!(!here.path("s/learning_rate=0.01").exists(), "the second run was not to begin");

    let said = here.sapo_flow(&["sweep", "--resume", "s", "--jobs", "2"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    for run in ["learning_rate=0.001", "learning_rate=0.01"] {
        here.results(&format!("s/{run}")).assert_same(&here.results(&format!("whole/{run}")), run);
    }
}

#[test]
fn a_killed_sweep_leaves_no_run_behind() {
    let here = workplace("sweep: {list: [{learning_rate: 1e-3}]}\n");
    let mut command = here.command(&["sweep", "p.yaml", "--sweep-dir", "s", "-S", "steps=1000000"]);
    let mut sweep = command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let run = here.path("s/learning_rate=0.001");
    let until = |done: &dyn Fn() -> bool| {
        let end = Instant::now() + Duration::from_secs(60);
        while !done() {
            assert!(Instant::now() < end, "it does not come");
            sleep(Duration::from_millis(10));
        }
    };
    until(&|| fs::metadata(run.join("metrics.jsonl")).is_ok_and(|file| file.len() > 0));
    sweep.kill().unwrap();
    sweep.wait().unwrap();
    let lock = fs::File::open(run.join(".lock")).unwrap();
    until(&|| lock.try_lock().is_ok());
    assert_eq!(
        read_json(&here, "s/learning_rate=0.001/manifest.json")["processes"][0]["ended"]["outcome"],
        "interrupted"
    );
}

#[test]
fn two_processes_do_not_work_on_one_run() {
    let here = workplace("");
    here.run("p.yaml", "run", &[]);
    let lock = fs::File::open(here.path("run/.lock")).unwrap();
    lock.try_lock().unwrap();
    let said = here.sapo_flow(&["run", "--resume", "run"]);
    assert_eq!((said.code, said.stderr.as_str()), (Some(1), "error: another process is at work on run\n"));
    drop(lock);
    assert_eq!(here.sapo_flow(&["run", "--resume", "run"]).code, Some(0));
}
