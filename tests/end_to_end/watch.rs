//! Data that is edited while the run goes on.

use std::fs;
use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStderr, Stdio};

use serde_json::{Value, json};

use crate::workplace::Workplace;

/// SAPO on data that is followed. `WATCH` is replaced.
const PIPELINE: &str = r#"
  prompts: {op: prompt_source, with: {path: chats.jsonl, tokenizer: model, batch_size: 3, watch: WATCH}}
  segments:
    op: segment_sampler
    in: {prompts: prompts, weights: {from: learner.weights, feedback: {max_staleness: "${max_staleness}"}}}
    with: {segment_tokens: 2, max_length: 48, max_prompt_tokens: 24}
  replay: {op: replay_buffer, in: segments, with: {capacity: 100000, draws: 3}}
  batches: {op: batcher, in: replay.pairs, with: {batch_size: 4, max_length: 48}}
  learner: {op: preference_learner, in: batches.batches, with: {model: model, objective: orpo, learning_rate: 1e-4, schedule: constant}}
  metrics: {op: metrics_sink, in: [learner.metrics, replay.metrics]}
  samples: {op: sample_sink, in: segments, with: {tokenizer: model, every: 1, count: 3}}
"#;

/// A run under way, and what it says.
struct Running {
    child: Child,
    said: Lines<BufReader<ChildStderr>>,
    heard: Vec<String>,
}

impl Running {
    fn begin(here: &Workplace, arguments: &[&str]) -> Self {
        let mut child =
            here.command(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it starts");
        let said = BufReader::new(child.stderr.take().expect("it is piped")).lines();
        Running { child, said, heard: Vec::new() }
    }

    /// The first line from here on that satisfies a condition.
    fn hear(&mut self, wanted: impl Fn(&str) -> bool) -> String {
        for line in self.said.by_ref() {
            let line = line.expect("it speaks UTF-8");
            self.heard.push(line.clone());
            if wanted(&line) {
                return line;
            }
        }
        panic!("it ended without saying so: {:?}", self.heard)
    }

    /// Until the run has written so many more steps' metrics.
    fn await_steps(&mut self, here: &Workplace, more: usize) {
        let written = || fs::read_to_string(here.path("out/metrics.jsonl")).map_or(0, |text| text.lines().count());
        let before = written();
        while written() < before + more {
            assert!(self.child.try_wait().expect("it is ours").is_none(), "it ended");
            std::thread::yield_now();
        }
    }

    /// Interrupt it, and wait for its end.
    fn interrupt(mut self) {
        let sent = std::process::Command::new("kill").args(["-INT", &self.child.id().to_string()]).status();
        assert!(sent.expect("there is a kill").success());
        let rest: Vec<String> = self.said.map_while(Result::ok).collect();
        assert_eq!(self.child.wait().expect("it is ours").code(), Some(130), "{rest:?}");
    }
}

fn append(here: &Workplace, text: &str) {
    let mut file = fs::OpenOptions::new().append(true).open(here.path("chats.jsonl")).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

fn row(user: &str, answer: &str) -> String {
    let turns = [("user", user), ("assistant", answer)];
    let messages = turns.map(|(role, content)| json!({"role": role, "content": content}));
    json!({ "messages": messages }).to_string()
}

fn lines(here: &Workplace, name: &str) -> Vec<Value> {
    let text = fs::read_to_string(here.path(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn edits_are_followed_recorded_and_repeated() {
    let here = Workplace::new();
    edit_a_run(&here);
    // The same again, without the data.
    fs::remove_file(here.path("chats.jsonl")).unwrap();
    here.pipeline("again.yaml", &PIPELINE.replace("WATCH", "{replay: out/edits/prompts.jsonl}"));
    let before = here.results("out");
    let again = here.run("again.yaml", "again", &[&format!("steps={}", before.metrics.len()), "max_staleness=1"]);
    for (ours, theirs) in again.metrics.iter().zip(&before.metrics) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(again.metrics.len(), before.metrics.len());
    assert!(again.samples == before.samples);
    let edits = |run: &str| fs::read(here.path(run).join("edits/prompts.jsonl")).unwrap();
    assert!(edits("again") == edits("out"));
}

/// A run into `out` that is interrupted once, with a row that goes and two that come.
fn edit_a_run(here: &Workplace) {
    here.pipeline("p.yaml", &PIPELINE.replace("WATCH", "true"));
    let arguments = ["run", "p.yaml", "--run-dir", "out", "-S", "steps=1000000", "-S", "max_staleness=1"];
    let mut run = Running::begin(here, &arguments);
    // A whole pass of 14 rows, three a step, so that the first row has been there.
    run.await_steps(here, 6);
    let text = fs::read_to_string(here.path("chats.jsonl")).unwrap();
    let without_first = text.split_once('\n').unwrap().1;
    here.write("chats.jsonl", without_first);
    let left = run.hear(|line| line.contains("left the buffer"));
    append(here, &(row("w50 w51", "w52 w53 w54 w55 w56") + "\n" + &row("w60", "w61 w62 w63 w64")[..20]));
    run.hear(|line| line.contains("1 row added"));
    run.await_steps(here, 2);
    run.interrupt();

    let mut run = Running::begin(here, &["run", "--resume", "out"]);
    run.await_steps(here, 2);
    append(here, &(row("w60", "w61 w62 w63 w64")[20..].to_owned() + "\n"));
    run.hear(|line| line.contains("1 row added"));
    run.await_steps(here, 2);
    run.interrupt();

    // What was recorded: 14 rows, then one that went and two that came.
    let edits = lines(here, "out/edits/prompts.jsonl");
    assert_eq!((edits.len(), edits[0]["added"].as_array().unwrap().len()), (4, 14));
    assert_eq!(edits[1]["removed"], json!([{"row": 0, "file": "chats.jsonl", "line": 1}]));
    let came = |edit: &Value| (edit["added"][0]["row"].as_u64().unwrap(), edit["step"].as_u64().unwrap());
    assert_eq!((came(&edits[2]).0, came(&edits[3]).0), (14, 15));

    // A row that comes is there at the step of its edit; of one that went, as many pairs left as had been made of it.
    let samples = lines(here, "out/samples.jsonl");
    let made = |row: u64| samples.iter().filter(move |line| line["row"] == row);
    for edit in &edits[2..] {
        let (row, step) = came(edit);
        assert_eq!(made(row).next().unwrap()["step"], step);
    }
    let gone = edits[1]["step"].as_u64().unwrap();
    assert!(made(0).all(|line| line["step"].as_u64().unwrap() < gone));
    let count = made(0).count();
    assert!(count > 0);
    let pairs = if count == 1 { "1 pair".to_owned() } else { format!("{count} pairs") };
    let expected = format!("replay: {pairs} left the buffer: chats.jsonl:1 (row 0 of `prompts`) was removed or edited");
    assert_eq!(left, expected);
    assert_eq!(samples.iter().filter(|line| line["retracted"]["row"] == 0).count(), count);
    let metrics = lines(here, "out/metrics.jsonl");
    let last = metrics.last().unwrap();
    assert_eq!(last["buffer/retracted"].as_f64(), Some(count as f64));
    let all = samples.iter().filter(|line| line["row"].is_u64()).count();
    assert_eq!(last["buffer/size"].as_f64(), Some((all - count) as f64));
}

#[test]
fn a_broken_row_that_is_added_stops_the_run_until_it_is_mended() {
    let here = Workplace::new();
    here.pipeline("p.yaml", &PIPELINE.replace("WATCH", "true"));
    let mut run = Running::begin(&here, &["run", "p.yaml", "--run-dir", "out", "-S", "steps=1000000"]);
    run.await_steps(&here, 8);
    append(&here, "{\"messages\": 3}\n");
    run.hear(|line| line.contains("chats.jsonl:15: `messages`: expected a list of messages, found a number"));
    assert_eq!(run.child.wait().unwrap().code(), Some(1));

    let text = fs::read_to_string(here.path("chats.jsonl")).unwrap();
    here.write("chats.jsonl", &text.replace("{\"messages\": 3}", &row("w70", "w71 w72 w73 w74")));
    let mut run = Running::begin(&here, &["run", "--resume", "out"]);
    run.hear(|line| line.contains("1 row added"));
    run.interrupt();
    assert_eq!(lines(&here, "out/edits/prompts.jsonl").len(), 2);
}

#[test]
fn watched_data_has_no_epochs() {
    let here = Workplace::new();
    let text = format!("{}{}", crate::workplace::HEAD, PIPELINE.trim_start_matches('\n').replace("WATCH", "true"));
    here.write("p.yaml", &text.replace("steps: \"${steps}\"", "epochs: \"${steps}\""));
    for arguments in [&["validate", "p.yaml"] as &[&str], &["run", "p.yaml", "--dry-run"], &["run", "p.yaml"]] {
        let said = here.sapo_flow(arguments);
        assert_eq!(said.code, Some(78), "{arguments:?}: {}", said.stderr);
        for expected in [
            "no source tells how many steps an epoch has",
            "`prompts` (prompt_source) does not, with its settings",
            "give `run: {steps: N}` instead of `epochs`",
        ] {
            assert!(said.stderr.contains(expected), "{}", said.stderr);
        }
    }
    let nodes = PIPELINE.replace("WATCH", "true, limit: 3").replace("path: chats.jsonl", "path: [chats.json]");
    here.pipeline("q.yaml", &nodes);
    let said = here.sapo_flow(&["validate", "q.yaml"]);
    assert_eq!(said.code, Some(78));
    for expected in ["expected no limit together with watch", "files, which can be followed, found chats.json"] {
        assert!(said.stderr.contains(expected), "{}", said.stderr);
    }
}
