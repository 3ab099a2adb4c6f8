//! `bema`: an average of a model's weights whose lag is corrected.
//!
//! BEMA (Block and Zhang 2025, arXiv 2508.00180), as TRL's `BEMACallback`: with t updates, age = lag + multiplier t,
//! ema = (1 - beta_t) ema + beta_t policy, beta_t = age^-ema_power, and emitted is ema + age^-bias_power (policy - first).

use std::path::{Path, PathBuf};

use sapo_flow_engine::graph::Dtype;
use sapo_flow_engine::operator::{ConfigIssue, Define};
use sapo_flow_engine::plan::{Emits, NodePlan, PlanContext};
use sapo_flow_engine::record::{PortType, Record};
use sapo_flow_engine::{BuildContext, Inputs, Operator, OperatorError, Outputs, Placement, PortSpec};
use sapo_flow_training::bema::{self, Powers};
use sapo_flow_training::device;
use sapo_flow_training::model::Kernels;
use sapo_flow_training::parameters::ParameterSet;
use schemars::JsonSchema;
use serde::Deserialize;
use tch::{Device, Kind};

use crate::compute::{NodeThread, PlannedModel, device_issue, kernels};
use crate::state;
use crate::weights::{SharedWeights, Versions, shared_on};

/// What `bema` takes under `with`; the defaults are TRL's.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BemaConfig {
    /// Average every so many updates, and leave the average as it is in between.
    #[serde(default = "default_every")]
    #[schemars(range(min = 1))]
    pub every: u64,
    /// The policy's share of the average falls with this power of the age; 0 copies the policy.
    #[serde(default = "default_ema_power")]
    pub ema_power: f64,
    /// The correction falls with this power of the age; 0 keeps all of it, a large number nothing.
    #[serde(default = "default_bias_power")]
    pub bias_power: f64,
    /// Age at the start.
    #[serde(default = "default_lag")]
    pub lag: f64,
    /// Age that an update adds.
    #[serde(default = "default_multiplier")]
    pub multiplier: f64,
    /// The policy's share of the average falls no further than this.
    #[serde(default)]
    pub min_share: f64,
    /// Updates after which the average begins, with the weights of then.
    #[serde(default)]
    pub start_after: u64,
    /// Where the averages are kept, and where those who read them compute; absent: where the weights are.
    pub device: Option<String>,
}

fn default_every() -> u64 {
    400
}

fn default_ema_power() -> f64 {
    0.5
}

fn default_bias_power() -> f64 {
    0.2
}

fn default_lag() -> f64 {
    10.0
}

fn default_multiplier() -> f64 {
    1.0
}

impl BemaConfig {
    fn powers(&self) -> Powers {
        let (lag, multiplier, min_share) = (self.lag, self.multiplier, self.min_share);
        Powers { lag, multiplier, ema: self.ema_power, bias: self.bias_power, min_share }
    }
}

/// See the [module](self).
pub struct Bema {
    config: BemaConfig,
    versions: Versions,
    averages: Option<Averages>,
    kernels: Kernels,
    thread: NodeThread,
    device: Option<Device>,
    restore_from: Option<PathBuf>,
}

/// What the corrected average is computed from; float32.
struct Averages {
    /// The weights at the beginning of the average.
    first: ParameterSet,
    /// The average as it is, not corrected.
    plain: ParameterSet,
    /// Updates of the policy seen last: a step without one changes nothing.
    seen: u64,
}

const FIRST: &str = "first.safetensors";
const PLAIN: &str = "average.safetensors";
const SEEN: &str = "bema.json";

impl Averages {
    fn of(policy: &SharedWeights) -> Self {
        let first = float32(&policy.parameters);
        Averages { plain: first.deep_copy(), first, seen: policy.version }
    }

    fn snapshot(&self, directory: &Path) -> Result<(), OperatorError> {
        self.first.write(&directory.join(FIRST), None)?;
        self.plain.write(&directory.join(PLAIN), None)?;
        Ok(state::write(directory, SEEN, &self.seen)?)
    }

    fn restore(directory: &Path, like: &SharedWeights) -> Result<Self, OperatorError> {
        let expected = like.decoder.expected_parameters();
        let read = |name| ParameterSet::load_file(&directory.join(name), &expected, like.decoder.device);
        Ok(Averages { first: read(FIRST)?, plain: read(PLAIN)?, seen: state::read(directory, SEEN)? })
    }
}

/// A copy in float32, whatever the type was.
fn float32(parameters: &ParameterSet) -> ParameterSet {
    parameters.to_kind(Kind::Float).deep_copy()
}

impl Bema {
    /// Take in update number `policy.version`, which has not been seen.
    fn update(&mut self, policy: &SharedWeights) -> Result<(), OperatorError> {
        let (version, start) = (policy.version, self.config.start_after);
        let averages = self.averages.as_mut().ok_or("stepped before its start")?;
        averages.seen = version;
        if version == start {
            *averages = Averages::of(policy);
        } else if version > start && (version - start).is_multiple_of(self.config.every) {
            let powers = self.config.powers();
            let Averages { plain, first, .. } = averages;
            let parameters = bema::update(plain, &policy.parameters, first, &powers, self.kernels, version)?;
            self.versions.push_next(version, parameters)?;
        }
        Ok(())
    }
}

impl Operator for Bema {
    fn start(&mut self, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        self.thread.begin(self.device)?;
        let weights = inputs.weights("weights").ok_or("no weights to average: `weights` must come from a learner")?;
        let policy = shared_on(&weights, self.device)?;
        match self.restore_from.take() {
            Some(directory) => {
                self.versions.restore(&directory, &policy)?;
                self.averages = Some(Averages::restore(&directory, &policy)?);
            }
            None => {
                self.averages = Some(Averages::of(&policy));
                self.versions.push(policy.version(policy.version, float32(&policy.parameters)));
            }
        }
        self.versions.outputs()
    }

    fn step(&mut self, _: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let weights = inputs.weights("weights").ok_or("no weights arrived at this step")?;
        if self.averages.as_ref().is_some_and(|averages| averages.seen != weights.version) {
            self.update(&*shared_on(&weights, self.device)?)?;
        }
        self.versions.outputs()
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        self.versions.snapshot(directory)?;
        self.averages.as_ref().ok_or("asked for its state before its start")?.snapshot(directory)
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        self.restore_from = Some(directory.into());
        Ok(())
    }

    fn reattach(&mut self, record: &mut Record) -> Result<(), OperatorError> {
        self.versions.reattach(record)
    }
}

impl Define for Bema {
    const NAME: &'static str = "bema";
    const SUMMARY: &'static str = "Averages a learner's weights over its updates, and corrects the average's lag.";
    const DOCS: &'static str = "\
After update t, a multiple of `every`, with age = lag + multiplier t:

    average = (1 - age^-ema_power) average + age^-ema_power policy
    emitted = average + age^-bias_power (policy - first)

Both begin as the first weights; with `start_after: n` the average and `first` begin as the weights after n updates, and
until the next multiple of `every` counted from there the first weights of the run are emitted. The average weighs all
updates more evenly the longer the run, and the correction moves it on by what it lags behind. Arithmetic is in float32.

The paper's names: rho is `lag`, gamma `multiplier`, kappa `ema_power`, eta `bias_power`, phi `every`, tau `start_after`;
TRL's `min_ema_multiplier` is `min_share`, and TRL's defaults are the defaults here. As a reference's weights it is TRL's
`bema_for_ref_model`; with a `checkpoint` behind it, the model to keep.

State: the first weights, the average, and what was emitted in as many versions as feedback edges from here may still read.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat_pairs.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8, max_prompt_tokens: 1792}}
batches: {op: batcher, in: prompts.pairs, with: {batch_size: 8, max_length: 2048}}
learner: {op: preference_learner, in: batches, with: {model: models/smollm2-135m-instruct, objective: orpo, learning_rate: 5e-6}}
bema: {op: bema, in: learner.weights, with: {every: 50}}
model: {op: checkpoint, in: bema}
";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new("weights", &[PortType::Weights], "The weights to average.")];
    const OUTPUTS: &'static [PortSpec] =
        &[PortSpec::new("weights", &[PortType::Weights], "The corrected average after each step.")];
    const PLACEMENT: Placement = Placement::Device;
    type Config = BemaConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        for (key, value) in
            [("ema_power", config.ema_power), ("bias_power", config.bias_power), ("multiplier", config.multiplier)]
        {
            if !(value >= 0.0 && value.is_finite()) {
                issues.push(ConfigIssue::new(key, format!("expected 0 or more, found {value}")));
            }
        }
        // A younger average would take in more than all of the policy.
        if !(config.lag >= 1.0 && config.lag.is_finite()) {
            issues.push(ConfigIssue::new("lag", format!("expected 1 or more, found {}", config.lag)));
        }
        if !(0.0..=1.0).contains(&config.min_share) {
            issues.push(ConfigIssue::new("min_share", format!("expected 0 to 1, found {}", config.min_share)));
        }
        issues.extend(device_issue(config.device.as_deref()));
        issues
    }

    fn plan(config: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        let Some((model, arrives)) = PlannedModel::averaged(context, config.device.as_deref())? else {
            return Ok(NodePlan::default());
        };
        let model = model.with_weights(Dtype::Float32);
        let emits = Emits { dtype: Some(Dtype::Float32), ..arrives.clone() };
        // The first weights, the average, and the versions that may be read; the next one is there before the oldest goes.
        let kept = (2 + context.retained_versions) * model.weights();
        let policy = PlannedModel::arriving(context, "weights")?;
        let averaging = |(policy, _): (PlannedModel, _)| model.footprint().averaging(&policy.footprint(), false);
        let working = policy.map_or(0, averaging);
        let memory = Some(model.steady_memory(kept, working));
        Ok(NodePlan { parameters: Some(model.footprint().parameters()), memory, emits, ..NodePlan::default() })
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        let versions = Versions::new(context.node, context.retained_versions);
        let device = config.device.as_deref().map(device::parse).transpose()?;
        let (kernels, thread) = (kernels(context.run), NodeThread::of(context));
        Ok(Bema { config, versions, averages: None, kernels, thread, device, restore_from: None })
    }
}

#[cfg(test)]
mod tests;
