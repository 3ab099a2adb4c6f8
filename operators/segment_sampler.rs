//! `segment_sampler`: rewrites a segment of each answer with the model's own words, and so makes the rejected response.
//!
//! SAPO (arXiv 2405.20830), section 3.2 and algorithm 1; with `segment_tokens: all`, the whole responses of SPIN
//! (arXiv 2401.01335).

use std::sync::Arc;
use std::time::Instant;

use sapo_flow_engine::operator::{ConfigIssue, Define};
use sapo_flow_engine::plan::{Emits, NodePlan, PlanContext};
use sapo_flow_engine::record::{Metrics, Pair, PortType, Record, Retraction};
use sapo_flow_engine::{BuildContext, Inputs, Operator, OperatorError, Outputs, Placement, PortSpec};
use sapo_flow_training::model::{Compute, Kernels};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::compute::{NodeThread, PlannedModel, compute, kernels};
use crate::decoding::DecodingConfig;
use crate::draws::Draws;
use crate::rewrite::{RewriteSettings, SegmentTokens, defaults, rewrite};
use crate::segments::Truncation;
use crate::weights::shared;

/// What `segment_sampler` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SegmentSamplerConfig {
    /// Tokens rewritten in each answer, or `all` for a whole response.
    #[serde(default = "defaults::segment_tokens")]
    pub segment_tokens: SegmentTokens,
    /// Longest prompt and answer together, in tokens; longer ones are cut as the authors do.
    #[serde(default = "defaults::max_length")]
    pub max_length: usize,
    /// Longest prompt where prompt and answer are over max_length together, in tokens.
    #[serde(default = "defaults::max_prompt_tokens")]
    pub max_prompt_tokens: usize,
    /// Which end of such a prompt is kept: keep_end or keep_start.
    #[serde(default = "defaults::truncation")]
    pub truncation: Truncation,
    /// Softens (above 1) or sharpens (below 1) the model's distribution.
    #[serde(default = "defaults::temperature")]
    pub temperature: f64,
    /// Draw from the k likeliest tokens only; 0 for all.
    #[serde(default = "defaults::top_k")]
    pub top_k: usize,
    /// Draw from the likeliest tokens that have this probability together; 1 for all.
    #[serde(default = "defaults::top_p")]
    pub top_p: f64,
    /// Rejected responses made for each prompt.
    #[serde(default = "default_one")]
    pub responses_per_prompt: usize,
    /// Rewrite at every n-th step only; the prompts of the others pass unused.
    #[serde(default = "default_one_step")]
    pub sample_every: u64,
    /// How the work is arranged. It changes speed and memory; results by the order of sums, and what bfloat16 rounds.
    #[serde(default)]
    pub decoding: DecodingConfig,
}

impl SegmentSamplerConfig {
    /// How answers are rewritten in a run with these kernels.
    fn settings(&self, kernels: Kernels) -> RewriteSettings {
        RewriteSettings {
            segment_tokens: self.segment_tokens,
            max_length: self.max_length,
            max_prompt_tokens: self.max_prompt_tokens,
            truncation: self.truncation,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            responses_per_prompt: self.responses_per_prompt,
            decoding: self.decoding.settings(kernels),
        }
    }
}

fn default_one() -> usize {
    1
}

fn default_one_step() -> u64 {
    1
}

/// See the [module](self).
pub struct SegmentSampler {
    settings: RewriteSettings,
    sample_every: u64,
    node: String,
    random: Draws,
    compute: Compute,
    thread: NodeThread,
}

impl Operator for SegmentSampler {
    fn start(&mut self, _: Inputs) -> Result<Outputs, OperatorError> {
        self.thread.begin(None)?;
        Ok(Outputs::new())
    }

    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        for retraction in inputs.retractions("prompts") {
            outputs.push("pairs", Record::Retraction(Retraction { port_type: PortType::Pairs, ..retraction }));
        }
        let weights = inputs.weights("weights").ok_or("no weights arrived at this step")?;
        let prompts = inputs.prompts("prompts");
        if !step.is_multiple_of(self.sample_every) || prompts.is_empty() {
            return Ok(outputs);
        }
        let model = shared(&weights)?;
        drop(weights);
        let began = Instant::now();
        let rewritten = rewrite(&model, &prompts, &self.settings, &self.random, step, &self.compute)?;
        let seconds = began.elapsed().as_secs_f64();

        let responses = rewritten.len();
        let tokens: usize = rewritten.iter().map(|response| response.generated).sum();
        let ended = rewritten.iter().filter(|response| response.segment.ended).count();
        for (position, response) in rewritten.into_iter().enumerate() {
            let pair = Pair {
                step,
                position: position as u32,
                origin: self.node.clone(),
                source: response.source,
                row: response.row,
                prompt_ids: response.prompt,
                chosen_ids: response.answer,
                rejected_ids: Some(response.rejected),
                segment: Some(response.segment),
                weights_version: Some(model.version),
                seed: Some(response.seed),
                values: response.values,
            };
            outputs.push("pairs", Record::Pair(Arc::new(pair)));
        }
        let mut metrics = Metrics::default();
        let mut set = |name: &str, value: f64| metrics.values.insert(format!("{}/{name}", self.node), value);
        set("generated_tokens", tokens as f64);
        set("ended_share", ended as f64 / responses as f64);
        set("tokens/s", tokens as f64 / seconds);
        outputs.push("metrics", Record::Metrics(Arc::new(metrics)));
        Ok(outputs)
    }
}

impl Define for SegmentSampler {
    const NAME: &'static str = "segment_sampler";
    const SUMMARY: &'static str = "Rewrites a segment of each answer with a model, which makes the rejected response.";
    const DOCS: &'static str = "\
For a prompt and its answer of C tokens (EOS included), n = min(segment_tokens, C) tokens from a random start s are
generated anew after the prompt and the answer's first s tokens. If EOS is among them the response ends there, else
the answer's own tail follows. That is the rejected response; the answer is the chosen one. The start leaves at least
three tokens after the segment, where the answer has them. With `segment_tokens: all` the whole response is generated,
up to max_length.

The weights come over a feedback edge from the EMA model (SAPO), the learner (on-policy) or anything else that emits
weights. All random draws are functions of (seed, node, step, response, token).
When a row is taken back, so are the pairs that were made of it.

State: none. Errors: none of its own; a prompt and answer that are too long are cut (`max_length`).
Metrics: NODE/generated_tokens, NODE/ended_share (responses that ended in EOS), NODE/tokens/s.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8, max_prompt_tokens: 1792}}
segments:
  op: segment_sampler
  in:
    prompts: prompts
    weights: {from: ema, feedback: {max_staleness: 0}}
  with: {segment_tokens: 256, temperature: 0.7, top_k: 50, top_p: 0.95}
batches: {op: batcher, in: segments, with: {batch_size: 8, max_length: 2048}}
learner: {op: preference_learner, in: batches, with: {model: models/smollm2-135m-instruct, objective: orpo, learning_rate: 5e-6}}
ema: {op: ema, in: learner.weights, with: {decay: 0.5}}
";
    const INPUTS: &'static [PortSpec] = &[
        PortSpec::new("prompts", &[PortType::Prompts], "Prompts with the answers to rewrite.")
            .many()
            .honouring_retractions(),
        PortSpec::new("weights", &[PortType::Weights], "The model that writes."),
    ];
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("pairs", &[PortType::Pairs], "The answer as chosen, the rewritten one as rejected.")
            .passing_retractions(),
        PortSpec::new("metrics", &[PortType::Metrics], "Tokens generated, and how fast."),
    ];
    const PLACEMENT: Placement = Placement::Device;
    type Config = SegmentSamplerConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let mut issues = config.settings(Kernels::default()).issues();
        issues.extend(config.decoding.issues());
        if config.sample_every == 0 {
            issues.push(ConfigIssue::new("sample_every", "expected a number above 0, found 0"));
        }
        issues
    }

    fn plan(config: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        let responses = config.responses_per_prompt as u64;
        let tokens = config.max_length as u64;
        let prompts = context.input("prompts");
        let rows = prompts.rows.map(|prompts| prompts * responses);
        let settings = config.settings(kernels(context.run));
        let sample = prompts.sample.iter().map(|row| settings.pair(*row)).collect();
        let emits = Emits { rows, max_length: Some(tokens), sample, ..Emits::default() };
        let memory = PlannedModel::sampling(context, &emits, &settings.decoding, &settings.choice())?;
        Ok(NodePlan { memory, emits, ..NodePlan::default() })
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        Ok(SegmentSampler {
            settings: config.settings(kernels(context.run)),
            sample_every: config.sample_every,
            node: context.node.into(),
            random: Draws::new(context.run.seed, context.node),
            compute: compute(context.run),
            thread: NodeThread::of(context),
        })
    }
}
