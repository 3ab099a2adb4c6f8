//! `sampler`: whole responses to prompts, by a model of the run.

use std::sync::Arc;
use std::time::Instant;

use sapo_flow_engine::operator::{ConfigIssue, Define};
use sapo_flow_engine::plan::{Emits, NodePlan, PlanContext};
use sapo_flow_engine::record::{Metrics, PortType, Prompt, Record, Retraction, Sample};
use sapo_flow_engine::{BuildContext, Inputs, Operator, OperatorError, Outputs, Placement, PortSpec};
use sapo_flow_training::generate::{Choice, Request, Sampling, Warpers, generate};
use sapo_flow_training::model::Compute;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::compute::{NodeThread, PlannedModel, compute, kernels};
use crate::decoding::DecodingConfig;
use crate::draws::Draws;
use crate::weights::{SharedWeights, shared};

/// What `sampler` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SamplerConfig {
    /// Responses made for each prompt.
    #[serde(default = "default_responses")]
    #[schemars(range(min = 1))]
    pub responses_per_prompt: usize,
    /// Longest response, in tokens.
    #[serde(default = "default_max_new_tokens")]
    #[schemars(range(min = 1))]
    pub max_new_tokens: usize,
    /// Softens (above 1) or sharpens (below 1) the model's distribution.
    #[serde(default = "default_temperature")]
    pub temperature: f64,
    /// Draw from the k likeliest tokens only; 0 for all.
    #[serde(default)]
    pub top_k: usize,
    /// Draw from the likeliest tokens that have this probability together; 1 for all.
    #[serde(default = "default_top_p")]
    pub top_p: f64,
    /// How the work is arranged. It changes speed and memory; results by the order of sums, and what bfloat16 rounds.
    #[serde(default)]
    pub decoding: DecodingConfig,
}

fn default_responses() -> usize {
    2
}

fn default_max_new_tokens() -> usize {
    256
}

fn default_temperature() -> f64 {
    1.0
}

fn default_top_p() -> f64 {
    1.0
}

impl SamplerConfig {
    /// How tokens are chosen.
    fn choice(&self) -> Choice {
        let SamplerConfig { temperature, top_k, top_p, .. } = *self;
        let (top_k, top_p) = ((top_k > 0).then_some(top_k), (top_p < 1.0).then_some(top_p));
        Choice::Sample(Warpers { temperature, top_k, top_p })
    }
}

/// See the [module](self).
pub struct Sampler {
    config: SamplerConfig,
    node: String,
    random: Draws,
    compute: Compute,
    thread: NodeThread,
}

impl Sampler {
    /// `responses_per_prompt` samples of each prompt, in the prompts' order, and the tokens generated.
    fn sample(&self, model: &SharedWeights, prompts: &[Arc<Prompt>], step: u64) -> Result<Vec<Sample>, OperatorError> {
        let SamplerConfig { responses_per_prompt, max_new_tokens, decoding, .. } = self.config;
        let each = prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, responses_per_prompt));
        let tasks: Vec<(u64, &Arc<Prompt>)> = (0..).zip(each).collect();
        let requests: Vec<Request> = tasks
            .iter()
            .map(|(n, prompt)| {
                let (prompt_ids, seed) = (prompt.prompt_ids.clone(), self.random.seed(step, *n));
                Request { prompt_ids, max_new_tokens, seed }
            })
            .collect();
        let eos_ids = model.decoder.config.eos_token_ids.clone();
        let (choice, decoding) = (self.config.choice(), decoding.settings(self.compute.kernels));
        let sampling = Sampling { choice, eos_ids, compute: self.compute, decoding };
        let generations = generate(&model.decoder, &model.parameters, &requests, &sampling)?;
        let samples = tasks.iter().zip(requests).zip(generations).map(|(((n, prompt), request), generation)| {
            let mut values = prompt.values.clone();
            values.insert("tokens".into(), generation.tokens.len() as f64);
            Sample {
                step,
                position: *n as u32,
                origin: self.node.clone(),
                source: prompt.source.clone(),
                row: prompt.row,
                prompt_ids: request.prompt_ids,
                response_ids: generation.tokens,
                weights_version: Some(model.version),
                seed: Some(request.seed),
                values,
            }
        });
        Ok(samples.collect())
    }
}

impl Operator for Sampler {
    fn start(&mut self, _: Inputs) -> Result<Outputs, OperatorError> {
        self.thread.begin(None)?;
        Ok(Outputs::new())
    }

    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        for retraction in inputs.retractions("prompts") {
            let retraction = Retraction { port_type: PortType::Samples, ..retraction };
            outputs.push("samples", Record::Retraction(retraction));
        }
        let weights = inputs.weights("weights").ok_or("no weights arrived at this step")?;
        let prompts = inputs.prompts("prompts");
        if prompts.is_empty() {
            return Ok(outputs);
        }
        let model = shared(&weights)?;
        drop(weights);
        let began = Instant::now();
        let samples = self.sample(&model, &prompts, step)?;
        let seconds = began.elapsed().as_secs_f64();

        let eos_ids = &model.decoder.config.eos_token_ids;
        let ended = samples.iter().filter(|s| s.response_ids.last().is_some_and(|last| eos_ids.contains(last))).count();
        let tokens: usize = samples.iter().map(|sample| sample.response_ids.len()).sum();
        let mut metrics = Metrics::default();
        let mut set = |name: &str, value: f64| metrics.values.insert(format!("{}/{name}", self.node), value);
        set("generated_tokens", tokens as f64);
        set("ended_share", ended as f64 / samples.len() as f64);
        set("tokens/s", tokens as f64 / seconds);
        for sample in samples {
            outputs.push("samples", Record::Sample(Arc::new(sample)));
        }
        outputs.push("metrics", Record::Metrics(Arc::new(metrics)));
        Ok(outputs)
    }
}

impl Define for Sampler {
    const NAME: &'static str = "sampler";
    const SUMMARY: &'static str = "Writes whole responses to prompts with a model.";
    const DOCS: &'static str = "\
For each prompt `responses_per_prompt` responses of at most `max_new_tokens` tokens are generated; one that ends in EOS ends \
there. Each is a sample: with its prompt's values, and `values.tokens`, its length. Operators after it score samples and make \
pairs of them (`best_worst`, `join`).

The weights come over a feedback edge from the learner (on-policy), the EMA model or anything else that emits weights. All \
random draws are functions of (seed, node, step, response, token). When a row is taken back, so are its samples.

State: none. Errors: none of its own.
Metrics: NODE/generated_tokens, NODE/ended_share (responses that ended in EOS), NODE/tokens/s.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat.jsonl, tokenizer: models/smollm2, batch_size: 8}}
samples:
  op: sampler
  in: {prompts: prompts, weights: {from: learner.weights, feedback: {max_staleness: 0}}}
  with: {responses_per_prompt: 4, max_new_tokens: 64}
pairs: {op: best_worst, in: samples, with: {score: values.tokens, candidates: 4}}
batches: {op: batcher, in: pairs, with: {batch_size: 8, max_length: 2048}}
learner: {op: preference_learner, in: batches, with: {model: models/smollm2, objective: orpo, learning_rate: 5e-7}}
";
    const INPUTS: &'static [PortSpec] = &[
        PortSpec::new("prompts", &[PortType::Prompts], "What to respond to.").many().honouring_retractions(),
        PortSpec::new("weights", &[PortType::Weights], "The model that writes."),
    ];
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("samples", &[PortType::Samples], "The responses.").passing_retractions(),
        PortSpec::new("metrics", &[PortType::Metrics], "Tokens generated, and how fast."),
    ];
    const PLACEMENT: Placement = Placement::Device;
    type Config = SamplerConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let mut issues = config.decoding.issues();
        let temperature = config.temperature;
        if !temperature.is_finite() || temperature <= 0.0 {
            issues.push(ConfigIssue::new(
                "temperature",
                format!("expected a finite number above 0, found {temperature}"),
            ));
        }
        let top_p = config.top_p;
        if !(top_p > 0.0 && top_p <= 1.0) {
            issues.push(ConfigIssue::new("top_p", format!("expected a number above 0 and up to 1, found {top_p}")));
        }
        issues
    }

    fn plan(config: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        let prompts = context.input("prompts");
        let responses = config.responses_per_prompt as u64;
        let rows = prompts.rows.map(|prompts| prompts * responses);
        let longest = prompts.max_length.map(|tokens| tokens + config.max_new_tokens as u64);
        let emits = Emits { rows, max_length: longest, sample: prompts.sample, ..Emits::default() };
        let decoding = config.decoding.settings(kernels(context.run));
        let memory = PlannedModel::sampling(context, &emits, &decoding, &config.choice())?;
        Ok(NodePlan { memory, emits, ..NodePlan::default() })
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        Ok(Sampler {
            config,
            node: context.node.into(),
            random: Draws::new(context.run.seed, context.node),
            compute: compute(context.run),
            thread: NodeThread::of(context),
        })
    }
}
