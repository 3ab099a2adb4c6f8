//! Operators that do nothing, with the ports and configs of a small preference-learning loop.
#![allow(dead_code)] // Configs are read for their errors, not their values.

use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::pipeline::{self, Diagnostics};
use sapo_flow_engine::{
    BuildContext, Define, Graph, Inputs, Operator, OperatorError, OperatorSpec, Outputs, PortSpec, PortType, Registry,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const PROMPTS: &[PortType] = &[PortType::Prompts];
const PAIRS: &[PortType] = &[PortType::Pairs];
const BATCHES: &[PortType] = &[PortType::Batches];
const WEIGHTS: &[PortType] = &[PortType::Weights];
const METRICS: &[PortType] = &[PortType::Metrics];

/// An operator named `$name` that emits nothing.
macro_rules! toy {
    ($type:ident, $name:literal, $config:ty, [$($input:expr),*], [$($output:expr),*] $(, $check:expr)?) => {
        pub struct $type;

        impl Operator for $type {
            fn step(&mut self, _: u64, _: Inputs) -> Result<Outputs, OperatorError> {
                Ok(Outputs::new())
            }
        }

        impl Define for $type {
            const NAME: &'static str = $name;
            const SUMMARY: &'static str = concat!("A toy ", $name, ".");
            const DOCS: &'static str = "Does nothing.";
            const EXAMPLE: &'static str = concat!("toy:\n  op: ", $name);
            const INPUTS: &'static [PortSpec] = &[$($input),*];
            const OUTPUTS: &'static [PortSpec] = &[$($output),*];
            type Config = $config;

            $(fn check(config: &Self::Config) -> Vec<ConfigIssue> {
                let check: fn(&Self::Config) -> Vec<ConfigIssue> = $check;
                check(config)
            })?

            fn build(_: Self::Config, _: &BuildContext) -> Result<Self, OperatorError> {
                Ok($type)
            }
        }
    };
}

/// No keys.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// A source's keys.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// Where the rows are.
    pub path: String,
    /// Rows a step.
    #[serde(default = "eight")]
    #[schemars(range(min = 1))]
    pub batch_size: u64,
    /// Names of columns.
    #[serde(default)]
    pub columns: Vec<String>,
}

fn eight() -> u64 {
    8
}

/// How many tokens.
#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Tokens {
    /// That many.
    Count(u64),
    /// All there are.
    Word(All),
}

/// The word `all`.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum All {
    /// All.
    All,
}

/// A sampler's keys.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SamplerConfig {
    /// Softmax temperature.
    #[schemars(range(min = 0.0))]
    pub temperature: f64,
    /// Nucleus mass.
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
    pub top_p: Option<f64>,
    /// Tokens to rewrite.
    pub segment_tokens: Tokens,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        SamplerConfig { temperature: 1.0, top_p: None, segment_tokens: Tokens::Count(256) }
    }
}

/// What to minimise.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// Odds ratios.
    Orpo,
    /// Against a reference.
    Dpo,
}

/// An update rule.
#[derive(Deserialize, JsonSchema)]
#[serde(tag = "name", rename_all = "lowercase", deny_unknown_fields)]
pub enum Optimizer {
    /// Adam.
    Adamw {
        /// Step size.
        learning_rate: f64,
        /// Decay of the moments.
        #[serde(default)]
        betas: Option<(f64, f64)>,
    },
    /// Plain.
    Sgd {
        /// Step size.
        learning_rate: f64,
        /// Of the past.
        #[serde(default)]
        momentum: f64,
    },
}

/// A learner's keys.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LearnerConfig {
    /// The loss.
    pub objective: Objective,
    /// Its strength.
    #[serde(default)]
    pub beta: f64,
    /// The update rule.
    #[serde(default)]
    pub optimizer: Option<Optimizer>,
}

/// An average's keys.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EmaConfig {
    /// Weight of the past.
    pub decay: f64,
}

toy!(Source, "prompt_source", SourceConfig, [], [PortSpec::new("prompts", PROMPTS, "rows")]);
toy!(
    Sampler,
    "segment_sampler",
    SamplerConfig,
    [PortSpec::new("prompts", PROMPTS, "what to answer"), PortSpec::new("weights", WEIGHTS, "who answers")],
    [PortSpec::new("pairs", PAIRS, "answers")]
);
toy!(
    Buffer,
    "replay_buffer",
    Nothing,
    [PortSpec::new("pairs", PAIRS, "what to keep").many()],
    [PortSpec::new("pairs", PAIRS, "what is drawn"), PortSpec::new("metrics", METRICS, "sizes")]
);
toy!(
    Batcher,
    "batcher",
    Nothing,
    [PortSpec::new("pairs", PAIRS, "what to gather")],
    [PortSpec::new("batches", BATCHES, "batches")]
);
toy!(
    Learner,
    "learner",
    LearnerConfig,
    [PortSpec::new("batches", BATCHES, "what to learn from")],
    [PortSpec::new("weights", WEIGHTS, "the policy"), PortSpec::new("metrics", METRICS, "the loss")]
);
toy!(
    Ema,
    "ema",
    EmaConfig,
    [PortSpec::new("weights", WEIGHTS, "what to follow")],
    [PortSpec::new("weights", WEIGHTS, "the average")],
    |config| {
        let inside = (0.0..1.0).contains(&config.decay);
        if inside { Vec::new() } else { vec![ConfigIssue::new("decay", "must be at least 0 and below 1")] }
    }
);
toy!(Sink, "metrics_sink", Nothing, [PortSpec::new("metrics", METRICS, "what to write").many()], []);

/// All of them.
pub fn registry() -> Registry {
    Registry::new(vec![
        OperatorSpec::of::<Source>(),
        OperatorSpec::of::<Sampler>(),
        OperatorSpec::of::<Buffer>(),
        OperatorSpec::of::<Batcher>(),
        OperatorSpec::of::<Learner>(),
        OperatorSpec::of::<Ema>(),
        OperatorSpec::of::<Sink>(),
    ])
}

/// The whole loop, right in every way.
pub const LOOP: &str = r#"version: 1
params:
  ema_decay: 0.5
  max_staleness: 0
run: {steps: 10}
nodes:
  prompts: {op: prompt_source, with: {path: rows.jsonl}}
  segments:
    op: segment_sampler
    in:
      prompts: prompts
      weights: {from: ema, feedback: {max_staleness: "${max_staleness}"}}
  replay: {op: replay_buffer, in: segments}
  batches: {op: batcher, in: replay}
  learner: {op: learner, in: batches, with: {objective: orpo}}
  ema: {op: ema, in: learner.weights, with: {decay: "${ema_decay}"}}
  metrics: {op: metrics_sink, in: [learner.metrics, replay.metrics]}
"#;

/// Read a pipeline named `p.yaml`.
pub fn read(text: &str) -> Result<Graph, Diagnostics> {
    read_with(text, &[])
}

/// Read a pipeline named `p.yaml` with overrides.
pub fn read_with(text: &str, overrides: &[(&str, &str)]) -> Result<Graph, Diagnostics> {
    let overrides: Vec<_> = overrides.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    pipeline::parse_str("p.yaml", text, &overrides, &registry())
}

/// A right pipeline around these lines of `nodes`, which begin at line 4.
pub fn around(nodes: &str) -> String {
    format!("version: 1\nrun: {{steps: 10}}\nnodes:\n{nodes}")
}

/// What is wrong with a pipeline that must not be right: `line:column message` of each error and warning.
pub fn complaints(text: &str) -> Vec<String> {
    let diagnostics = match read(text) {
        Ok(graph) => graph.warnings,
        Err(diagnostics) => diagnostics,
    };
    diagnostics.list.iter().map(|d| format!("{}:{} {}", d.line, d.column, d.message)).collect()
}

/// The help of the first complaint.
pub fn help(text: &str) -> Option<String> {
    read(text).err().and_then(|diagnostics| diagnostics.list.first().and_then(|first| first.help.clone()))
}
