//! `ema`: the exponential moving average of a model's weights.
//!
//! SAPO (arXiv 2405.20830), equation 5: ema = decay * ema + (1 - decay) * policy, with ema_0 = policy_0. Taken seldom, it is
//! TR-DPO's reference (arXiv 2404.09656), and with decay 0 the last iteration's model of SPIN and SPPO.

use std::path::{Path, PathBuf};

use sapo_flow_engine::graph::Dtype;
use sapo_flow_engine::operator::{ConfigIssue, Define};
use sapo_flow_engine::plan::{Emits, NodePlan, PlanContext};
use sapo_flow_engine::record::{PortType, Record};
use sapo_flow_engine::{BuildContext, Inputs, Operator, OperatorError, Outputs, Placement, PortSpec};
use sapo_flow_training::model::Kernels;
use sapo_flow_training::parameters::ParameterSet;
use sapo_flow_training::{device, ema};
use schemars::JsonSchema;
use serde::Deserialize;
use tch::{Device, Kind};

use crate::compute::{NodeThread, PlannedModel, device_issue, kernels, kind};
use crate::draws::Draws;
use crate::weights::{SharedWeights, Versions, shared_on};

/// What `ema` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EmaConfig {
    /// Share of the old average that stays at each step: 0 copies the weights, 0.5 is SAPO's, 1 keeps the first weights.
    pub decay: f64,
    /// Average every so many updates, and leave the average as it is in between.
    #[serde(default = "default_every")]
    #[schemars(range(min = 1))]
    pub every: u64,
    /// Type of the average: float32, or bfloat16 for half the memory.
    #[serde(default = "default_dtype")]
    pub dtype: Dtype,
    /// Where the average is kept, and where those who read it compute; absent: where the weights are that it averages.
    pub device: Option<String>,
}

fn default_every() -> u64 {
    1
}

fn default_dtype() -> Dtype {
    Dtype::Float32
}

/// See the [module](self).
pub struct Ema {
    config: EmaConfig,
    versions: Versions,
    random: Draws,
    kernels: Kernels,
    thread: NodeThread,
    device: Option<Device>,
    restore_from: Option<PathBuf>,
}

impl Ema {
    /// Whether this version of the policy is one to take in. At a step without an update the average stays as it is: a
    /// version always names the same weights.
    fn is_due(&self, policy: u64, averaged: u64) -> bool {
        policy != averaged && policy.is_multiple_of(self.config.every) && self.config.decay < 1.0
    }

    /// Take in an update of the policy.
    fn update(&mut self, policy: &SharedWeights) -> Result<(), OperatorError> {
        let (decay, version) = (self.config.decay, policy.version);
        let seed = self.random.seed(version, 0);
        if let Some(average) = self.versions.exclusive() {
            ema::update(&mut average.parameters, &policy.parameters, decay, self.kernels, seed)?;
            average.version = version;
        } else {
            let average = self.versions.newest().ok_or("stepped before its start")?;
            let parameters = ema::updated(&average.parameters, &policy.parameters, decay, seed)?;
            self.versions.push_next(version, parameters)?;
        }
        Ok(())
    }
}

/// What the average is at first: a copy of the weights.
fn first(policy: &ParameterSet, kind: Kind) -> ParameterSet {
    let is_of_kind = policy.iter().all(|(_, tensor)| tensor.kind() == kind);
    if is_of_kind { policy.deep_copy() } else { policy.to_kind(kind) }
}

impl Operator for Ema {
    fn start(&mut self, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        self.thread.begin(self.device)?;
        let weights = inputs.weights("weights").ok_or("no weights to average: `weights` must come from a learner")?;
        let policy = shared_on(&weights, self.device)?;
        match self.restore_from.take() {
            Some(directory) => self.versions.restore(&directory, &policy)?,
            None => {
                let first = first(&policy.parameters, kind(self.config.dtype));
                self.versions.push(policy.version(policy.version, first));
            }
        }
        self.versions.outputs()
    }

    fn step(&mut self, _: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let weights = inputs.weights("weights").ok_or("no weights arrived at this step")?;
        let averaged = self.versions.newest().ok_or("stepped before its start")?.version;
        if self.is_due(weights.version, averaged) {
            let policy = shared_on(&weights, self.device)?;
            self.update(&policy)?;
        }
        self.versions.outputs()
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        self.versions.snapshot(directory)
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        self.restore_from = Some(directory.into());
        Ok(())
    }

    fn reattach(&mut self, record: &mut Record) -> Result<(), OperatorError> {
        self.versions.reattach(record)
    }
}

impl Define for Ema {
    const NAME: &'static str = "ema";
    const SUMMARY: &'static str = "Averages a learner's weights over its updates.";
    const DOCS: &'static str = "\
Keeps ema = decay * ema + (1 - decay) * policy, in float32 whatever the compute type. The average starts as a copy of the
first weights, and is emitted after every step; at a step in which the learner had no pairs, and its weights no update, it
stays as it is.

`dtype: bfloat16` takes half the memory, and loses precision: 8 bits are left. Rounded to the nearest number, an average with
a decay near 1 would never move, since an update is less than half a unit in the last place. So it is computed in float32
and rounded up or down at random, as the run's seed says, with the odds that keep it unchanged on average; what remains is
noise of a unit in the last place (0.4 to 0.8% of a weight). With decay 0 a copy is rounded to the nearest.

With `every: n` it moves after updates n, 2n, 3n, ... alone. So `{decay: 0, every: n}` is the model of the last iteration, an
iteration being n updates; `{decay: 0.4, every: 512}` is the reference of TR-DPO; and `{decay: 1}` the model as it was before
training. With `device` the average is kept on another device than the learner's, and those who read it compute there: a
sampler on one GPU, the learner on another. Its version, from which the staleness of samples follows, is that of the weights taken in last.

State: the average, and as many older versions as feedback edges from here may still read; all are in checkpoints.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat_pairs.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8, max_prompt_tokens: 1792}}
batches: {op: batcher, in: prompts.pairs, with: {batch_size: 8, max_length: 2048}}
learner: {op: preference_learner, in: batches, with: {model: models/smollm2-135m-instruct, objective: orpo, learning_rate: 5e-6}}
ema: {op: ema, in: learner.weights, with: {decay: 0.5}}
";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new("weights", &[PortType::Weights], "The weights to average.")];
    const OUTPUTS: &'static [PortSpec] =
        &[PortSpec::new("weights", &[PortType::Weights], "The average after each step.")];
    const PLACEMENT: Placement = Placement::Device;
    type Config = EmaConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        if !(0.0..=1.0).contains(&config.decay) {
            issues.push(ConfigIssue::new("decay", format!("expected a number from 0 to 1, found {}", config.decay)));
        }
        if config.every > 1 && config.decay == 1.0 {
            issues.push(ConfigIssue::new("every", "has no effect: with `decay: 1` nothing is averaged in"));
        }
        issues.extend(device_issue(config.device.as_deref()));
        issues
    }

    fn plan(config: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        let Some((model, arrives)) = PlannedModel::averaged(context, config.device.as_deref())? else {
            return Ok(NodePlan::default());
        };
        let model = model.with_weights(config.dtype);
        let emits = Emits { dtype: Some(config.dtype), ..arrives.clone() };
        let versions = context.retained_versions;
        // Where older versions may still be read, the next one is there before the oldest goes.
        let policy = PlannedModel::arriving(context, "weights")?;
        let averaging =
            |(policy, _): (PlannedModel, _)| model.footprint().averaging(&policy.footprint(), versions == 1);
        let working = policy.map_or(0, averaging);
        let memory = Some(model.steady_memory(versions * model.weights(), working));
        Ok(NodePlan { parameters: Some(model.footprint().parameters()), memory, emits, ..NodePlan::default() })
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        let versions = Versions::new(context.node, context.retained_versions);
        let random = Draws::new(context.run.seed, context.node);
        let device = config.device.as_deref().map(device::parse).transpose()?;
        let (kernels, thread) = (kernels(context.run), NodeThread::of(context));
        Ok(Ema { config, versions, random, kernels, thread, device, restore_from: None })
    }
}
