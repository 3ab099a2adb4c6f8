//! The binary as people use it: exit codes, what it says, what it leaves on disk.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Three nodes and no model: rows, gathered into batches, counted.
const PIPELINE: &str = "version: 1
params: {batch_size: 2, steps: 3}
run: {steps: \"${steps}\", device: cpu}
nodes:
  prompts: {op: prompt_source, with: {path: rows.jsonl, tokenizer: model, batch_size: \"${batch_size}\"}}
  batches: {op: batcher, in: prompts, with: {batch_size: 8, max_length: 16}}
  metrics: {op: metrics_sink, in: batches.metrics}
";

const ROWS: &str = "{\"prompt\": \"t3 t4\", \"chosen\": \" t5\"}
{\"prompt\": \"t6\", \"chosen\": \" t7 t8\"}
{\"prompt\": \"t9\", \"chosen\": \" t10\"}
";

struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn command(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sapo-flow"));
    command.current_dir(directory).args(arguments).env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

fn sapo_flow(directory: &Path, arguments: &[&str]) -> Said {
    let output = command(directory, arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Said { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A directory with a pipeline, its rows, and a tokenizer for them.
fn workplace() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("p.yaml"), PIPELINE).unwrap();
    fs::write(directory.path().join("rows.jsonl"), ROWS).unwrap();
    fs::create_dir(directory.path().join("model")).unwrap();
    write_tokenizer(&directory.path().join("model"));
    directory
}

/// The word for a token. The one that ends texts is no part of others, since it is cut out before words are.
fn word(id: u64) -> String {
    if id == 2 { "</s>".to_owned() } else { format!("t{id}") }
}

/// A tokenizer of these words; its chats are their contents with blanks between.
fn write_tokenizer(directory: &Path) {
    let vocabulary: serde_json::Map<String, Value> = (0..1000).map(|id| (word(id), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": word(0)},
    });
    let config = json!({
        "eos_token": word(2),
        "chat_template": "{% for message in messages %}{{ message.content }} {% endfor %}",
    });
    fs::write(directory.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(directory.join("tokenizer_config.json"), config.to_string()).unwrap();
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn wrong_usage_exits_with_2() {
    let here = tempfile::tempdir().unwrap();
    for (arguments, complaint) in [
        (&["trian", "p.yaml"][..], "unrecognized subcommand 'trian'"),
        (&["run", "p.yaml", "--fast"], "unexpected argument '--fast'"),
        (&["run", "p.yaml", "-S", "steps"], "expected NAME=VALUE"),
        (&["run", "p.yaml", "--resume", "d", "--run-dir", "e"], "cannot be used with"),
        (&["run"], "which pipeline?"),
        (&["run", "--resume"], "which pipeline?"),
        (&["validate"], "required"),
        (&["operators", "batchr"], "there is no operator `batchr`; did you mean `batcher`?"),
        (&["run", "p.yaml", "--dry-run", "--run-dir", "e"], "cannot be used with"),
        (&["sweep", "p.yaml", "--dry-run", "--sweep-dir", "e"], "cannot be used with"),
        (&["generate", "--model", "m"], "required"),
        (
            &["generate", "--model", "m", "--prompt", "a", "--temperature", "0", "--top-p", "0.9"],
            "--top-p has no effect",
        ),
        (&["generate", "--model", "m", "--prompt", "a", "--temperature", "0", "--top-k", "5"], "--top-k has no effect"),
        (&["generate", "--model", "m", "--prompt", "a", "--temperature", "0", "--seed", "42"], "--seed has no effect"),
        (&["generate", "--model", "m", "--prompt", "a", "--message", "user=b"], "cannot be used with"),
    ] {
        let said = sapo_flow(here.path(), arguments);
        assert_eq!(said.code, Some(2), "{arguments:?}: {}", said.stderr);
        assert!(said.stderr.contains(complaint), "{arguments:?}: {}", said.stderr);
        assert_eq!(said.stdout, "");
    }
}

#[test]
fn an_invalid_pipeline_exits_with_78_and_tells_all_its_errors() {
    let here = workplace();
    let broken = PIPELINE.replace("op: batcher", "op: batchr").replace("batches.metrics", "prompts.prompts");
    fs::write(here.path().join("broken.yaml"), broken).unwrap();
    let expected = "\
error: unknown operator `batchr`
 --> broken.yaml:6:17
  |
6 |   batches: {op: batchr, in: prompts, with: {batch_size: 8, max_length: 16}}
  |                 ^^^^^^
  = help: did you mean `batcher`?

error: `prompts.prompts` carries Prompts, but the input `metrics` of `metrics_sink` takes Metrics
 --> broken.yaml:7:35
  |
7 |   metrics: {op: metrics_sink, in: prompts.prompts}
  |                                   ^^^^^^^^^^^^^^^ expected Metrics

broken.yaml: invalid, 2 errors, 0 warnings
";
    for verb in ["validate", "run", "graph"] {
        let said = sapo_flow(here.path(), &[verb, "broken.yaml"]);
        assert_eq!((said.code, said.stderr.as_str(), said.stdout.as_str()), (Some(78), expected, ""));
    }
    let said = sapo_flow(here.path(), &["validate", "broken.yaml", "p.yaml", "missing.yaml"]);
    assert_eq!(said.code, Some(78));
    assert_eq!(said.stdout, "p.yaml: ok, 3 nodes, 2 edges\n");
    assert!(said.stderr.contains("error: cannot read `missing.yaml`"), "{}", said.stderr);

    let said = sapo_flow(here.path(), &["validate", "p.yaml", "-S", "batch_sise=3"]);
    assert_eq!(said.code, Some(78));
    assert!(said.stderr.contains("did you mean `batch_size`?"), "{}", said.stderr);
}

#[test]
fn graphs_are_drawn() {
    let here = workplace();
    let said = sapo_flow(here.path(), &["graph", "p.yaml"]);
    assert_eq!(said.code, Some(0));
    assert_eq!(
        said.stdout,
        r#"flowchart LR
    prompts["prompts<br/><small>prompt_source</small>"]
    batches["batches<br/><small>batcher</small>"]
    metrics["metrics<br/><small>metrics_sink</small>"]
    prompts -->|"Prompts"| batches
    batches -->|"Metrics"| metrics
"#
    );
    let said = sapo_flow(here.path(), &["graph", "p.yaml", "--format", "dot"]);
    assert!(said.stdout.starts_with("digraph pipeline {\n"), "{}", said.stdout);
}

#[test]
fn operators_are_documented_from_the_registry() {
    let here = tempfile::tempdir().unwrap();
    let registry = sapo_flow_operators::registry();
    let list = sapo_flow(here.path(), &["operators"]).stdout;
    let table = sapo_flow(here.path(), &["operators", "--format", "markdown"]).stdout;
    let json: Value = serde_json::from_str(&sapo_flow(here.path(), &["operators", "--format", "json"]).stdout).unwrap();
    for (index, operator) in registry.iter().enumerate() {
        assert!(list.lines().nth(index).is_some_and(|line| line.starts_with(operator.name)), "{list}");
        assert!(table.contains(&format!("| `{}` |", operator.name)), "{table}");
        assert_eq!(json[index]["name"], operator.name);
    }
    let page = sapo_flow(here.path(), &["operators", "batcher"]).stdout;
    assert!(page.contains("    batch_size: an integer, required\n"), "{page}");
    let page = sapo_flow(here.path(), &["operators", "batcher", "--format", "json"]).stdout;
    let page: Value = serde_json::from_str(&page).unwrap();
    assert_eq!(page["schema"]["properties"]["batch_size"]["type"], "integer");
}

#[test]
fn threads_are_those_that_openmp_is_to_have() {
    let here = workplace();
    let threads = |variable: &str, run: &str, more: &[&str]| {
        let mut command = command(here.path(), &[&["run", "p.yaml", "--run-dir", run], more].concat());
        assert!(command.env("OMP_NUM_THREADS", variable).output().unwrap().status.success());
        read_json(&here.path().join(run).join("manifest.json"))["threads"].clone()
    };
    assert_eq!(threads("3,2", "a", &[]), 3);
    assert_eq!(threads("3", "b", &["--threads", "1"]), 1);
}

#[test]
fn a_run_leaves_its_directory_behind() {
    let here = workplace();
    let said = sapo_flow(here.path(), &["run", "p.yaml", "-S", "batch_size=3", "--run-dir", "out"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(said.stdout.ends_with("run    out\n"), "{}", said.stdout);
    assert!(said.stderr.contains("step 3/3"), "{}", said.stderr);

    let out = here.path().join("out");
    assert_eq!(fs::read_to_string(out.join("metrics.jsonl")).unwrap().lines().count(), 3);
    let manifest = read_json(&out.join("manifest.json"));
    assert_eq!(manifest["seed"], 42);
    assert_eq!(manifest["device"], "cpu");
    assert_eq!(manifest["files"]["rows.jsonl"]["bytes"], ROWS.len());
    // As the program sha256sum says.
    let sha256 = "12c9365c5607813d38b031cdfb939c3a237038cd555c975b32ae3d043b93e7bb";
    assert_eq!(manifest["files"]["rows.jsonl"]["sha256"], sha256);
    assert!(manifest["files"]["model/tokenizer.json"].is_object(), "{manifest}");
    assert_eq!(manifest["processes"][0]["libtorch"], "2.11.0");
    assert_eq!(manifest["processes"][0]["command_line"][3], "-S");

    // The resolved pipeline runs as it is, and gives the same.
    let resolved = fs::read_to_string(out.join("pipeline.yaml")).unwrap();
    assert!(resolved.contains("batch_size: 3") && !resolved.contains("params"), "{resolved}");
    let said = sapo_flow(here.path(), &["run", "out/pipeline.yaml", "--run-dir", "again"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    let metrics = |run: &str| fs::read(here.path().join(run).join("metrics.jsonl")).unwrap();
    assert_eq!(metrics("again"), metrics("out"));
}

#[test]
fn a_run_directory_is_never_overwritten() {
    let here = workplace();
    fs::create_dir(here.path().join("out")).unwrap();
    fs::write(here.path().join("out/precious"), "data").unwrap();
    let said = sapo_flow(here.path(), &["run", "p.yaml", "--run-dir", "out"]);
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains("the run directory out is not empty"), "{}", said.stderr);
    assert_eq!(fs::read_dir(here.path().join("out")).unwrap().count(), 1);

    for _ in 0..2 {
        assert_eq!(sapo_flow(here.path(), &["run", "p.yaml"]).code, Some(0));
    }
    let names: Vec<String> = fs::read_dir(here.path().join("runs"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(names.iter().all(|name| name.starts_with("p-20")), "{names:?}");
}

#[test]
fn quiet_is_quiet() {
    let here = workplace();
    let said = sapo_flow(here.path(), &["run", "p.yaml", "--quiet"]);
    assert_eq!((said.code, said.stdout.as_str(), said.stderr.as_str()), (Some(0), "", ""));
}

#[test]
fn a_failing_run_exits_with_1_and_names_the_node() {
    let here = workplace();
    fs::write(here.path().join("rows.jsonl"), "{\"prompt\": \"t3\", \"chosen\": 5}\n").unwrap();
    let said = sapo_flow(here.path(), &["run", "p.yaml"]);
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains("node `prompts`") && said.stderr.contains("rows.jsonl:1"), "{}", said.stderr);
    assert_eq!(said.stdout, "");
}

#[test]
fn a_dry_run_only_tells() {
    let here = workplace();
    let said = sapo_flow(here.path(), &["run", "p.yaml", "--dry-run", "-S", "steps=5"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    let expected = "\
p: 3 nodes, 2 edges

node     operator       reads
prompts  prompt_source
batches  batcher        prompts.prompts
metrics  metrics_sink   batches.metrics

steps       5 (an epoch has 2)
device      cpu, computing in float32, master weights in float32
workers     1: a run is one process with one dataflow worker, and a thread for each node that computes
";
    assert!(said.stdout.starts_with(expected), "{}", said.stdout);
    assert!(!here.path().join("runs").exists());
}

#[test]
fn a_dry_run_estimates_memory() {
    let here = workplace();
    golden_model(&here.path().join("model"));
    let learning = "  learner: {op: preference_learner, in: batches.batches, \
                    with: {model: model, objective: sft, learning_rate: 0.1}}\n  \
                    ema: {op: ema, in: learner.weights, with: {decay: 0.5}}\n";
    fs::write(here.path().join("learning.yaml"), format!("{PIPELINE}{learning}")).unwrap();
    let said = sapo_flow(here.path(), &["run", "learning.yaml", "--dry-run"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    let read = fs::File::open(here.path().join("model/model.safetensors")).unwrap();
    let mut header = [0; 8];
    std::io::Read::take(read, 8).read_exact(&mut header).unwrap();
    let file = fs::metadata(here.path().join("model/model.safetensors")).unwrap().len();
    // Weights in float32 are the file without its header; the learner has two moments besides.
    let weights = file - 8 - u64::from_le_bytes(header);
    for expected in [
        format!("learner keeps {} KiB; works with ", (3 * weights + 512) / 1024),
        format!("ema keeps {} KiB\n", (weights + 512) / 1024),
        "note        learner: at most: 2 pairs, every sequence 16 tokens long\n".to_owned(),
    ] {
        assert!(said.stdout.contains(&expected), "{expected}: {}", said.stdout);
    }
    assert!(!said.stdout.contains("max_position_embeddings"), "{}", said.stdout);
    // Two versions that a sampler may still read, and during an update the third.
    let sampling = "  segments: {op: segment_sampler, in: {prompts: prompts, weights: {from: learner, feedback: \
                    {max_staleness: 1}}}, with: {segment_tokens: 4, max_length: 16, max_prompt_tokens: 8}}\n";
    fs::write(here.path().join("ahead.yaml"), format!("{PIPELINE}{learning}{sampling}")).unwrap();
    let said = sapo_flow(here.path(), &["run", "ahead.yaml", "--dry-run"]);
    // 1.6 MiB with the two moments; 1.3 without that third one.
    assert!((5 * weights + (1 << 19)) >> 20 == 2 && (4 * weights + (1 << 19)) >> 20 == 1);
    assert!(said.stdout.contains("learner keeps 2 MiB; works with "), "{}", said.stdout);
    let config = read_json(&here.path().join("model/config.json"));
    let longer = format!("{PIPELINE}{learning}").replace("max_length: 16", "max_length: 4000");
    fs::write(here.path().join("learning.yaml"), longer).unwrap();
    let said = sapo_flow(here.path(), &["run", "learning.yaml", "--dry-run"]);
    let note =
        format!("more than the model was made for: max_position_embeddings {}", config["max_position_embeddings"]);
    assert!(
        said.stdout.contains("learner: sequences of up to 4000 tokens") && said.stdout.contains(&note),
        "{}",
        said.stdout
    );
}

/// Run until the first steps are done, then interrupt; what was said on standard error.
fn interrupted(directory: &Path, arguments: &[&str]) -> Vec<String> {
    let mut child = command(directory, arguments).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut said: Vec<String> = Vec::new();
    while !said.last().is_some_and(|line| line.starts_with("step ")) {
        said.push(lines.next().expect("the run goes on until it is interrupted"));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    said.extend(lines);
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said:?}");
    said
}

#[test]
fn an_interrupted_run_stores_a_checkpoint_and_goes_on() {
    let here = workplace();
    let said = interrupted(here.path(), &["run", "p.yaml", "-S", "steps=100000000", "--run-dir", "out"]);
    let last = said.last().unwrap();
    assert!(last.ends_with("go on with: sapo-flow run --resume out"), "{said:?}");
    let step: u64 = last.split(' ').nth(2).unwrap().parse().unwrap();

    let said = interrupted(here.path(), &["run", "--resume", "out"]);
    assert!(said.contains(&format!("training from step {step}: 100000000 steps")), "{said:?}");
    let manifest = read_json(&here.path().join("out/manifest.json"));
    assert_eq!(manifest["processes"][1]["first_step"], step);

    let directory = here.path().canonicalize().unwrap();
    let elsewhere = sapo_flow(&directory.join("model"), &["run", "--resume", "../out"]);
    let began = format!("the run began in {}: its paths were relative to that", directory.display());
    assert!(elsewhere.code == Some(1) && elsewhere.stderr.contains(&began), "{}", elsewhere.stderr);

    // Data that is not what it was is refused by name.
    fs::write(here.path().join("rows.jsonl"), ROWS.replace("t9", "t11")).unwrap();
    let said = sapo_flow(here.path(), &["run", "--resume", "out"]);
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains("rows.jsonl has changed since the run began"), "{}", said.stderr);
    // And so is another pipeline.
    let said = sapo_flow(here.path(), &["run", "p.yaml", "--resume", "out"]);
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains("different pipeline"), "{}", said.stderr);
    assert!(said.stderr.contains("run.steps was 100000000, and is 3 now"), "{}", said.stderr);
    assert!(said.stderr.contains("sapo-flow run --resume out"), "{}", said.stderr);
}

#[test]
fn what_holds_no_run_cannot_be_resumed() {
    let here = workplace();
    fs::create_dir(here.path().join("empty")).unwrap();
    for (directory, found) in [("nowhere", "is no directory"), ("empty", "holds no run")] {
        for arguments in [&["run", "--resume", directory][..], &["run", "p.yaml", "--resume", directory]] {
            let said = sapo_flow(here.path(), arguments);
            let expected = format!("error: cannot resume: {directory} {found}\n");
            assert_eq!((said.code, said.stderr), (Some(1), expected), "{arguments:?}");
        }
    }
    assert_eq!(fs::read_dir(here.path().join("empty")).unwrap().count(), 0);

    // A run's directory where a pipeline is expected.
    assert_eq!(sapo_flow(here.path(), &["run", "p.yaml", "--run-dir", "out"]).code, Some(0));
    let said = sapo_flow(here.path(), &["run", "out"]);
    assert_eq!(said.code, Some(2));
    assert!(said.stderr.contains("go on with it by `sapo-flow run --resume out`"), "{}", said.stderr);
}

#[test]
fn the_log_tells_what_happens_and_how_long_it_takes() {
    let here = workplace();
    let log = |filter: &str, arguments: &[&str]| {
        let output = command(here.path(), arguments).env("RUST_LOG", filter).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{text}");
        text
    };
    let has = |text: &str, parts: &[&str]| {
        let found = text.lines().any(|line| parts.iter().all(|part| line.contains(part)));
        assert!(found, "{parts:?}: {text}");
    };
    let run = ["run", "p.yaml", "--run-dir", "out", "--quiet"];
    let text = log("debug", &run);
    has(&text, &["DEBUG", "node started", "node=\"prompts\"", "seconds="]);
    has(&text, &["DEBUG", "run started", "total_steps=3"]);
    has(&text, &["DEBUG", "step done", "step=2", "seconds="]);
    has(&text, &["DEBUG", "steps ended", "steps=3", "seconds="]);
    assert!(!text.contains("node stepped"), "{text}");
    fs::remove_dir_all(here.path().join("out")).unwrap();
    has(&log("sapo_flow_engine=trace", &run), &["TRACE", "node stepped", "node=\"batches\"", "step=1", "seconds="]);

    // What cannot be read is complained of, and warnings are shown as without it.
    let text = log("sapo_flow=loud", &["validate", "p.yaml"]);
    assert!(text.starts_with("warning: RUST_LOG=`sapo_flow=loud` is no filter ("), "{text}");
}

#[test]
fn a_dry_run_of_data_that_cannot_be_used_says_so() {
    let here = workplace();
    for (rows, limit, complaint) in [
        ("", "", "rows.jsonl: no row can be used: 0 rows read"),
        ("{\"prompt\": \"t3\", \"chosen\": 5}\n", "", "rows.jsonl:1: `chosen`: expected a string"),
        (ROWS, ", max_prompt_tokens: 0", "expected 1 or more, found 0"),
        ("{\"prompt\": \"t3 t4\", \"chosen\": \"t5\"}\n", ", max_prompt_tokens: 1", "1 row dropped: prompt over"),
    ] {
        fs::write(here.path().join("rows.jsonl"), rows).unwrap();
        let source = "batch_size: \"${batch_size}\"";
        fs::write(here.path().join("q.yaml"), PIPELINE.replace(source, &format!("{source}{limit}"))).unwrap();
        let dry = sapo_flow(here.path(), &["run", "q.yaml", "--dry-run"]);
        let wet = sapo_flow(here.path(), &["run", "q.yaml"]);
        assert!(dry.code == wet.code && dry.code != Some(0), "{:?} {:?}", dry.code, wet.code);
        for said in [dry, wet] {
            assert!(said.stderr.contains(complaint), "{complaint}: {}", said.stderr);
        }
    }
}

#[test]
fn resuming_finds_the_latest_run() {
    let here = workplace();
    let said = sapo_flow(here.path(), &["run", "p.yaml", "--resume"]);
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains("there is no run of `p` in runs to resume"), "{}", said.stderr);

    interrupted(here.path(), &["run", "p.yaml", "-S", "steps=100000000"]);
    let said = interrupted(here.path(), &["run", "p.yaml", "-S", "steps=100000000", "--resume"]);
    assert!(said.iter().any(|line| line.starts_with("training from step ")), "{said:?}");
    assert_eq!(fs::read_dir(here.path().join("runs")).unwrap().count(), 1);
}

/// A golden model with a tokenizer; its first prompt and the tokens that transformers continues it with, as words.
fn golden_model(directory: &Path) -> (String, String) {
    let golden = std::env::var_os("GOLDEN_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"), PathBuf::from);
    let golden = golden.join("models/llama");
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        fs::copy(golden.join(file), directory.join(file)).unwrap();
    }
    write_tokenizer(directory);
    let expected = read_json(&golden.join("expected.json"));
    let words = |ids: &Value, most: usize| {
        let ids = ids.as_array().unwrap().iter().take(most);
        ids.filter_map(Value::as_u64).map(word).collect::<Vec<_>>().join(" ")
    };
    let length = expected["lengths"][0].as_u64().unwrap() as usize;
    (words(&expected["input_ids"][0], length), words(&expected["greedy_12"][0], 12))
}

#[test]
fn generation_is_that_of_transformers() {
    let here = tempfile::tempdir().unwrap();
    let (prompt, continuation) = golden_model(here.path());
    let greedy = ["generate", "--model", ".", "--device", "cpu", "--temperature", "0", "--max-tokens", "12"];
    let ask = |more: &[&str]| sapo_flow(here.path(), &[&greedy, more].concat());
    let expected = format!("{continuation}\n");
    let said = ask(&["--prompt", &prompt]);
    assert_eq!((said.code, said.stdout.as_str()), (Some(0), expected.as_str()), "{}", said.stderr);

    let (first, rest) = prompt.split_once(' ').unwrap();
    let messages = [format!("system={first}"), format!("user={rest}")];
    assert_eq!(ask(&["--message", &messages[0], "--message", &messages[1]]).stdout, expected);

    let chat = json!([{"role": "system", "content": first}, {"role": "user", "content": rest}]).to_string();
    fs::write(here.path().join("chat.json"), &chat).unwrap();
    assert_eq!(ask(&["--chat", "chat.json"]).stdout, expected);
    let mut child = command(here.path(), &[&greedy[..], &["--chat", "-"]].concat())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(chat.as_bytes()).unwrap();
    let mut answer = String::new();
    child.stdout.take().unwrap().read_to_string(&mut answer).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(answer, expected);

    let drawn = |seed: &str| {
        let said = sapo_flow(
            here.path(),
            &["generate", "--model", ".", "--device", "cpu", "--prompt", &prompt, "--max-tokens", "8", "--seed", seed],
        );
        said.stdout
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
}

#[test]
fn what_cannot_be_read_is_named() {
    let here = tempfile::tempdir().unwrap();
    fs::write(here.path().join("model.gguf"), "no such thing").unwrap();
    let said = sapo_flow(here.path(), &["import", "model.gguf", "out"]);
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.starts_with("error: model.gguf: not a GGUF file"), "{}", said.stderr);
    assert!(!here.path().join("out").exists());
    let missing = "No such file or directory (os error 2)";
    for (arguments, file) in [
        (&["generate", "--model", "nowhere", "--prompt", "a"][..], "nowhere/tokenizer.json"),
        (&["import", "nothing.gguf", "out"], "nothing.gguf"),
    ] {
        let said = sapo_flow(here.path(), arguments);
        assert_eq!((said.code, said.stderr), (Some(1), format!("error: {file}: {missing}\n")));
    }
}
