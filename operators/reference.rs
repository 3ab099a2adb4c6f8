//! `reference`: adds a reference model's log-probabilities to batches.
//!
//! DPO (arXiv 2305.18290) measures the policy against a frozen reference; SAPO refreshes it from the EMA model every
//! 108 steps.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapo_flow_engine::operator::{ConfigIssue, Define};
use sapo_flow_engine::plan::{NodePlan, PlanContext};
use sapo_flow_engine::record::{Batch, PortType, Record, ReferenceLogps, Weights};
use sapo_flow_engine::{BuildContext, Inputs, Operator, OperatorError, Outputs, Placement, PortSpec};
use sapo_flow_training::device;
use sapo_flow_training::learner::reference_logps;
use sapo_flow_training::memory::Shape;
use sapo_flow_training::model::{Compute, Model};
use sapo_flow_training::parameters::ParameterSet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::Error;
use crate::compute::{PlannedModel, compute};
use crate::examples::example;
use crate::weights::{SharedWeights, shared};

/// What `reference` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReferenceConfig {
    /// Directory of the model to start from, in Hugging Face's layout.
    pub model: String,
    /// Take over the weights that arrive on `weights` every so many steps; absent: never.
    pub refresh_every: Option<u64>,
    /// Where to compute; absent: the run's device.
    pub device: Option<String>,
}

/// See the [module](self).
pub struct Reference {
    config: ReferenceConfig,
    device: Device,
    compute: Compute,
    threads: usize,
    weights: Option<Arc<SharedWeights>>,
    /// Whether the weights are others than those of the model directory.
    refreshed: bool,
    restore_from: Option<PathBuf>,
}

/// What a snapshot says besides the weights.
#[derive(Serialize, Deserialize)]
struct State {
    /// Version of the weights taken over last; absent: those of the model directory.
    version: Option<u64>,
}

const STATE: &str = "state.json";
const WEIGHTS: &str = "weights.safetensors";

impl Reference {
    /// Take over weights at steps n, 2n, ...; the first ones come with `start`.
    fn refresh(&mut self, step: u64, weights: Option<Weights>) -> Result<(), OperatorError> {
        let Some(every) = self.config.refresh_every else { return Ok(()) };
        let weights = weights.ok_or("refresh_every is set, but no weights arrived")?;
        if step > 0 && step.is_multiple_of(every) {
            self.weights = Some(shared(&weights)?);
            self.refreshed = true;
        }
        Ok(())
    }

    fn with_logps(&self, batch: &Batch) -> Result<Batch, OperatorError> {
        let weights = self.weights.as_ref().ok_or("stepped before its start")?;
        let examples = batch.pairs.iter().map(|pair| example(pair, pair.step, None)).collect::<Vec<_>>();
        let (decoder, parameters) = (&weights.decoder, &weights.parameters);
        let logps = reference_logps(decoder, parameters, &examples, &self.compute, examples.len())?;
        let reference = logps.into_iter().map(|(chosen, rejected)| ReferenceLogps { chosen, rejected }).collect();
        Ok(Batch { pairs: batch.pairs.clone(), reference: Some(reference) })
    }
}

impl Operator for Reference {
    fn start(&mut self, _: Inputs) -> Result<Outputs, OperatorError> {
        device::set_threads(self.threads);
        let model = Model::load(Path::new(&self.config.model), self.device, Kind::Float)?;
        let mut weights = SharedWeights {
            decoder: model.decoder,
            parameters: model.parameters,
            files: Arc::new(model.files),
            version: 0,
        };
        if let Some(directory) = self.restore_from.take() {
            let path = directory.join(STATE);
            let state: State = serde_json::from_slice(&std::fs::read(&path).map_err(Error::io(&path))?)?;
            if let Some(version) = state.version {
                let expected = weights.decoder.expected_parameters();
                let path = directory.join(WEIGHTS);
                weights.parameters = ParameterSet::load_file(&path, &expected, self.device, Kind::Float)?;
                weights.version = version;
                self.refreshed = true;
            }
        }
        self.weights = Some(Arc::new(weights));
        Ok(Outputs::new())
    }

    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let weights = inputs.weights("weights");
        self.refresh(step, weights)?;
        let mut outputs = Outputs::new();
        for batch in inputs.batches("batches") {
            outputs.push("batches", Record::Batch(Arc::new(self.with_logps(&batch)?)));
        }
        Ok(outputs)
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let weights = self.weights.as_ref().ok_or("stepped before its start")?;
        let version = self.refreshed.then_some(weights.version);
        let path = directory.join(STATE);
        std::fs::write(&path, serde_json::to_vec(&State { version })?).map_err(Error::io(&path))?;
        if version.is_some() {
            weights.parameters.write(&directory.join(WEIGHTS), None)?;
        }
        Ok(())
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        self.restore_from = Some(directory.into());
        Ok(())
    }
}

impl Define for Reference {
    const NAME: &'static str = "reference";
    const SUMMARY: &'static str = "Adds a reference model's log-probabilities to batches, as DPO needs them.";
    const DOCS: &'static str = "\
Every pair of a batch gets the summed log-probabilities (nats) of its chosen and its rejected response under the
reference model (of its one response, where it has no rejected one). The model is the one in `model`, frozen; with `refresh_every: n` the weights that arrive on `weights`
(SAPO: the EMA model, every 108 steps) take its place at steps n, 2n, 3n, ...

State: the weights, once they have been refreshed; they are in checkpoints.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat_pairs.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8, max_prompt_tokens: 1792}}
batches: {op: batcher, in: prompts.pairs, with: {batch_size: 8, max_length: 2048}}
reference:
  op: reference
  in: batches
  with: {model: models/smollm2-135m-instruct}
learner:
  op: preference_learner
  in: reference
  with: {model: models/smollm2-135m-instruct, objective: dpo, learning_rate: 5e-7}
";
    const INPUTS: &'static [PortSpec] = &[
        PortSpec::new("batches", &[PortType::Batches], "Batches of pairs."),
        PortSpec::new("weights", &[PortType::Weights], "Where refreshed weights come from.").optional(),
    ];
    const OUTPUTS: &'static [PortSpec] =
        &[PortSpec::new("batches", &[PortType::Batches], "The batches, with the reference's log-probabilities.")];
    const PLACEMENT: Placement = Placement::Device;
    type Config = ReferenceConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let zero = config.refresh_every.filter(|every| *every == 0);
        zero.map(|_| ConfigIssue::new("refresh_every", "expected a number above 0, found 0")).into_iter().collect()
    }

    fn plan(config: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        let model = PlannedModel::load(Path::new(&config.model), config.device.as_deref(), context.run)?;
        let emits = context.input("batches");
        let pairs = emits.batch_size.unwrap_or(0);
        let working = |prompt, response| model.footprint().scoring(Shape::Pairs { pairs, prompt, response });
        Ok(NodePlan {
            parameters: Some(model.footprint().parameters()),
            memory: model.memory(model.weights(), &emits, working),
            emits,
            ..NodePlan::default()
        })
    }

    fn files(config: &Self::Config) -> Vec<PathBuf> {
        vec![config.model.clone().into()]
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        let connected = context.connected_inputs.contains(&"weights");
        if config.refresh_every.is_some() && !connected {
            return Err("`refresh_every` is set, but `in: {weights: ...}` is not connected".into());
        }
        if config.refresh_every.is_none() && connected {
            return Err(
                "`in: {weights: ...}` is connected, but `refresh_every` is not set: it would have no effect".into()
            );
        }
        let device = device::parse(config.device.as_deref().unwrap_or(&context.run.device))?;
        let (compute, threads) = (compute(context.run), context.threads);
        Ok(Reference { config, device, compute, threads, weights: None, refreshed: false, restore_from: None })
    }
}
