//! `evaluator`: how well a model does on held-out rows, before, during and after a run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use sapo_flow_engine::operator::{ConfigIssue, Define};
use sapo_flow_engine::plan::{Emits, NodePlan, PlanContext};
use sapo_flow_engine::record::{Metrics, PortType, Prompt, Record, TokenId, Weights};
use sapo_flow_engine::runtime::event::{Completion, Event, EventSender};
use sapo_flow_engine::{BuildContext, Inputs, Operator, OperatorError, Outputs, Placement, PortSpec};
use sapo_flow_training::generate::{Choice, Decoding, Generation, Request, Sampling, generate};
use sapo_flow_training::learner::{Example, ExampleScore, score};
use sapo_flow_training::model::{Compute, Kernels};
use sapo_flow_training::text::TextTokenizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::compute::{NodeThread, PlannedModel, compute, kernels};
use crate::data::{self, Columns, OnError, Part, Paths};
use crate::draws::Draws;
use crate::planned_batches::{BatchLengths, PlannedBatches};
use crate::rewrite::{RewriteSettings, Rewritten, SegmentTokens, defaults, rewrite};
use crate::segments::Truncation;
use crate::state;
use crate::sums::Sums;
use crate::weights::{SharedWeights, shared};

/// What `evaluator` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvaluatorConfig {
    /// Held-out data: a file, a glob pattern, or a list of them, in any form that `prompt_source` reads.
    pub path: Paths,
    /// A model directory with the tokenizer and, as a rule, the chat template.
    pub tokenizer: String,
    /// Names of the data's columns where they are not the usual ones.
    #[serde(default)]
    pub columns: Columns,
    /// Chat template in place of the tokenizer's: its text, or a file that holds it.
    pub chat_template: Option<String>,
    /// Steps between evaluations; absent: only before the first step and after the last.
    pub every: Option<u64>,
    /// Every n-th row of the data only: those that a `prompt_source` with the same `hold_out_every` leaves out.
    pub hold_out_every: Option<u64>,
    /// Rows evaluated, from the first; absent: all.
    pub limit: Option<usize>,
    /// Rows at a time.
    #[serde(default = "default_batch_size")]
    pub batch_size: usize,
    /// Tokens rewritten in each answer to make the rejected response, or `all`.
    #[serde(default = "defaults::segment_tokens")]
    pub segment_tokens: SegmentTokens,
    /// Longest prompt and answer together, in tokens.
    #[serde(default = "defaults::max_length")]
    pub max_length: usize,
    /// Longest prompt, in tokens; rows with longer ones are dropped and counted.
    #[serde(default = "defaults::max_prompt_tokens")]
    pub max_prompt_tokens: usize,
    /// Of the rejected responses' tokens.
    #[serde(default = "defaults::temperature")]
    pub temperature: f64,
    /// Of the rejected responses' tokens.
    #[serde(default = "defaults::top_k")]
    pub top_k: usize,
    /// Of the rejected responses' tokens.
    #[serde(default = "defaults::top_p")]
    pub top_p: f64,
    /// Rows whose completions are shown.
    #[serde(default = "default_show")]
    pub show: usize,
    /// Longest completion shown, in tokens (default 48).
    pub show_tokens: Option<usize>,
}

impl EvaluatorConfig {
    /// What to read.
    fn data(&self) -> data::Settings<'_> {
        data::Settings {
            paths: &self.path,
            columns: &self.columns,
            tokenizer: Path::new(&self.tokenizer),
            chat_template: self.chat_template.as_deref(),
            max_prompt_tokens: Some(self.max_prompt_tokens),
            on_error: OnError::Stop,
            part: self.hold_out_every.map_or(Part::All, |hold_out_every| Part::HeldOut { hold_out_every }),
            limit: self.limit,
        }
    }

    /// How the rejected responses are made in a run with these kernels.
    fn rewriting(&self, kernels: Kernels) -> RewriteSettings {
        RewriteSettings {
            segment_tokens: self.segment_tokens,
            max_length: self.max_length,
            max_prompt_tokens: self.max_prompt_tokens,
            truncation: Truncation::KeepEnd,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            responses_per_prompt: 1,
            decoding: Decoding::suited_to(kernels),
        }
    }
}

fn default_batch_size() -> usize {
    8
}

fn default_show() -> usize {
    1
}

const DEFAULT_SHOW_TOKENS: usize = 48;

/// See the [module](self).
pub struct Evaluator {
    config: EvaluatorConfig,
    rewriting: RewriteSettings,
    node: String,
    random: Draws,
    compute: Compute,
    thread: NodeThread,
    total_steps: u64,
    rows: Vec<Arc<Prompt>>,
    tokenizer: TextTokenizer,
    events: EventSender,
    first: Option<First>,
    resumed: bool,
}

/// The first evaluation of a run: told again when the run is resumed, and what later ones are compared with.
#[derive(Clone, Serialize, Deserialize)]
struct First {
    version: u64,
    metrics: Metrics,
    /// What the model wrote then, by row.
    rejected: Vec<Vec<TokenId>>,
    /// What it answered then.
    shown: Vec<Completion>,
}

impl Evaluator {
    /// Evaluate, tell the result and show completions.
    fn evaluate(&mut self, weights: &Weights) -> Result<Metrics, OperatorError> {
        let began = Instant::now();
        let weights = shared(weights)?;
        let mut pairs: Vec<Rewritten> = Vec::with_capacity(self.rows.len());
        for (batch, rows) in self.rows.chunks(self.config.batch_size).enumerate() {
            // The draws depend on the rows only, so that evaluations differ by the model alone.
            pairs.extend(rewrite(&weights, rows, &self.rewriting, &self.random, batch as u64, &self.compute)?);
        }
        let scores = self.score(&weights, pairs.iter().map(|pair| (pair, &pair.answer, Some(&pair.rejected))))?;
        let own = Sums::of(&scores);
        let mut metrics = Metrics::default();
        metrics.values.extend([("eval_nll".into(), own.nll()), ("eval_own_accuracy".into(), own.accuracy())]);
        metrics.values.insert("eval_own_margin".into(), own.margin());
        let against_first = match &self.first {
            None => own,
            Some(first) => {
                let rejected = first.rejected.iter().map(Some);
                self.against(&weights, &pairs, &scores, rejected)?
            }
        };
        metrics.values.insert("eval_accuracy".into(), against_first.accuracy());
        metrics.values.insert("eval_margin".into(), against_first.margin());
        if self.rows.iter().any(|row| row.rejected_ids.is_some()) {
            let given = self.rows.iter().map(|row| row.rejected_ids.as_ref());
            let given = self.against(&weights, &pairs, &scores, given)?;
            metrics.values.insert("eval_given_accuracy".into(), given.accuracy());
            metrics.values.insert("eval_given_margin".into(), given.margin());
        }
        let shown = self.completions(&weights)?;
        self.tell(weights.version, &metrics, &shown);
        if self.first.is_none() {
            let rejected = pairs.into_iter().map(|pair| pair.rejected).collect();
            self.first = Some(First { version: weights.version, metrics: metrics.clone(), rejected, shown });
        }
        let seconds = began.elapsed().as_secs_f64();
        tracing::debug!(node = self.node, version = weights.version, rows = self.rows.len(), seconds, "evaluated");
        Ok(metrics)
    }

    fn tell(&self, version: u64, metrics: &Metrics, shown: &[Completion]) {
        let (node, metrics) = (self.node.clone(), Arc::new(metrics.clone()));
        self.events.send(Event::Evaluation { node, version, metrics, shown: shown.to_vec() });
    }

    /// The held-out answers, whose log-probabilities are known, against other responses where there are any.
    fn against<'p>(
        &self,
        weights: &SharedWeights,
        pairs: &'p [Rewritten],
        scores: &[ExampleScore],
        others: impl Iterator<Item = Option<&'p Vec<TokenId>>>,
    ) -> Result<Sums, OperatorError> {
        let compared = pairs.iter().zip(scores).zip(others).filter_map(|(row, other)| Some((row, other?)));
        let (rows, others): (Vec<_>, Vec<_>) = compared.unzip();
        let responses = rows.iter().zip(others).map(|((pair, _), other)| (*pair, other, None));
        let others = self.score(weights, responses)?;
        let both = rows
            .iter()
            .zip(others)
            .map(|((_, score), other)| ExampleScore { chosen: score.chosen, rejected: Some(other.chosen) });
        Ok(Sums::of(&both.collect::<Vec<_>>()))
    }

    /// The log-probabilities of responses to the rows' prompts, one or two for each.
    fn score<'p>(
        &self,
        weights: &SharedWeights,
        rows: impl Iterator<Item = (&'p Rewritten, &'p Vec<TokenId>, Option<&'p Vec<TokenId>>)>,
    ) -> Result<Vec<ExampleScore>, OperatorError> {
        let examples: Vec<Example> = rows
            .map(|(row, response, other)| Example {
                prompt_ids: row.prompt.clone(),
                chosen_ids: response.clone(),
                rejected_ids: other.cloned(),
                label: format!("held-out row {}", row.row),
                ..Example::default()
            })
            .collect();
        Ok(score(&weights.decoder, &weights.parameters, &examples, &self.compute, self.config.batch_size)?)
    }

    /// Greedy answers to the first rows' prompts.
    fn completions(&self, weights: &SharedWeights) -> Result<Vec<Completion>, OperatorError> {
        let rows = &self.rows[..self.config.show.min(self.rows.len())];
        let tokens = self.config.show_tokens.unwrap_or(DEFAULT_SHOW_TOKENS);
        let requests: Vec<Request> = rows
            .iter()
            .map(|row| Request { prompt_ids: row.prompt_ids.clone(), max_new_tokens: tokens, seed: 0 })
            .collect();
        let eos_ids = weights.decoder.config.eos_token_ids.clone();
        let decoding = self.rewriting.decoding;
        let sampling = Sampling { choice: Choice::Greedy, eos_ids, compute: self.compute, decoding };
        let answers = generate(&weights.decoder, &weights.parameters, &requests, &sampling)?;
        let completion = |(row, answer): (&Arc<Prompt>, Generation)| {
            Ok(Completion {
                prompt: self.tokenizer.decode_without_special_tokens(&row.prompt_ids)?,
                answer: self.tokenizer.decode_without_special_tokens(&answer.tokens)?,
            })
        };
        rows.iter().zip(answers).map(completion).collect()
    }
}

const FIRST: &str = "first.json";

impl Operator for Evaluator {
    fn start(&mut self, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        self.thread.begin(None)?;
        match &self.first {
            Some(first) => self.tell(first.version, &first.metrics, &first.shown),
            None if self.resumed => {}
            None => {
                // Over a feedback edge nothing arrives before the first step.
                if let Some(weights) = inputs.weights("weights") {
                    self.evaluate(&weights)?;
                }
            }
        }
        Ok(Outputs::new())
    }

    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        let steps = step + 1;
        if steps == self.total_steps || self.config.every.is_some_and(|every| steps.is_multiple_of(every)) {
            let weights = inputs.weights("weights").ok_or("no weights arrived at this step")?;
            let metrics = self.evaluate(&weights)?;
            outputs.push("metrics", Record::Metrics(Arc::new(metrics)));
        }
        Ok(outputs)
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        Ok(state::write(directory, FIRST, &self.first)?)
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        self.first = state::read(directory, FIRST)?;
        Ok(())
    }
}

impl Define for Evaluator {
    const NAME: &'static str = "evaluator";
    const SUMMARY: &'static str = "Measures a model on held-out rows.";
    const DOCS: &'static str = "\
Before the first step, every `every` steps and after the last one, for each held-out row the model rewrites a segment
of the answer, as `segment_sampler` does, and both responses are scored:

- eval_nll: negative log-likelihood of the answers, nats per token (lower is better);
- eval_accuracy: share of rows whose answer has a higher log-probability per token than what the model wrote in its
  place at the first evaluation; eval_margin: mean of that difference, nats per token;
- eval_own_accuracy, eval_own_margin: the same against what the model writes now. A model that learns writes better
  too, so these need not rise;
- eval_given_accuracy, eval_given_margin: the same against the rejected answers of the data, for the rows that have one.

The random draws are the same at every evaluation, so that only the model makes a difference. Greedy completions of
the first `show` prompts are shown. All evaluations and completions are in RUN/evaluations.json, by number of updates; the
one before the first step is there alone, since what `metrics` carries belongs to a step.

State: the first evaluation and what the model wrote for it.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat_pairs.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8, max_prompt_tokens: 1792}}
batches: {op: batcher, in: prompts.pairs, with: {batch_size: 8, max_length: 2048}}
learner: {op: preference_learner, in: batches, with: {model: models/smollm2-135m-instruct, objective: orpo, learning_rate: 5e-6}}
evaluation:
  op: evaluator
  in: learner.weights
  with: {path: data/chat_heldout.jsonl, tokenizer: models/smollm2-135m-instruct, every: 100}
";
    const INPUTS: &'static [PortSpec] = &[PortSpec::new("weights", &[PortType::Weights], "The model to measure.")];
    const OUTPUTS: &'static [PortSpec] = &[PortSpec::new(
        "metrics",
        &[PortType::Metrics],
        "eval_nll, eval_accuracy, eval_margin, eval_own_*, eval_given_*.",
    )];
    const PLACEMENT: Placement = Placement::Device;
    type Config = EvaluatorConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        let positive = [
            ("every", config.every.unwrap_or(1) as usize),
            ("limit", config.limit.unwrap_or(1)),
            ("batch_size", config.batch_size),
            ("show_tokens", config.show_tokens.unwrap_or(1)),
        ];
        let zeros = positive.into_iter().filter(|(_, value)| *value == 0);
        let mut issues = config.rewriting(Kernels::default()).issues();
        issues.extend(zeros.map(|(key, _)| ConfigIssue::new(key, "expected a number above 0, found 0")));
        if let Some(every @ 0..2) = config.hold_out_every {
            issues.push(ConfigIssue::new("hold_out_every", format!("expected a number above 1, found {every}")));
        }
        if config.show == 0 && config.show_tokens.is_some() {
            issues.push(ConfigIssue::new("show_tokens", "has no effect: with `show: 0` no completion is shown"));
        }
        if !config.columns.values.is_empty() {
            issues.push(ConfigIssue::new("columns.values", "`values` have no effect here: nothing reads them"));
        }
        issues
    }

    fn files(config: &Self::Config) -> Vec<PathBuf> {
        data::all_files(&config.path, Path::new(&config.tokenizer), config.chat_template.as_deref())
    }

    fn plan(config: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        let Some((model, _)) = PlannedModel::arriving(context, "weights")? else { return Ok(NodePlan::default()) };
        let rows = config.batch_size as u64;
        let lengths = Emits {
            max_length: Some(config.max_length as u64),
            sample: data::sample(&config.data())?,
            ..Emits::default()
        };
        let rewriting = config.rewriting(kernels(context.run));
        let choice = rewriting.choice();
        // One after the other.
        let working = |batch: &BatchLengths| {
            model
                .footprint()
                .generating(rows, batch.longest.tokens(), &rewriting.decoding, &choice)
                .max(model.scoring(rows, batch))
        };
        let memory = model.memory(0, &PlannedBatches::new(context, &lengths, rows), working);
        Ok(NodePlan { memory: Some(memory), ..NodePlan::default() })
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        let tokenizer = TextTokenizer::load(Path::new(&config.tokenizer))?;
        let rows = data::load(&config.data())?.rows.all()?;
        Ok(Evaluator {
            rewriting: config.rewriting(kernels(context.run)),
            config,
            node: context.node.into(),
            random: Draws::new(context.run.seed, context.node),
            compute: compute(context.run),
            thread: NodeThread::of(context),
            total_steps: context.total_steps,
            rows,
            tokenizer,
            events: context.events.clone(),
            first: None,
            resumed: context.resumed,
        })
    }
}
