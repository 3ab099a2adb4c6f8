//! What the operators' unit tests share: building an operator outside a pipeline, and small records.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapo_flow_engine::graph::Kernels;
use sapo_flow_engine::runtime::event::{Event, EventSender};
use sapo_flow_engine::{BuildContext, Define, Metrics, OperatorError, Pair, Prompt, RunSettings};

use crate::data::{Columns, OnError, Part, Paths, Settings};

/// A run directory with what an operator is built from.
pub struct Harness {
    directory: tempfile::TempDir,
    sender: EventSender,
    receiver: crossbeam::channel::Receiver<Event>,
    run: RunSettings,
}

impl Harness {
    pub fn new() -> Self {
        let (sender, receiver) = EventSender::channel();
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        Harness { directory, sender, receiver, run: RunSettings::default() }
    }

    /// The same for a run with plain kernels.
    pub fn with_plain_kernels() -> Self {
        let run = RunSettings { kernels: Kernels::Plain, ..RunSettings::default() };
        Harness { run, ..Harness::new() }
    }

    /// The operator as the first node of a fresh run would be, with every port connected.
    pub fn build<D: Define>(&self, with: &str) -> Result<D, OperatorError> {
        self.build_as(with, false)
    }

    /// The same in a run that takes up a checkpoint.
    pub fn resume<D: Define>(&self, with: &str) -> Result<D, OperatorError> {
        self.build_as(with, true)
    }

    fn build_as<D: Define>(&self, with: &str, resumed: bool) -> Result<D, OperatorError> {
        let context = BuildContext {
            node: "node",
            run: &self.run,
            total_steps: 0,
            run_directory: self.directory.path(),
            resumed,
            retained_versions: 1,
            threads: 1,
            overlaps: false,
            connected_inputs: D::INPUTS.iter().map(|port| port.name).collect(),
            connected_outputs: D::OUTPUTS.iter().map(|port| port.name).collect(),
            events: self.sender.clone(),
        };
        D::build(serde_yaml::from_str(with)?, &context)
    }

    /// A file of the run directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What a file of the run directory holds.
    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).expect("the file was written")
    }

    /// Write a file into the run directory; its path as text.
    pub fn write(&self, name: &str, content: &str) -> String {
        std::fs::write(self.path(name), content).expect("the run directory can be written");
        self.path(name).display().to_string()
    }

    /// A directory for a snapshot.
    pub fn checkpoint(&self) -> PathBuf {
        let path = self.path("checkpoint");
        std::fs::create_dir_all(&path).expect("the run directory can be written");
        path
    }

    /// The events sent so far.
    pub fn events(&self) -> Vec<Event> {
        self.receiver.try_iter().collect()
    }

    /// The notes among the events sent so far.
    pub fn notes(&self) -> Vec<String> {
        let note = |event| if let Event::Note { message, .. } = event { Some(message) } else { None };
        self.events().into_iter().filter_map(note).collect()
    }
}

/// A set of metrics.
pub fn metrics(values: &[(&str, f64)]) -> Arc<Metrics> {
    Arc::new(Metrics { values: values.iter().map(|(name, value)| (name.to_string(), *value)).collect() })
}

/// The plainest settings: all rows, of which none may be unusable.
pub fn all_rows<'a>(paths: &'a Paths, columns: &'a Columns, tokenizer: &'a Path) -> Settings<'a> {
    Settings {
        paths,
        columns,
        tokenizer,
        chat_template: None,
        max_prompt_tokens: None,
        part: Part::All,
        limit: None,
        on_error: OnError::Stop,
    }
}

/// A data row of the first epoch.
pub fn prompt(row: u64, prompt: &[u32], chosen: &[u32], rejected: Option<&[u32]>) -> Prompt {
    Prompt {
        source: "data".into(),
        row,
        epoch: 0,
        prompt_ids: prompt.to_vec(),
        chosen_ids: chosen.to_vec(),
        rejected_ids: rejected.map(<[u32]>::to_vec),
        values: Default::default(),
    }
}

/// A pair from a data set.
pub fn pair(row: u64, prompt: &[u32], chosen: &[u32], rejected: Option<&[u32]>) -> Pair {
    Pair {
        step: 0,
        position: row as u32,
        origin: "data".into(),
        source: "data".into(),
        row,
        prompt_ids: prompt.to_vec(),
        chosen_ids: chosen.to_vec(),
        rejected_ids: rejected.map(<[u32]>::to_vec),
        segment: None,
        weights_version: None,
        seed: None,
        values: Default::default(),
    }
}

/// A model directory with a tokenizer of few words, and a chat template that writes `<role> content </s>`.
///
/// Ids: `<s>` 0 (BOS, in front of every text), `</s>` 1 (EOS), `<user>` 2, `<assistant>` 3, `<unk>` 4, `hi` 5, `a` 6, `b` 7.
pub fn tiny_tokenizer() -> tempfile::TempDir {
    let words = ["<s>", "</s>", "<user>", "<assistant>", "<unk>", "hi", "a", "b"];
    let vocabulary: serde_json::Map<_, _> =
        words.iter().zip(0..).map(|(word, id)| (word.to_string(), id.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    });
    let config = serde_json::json!({
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": true,
        "chat_template": "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}\
                          {% if add_generation_prompt %}<assistant> {% endif %}",
    });
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    for (name, value) in [("tokenizer.json", tokenizer), ("tokenizer_config.json", config)] {
        std::fs::write(directory.path().join(name), value.to_string()).expect("a temporary directory can be written");
    }
    directory
}

/// A file or folder of the golden data: below GOLDEN_DIR where that is set, else below the repository's own.
pub fn golden_path(name: &str) -> PathBuf {
    let folder = std::env::var_os("GOLDEN_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden"), PathBuf::from);
    folder.join(name)
}

/// A JSON file of the golden data.
pub fn golden(name: &str) -> serde_json::Value {
    let path = golden_path(name);
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A JSON list of token ids.
pub fn token_ids(value: &serde_json::Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("a list of token ids")
}
