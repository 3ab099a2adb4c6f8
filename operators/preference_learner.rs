//! `preference_learner`: updates a policy from batches of pairs.
//!
//! What it minimises is a formula: see [`crate::objectives`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use sapo_flow_engine::graph::Dtype;
use sapo_flow_engine::operator::{ConfigIssue, Connections, Define};
use sapo_flow_engine::plan::{Emits, NodePlan, PlanContext};
use sapo_flow_engine::record::{Batch, Metrics, PortType, Record};
use sapo_flow_engine::{BuildContext, Inputs, Operator, OperatorError, Outputs, Placement, PortSpec};
use sapo_flow_training::learner::{Example, LayoutKind, Learner, LearnerSettings, Passes};
use sapo_flow_training::logps::Limits;
use sapo_flow_training::memory::{Scored, Shape, TrainingStep};
use sapo_flow_training::model::{self, Model, SourceFiles};
use sapo_flow_training::objectives::Objective;
use sapo_flow_training::optim::Schedule;
use sapo_flow_training::{Error, device};
use tch::Device;

use crate::batcher::Batcher;
use crate::compute::{NodeThread, PlannedModel, compute, kernels, kind};
use crate::draws::Draws;
use crate::examples::{check_values, example};
use crate::failed_update::FailedUpdate;
use crate::learner_config::PreferenceLearnerConfig;
use crate::objectives::{self, Sum};
use crate::planned_batches::{BatchLengths, PlannedBatches, logit_rows, pairs_of};
use crate::reference::Reference;
use crate::weights::{SharedWeights, Versions};

/// See the [module](self).
pub struct PreferenceLearner {
    model: PathBuf,
    settings: LearnerSettings,
    node: String,
    device: Device,
    thread: NodeThread,
    run_directory: PathBuf,
    weights: Dtype,
    learner: Option<Learner>,
    files: Arc<SourceFiles>,
    versions: Versions,
    restore_from: Option<PathBuf>,
}

const LEARNER: &str = "learner";
const VERSIONS: &str = "versions";

impl PreferenceLearner {
    fn learner(&mut self) -> Result<&mut Learner, OperatorError> {
        self.learner.as_mut().ok_or_else(|| "stepped before its start".into())
    }

    /// Share the learner's weights as they are now; the tensors are the learner's own.
    fn share(&mut self) -> Result<(), OperatorError> {
        let learner = self.learner()?;
        let (decoder, version) = (learner.decoder.clone(), learner.steps());
        let parameters = learner.parameters().shallow_clone();
        self.versions.push(SharedWeights { decoder, parameters, files: self.files.clone(), version });
        Ok(())
    }

    /// One update from all batches of a step, each batch a forward and backward pass of its own.
    fn update(&mut self, step: u64, batches: &[Arc<Batch>]) -> Result<Metrics, OperatorError> {
        // The update writes to the weights: whoever may still read them keeps them, and the learner goes on with a copy.
        if self.versions.exclusive().is_none() {
            self.learner()?.leave_weights();
        }
        let needs = self.settings.objective.needs();
        batches.iter().flat_map(|batch| &batch.pairs).try_for_each(|pair| check_values(pair, needs))?;
        let examples: Vec<Example> = batches.iter().flat_map(|batch| examples(batch, step)).collect();
        let passes = Passes::Sizes(batches.iter().map(|batch| batch.pairs.len()).collect());
        let began = Instant::now();
        let values = match self.learner()?.step(step, &examples, passes) {
            Ok(values) => values,
            Err(error @ Error::NonFinite { .. }) => {
                let failed = FailedUpdate { node: &self.node, step, model: &self.model, batches };
                let path = failed.write(&self.run_directory, &error)?;
                return Err(format!("{error}; its pairs are in {}", path.display()).into());
            }
            Err(error) => return Err(error.into()),
        };
        let mut metrics = Metrics { values };
        let tokens: usize = examples.iter().map(Example::tokens).sum();
        metrics.values.insert("tokens/s".into(), tokens as f64 / began.elapsed().as_secs_f64());
        let pairs = || batches.iter().flat_map(|batch| &batch.pairs);
        let staleness = pairs().filter_map(|pair| Some(pair.step.saturating_sub(pair.weights_version?)));
        if let Some(most) = staleness.max() {
            metrics.values.insert("staleness".into(), most as f64);
            let ages: Vec<u64> = pairs().map(|pair| step.saturating_sub(pair.step)).collect();
            metrics.values.insert("pair_age".into(), ages.iter().sum::<u64>() as f64 / ages.len() as f64);
        }
        Ok(metrics)
    }
}

/// A batch's pairs with their reference log-probabilities.
fn examples(batch: &Batch, step: u64) -> Vec<Example> {
    let reference = |index: usize| batch.reference.as_ref().and_then(|logps| logps.get(index).copied());
    batch.pairs.iter().enumerate().map(|(index, pair)| example(pair, step, reference(index))).collect()
}

/// What a configuration says is minimised; validation has compiled it before.
fn objective(config: &PreferenceLearnerConfig) -> Result<Sum, OperatorError> {
    config.objective.compile().map_err(|issues| {
        let messages: Vec<String> = issues.iter().map(|issue| format!("`{}`: {issue}", issue.key)).collect();
        messages.join("; ").into()
    })
}

impl Operator for PreferenceLearner {
    fn start(&mut self, _: Inputs) -> Result<Outputs, OperatorError> {
        self.thread.begin(Some(self.device))?;
        let model = Model::load(&self.model, self.device, kind(self.weights))?;
        self.files = Arc::new(model.files);
        let mut learner = Learner::new(model.decoder, model.parameters, self.settings.clone())?;
        match self.restore_from.take() {
            Some(directory) => {
                learner.load(&directory.join(LEARNER))?;
                let like = SharedWeights {
                    decoder: learner.decoder.clone(),
                    parameters: learner.parameters().shallow_clone(),
                    files: self.files.clone(),
                    version: learner.steps(),
                };
                self.versions.restore(&directory.join(VERSIONS), &like)?;
                self.learner = Some(learner);
                self.share()?;
            }
            None => {
                self.learner = Some(learner);
                self.share()?;
            }
        }
        let mut outputs = Outputs::new();
        self.versions.emit(&mut outputs)?;
        Ok(outputs)
    }

    fn step(&mut self, step: u64, mut inputs: Inputs) -> Result<Outputs, OperatorError> {
        let batches = inputs.batches("batches");
        let mut outputs = Outputs::new();
        if batches.iter().any(|batch| !batch.pairs.is_empty()) {
            let metrics = self.update(step, &batches)?;
            outputs.push("metrics", Record::Metrics(Arc::new(metrics)));
            self.share()?;
        }
        self.versions.emit(&mut outputs)?;
        Ok(outputs)
    }

    fn snapshot(&mut self, directory: &Path) -> Result<(), OperatorError> {
        let (own, older) = (directory.join(LEARNER), directory.join(VERSIONS));
        std::fs::create_dir(&own)?;
        let files = self.files.clone();
        let learner = self.learner()?;
        learner.save(&own)?;
        model::save_description(&own, &learner.decoder.config, &files, learner.parameters().kind())?;
        // The newest version is the learner's own weights.
        std::fs::create_dir(&older)?;
        self.versions.snapshot_older(&older)
    }

    fn restore(&mut self, directory: &Path) -> Result<(), OperatorError> {
        self.restore_from = Some(directory.into());
        Ok(())
    }

    fn reattach(&mut self, record: &mut Record) -> Result<(), OperatorError> {
        self.versions.reattach(record)
    }

    fn finish(&mut self) -> Result<(), OperatorError> {
        if self.learner()?.steps() == 0 {
            tracing::warn!(node = self.node, "no pairs arrived at any step: the model is what it was at the beginning");
        }
        Ok(())
    }
}

impl Define for PreferenceLearner {
    const NAME: &'static str = "preference_learner";
    const SUMMARY: &'static str =
        "Updates a policy from batches of pairs: ORPO, DPO, KTO, SFT and others, or a formula.";
    const DOCS: &'static str = "\
One optimizer update a step, from all batches of that step together: the gradient is that of the whole, however it is
divided, so the batcher's `batch_size` bounds memory and changes no result (but for models whose `rope_scaling` is `dynamic` or `longrope`: there the
longest sequence of a batch counts, as in transformers). The learning rate follows the steps of the run, with pairs or
without. Weights and optimizer state are float32, unless `weights` and `optimizer` say otherwise; matrix products are in the
run's dtype. At a step without pairs the weights stay as they are.

What a large model takes besides activations, for every parameter: weights 4 bytes (`weights: bfloat16`: 2), AdamW's state 8
(`optimizer: adamw_8bit`: 2), gradients 4 (as the weights, and 4 more where bfloat16 ones of several batches add up; with
`release_gradients` one layer's). `run --dry-run` adds it up.

`objective` is a name, `{name: dpo, beta: 0.2}`, a definition or a `{file: PATH}` with one, or a list of these, each with
a `weight` (0: reported alone), for their weighted sum. A definition has a `formula`, the loss of every pair, whose mean over the step's pairs
is minimised; `params`; under `let` expressions by name; `rewards`, those of the chosen and the rejected response;
`report`, metrics by name; `pair_weight`, a factor of every pair's loss without a gradient; `state`, numbers carried from
step to step, as `{initial: 0, next: EXPRESSION}`; and `use`, another definition to begin with: `log_ratios` has DPO's
`margin`, `d_chosen`, `d_rejected` and `beta`. Only what the formula names is computed: without rejected responses if it
names none, and a `reference` node must come before if it names `ref_*`. Where a formula goes over all pairs of a step
(`mean`, `sort`, ...) and these fill several batches, the forward pass is computed twice, and the gradient is exact.

Metrics are TRL's: loss, rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen,
logps/rejected, logits/chosen, logits/rejected, nll_loss, log_odds_ratio, log_odds_chosen, and what else the objective
reports, loss/NAME for the objectives of a list; mean_token_accuracy, num_tokens, grad_norm (before clipping), learning_rate. Besides: tokens/s; staleness, step minus version of the weights that generated a
pair, at the step it was generated, the largest of the step's pairs; pair_age, the mean number of steps since the pairs
were generated. Both rewards often fall together while their margin rises: only the margin is what is learned.

State: weights, optimizer state, the number of updates and the objective's state; all are in checkpoints.
Errors: an objective that names `ref_*` without a `reference` before it, or the reverse; a formula that gives no loss for
each pair, or one without a gradient; params that have no effect; a pair without what the objective needs; a loss or gradient that is not
finite, which stops the run before the weights change (with `release_gradients` a gradient after), with the pairs written to
RUN/NODE-failed-at-step-N.json; with `release_gradients` a step of more than one batch.";
    const EXAMPLE: &'static str = "\
prompts: {op: prompt_source, with: {path: data/chat_pairs.jsonl, tokenizer: models/smollm2-135m-instruct, batch_size: 8, max_prompt_tokens: 1792}}
batches: {op: batcher, in: prompts.pairs, with: {batch_size: 8, max_length: 2048}}
learner:
  op: preference_learner
  in: batches
  with:
    model: models/smollm2-135m-instruct
    objective: {name: orpo, beta: 0.05}
    learning_rate: 5e-6
    schedule: inverse_sqrt
    warmup_steps: 100
";
    const INPUTS: &'static [PortSpec] =
        &[PortSpec::new("batches", &[PortType::Batches], "Pairs to learn from.").many()];
    const OUTPUTS: &'static [PortSpec] = &[
        PortSpec::new("weights", &[PortType::Weights], "The policy after each step."),
        PortSpec::new("metrics", &[PortType::Metrics], "loss, rewards/*, logps/*, grad_norm and others."),
    ];
    const PLACEMENT: Placement = Placement::Device;
    type Config = PreferenceLearnerConfig;

    fn check(config: &Self::Config) -> Vec<ConfigIssue> {
        config.issues()
    }

    fn check_connections(config: &Self::Config, connections: &Connections) -> Vec<ConfigIssue> {
        let Ok(objective) = config.objective.compile() else { return Vec::new() };
        let named = objective.needs().tensors.iter().find(|tensor| tensor.is_of_reference());
        let from = |op: &str| connections.sources.iter().find(|source| source.op == op);
        let issue = match (named, from(Batcher::NAME), from(Reference::NAME)) {
            (Some(tensor), Some(batcher), _) => format!(
                "`objective` needs `{}`, but the batches of `{}` come without a reference model's log-probabilities: put \
                 a node {{op: reference, in: {}, with: {{model: ...}}}} in between",
                tensor.name(),
                batcher.node,
                batcher.node
            ),
            (None, _, Some(reference)) => format!(
                "`objective` names no `ref_...`, so that the reference model of `{}` would have no effect: take the batches \
                 from where it takes them",
                reference.node
            ),
            _ => return Vec::new(),
        };
        vec![ConfigIssue::new("objective", issue)]
    }

    fn appendix() -> String {
        objectives::page()
    }

    fn plan(config: &Self::Config, context: &PlanContext) -> Result<NodePlan, OperatorError> {
        let model = PlannedModel::load(Path::new(&config.model), config.device.as_deref(), context.run)?;
        let model = model.with_weights(config.weights);
        let (footprint, parameters) = (model.footprint(), model.footprint().parameters());
        // The versions that may still be read, the newest of which is the learner's own, and the optimizer's state. Where
        // older ones may be read, an update is made to a copy, and the oldest goes when it is done.
        let copy = u64::from(context.retained_versions > 1);
        let kept = model.weights() * (context.retained_versions + copy) + footprint.optimizer_state(config.rule());
        let arrives = context.input("batches");
        let mut notes = Vec::new();
        let pairs = arrives.batch_size.unwrap_or(0);
        match arrives.max_length.filter(|_| pairs > 0) {
            Some(tokens) => notes.push(format!("at most: {pairs} pairs, every sequence {tokens} tokens long")),
            None => notes.push("activations not counted: the size of batches is unknown".into()),
        }
        notes.extend(arrives.max_length.and_then(|tokens| model.note_on_length(tokens)));
        let (objective, layout) = (objective(config)?, config.layout(kernels(context.run)));
        let needs = objective.needs();
        let shape = |batch: &BatchLengths| match (needs.rejected(), layout) {
            (false, LayoutKind::Padded) => Shape::Rows { rows: pairs, tokens: batch.longest.tokens() },
            (false, LayoutKind::SharedPrefix) => Shape::Rows { rows: pairs, tokens: batch.mean.tokens() },
            (true, LayoutKind::Padded) => Shape::Rows { rows: 2 * pairs, tokens: batch.longest.tokens() },
            (true, LayoutKind::SharedPrefix) => pairs_of(pairs, batch.mean),
        };
        let rows = |batch: &BatchLengths| pairs * logit_rows(batch.mean, layout, needs.prompt(), needs.rejected());
        let passes = arrives.rows.map_or(1, |rows| rows.div_ceil(pairs.max(1)));
        let working = |batch: &BatchLengths| {
            footprint.training(TrainingStep {
                pass: Scored { shape: shape(batch), logit_rows: rows(batch) },
                passes,
                gradient_checkpointing: config.gradient_checkpointing,
                release_gradients: config.release_gradients,
                optimizer: config.rule(),
            })
        };
        if config.release_gradients && passes > 1 {
            let rows = arrives.rows.unwrap_or(0);
            notes.push(format!(
                "`release_gradients` fails at steps of more than one batch: {rows} pairs, {pairs} a batch"
            ));
        }
        if !config.freeze.is_empty() {
            notes.push("counted as if nothing were frozen".into());
        }
        let emits = Emits {
            model: Some(config.model.clone().into()),
            device: Some(device::name(footprint.device)),
            dtype: Some(config.weights),
            ..Emits::default()
        };
        Ok(NodePlan {
            parameters: Some(parameters),
            memory: Some(model.memory(kept, &PlannedBatches::new(context, &arrives, pairs), working)),
            emits,
            notes,
            ..NodePlan::default()
        })
    }

    fn files(config: &Self::Config) -> Vec<PathBuf> {
        let model = PathBuf::from(&config.model);
        config.objective.files().into_iter().chain([model]).collect()
    }

    fn build(config: Self::Config, context: &BuildContext) -> Result<Self, OperatorError> {
        let (kind, warmup) = config.schedule();
        let settings = LearnerSettings {
            objective: Arc::new(objective(&config)?),
            optimizer: config.rule(),
            learning_rate: config.learning_rate,
            schedule: Schedule::new(kind, warmup, context.total_steps)?,
            max_grad_norm: config.max_grad_norm,
            layout: config.layout(kernels(context.run)),
            gradient_checkpointing: config.gradient_checkpointing,
            release_gradients: config.release_gradients,
            freeze: config.freeze.clone(),
            compute: compute(context.run),
            logits: Limits::default(),
            seed: Draws::new(context.run.seed, context.node).seed(0, 0),
        };
        Ok(PreferenceLearner {
            model: config.model.into(),
            settings,
            node: context.node.into(),
            device: device::parse(config.device.as_deref().unwrap_or(&context.run.device))?,
            thread: NodeThread::of(context),
            run_directory: context.run_directory.into(),
            weights: config.weights,
            learner: None,
            files: Arc::default(),
            versions: Versions::new(context.node, context.retained_versions),
            restore_from: None,
        })
    }
}
