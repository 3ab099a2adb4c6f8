//! How runs begin and are taken up, as people meet it at the command line: what is refused, and what that leaves behind.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// A pipeline that can be validated anywhere; its model is not there.
const PIPELINE: &str = "version: 1
params: {model: model, batch_size: 2}
run: {steps: 3, device: cpu}
nodes:
  prompts: {op: prompt_source, with: {path: rows.jsonl, tokenizer: \"${model}\", batch_size: \"${batch_size}\"}}
  batches: {op: batcher, in: prompts, with: {batch_size: 8, max_length: 16}}
  metrics: {op: metrics_sink, in: batches.metrics}
";

/// A learner, and a node that keeps its model.
const LEARNING: &str = "
  learner: {op: preference_learner, in: batches, with: {model: \"${model}\", objective: sft, learning_rate: 1e-3}}
  NAME: {op: checkpoint, in: learner}
";

fn workplace() -> TempDir {
    let here = tempfile::tempdir().unwrap();
    fs::write(here.path().join("p.yaml"), PIPELINE).unwrap();
    fs::write(here.path().join("rows.jsonl"), "{\"prompt\": \"a\", \"chosen\": \" b\"}\n").unwrap();
    here
}

/// Exit code and standard error.
fn sapo_flow(here: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sapo-flow"));
    command.current_dir(here).args(arguments).env_remove("RUST_LOG").stdin(Stdio::null());
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_run_that_fails_before_it_begins_leaves_nothing() {
    let here = workplace();
    fs::write(here.path().join("p.yaml"), format!("{PIPELINE}{}", LEARNING.replace("NAME", "policy"))).unwrap();
    let begin = || sapo_flow(here.path(), &["run", "p.yaml", "-S", "model=nosuch", "--run-dir", "rt/nm"]);
    let (code, said) = begin();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("nosuch"), "{said}");
    assert!(!here.path().join("rt").exists(), "{said}");
    assert_eq!(begin(), (code, said), "the same again");

    // A directory that was there stays, as empty as it was.
    fs::create_dir_all(here.path().join("rt/nm")).unwrap();
    begin();
    assert_eq!(fs::read_dir(here.path().join("rt/nm")).unwrap().count(), 0);

    // What a process leaves that was killed before it wrote the manifest is no run: it can begin there.
    for file in [".lock", "pipeline.yaml"] {
        fs::write(here.path().join("rt/nm").join(file), "").unwrap();
    }
    let (code, said) = begin();
    assert_eq!((code, said.contains("nosuch")), (Some(1), true), "{said}");
    // A pipeline of the user's own is no such leftover.
    fs::write(here.path().join("rt/nm/pipeline.yaml"), "mine").unwrap();
    let (_, said) = begin();
    assert!(said.contains("rt/nm is not empty"), "{said}");
    assert_eq!(fs::read_to_string(here.path().join("rt/nm/pipeline.yaml")).unwrap(), "mine");
}

#[test]
fn threads_are_those_that_a_run_began_with() {
    let here = workplace();
    let (code, said) = sapo_flow(here.path(), &["run", "--resume", "out", "--threads", "2"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("--threads") && said.contains("cannot be used with"), "{said}");
}

#[test]
fn names_that_the_run_itself_uses_are_refused() {
    let here = workplace();
    for file in ["pipeline.yaml", "manifest.json", "evaluations.json", ".lock", "tensorboard", "checkpoints"] {
        let with = format!("op: metrics_sink, with: {{file: {file}}}");
        fs::write(here.path().join("q.yaml"), PIPELINE.replace("op: metrics_sink", &with)).unwrap();
        let (code, said) = sapo_flow(here.path(), &["validate", "q.yaml"]);
        assert_eq!(code, Some(78), "{file}: {said}");
        assert!(said.contains("q.yaml:7:") && said.contains(&format!("`{file}`")), "{file}: {said}");
    }
    for name in ["checkpoints", "tensorboard", "edits"] {
        fs::write(here.path().join("q.yaml"), format!("{PIPELINE}{}", LEARNING.replace("NAME", name))).unwrap();
        let (code, said) = sapo_flow(here.path(), &["validate", "q.yaml"]);
        assert_eq!(code, Some(78), "{name}: {said}");
        assert!(said.contains("q.yaml:10:") && said.contains("the run itself"), "{name}: {said}");
    }
}
