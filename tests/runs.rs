//! `sapo-flow runs`, on run directories made by hand.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

/// Write a run directory: the decay of the EMA, the seed, how it ended, and the loss of each step.
fn write_run(runs: &Path, name: &str, decay: f64, seed: u64, ended: &Value, losses: &[f64]) {
    let directory = runs.join(name);
    fs::create_dir_all(&directory).unwrap();
    let manifest = json!({
        "pipeline": "p.yaml", "params": {"ema_decay": decay, "steps": 2}, "seed": seed, "device": "cpu",
        "dtype": "float32", "threads": 1, "files": {},
        "processes": [{
            "started": format!("2026-01-0{seed}T00:00:00Z"), "command_line": ["sapo-flow"], "first_step": 0,
            "sapo_flow": "0.1.0", "libtorch": "2.11.0", "platform": "linux x86_64", "ended": ended,
        }],
    });
    fs::write(directory.join("manifest.json"), manifest.to_string()).unwrap();
    let pipeline =
        json!({"version": 1, "run": {"seed": seed}, "nodes": {"ema": {"op": "ema", "with": {"decay": decay}}}});
    fs::write(directory.join("pipeline.yaml"), format!("# p.yaml\n{pipeline}\n")).unwrap();
    let lines: String =
        losses.iter().enumerate().map(|(step, loss)| format!("{}\n", json!({"step": step, "loss": loss}))).collect();
    fs::write(directory.join("metrics.jsonl"), lines).unwrap();
}

fn finished() -> Value {
    json!({"at": "2026-01-09T00:00:00Z", "outcome": "finished", "steps": 2, "total_steps": 2})
}

/// Three runs that differ in their seed, one with another decay in a sweep of its own, one that failed, one that was
/// killed while it wrote a line.
fn workplace() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let runs = directory.path().join("runs");
    write_run(&runs, "a", 0.5, 1, &finished(), &[9.0, 2.0]);
    write_run(&runs, "b", 0.5, 2, &finished(), &[9.0, 4.0]);
    write_run(&runs, "c", 0.5, 3, &finished(), &[9.0, 6.0]);
    write_run(&runs, "sweep/d", 0.9, 1, &finished(), &[9.0, 1.25]);
    let failed = json!({"at": "2026-01-09T00:00:00Z", "outcome": "failed", "error": "node `ema`: no"});
    write_run(&runs, "failed", 0.5, 4, &failed, &[7.0]);
    write_run(&runs, "killed", 0.5, 5, &Value::Null, &[8.0, 7.5]);
    let path = runs.join("killed/metrics.jsonl");
    fs::write(&path, fs::read_to_string(&path).unwrap() + "{\"step\":2,\"lo").unwrap();
    let evaluation =
        |version: u64, nll: f64| json!({"node": "evaluation", "version": version, "values": {"eval_nll": nll}});
    for (run, nll) in [("a", 1.0), ("b", 1.5)] {
        let evaluations = json!([evaluation(0, 3.0), evaluation(2, nll)]);
        fs::write(runs.join(run).join("evaluations.json"), evaluations.to_string()).unwrap();
    }
    directory
}

fn said(directory: &Path, arguments: &[&str]) -> String {
    let (code, stdout, stderr) = outcome(directory, arguments);
    assert_eq!(code, Some(0), "{arguments:?}: {stderr}");
    stdout
}

fn outcome(directory: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sapo-flow"));
    let output = command.current_dir(directory).args(arguments).env_remove("RUST_LOG").output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn lists_tell_what_became_of_runs() {
    let here = workplace();
    // As a process at work on it would.
    let lock = File::create(here.path().join("runs/killed/.lock")).unwrap();
    lock.try_lock().unwrap();
    assert_eq!(
        said(here.path(), &["runs", "ls"]),
        "\
run           pipeline  state     steps    loss                 began
runs/a        p.yaml    finished      2  2.0000  2026-01-01T00:00:00Z
runs/sweep/d  p.yaml    finished      2  1.2500  2026-01-01T00:00:00Z
runs/b        p.yaml    finished      2  4.0000  2026-01-02T00:00:00Z
runs/c        p.yaml    finished      2  6.0000  2026-01-03T00:00:00Z
runs/failed   p.yaml    failed        1  7.0000  2026-01-04T00:00:00Z
runs/killed   p.yaml    running       2  7.5000  2026-01-05T00:00:00Z
"
    );
    drop(lock);
    let list = parsed(&said(here.path(), &["runs", "ls", "runs/killed", "runs/failed", "--format", "json"]));
    assert_eq!(list[0]["state"], "failed");
    assert_eq!(list[0]["error"], "node `ema`: no");
    assert_eq!(list[1]["state"], "interrupted");
    let (code, _, stderr) = outcome(here.path(), &["runs", "ls", "rons"]);
    assert_eq!((code, stderr.contains("cannot read rons")), (Some(1), true), "{stderr}");
}

#[test]
fn a_run_is_shown_with_its_last_numbers() {
    let here = workplace();
    let text = said(here.path(), &["runs", "show", "runs/b"]);
    for line in ["state finished", "ema_decay 0.5", "loss 4.0000", "eval_nll 1.5000"] {
        let words: Vec<&str> = line.split_whitespace().collect();
        assert!(text.lines().any(|found| found.split_whitespace().collect::<Vec<_>>() == words), "{line}: {text}");
    }
    let shown = parsed(&said(here.path(), &["runs", "show", "runs/b", "--format", "json"]));
    assert_eq!(shown["metrics"], json!({"eval_nll": 1.5, "loss": 4.0}));
    assert_eq!(shown["params"]["ema_decay"], 0.5);
    let markdown = said(here.path(), &["runs", "show", "runs/b", "--format", "markdown"]);
    assert!(markdown.contains("| metric | last value |\n|---|---|\n| eval_nll | 1.5000 |\n"), "{markdown}");
    let (code, _, stderr) = outcome(here.path(), &["runs", "show", "runs"]);
    assert_eq!((code, stderr.as_str()), (Some(1), "error: runs is no run directory: it has no manifest.json\n"));
}

#[test]
fn two_runs_are_compared() {
    let here = workplace();
    let markdown = said(here.path(), &["runs", "diff", "runs/a", "runs/sweep/d", "--format", "markdown"]);
    assert_eq!(
        markdown,
        "\
| parameter | runs/a | runs/sweep/d |
|---|---|---|
| ema_decay | 0.5 | 0.9 |

| pipeline | runs/a | runs/sweep/d |
|---|---|---|
| nodes.ema.with.decay | 0.5 | 0.9 |

| metric | runs/a | runs/sweep/d | difference |
|---|---|---|---|
| eval_nll | 1.0000 | - | - |
| loss | 2.0000 | 1.2500 | -0.7500 |
"
    );
    let diff = parsed(&said(here.path(), &["runs", "diff", "runs/a", "runs/b", "--format", "json"]));
    assert_eq!(diff["params"], json!({}));
    assert_eq!(diff["pipeline"], json!({"run.seed": [1, 2]}));
    assert_eq!(diff["metrics"], json!({"eval_nll": [1.0, 1.5], "loss": [2.0, 4.0]}));
    assert!(said(here.path(), &["runs", "diff", "runs/a", "runs/b"]).contains("(no differences)"));
}

#[test]
fn tables_have_means_and_deviations_over_seeds() {
    let here = workplace();
    // Losses 2, 4, 6: mean 4, squares 4 + 0 + 4 over n - 1 = 2, so 2. eval_nll 1 and 1.5: mean 1.25, squares 2 / 16 over
    // 1, so sqrt(0.125) = 0.3536.
    assert_eq!(
        said(here.path(), &["runs", "table", "--format", "markdown"]),
        "\
| ema_decay | n | loss | eval_nll |
|---|---|---|---|
| 0.5 | 3 | 4.0000 ± 2.0000 | 1.2500 ± 0.3536 |
| 0.9 | 1 | 1.2500 | - |
"
    );
    let table = parsed(&said(here.path(), &["runs", "table", "--metric", "loss", "--format", "json"]));
    assert_eq!(table[0]["params"], json!({"ema_decay": 0.5}));
    assert_eq!(table[0]["seeds"], json!([1, 2, 3]));
    assert_eq!(table[0]["metrics"], json!({"loss": {"n": 3, "mean": 4.0, "std": 2.0}}));
    assert_eq!(table[1]["metrics"]["loss"]["std"], Value::Null);
    let text = said(here.path(), &["runs", "table", "runs/a", "runs/b"]);
    assert_eq!(text, "pipeline  n             loss         eval_nll\np.yaml    2  3.0000 ± 1.4142  1.2500 ± 0.3536\n");

    let (_, _, stderr) = outcome(here.path(), &["runs", "table"]);
    assert_eq!(stderr, "left out, since not finished: 2 runs\n");
    let (code, _, stderr) = outcome(here.path(), &["runs", "table", "--metric", "los"]);
    assert_eq!((code, stderr.as_str()), (Some(1), "error: no run has the metric `los`; did you mean `loss`?\n"));
    let (code, _, stderr) = outcome(here.path(), &["runs", "table", "runs/failed"]);
    assert_eq!((code, stderr.as_str()), (Some(1), "error: no run is finished\n"));
}

#[test]
fn what_differs_in_more_than_its_seed_is_not_averaged() {
    let here = tempfile::tempdir().unwrap();
    let runs = here.path().join("runs");
    for (name, seed, loss) in [("a", 1, 2.0), ("b", 2, 4.0), ("c", 3, 6.0), ("d", 4, 8.0)] {
        write_run(&runs, name, 0.5, seed, &finished(), &[loss]);
    }
    // The file was edited before the third run, without any of its params; and the data before the fourth.
    let pipeline = runs.join("c/pipeline.yaml");
    let text = fs::read_to_string(&pipeline).unwrap();
    fs::write(&pipeline, text.replace("\"decay\":0.5", "\"decay\":0.75")).unwrap();
    let manifest = runs.join("d/manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"files\":{}", r#""files":{"chats.jsonl":{"bytes":3,"sha256":"abc"}}"#))
        .unwrap();
    assert_eq!(
        said(here.path(), &["runs", "table", "--format", "markdown"]),
        "\
| pipeline | nodes.ema.with.decay | sha256 of chats.jsonl | n | loss |
|---|---|---|---|---|
| p.yaml | 0.5 | - | 2 | 3.0000 ± 1.4142 |
| p.yaml | 0.75 | - | 1 | 6.0000 |
| p.yaml | 0.5 | abc | 1 | 8.0000 |
"
    );
}

#[test]
fn a_seed_that_ran_twice_is_told() {
    let here = tempfile::tempdir().unwrap();
    let runs = here.path().join("runs");
    for (name, seed, loss) in [("a", 1, 2.0), ("b", 1, 2.0), ("c", 3, 5.0)] {
        write_run(&runs, name, 0.5, seed, &finished(), &[loss]);
    }
    // Losses 2, 2, 5: mean 3, squares 1 + 1 + 4 over 2.
    assert_eq!(
        said(here.path(), &["runs", "table"]),
        "\
pipeline  n          seeds             loss
p.yaml    3  1 (2 runs), 3  3.0000 ± 1.7321
note: runs with the same seed are repetitions, no further samples; n counts every run
"
    );
    let table = parsed(&said(here.path(), &["runs", "table", "--format", "json"]));
    assert_eq!(table[0]["seeds"], json!([1, 1, 3]));
    assert_eq!(table[0]["repeated_seeds"], json!([1]));
}

#[test]
fn a_run_of_a_sweep_that_never_began_is_told_as_failed() {
    let here = tempfile::tempdir().unwrap();
    let sweep = here.path().join("runs/s");
    write_run(&here.path().join("runs/s"), "ema_decay=0.5", 0.5, 1, &finished(), &[2.0]);
    let job = |decay: f64| {
        let params = json!({"ema_decay": decay});
        json!({"name": format!("ema_decay={decay}"), "params": params, "seed": 1, "pipeline_sha256": ""})
    };
    let queue = json!({
        "pipeline": "p.yaml", "overrides": [], "fixed": {"steps": 2}, "parent": "runs",
        "jobs": [job(0.5), job(0.75), job(0.875)],
    });
    fs::write(sweep.join("sweep.json"), queue.to_string()).unwrap();
    // The second one said why; the third has not had its turn.
    fs::create_dir(sweep.join("ema_decay=0.75")).unwrap();
    fs::write(sweep.join("ema_decay=0.75.log"), "error: cannot read chats.jsonl\n").unwrap();
    let list = parsed(&said(here.path(), &["runs", "ls", "--format", "json"]));
    let found: Vec<_> = list.as_array().unwrap().iter().map(|run| (run["run"].clone(), run["state"].clone())).collect();
    assert_eq!(
        found,
        [(json!("runs/s/ema_decay=0.5"), json!("finished")), (json!("runs/s/ema_decay=0.75"), json!("failed"))]
    );
    assert_eq!(list[1]["error"], "error: cannot read chats.jsonl");
    assert_eq!(list[1]["params"], json!({"steps": 2, "ema_decay": 0.75}));
    let text = said(here.path(), &["runs", "ls", "runs/s"]);
    assert!(text.contains("failed"), "{text}");
}

#[test]
fn a_damaged_run_does_not_hide_the_others() {
    let here = workplace();
    let runs = here.path().join("runs");
    fs::write(runs.join("b/manifest.json"), "{\"pipeline\": \"p.ya").unwrap();
    fs::write(runs.join("c/metrics.jsonl"), "{\"step\":0,\"loss\":9.0}\nno json\n").unwrap();
    let (code, stdout, stderr) = outcome(here.path(), &["runs", "ls"]);
    assert_eq!(code, Some(0), "{stderr}");
    for run in ["runs/b", "runs/c"] {
        let row: Vec<&str> = stdout.lines().find(|line| line.starts_with(run)).unwrap().split_whitespace().collect();
        assert_eq!(row, [run, "-", "unreadable", "-", "-", "-"]);
    }
    assert_eq!(stdout.lines().count(), 7, "{stdout}");
    assert!(stderr.contains("warning: runs/b/manifest.json: EOF while parsing"), "{stderr}");
    assert!(stderr.contains("warning: runs/c/metrics.jsonl:2: expected"), "{stderr}");

    let list = parsed(&said(here.path(), &["runs", "ls", "--format", "json"]));
    let b = list.as_array().unwrap().iter().find(|run| run["run"] == "runs/b").unwrap();
    assert_eq!(b["state"], "unreadable");
    assert!(b["error"].as_str().unwrap().contains("EOF while parsing"), "{b}");

    let pipeline = runs.join("sweep/d/pipeline.yaml");
    fs::write(pipeline, "nodes: {").unwrap();
    let (code, stdout, stderr) = outcome(here.path(), &["runs", "table", "-m", "loss"]);
    assert_eq!(code, Some(0), "{stderr}");
    let last: Vec<&str> = stdout.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(last, ["p.yaml", "1", "2.0000"]);
    for warning in ["runs/b/manifest.json: ", "runs/c/metrics.jsonl:2: ", "runs/sweep/d/pipeline.yaml: "] {
        assert!(stderr.contains(&format!("warning: {warning}")), "{warning}: {stderr}");
    }
}
