//! A directory with a tiny model, data and pipelines, and the binary run in it.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// Words that the tiny models know.
const VOCABULARY: u64 = 160;
/// The first ones are special.
const SPECIAL: [&str; 6] = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "<unk>"];

/// What every pipeline begins with: small, and the same on every machine.
pub const HEAD: &str = r#"version: 1
params: {seed: 7, steps: 16, max_staleness: 0}
run:
  seed: "${seed}"
  steps: "${steps}"
  device: cpu
  dtype: float32
  threads: 1
  checkpoint: {every: 3, keep: 2}
nodes:
"#;

/// The nodes of `pipelines/sapo_orpo.yaml`, small.
pub const SAPO_ORPO: &str = r#"
  prompts: {op: prompt_source, with: {path: chats.jsonl, tokenizer: model, batch_size: 3}}
  segments:
    op: segment_sampler
    in: {prompts: prompts, weights: {from: ema, feedback: {max_staleness: "${max_staleness}"}}}
    with: {segment_tokens: 4, max_length: 48, max_prompt_tokens: 24}
  replay: {op: replay_buffer, in: segments, with: {capacity: 10, draws: 3}}
  batches: {op: batcher, in: replay.pairs, with: {batch_size: 2, max_length: 48}}
  learner:
    op: preference_learner
    in: batches.batches
    with: {model: model, objective: orpo, learning_rate: 1e-3, schedule: inverse_sqrt, warmup_steps: 4, max_grad_norm: 1.0}
  ema: {op: ema, in: learner.weights, with: {decay: 0.5}}
  metrics:
    op: metrics_sink
    in: [learner.metrics, segments.metrics, replay.metrics, batches.metrics, evaluation.metrics]
  samples: {op: sample_sink, in: segments, with: {tokenizer: model, every: 2, count: 2}}
  evaluation:
    op: evaluator
    in: learner.weights
    with: {path: heldout.jsonl, tokenizer: model, every: 5, segment_tokens: 4, max_length: 48, max_prompt_tokens: 24, show_tokens: 4}
  policy: {op: checkpoint, in: learner.weights, with: {every: 5, keep: 1}}
  average: {op: checkpoint, in: ema.weights}
"#;

/// A place to run pipelines in.
pub struct Workplace {
    directory: TempDir,
    /// OpenMP threads of the programs run there; absent: as they see fit.
    omp_num_threads: Option<&'static str>,
}

/// How the program ended, and what it said.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Workplace {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let here = Workplace { directory, omp_num_threads: Some("1") };
        for (name, source) in [("model", "models/llama"), ("reference", "models/llama/reference")] {
            fs::create_dir(here.path(name)).expect("it is new");
            fs::copy(golden(source).join("model.safetensors"), here.path(name).join("model.safetensors")).unwrap();
            for file in ["config.json", "generation_config.json"] {
                fs::copy(golden("models/llama").join(file), here.path(name).join(file)).unwrap();
            }
            write_tokenizer(&here.path(name));
        }
        here.write("chats.jsonl", &(0..14).map(|row| line(json!({"messages": conversation(row)}))).collect::<String>());
        here.write(
            "heldout.jsonl",
            &(50..53).map(|row| line(json!({"messages": conversation(row)}))).collect::<String>(),
        );
        here.write("pairs.jsonl", &(0..8).map(pair).collect::<String>());
        here
    }

    /// One with a pipeline of these nodes in p.yaml, which computes on two threads.
    pub fn on_two_threads(nodes: &str) -> Self {
        let here = Workplace { omp_num_threads: None, ..Workplace::new() };
        here.pipeline("p.yaml", nodes);
        let text = fs::read_to_string(here.path("p.yaml")).expect("it was just written");
        assert!(text.contains("threads: 1"));
        here.write("p.yaml", &text.replace("threads: 1", "threads: 2"));
        here
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("a temporary directory can be written");
    }

    /// A pipeline of these nodes, in a file.
    pub fn pipeline(&self, name: &str, nodes: &str) {
        self.write(name, &format!("{HEAD}{}", nodes.trim_start_matches('\n')));
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sapo-flow"));
        command.current_dir(self.directory.path()).args(arguments).stdin(Stdio::null());
        command.env_remove("RUST_LOG").env_remove("OMP_NUM_THREADS");
        command.envs(self.omp_num_threads.map(|threads| ("OMP_NUM_THREADS", threads)));
        command
    }

    pub fn sapo_flow(&self, arguments: &[&str]) -> Said {
        let output = self.command(arguments).output().expect("the program starts");
        let text = |bytes| String::from_utf8(bytes).expect("it speaks UTF-8");
        Said { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Run a pipeline to its end into `run_directory`.
    pub fn run(&self, pipeline: &str, run_directory: &str, overrides: &[&str]) -> Results {
        let mut arguments = vec!["run", pipeline, "--run-dir", run_directory];
        overrides.iter().for_each(|value| arguments.extend(["-S", value]));
        let said = self.sapo_flow(&arguments);
        assert_eq!(said.code, Some(0), "{pipeline} {overrides:?}: {}", said.stderr);
        self.results(run_directory)
    }

    /// The metrics of a run, a step an entry.
    pub fn metrics(&self, run_directory: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(run_directory).join("metrics.jsonl")).expect("there are metrics");
        text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
    }

    pub fn results(&self, run_directory: &str) -> Results {
        let directory = self.path(run_directory);
        let mut metrics = self.metrics(run_directory);
        for step in metrics.iter_mut().filter_map(Value::as_object_mut) {
            step.retain(|name, _| !name.ends_with("tokens/s"));
        }
        let read = |file: &str| fs::read(directory.join(file)).unwrap_or_default();
        let models = ["policy", "average"].map(|node| read(&format!("{node}/final/model.safetensors")));
        Results { models, metrics, samples: read("samples.jsonl"), evaluations: read("evaluations.json") }
    }
}

/// What a run comes to, but for how fast it was.
pub struct Results {
    pub models: [Vec<u8>; 2],
    pub metrics: Vec<Value>,
    pub samples: Vec<u8>,
    pub evaluations: Vec<u8>,
}

impl Results {
    /// To the byte.
    #[track_caller]
    pub fn assert_same(&self, other: &Results, what: &str) {
        assert!(!self.models[0].is_empty() && !self.metrics.is_empty(), "{what}: no results");
        for (step, (ours, theirs)) in self.metrics.iter().zip(&other.metrics).enumerate() {
            assert_eq!(ours, theirs, "{what}: line {step} of the metrics");
        }
        assert_eq!(self.metrics.len(), other.metrics.len(), "{what}: lines of metrics");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(text(&self.samples), text(&other.samples), "{what}: samples");
        assert_eq!(text(&self.evaluations), text(&other.evaluations), "{what}: evaluations");
        assert!(self.models == other.models, "{what}: the final weights differ");
    }
}

/// A file or folder of the golden data: below GOLDEN_DIR where that is set, else below the repository's own.
fn golden(name: &str) -> PathBuf {
    let folder = std::env::var_os("GOLDEN_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"), PathBuf::from);
    folder.join(name)
}

fn line(row: Value) -> String {
    format!("{row}\n")
}

/// Words that depend on a row's number and role alone.
fn words(row: u64, role: u64, count: u64) -> String {
    let special = SPECIAL.len() as u64;
    let mut text = String::new();
    for position in 0..count {
        let id = special + (row * 31 + role * 57 + position * (7 + row % 5)) % (VOCABULARY - special);
        let _ = write!(text, "{}w{id}", if position > 0 { " " } else { "" });
    }
    text
}

fn conversation(row: u64) -> Value {
    json!([
        {"role": "user", "content": words(row, 0, 2 + row % 5)},
        {"role": "assistant", "content": words(row, 1, 5 + row % 7)},
    ])
}

fn pair(row: u64) -> String {
    let conversation = conversation(row);
    let rejected = json!([{"role": "assistant", "content": words(row, 2, 4 + row % 3)}]);
    line(json!({"prompt": [conversation[0]], "chosen": [conversation[1]], "rejected": rejected}))
}

/// A tokenizer of whole words, and a template that writes `<user> hello </s> <assistant> hi </s>`.
fn write_tokenizer(directory: &Path) {
    let word = |id: u64| SPECIAL.get(id as usize).map_or_else(|| format!("w{id}"), |word| (*word).to_owned());
    let vocabulary: Map<String, Value> = (0..VOCABULARY).map(|id| (word(id), json!(id))).collect();
    let special = SPECIAL.iter().enumerate().map(|(id, word)| {
        json!({"id": id, "content": word, "special": true, "single_word": false, "lstrip": true, "rstrip": true,
               "normalized": false})
    });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": special.collect::<Vec<_>>(), "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    });
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": "{{ bos_token }}{% for m in messages %} <{{ m.role }}> {{ m.content }} </s>{% endfor %}\
                          {% if add_generation_prompt %} <assistant>{% endif %}",
    });
    fs::write(directory.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(directory.join("tokenizer_config.json"), config.to_string()).unwrap();
}
