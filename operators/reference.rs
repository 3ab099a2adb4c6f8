//! `reference`: adds a reference model's log-probabilities to batches.
//!
//! DPO (arXiv 2305.18290) measures the policy against a frozen reference; SAPO refreshes it from the EMA model every
//! 108 steps.

mod memo;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapo_flow_engine::operator::{ConfigIssue, Connections, Define};
use sapo_flow_engine::plan::{NodePlan, PlanContext};
use sapo_flow_engine::record::{Batch, Pair, PortType, Record, ReferenceLogps, Weights};
use sapo_flow_engine::{BuildContext, Inputs, Operator, OperatorError, Outputs, Placement, PortSpec};
use sapo_flow_training::device;
use sapo_flow_training::learner::{Example, reference_logps};
use sapo_flow_training::model::{self, Compute, Kernels, Model};
use sapo_flow_training::parameters::{ParameterSet, WEIGHTS_FILE};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::compute::{NodeThread, PlannedModel, compute, device_issue};
use crate::examples::example;
use crate::planned_batches::{BatchLengths, PlannedBatches};
use crate::state;
use crate::weights::{Reading, SharedWeights, shared_on};
use memo::{Key, Memo};

/// What `reference` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReferenceConfig {
    /// Directory of the model to start from, in Hugging Face's layout.
    pub model: String,
    /// Take over the weights that arrive on `weights` every so many steps; absent: never.
    pub refresh_every: Option<u64>,
    /// Keep each response's log-probability for as long as the model stays the same, and do not compute it again; false is
    /// the plain way. Both give the same numbers but for the last bits, which depend on what else is in a batch. Absent: true,
    /// or false where the run's kernels are plain.
    pub keep_logps: Option<bool>,
    /// Where to compute; absent: the run's device.
    pub device: Option<String>,
}

/// Responses whose log-probabilities are kept, the newest: far more than a replay buffer holds, and 5 MB of memory.
const KEPT: usize = 100_000;

/// See the [module](self).
pub struct Reference {
    config: ReferenceConfig,
    device: Device,
    compute: Compute,
    thread: NodeThread,
    weights: Option<Reading>,
    /// Whether the weights are others than those of the model directory.
    refreshed: bool,
    memo: Memo,
    restore_from: Option<PathBuf>,
}

/// What a snapshot says besides the weights.
#[derive(Serialize, Deserialize)]
struct State {
    /// Version of the weights taken over last; absent: those of the model directory.
    version: Option<u64>,
}

const STATE: &str = "state.json";
const LOGPS: &str = "logps.json";
const MODEL: &str = "model";

impl Reference {
    /// Take over weights at steps n, 2n, ...; the first ones come with `start`.
    fn refresh(&mut self, step: u64, weights: Option<Weights>) -> Result<(), OperatorError> {
        let Some(every) = self.config.refresh_every else { return Ok(()) };
        let weights = weights.ok_or("refresh_every is set, but no weights arrived")?;
        if step > 0 && step.is_multiple_of(every) {
            self.weights = Some(shared_on(&weights, Some(self.device))?);
            self.refreshed = true;
            self.memo = Memo::default();
        }
        Ok(())
    }

    fn with_logps(&mut self, batch: &Batch) -> Result<Batch, OperatorError> {
        let reference = match self.config.keep_logps.unwrap_or(self.compute.kernels == Kernels::Fused) {
            true => self.remembered(batch)?,
            false => {
                let examples: Vec<_> = batch.pairs.iter().map(|pair| example(pair, pair.step, None)).collect();
                let logps = self.logps(&examples)?;
                logps.into_iter().map(|(chosen, rejected)| ReferenceLogps { chosen, rejected }).collect()
            }
        };
        Ok(Batch { pairs: batch.pairs.clone(), reference: Some(reference) })
    }

    /// What the model gives to a batch's responses, of which only those are computed that it has not seen.
    fn remembered(&mut self, batch: &Batch) -> Result<Vec<ReferenceLogps>, OperatorError> {
        let keys = |pair: &Pair| {
            let key = |response: &[u32]| Key::of(&pair.prompt_ids, response);
            (key(&pair.chosen_ids), pair.rejected_ids.as_deref().map(key))
        };
        let keys: Vec<(Key, Option<Key>)> = batch.pairs.iter().map(|pair| keys(pair)).collect();
        let mut asked = HashSet::new();
        let (mut examples, mut computed) = (Vec::new(), Vec::new());
        for (pair, &(chosen, rejected)) in batch.pairs.iter().zip(&keys) {
            let mut is_new = |key: &Key| self.memo.get(*key).is_none() && asked.insert(*key);
            let new = (is_new(&chosen), rejected.filter(&mut is_new));
            if new == (false, None) {
                continue;
            }
            let whole = example(pair, pair.step, None);
            match new {
                (_, None) => examples.push(Example { rejected_ids: None, ..whole }),
                (true, Some(_)) => examples.push(whole),
                // Only the rejected response: it is scored like any single one.
                (false, Some(_)) => {
                    let chosen_ids = pair.rejected_ids.clone().unwrap_or_default();
                    examples.push(Example { chosen_ids, rejected_ids: None, ..whole });
                }
            }
            computed.push(if new.0 { (chosen, new.1) } else { (new.1.unwrap_or(chosen), None) });
        }
        for ((first, second), logps) in computed.into_iter().zip(self.logps(&examples)?) {
            self.memo.insert(first, logps.0);
            if let Some(second) = second {
                self.memo.insert(second, logps.1);
            }
        }
        let known = |key: Key| self.memo.get(key).ok_or("a response was not scored");
        let all = keys.into_iter().map(|(chosen, rejected)| {
            Ok(ReferenceLogps { chosen: known(chosen)?, rejected: rejected.map_or(Ok(0.0), known)? })
        });
        let all = all.collect::<Result<Vec<_>, OperatorError>>()?;
        self.memo.trim(KEPT);
        Ok(all)
    }

    fn logps(&self, examples: &[Example]) -> Result<Vec<(f32, f32)>, OperatorError> {
        let SharedWeights { decoder, parameters, .. } = &**self.weights.as_ref().ok_or("stepped before its start")?;
        Ok(reference_logps(decoder, parameters, examples, &self.compute, examples.len())?)
    }
}

impl Operator for Reference {
    fn start(&mut self, _: Inputs) -> Result<Outputs, OperatorError> {
        self.thread.begin(Some(self.device))?;
        let model = Model::load(Path::new(&self.config.model), self.device, Kind::Float)?;
        let mut weights = SharedWeights {
            decoder: model.decoder,
            parameters: model.parameters,
            files: Arc::new(model.files),
            version: 0,
        };
        if let Some(directory) = self.restore_from.take() {
            let state: State = state::read(&directory, STATE)?;
            self.memo = state::read::<Vec<(Key, f32)>>(&directory, LOGPS)?.into_iter().collect();
            if let Some(version) = state.version {
                let expected = weights.decoder.expected_parameters();
                let path = directory.join(MODEL).join(WEIGHTS_FILE);
                weights.parameters = ParameterSet::load_file(&path, &expected, self.device)?;
                weights.version = version;
                self.refreshed = true;
            }
        }
        self.weights = Some(Reading::of(Arc::new(weights))?);
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
        state::write(directory, STATE, &State { version })?;
        state::write(directory, LOGPS, &self.memo.entries())?;
        if version.is_some() {
            let (config, parameters) = (&weights.decoder.config, &weights.parameters);
            model::save(&directory.join(MODEL), config, parameters, &weights.files, parameters.kind())?;
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

A response is scored once under each model: a pair that a buffer draws again, or another pair with the same chosen response,
finds its number there. `keep_logps: false`, the default with `run: {kernels: plain}`, computes all of them each time.

State: the weights, once they have been refreshed, and the log-probabilities known; they are in checkpoints.";
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
        let zero = zero.map(|_| ConfigIssue::new("refresh_every", "expected a number above 0, found 0"));
        zero.into_iter().chain(device_issue(config.device.as_deref())).collect()
    }

    fn check_connections(config: &Self::Config, connections: &Connections) -> Vec<ConfigIssue> {
        let issue = match (config.refresh_every, connections.input("weights")) {
            (Some(_), None) => "is set, but `in: {weights: ...}` is not connected",
            (None, Some(_)) => "is not set, so that what is connected with `in: {weights: ...}` would have no effect",
            _ => return Vec::new(),
        };
        vec![ConfigIssue::new("refresh_every", issue)]
    }

    fn plan(config: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        let model = PlannedModel::load(Path::new(&config.model), config.device.as_deref(), context.run)?;
        let emits = context.input("batches");
        let pairs = emits.batch_size.unwrap_or(0);
        let working = |batch: &BatchLengths| model.scoring(pairs, batch);
        Ok(NodePlan {
            parameters: Some(model.footprint().parameters()),
            memory: Some(model.memory(model.weights(), &PlannedBatches::new(context, &emits, pairs), working)),
            emits,
            ..NodePlan::default()
        })
    }

    fn files(config: &Self::Config) -> Vec<PathBuf> {
        vec![config.model.clone().into()]
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        let device = device::parse(config.device.as_deref().unwrap_or(&context.run.device))?;
        let (compute, thread) = (compute(context.run), NodeThread::of(context));
        let memo = Memo::default();
        Ok(Reference { config, device, compute, thread, weights: None, refreshed: false, memo, restore_from: None })
    }
}

#[cfg(test)]
mod tests;
