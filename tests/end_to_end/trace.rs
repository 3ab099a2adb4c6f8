//! `run --trace` writes what the run did, in the form that Perfetto reads: whole, resumed, or failed.

use std::fs;

use serde_json::Value;

use crate::workplace::{SAPO_ORPO, Workplace};

/// The events of a trace.
fn events(here: &Workplace, file: &str) -> Vec<Value> {
    let trace: Value = serde_json::from_str(&fs::read_to_string(here.path(file)).expect("it was written")).unwrap();
    trace["traceEvents"].as_array().expect("a list").clone()
}

/// The slices of a kind on a node's track, as number of the step, beginning and end in microseconds.
fn slices(events: &[Value], node: &str, kind: &str) -> Vec<(Option<u64>, f64, f64)> {
    let name = |event: &&Value| event["name"] == "thread_name" && event["args"]["name"] == node;
    let track = &events.iter().find(name).expect("the node has a track")["tid"];
    let slice = |event: &Value| {
        let (began, took) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
        (event["args"]["step"].as_u64(), began, began + took)
    };
    let of_kind = |event: &&Value| event["ph"] == "X" && event["tid"] == *track && event["cat"] == kind;
    events.iter().filter(of_kind).map(slice).collect()
}

/// Microseconds for which two nodes were at work on steps at the same time.
fn overlap(events: &[Value], one: &str, other: &str) -> f64 {
    let others = slices(events, other, "step");
    let pairs = slices(events, one, "step").into_iter().flat_map(|a| others.iter().map(move |b| (a, *b)));
    pairs.map(|(a, b)| (a.2.min(b.2) - a.1.max(b.1)).max(0.0)).sum()
}

#[test]
fn generation_overlaps_learning_where_staleness_lets_it() {
    let here = Workplace::new();
    here.pipeline("p.yaml", SAPO_ORPO);
    for (max_staleness, overlaps) in [("max_staleness=0", false), ("max_staleness=2", true)] {
        let out = format!("out-{overlaps}");
        let said = here.sapo_flow(&["run", "p.yaml", "--run-dir", &out, "--trace", "t.json", "-S", max_staleness]);
        assert_eq!(said.code, Some(0), "{}", said.stderr);
        let events = events(&here, "t.json");
        // Microseconds of floating point: what touches may seem to overlap by less than one.
        assert_eq!(overlap(&events, "segments", "learner") > 1.0, overlaps, "{max_staleness}");

        // The table at the end tells seconds with three decimals, from one second on with one.
        let table = said.stdout.lines().skip_while(|line| !line.ends_with("of the run")).skip(1);
        let mut nodes = 0;
        for line in table.take_while(|line| !line.starts_with("the engine")) {
            let [node, seconds, _] = line.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{line}") };
            let seconds: f64 = seconds.parse().unwrap();
            let steps = slices(&events, node, "step");
            assert_eq!(steps.iter().map(|slice| slice.0.unwrap()).collect::<Vec<_>>(), Vec::from_iter(0..16), "{node}");
            let sum = steps.iter().map(|(_, began, ended)| ended - began).sum::<f64>() / 1e6;
            let rounding = if seconds < 1.0 { 0.0006 } else { 0.051 };
            assert!((sum - seconds).abs() < rounding, "{node}: {sum} s of slices, {seconds} s in the table");
            nodes += 1;
        }
        assert!(nodes >= 3, "{}", said.stdout);
        let engine = said.stdout.lines().find_map(|line| line.strip_prefix("the engine ")).expect("it has a row");
        let [seconds, share] = engine.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{engine}") };
        assert!(seconds.parse::<f64>().unwrap() > 0.0 && share.ends_with('%'), "{engine}");
        for kind in ["build", "start", "finish"] {
            assert_eq!(slices(&events, "learner", kind).len(), 1, "{kind}");
        }
        // Every third step but the last.
        assert_eq!(slices(&events, "learner", "snapshot").len(), 5);
    }
}

#[test]
fn resumed_and_failed_runs_have_traces_too() {
    let here = Workplace::new();
    here.pipeline("p.yaml", SAPO_ORPO);
    here.run("p.yaml", "out", &[]);
    let said = here.sapo_flow(&["run", "--resume", "out", "--trace", "t.json"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    let resumed = events(&here, "t.json");
    assert_eq!(slices(&resumed, "learner", "step").iter().map(|slice| slice.0).collect::<Vec<_>>(), [Some(15)]);
    assert_eq!(slices(&resumed, "learner", "restore").len(), 1);

    fs::remove_file(here.path("model/model.safetensors")).unwrap();
    let said = here.sapo_flow(&["run", "p.yaml", "--run-dir", "failed", "--trace", "t.json"]);
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    let failed = events(&here, "t.json");
    assert_eq!(slices(&failed, "learner", "start").len(), 1);
    assert!(slices(&failed, "learner", "step").is_empty());
}

#[test]
fn a_trace_that_cannot_be_written_keeps_the_run_from_starting() {
    let here = Workplace::new();
    here.pipeline("p.yaml", SAPO_ORPO);
    for (file, reason) in [("nowhere/t.json", "No such file or directory"), ("model", "it is a directory")] {
        let said = here.sapo_flow(&["run", "p.yaml", "--run-dir", "out", "--trace", file]);
        assert_eq!(said.code, Some(1));
        assert!(said.stderr.contains(&format!("cannot write the trace {file}: {reason}")), "{}", said.stderr);
        assert!(!here.path("out").exists());
    }
}
