//! Small Python programs at the other end of `subprocess`: what comes back, and what happens when they misbehave.

use std::path::Path;
use std::time::{Duration, Instant};

use sapo_flow_engine::{Retracted, Retraction, Sample};

use super::*;
use crate::item::Part;
use crate::testing::{Harness, pair, tiny_tokenizer};

/// A harness, a tokenizer, and an operator over a Python program.
struct Setup {
    harness: Harness,
    tokenizer: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        Setup { harness: Harness::new(), tokenizer: tiny_tokenizer() }
    }

    fn start(&self, program: &str, with: &str) -> Result<Subprocess, OperatorError> {
        let path = self.harness.write("program.py", program);
        let mut operator: Subprocess = self.harness.build(&format!(
            "{{command: [python3, '{path}'], tokenizer: '{}'{}{with}}}",
            self.tokenizer.path().display(),
            if with.is_empty() { "" } else { ", " }
        ))?;
        operator.start(Inputs::default())?;
        Ok(operator)
    }

    /// What a program's answers to one sample lead to.
    fn refusal(&self, program: &str, with: &str) -> String {
        let mut operator = self.start(program, with).unwrap();
        let error = step(&mut operator, 0, vec![sample(0, &[6, 1])]).expect_err("the program misbehaves");
        error.to_string()
    }
}

fn sample(position: u32, response: &[u32]) -> Record {
    Record::Sample(
        Sample {
            step: 3,
            position,
            origin: "made".into(),
            source: "data".into(),
            row: 9,
            prompt_ids: vec![0, 2, 5, 1],
            response_ids: response.to_vec(),
            weights_version: Some(2),
            seed: Some(8),
            values: [("known".to_owned(), 0.5)].into(),
        }
        .into(),
    )
}

fn step(operator: &mut Subprocess, step: u64, records: Vec<Record>) -> Result<(Vec<Record>, Metrics), OperatorError> {
    let outputs = operator.step(step, Inputs::new(vec![("records", records)]))?;
    let (mut records, mut metrics) = (Vec::new(), Metrics::default());
    for (port, record) in outputs.records {
        match record {
            Record::Metrics(found) => metrics = Metrics::clone(&found),
            other => {
                assert_eq!(port, "records");
                records.push(other);
            }
        }
    }
    Ok((records, metrics))
}

fn items(records: &[Record]) -> Vec<Item> {
    records.iter().filter_map(|record| Item::of(record.clone()).ok()).collect()
}

/// Writes down what it gets; scores by words, and drops single words.
const SCORER: &str = r#"
import json, sys
with open(sys.argv[0] + ".got", "w") as got:
    for line in sys.stdin:
        got.write(line)
        record = json.loads(line)
        words = len(record["response"].split())
        answer = {"id": record["id"], "drop": True} if words == 1 else {"id": record["id"], "values": {"score": words / 4}}
        print(json.dumps(answer), flush=True)
"#;

#[test]
fn values_come_back_in_order_and_retractions_stay_in_place() {
    let setup = Setup::new();
    // Batches of two: the three samples make two exchanges.
    let mut operator = setup.start(SCORER, "batch_size: 2, send: [text, tokens, values, origin]").unwrap();
    let retraction = Record::Retraction(Retraction {
        port_type: PortType::Samples,
        of: Retracted::Record { origin: "made".into(), step: 1, position: 0 },
        because: None,
    });
    let records = vec![sample(0, &[6, 7, 1]), retraction.clone(), sample(1, &[6, 1]), sample(2, &[5, 6, 7])];
    let (found, metrics) = step(&mut operator, 7, records).unwrap();
    assert!(
        matches!(&found[1], Record::Retraction(found) if Record::Retraction(found.clone()).port_type() == PortType::Samples)
    );
    let items = items(&found);
    assert_eq!(found.len(), 3);
    assert_eq!(items.iter().map(|item| item.values()["score"]).collect::<Vec<_>>(), [0.5, 0.75]);
    assert!(items.iter().all(|item| item.values()["known"] == 0.5 && item.weights_version() == Some(2)));
    // Two scores, 2/4 and 3/4.
    let expected = [("node/dropped", 1.0), ("node/records", 3.0), ("node/restarts", 0.0), ("node/score", 0.625)];
    assert_eq!(metrics.values, expected.map(|(name, value)| (name.to_owned(), value)).into());
    operator.finish().unwrap();

    let got: Vec<serde_json::Value> =
        setup.harness.read("program.py.got").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        got[0],
        serde_json::json!({
            "id": "7.0", "prompt": "<s> <user> hi </s>", "response": "a b",
            "prompt_ids": [0, 2, 5, 1], "response_ids": [6, 7, 1], "values": {"known": 0.5},
            "source": "data", "row": 9, "origin": "made", "step": 3, "position": 0,
        })
    );
    assert_eq!(got.iter().map(|line| line["id"].as_str().unwrap()).collect::<Vec<_>>(), ["7.0", "7.2", "7.3"]);
}

#[test]
fn texts_can_be_replaced() {
    let program = r#"
import json, sys
for line in sys.stdin:
    record = json.loads(line)
    print(json.dumps({"id": record["id"], "chosen": record["rejected"], "rejected": "b a b"}), flush=True)
"#;
    let setup = Setup::new();
    let mut operator = setup.start(program, "").unwrap();
    let mut given = pair(4, &[0, 5], &[6, 1], Some(&[7, 1]));
    given.segment = Some(sapo_flow_engine::Segment { start: 0, len: 1, ended: false });
    (given.weights_version, given.seed) = (Some(1), Some(1));
    let (found, _) = step(&mut operator, 0, vec![Record::Pair(given.clone().into())]).unwrap();
    // The texts as tokens, with the EOS that the program need not know of; nothing more is known of how they came to be.
    let mut expected = pair(4, &[0, 5], &[7, 1], Some(&[7, 6, 7, 1]));
    expected.position = given.position;
    assert_eq!(items(&found), [Item::Pair(expected.into())]);
}

#[test]
fn a_program_that_ends_is_named_with_its_last_words() {
    let program = "import sys\nsys.stdin.readline()\nprint('no such model', file=sys.stderr)\nsys.exit(3)\n";
    let error = Setup::new().refusal(program, "");
    assert!(error.starts_with("`python3 "), "{error}");
    assert!(
        error.ends_with(
            "program.py` ended (exit status: 3) when 1 of 1 answers were missing; its standard error ended in\n    no such model"
        ),
        "{error}"
    );
    let mut operator: Subprocess =
        Setup::new().harness.build("{command: [no-such-program, -x], send: [values]}").unwrap();
    let error = operator.start(Inputs::default()).expect_err("there is none").to_string();
    assert!(error.starts_with("cannot start `no-such-program -x`: No such file"), "{error}");
}

#[test]
fn it_is_started_again_as_often_as_allowed() {
    // Fails as long as fewer than two have been started before it.
    let program = r#"
import os, sys
marks = [sys.argv[0] + ".0", sys.argv[0] + ".1"]
for mark in marks:
    if not os.path.exists(mark):
        open(mark, "w").close()
        sys.exit(1)
"#;
    let setup = Setup::new();
    let mut operator = setup.start(&format!("{program}{SCORER}"), "restarts: 2").unwrap();
    let (found, metrics) = step(&mut operator, 0, vec![sample(0, &[6, 7, 1])]).unwrap();
    assert_eq!(items(&found)[0].values()["score"], 0.5);
    assert_eq!(metrics.values["node/restarts"], 2.0);
    operator.finish().unwrap();

    let error = Setup::new().refusal(program, "restarts: 1");
    assert!(error.starts_with("started again once, and still: `python3"), "{error}");
}

#[test]
fn wrong_answers_are_refused_at_once() {
    let answering = |line: &str| format!("import sys\nfor line in sys.stdin:\n    print('{line}', flush=True)\n");
    for (line, expected) in [
        (
            "loading the model",
            "expected {\"id\": \"0.0\", ...} and nothing else on standard output, found expected value",
        ),
        ("{\"id\": \"0.1\"}", "expected the id \"0.0\", found \"0.1\"; the line is: {\"id\": \"0.1\"}"),
        ("{\"values\": {\"score\": 1}}", "missing field `id`"),
        ("{\"id\": \"0.0\", \"value\": {\"score\": 1}}", "unknown field `value`"),
        ("{\"id\": \"0.0\", \"values\": {\"score\": NaN}}", "found expected value"),
        ("{\"id\": \"0.0\", \"response\": \" \"}", "the response is empty"),
        ("{\"id\": \"0.0\", \"chosen\": \"a\"}", "Samples have no `chosen`"),
    ] {
        let error = Setup::new().refusal(&answering(line), "restarts: 3");
        assert!(error.contains(expected) && error.contains("row 9 (sample 0 of `made` at step 3)"), "{line}: {error}");
    }
    let setup = Setup::new();
    let twice = "import sys\nfor line in sys.stdin:\n    print('{\"id\": \"0.0\"}\\n{\"id\": \"0.0\"}', flush=True)\n";
    let mut operator = setup.start(twice, "").unwrap();
    step(&mut operator, 0, vec![sample(0, &[6, 1])]).unwrap();
    let error = operator.finish().expect_err("there is one answer more").to_string();
    assert!(error.ends_with("wrote 1 lines more than it was sent"), "{error}");
}

/// Whether a process is there, and no mere zombie.
fn is_running(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

#[test]
fn a_program_that_hangs_is_killed_with_what_it_started() {
    let program = r#"
import os, subprocess, sys, time
other = subprocess.Popen(["sleep", "600"])
with open(sys.argv[0] + ".new", "w") as pids:
    pids.write(f"{os.getpid()} {other.pid}")
os.rename(sys.argv[0] + ".new", sys.argv[0] + ".pids")
time.sleep(600)
"#;
    let setup = Setup::new();
    let mut operator = setup.start(program, "timeout_seconds: 0.2").unwrap();
    let pids = setup.harness.path("program.py.pids");
    await_that("it has started another", || pids.exists());
    let error = step(&mut operator, 0, vec![sample(0, &[6, 1])]).expect_err("it hangs").to_string();
    assert!(error.ends_with("was not done within 0.2 seconds, when 1 of 1 answers were missing"), "{error}");
    let pids = std::fs::read_to_string(pids).unwrap();
    await_that("both are gone", || !pids.split(' ').any(is_running));

    // So is one that is busy when its operator goes.
    std::fs::remove_file(setup.harness.path("program.py.pids")).unwrap();
    let operator = setup.start(program, "").unwrap();
    await_that("it has started another", || Path::new(&setup.harness.path("program.py.pids")).exists());
    let pids = setup.harness.read("program.py.pids");
    assert!(pids.split(' ').all(is_running));
    drop(operator);
    await_that("both are gone", || !pids.split(' ').any(is_running));
}

/// Wait until something holds, which it must.
fn await_that(what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < until, "waited in vain: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn full_pipes_do_not_stop_it() {
    // Answers at once with as much as it got, and says as much again on standard error: each far more than a pipe holds.
    let program = r#"
import json, sys
for line in sys.stdin:
    record = json.loads(line)
    print(json.dumps({"id": record["id"], "response": record["response"]}), flush=True)
    print(record["response"], file=sys.stderr, flush=True)
"#;
    let setup = Setup::new();
    let mut operator = setup.start(program, "batch_size: 64").unwrap();
    let response: Vec<u32> = std::iter::repeat_n(6, 50_000).chain([1]).collect();
    let (found, _) = step(&mut operator, 0, (0..20).map(|position| sample(position, &response)).collect()).unwrap();
    assert_eq!(found.len(), 20);
    assert!(items(&found).iter().all(|item| item.ids(Part::Response) == Some(&response[..])));
    operator.finish().unwrap();
}

#[test]
fn settings_are_checked() {
    let issues = |with: &str| -> Vec<String> {
        let issues = Subprocess::check(&serde_yaml::from_str(with).unwrap());
        issues.iter().map(|issue| format!("{}: {}", issue.key, issue.message)).collect()
    };
    assert_eq!(issues("{command: [a], send: [tokens]}"), [""; 0]);
    assert_eq!(
        issues("{command: [], send: [], timeout_seconds: 0, environment: {A=B: c}}"),
        [
            "command: expected a program and its arguments, found none",
            "send: expected some of text, tokens, values, origin, found none",
            "timeout_seconds: expected a number of seconds above 0, found 0",
            "environment: \"A=B\" is no name of an environment variable",
        ]
    );
    // No clock reaches that far.
    assert_eq!(
        issues("{command: [a], send: [tokens], timeout_seconds: 1e19}"),
        ["timeout_seconds: expected at most 1000000000 seconds, found 10000000000000000000"]
    );
    assert_eq!(issues("{command: [a]}"), ["tokenizer: is needed, since `send` has text"]);
}
