//! `checkpoint`: writes a model's weights as Hugging Face directories, every n steps and at the end.

use std::fs;
use std::path::{Path, PathBuf};

use sapo_flow_engine::graph::Dtype;
use sapo_flow_engine::operator::{ConfigIssue, Connections, Define};
use sapo_flow_engine::record::PortType;
use sapo_flow_engine::runtime::disk::{sync_directories, sync_directory};
use sapo_flow_engine::runtime::event::{Event, EventSender};
use sapo_flow_engine::{BuildContext, Inputs, Operator, OperatorError, Outputs, Placement, PortSpec};
use sapo_flow_training::model;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::Error;
use crate::compute::{NodeThread, kind};
use crate::log_file::check_folder_name;
use crate::weights::{SharedWeights, shared};

/// What `checkpoint` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Updates between models; absent: only the final one is written.
    pub every: Option<u64>,
    /// How many of them to keep, the newest (default 2); the final one is kept besides.
    pub keep: Option<usize>,
    /// Type of the saved weights: float32 or bfloat16.
    #[serde(default = "default_dtype")]
    pub dtype: Dtype,
}

fn default_dtype() -> Dtype {
    Dtype::Float32
}

/// See the [module](self).
pub struct Checkpoint {
    config: CheckpointConfig,
    node: String,
    directory: PathBuf,
    total_steps: u64,
    thread: NodeThread,
    events: EventSender,
}

impl Checkpoint {
    /// Write a model under a temporary name, then rename it. One that has its name stays until then: neither a full disk nor
    /// a kill may cost it.
    fn save(&self, weights: &SharedWeights, name: &str) -> Result<(), OperatorError> {
        fs::create_dir_all(&self.directory).map_err(Error::io(&self.directory))?;
        let (temporary, target) = (self.directory.join(format!(".writing-{name}")), self.directory.join(name));
        remove_if_there(&temporary)?;
        model::save(&temporary, &weights.decoder.config, &weights.parameters, &weights.files, kind(self.config.dtype))?;
        make_durable(&temporary).map_err(Error::io(&temporary))?;
        if target.exists() {
            self.set_aside(&target)?;
        }
        fs::rename(&temporary, &target).map_err(Error::io(&target))?;
        sync_directory(&self.directory).map_err(Error::io(&self.directory))?;
        remove_if_there(&self.aside())?;
        self.events.send(Event::ModelSaved { node: self.node.clone(), path: target });
        Ok(())
    }

    /// Remove models of steps after this one, which a run left that then went on from an older checkpoint, and what is older
    /// than the newest `keep` of the others.
    fn drop_others(&self, steps: u64) -> Result<(), OperatorError> {
        let mut versions: Vec<u64> = fs::read_dir(&self.directory)
            .map_err(Error::io(&self.directory))?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix(PREFIX)?.parse().ok())
            .collect();
        versions.sort_unstable();
        let now = versions.partition_point(|version| *version <= steps);
        let old = now.saturating_sub(self.config.keep.unwrap_or(DEFAULT_KEEP));
        for version in versions[now..].iter().chain(&versions[..old]) {
            self.set_aside(&self.directory.join(format!("{PREFIX}{version}")))?;
            remove_if_there(&self.aside())?;
        }
        Ok(())
    }

    /// Give a model that is to be removed another name: what has its own is whole, even while it is being removed.
    fn set_aside(&self, model: &Path) -> Result<(), OperatorError> {
        remove_if_there(&self.aside())?;
        Ok(fs::rename(model, self.aside()).map_err(Error::io(model))?)
    }

    fn aside(&self) -> PathBuf {
        self.directory.join(".removing")
    }
}

fn remove_if_there(directory: &Path) -> Result<(), OperatorError> {
    if directory.exists() {
        fs::remove_dir_all(directory).map_err(Error::io(directory))?;
    }
    Ok(())
}

/// Bring the files of a model and their names to the disk: a directory that appears is whole, even after a power cut.
fn make_durable(directory: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        fs::File::open(entry?.path())?.sync_all()?;
    }
    sync_directories(directory)
}

const PREFIX: &str = "checkpoint-";
const DEFAULT_KEEP: usize = 2;

impl Operator for Checkpoint {
    fn start(&mut self, _: Inputs) -> Result<Outputs, OperatorError> {
        self.thread.begin(None)?;
        Ok(Outputs::new())
    }

    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let weights = inputs.weights("weights").ok_or("no weights arrived at this step")?;
        let steps = step + 1;
        if steps == self.total_steps {
            self.save(&*shared(&weights)?, "final")?;
        } else if self.config.every.is_some_and(|every| steps.is_multiple_of(every)) {
            self.save(&*shared(&weights)?, &format!("{PREFIX}{steps}"))?;
            self.drop_others(steps)?;
        }
        Ok(Outputs::new())
    }
}

impl Define for Checkpoint {
    const NAME: &'static str = "checkpoint";
    const SUMMARY: &'static str = "Writes a model's weights as Hugging Face directories.";
    const DOCS: &'static str = "\
Every `every` steps the weights are written to RUN/NODE/checkpoint-STEPS, and after the last step to RUN/NODE/final:
weights, configuration, tokenizer and chat template, as transformers loads them. A directory appears when it is whole, and \
takes the place of an older one only then. When a checkpoint-STEPS appears, those of later steps go, which are there where a \
run went on from an older checkpoint; then the oldest but `keep`.

These are models to use, not states to resume from: a run resumes from what `run: {checkpoint: ...}` stores.

State: none.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat_pairs.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8, max_prompt_tokens: 1792}}
batches: {op: batcher, in: prompts.pairs, with: {batch_size: 8, max_length: 2048}}
learner: {op: preference_learner, in: batches, with: {model: models/smollm2-135m-instruct, objective: orpo, learning_rate: 5e-6}}
model: {op: checkpoint, in: learner.weights, with: {every: 300, keep: 2}}
";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new("weights", &[PortType::Weights], "The weights to write.")];
    const OUTPUTS: &'static [PortSpec] = &[];
    const PLACEMENT: Placement = Placement::Device;
    type Config = CheckpointConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        for (key, value) in [("every", config.every), ("keep", config.keep.map(|keep| keep as u64))] {
            if value == Some(0) {
                issues.push(ConfigIssue::new(key, "expected a number above 0, found 0"));
            }
        }
        if config.keep.is_some() && config.every.is_none() {
            issues.push(ConfigIssue::new("keep", "has no effect without `every`: only the final model is written"));
        }
        issues
    }

    fn check_connections(_: &Self::Config, connections: &Connections) -> Vec<ConfigIssue> {
        check_folder_name(&connections.node).map(|message| ConfigIssue::new("", message)).into_iter().collect()
    }

    fn writes(_: &Self::Config, node: &str) -> Vec<PathBuf> {
        vec![node.into()]
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        Ok(Checkpoint {
            config,
            node: context.node.into(),
            directory: context.run_directory.join(context.node),
            total_steps: context.total_steps,
            thread: NodeThread::of(context),
            events: context.events.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use sapo_flow_training::model::{Model, SourceFiles};
    use tch::{Device, Kind};

    use super::*;
    use crate::testing::{Harness, golden_path};

    fn names(harness: &Harness) -> BTreeSet<String> {
        let entries = fs::read_dir(harness.path("node")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_model_stays_until_the_next_is_whole() {
        let harness = Harness::new();
        let checkpoint: Checkpoint = harness.build("{}").unwrap();
        let Model { decoder, parameters, files } =
            Model::load(&golden_path("models/llama"), Device::Cpu, Kind::Float).unwrap();
        let weights = SharedWeights { decoder, parameters, files: Arc::new(files), version: 0 };
        let same = weights.version(1, weights.parameters.shallow_clone());
        // A file that cannot be written, since its folder is not there.
        let files = Arc::new(SourceFiles { files: vec![("no/folder".into(), Vec::new())] });
        let (weights, broken) = (Arc::new(weights), Arc::new(SharedWeights { files, ..same }));

        checkpoint.save(&weights, "final").unwrap();
        let kept = harness.path("node/final/kept");
        fs::write(&kept, "").unwrap();
        assert!(checkpoint.save(&broken, "final").unwrap_err().to_string().contains("no/folder"));
        assert!(kept.exists(), "the model of before is there");
        checkpoint.save(&weights, "final").unwrap();
        assert!(!kept.exists() && harness.path("node/final/model.safetensors").exists());
        assert_eq!(names(&harness), ["final".to_owned()].into());
    }

    #[test]
    fn models_of_later_steps_go_before_older_ones() {
        let harness = Harness::new();
        let checkpoint: Checkpoint = harness.build("{every: 2, keep: 2}").unwrap();
        for steps in [2, 4, 6, 10, 12] {
            fs::create_dir_all(harness.path(&format!("node/{PREFIX}{steps}"))).unwrap();
        }
        fs::create_dir(harness.path("node/final")).unwrap();
        checkpoint.drop_others(6).unwrap();
        assert_eq!(names(&harness), ["checkpoint-4", "checkpoint-6", "final"].map(String::from).into());
    }

    #[test]
    fn settings_without_effect_are_errors() {
        let keys = |with: &str| -> Vec<String> {
            let config: CheckpointConfig = serde_yaml::from_str(with).unwrap();
            Checkpoint::check(&config).into_iter().map(|issue| issue.key).collect()
        };
        assert_eq!(keys("{keep: 5}"), ["keep"]);
        assert_eq!(keys("{every: 0, keep: 0}"), ["every", "keep"]);
        assert!(keys("{every: 3, keep: 5}").is_empty() && keys("{every: 3}").is_empty() && keys("{}").is_empty());
    }
}
