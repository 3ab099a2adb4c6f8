//! Log-probabilities of records' responses, under a model of its own or one whose weights arrive.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapo_flow_engine::operator::{ConfigIssue, Connections};
use sapo_flow_engine::plan::{Memory, PlanContext};
use sapo_flow_engine::record::Weights;
use sapo_flow_engine::{BuildContext, OperatorError};
use sapo_flow_training::device;
use sapo_flow_training::learner::{Example, score};
use sapo_flow_training::model::{Compute, Model};
use tch::{Device, Kind};

use crate::compute::{NodeThread, PlannedModel, compute, device_issue};
use crate::expression::records::Logps;
use crate::item::{Item, Part};
use crate::planned_batches::PlannedBatches;
use crate::weights::{Reading, SharedWeights, shared};

/// The settings of a scorer, as its operator's config has them.
#[derive(Clone, Debug)]
pub struct ScorerSettings {
    /// Directory of the model; absent: weights arrive.
    pub model: Option<PathBuf>,
    /// Where the model of that directory computes; absent: the run's device.
    pub device: Option<String>,
    /// Records that go through the model at a time; absent: [`DEFAULT_BATCH_SIZE`].
    pub batch_size: Option<usize>,
}

/// Records that go through a model at a time where nothing is said.
pub const DEFAULT_BATCH_SIZE: usize = 8;

impl ScorerSettings {
    /// What is wrong with them, given what is connected and whether log-probabilities are `asked` for at all.
    pub fn check(&self, asked: bool, connections: &Connections) -> Vec<ConfigIssue> {
        let weights = connections.input("weights").is_some();
        let issue = |key: &str, message: &str| vec![ConfigIssue::new(key, message)];
        if !asked {
            return self.without_effect(weights);
        }
        match (self.model.is_some(), weights) {
            (true, true) => issue("model", "is given, but weights arrive too: leave out one of them"),
            (false, false) => issue("", "log-probabilities need a model: give `model`, or connect `weights`"),
            (false, _) if self.device.is_some() => issue("device", "would have no effect without `model`"),
            _ => device_issue(self.device.as_deref()).into_iter().collect(),
        }
    }

    /// What is given though no expression reads log-probabilities.
    fn without_effect(&self, weights: bool) -> Vec<ConfigIssue> {
        let why = "would have no effect: no expression reads log-probabilities";
        let given = [
            ("model", self.model.is_some()),
            ("device", self.device.is_some()),
            ("batch_size", self.batch_size.is_some()),
        ];
        let settings = given.into_iter().filter(|(_, given)| *given).map(|(key, _)| ConfigIssue::new(key, why));
        settings.chain(weights.then(|| ConfigIssue::new("", format!("`in: {{weights: ...}}` {why}")))).collect()
    }

    fn batch_size(&self) -> usize {
        self.batch_size.unwrap_or(DEFAULT_BATCH_SIZE)
    }

    /// What it takes in memory.
    ///
    /// # Errors
    /// When the model's configuration cannot be read.
    pub fn memory(&self, context: &PlanContext) -> Result<Option<Memory>, OperatorError> {
        let arrives = context.input("records");
        let pairs = self.batch_size() as u64;
        let batches = PlannedBatches::new(context, &arrives, pairs);
        let of = |model: &PlannedModel, kept: u64| model.memory(kept, &batches, |batch| model.scoring(pairs, batch));
        Ok(match &self.model {
            Some(directory) => {
                let model = PlannedModel::load(directory, self.device.as_deref(), context.run)?;
                Some(of(&model, model.weights()))
            }
            None => PlannedModel::arriving(context, "weights")?.map(|(model, _)| of(&model, 0)),
        })
    }
}

/// See the [module](self).
pub struct Scorer {
    settings: ScorerSettings,
    device: Device,
    compute: Compute,
    thread: NodeThread,
    weights: Option<Reading>,
}

impl Scorer {
    /// A scorer without its model yet.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn new(settings: ScorerSettings, context: &BuildContext) -> Result<Self, OperatorError> {
        let device = device::parse(settings.device.as_deref().unwrap_or(&context.run.device))?;
        Ok(Scorer { settings, device, compute: compute(context.run), thread: NodeThread::of(context), weights: None })
    }

    /// Load the model.
    ///
    /// # Errors
    /// When it cannot be loaded.
    pub fn start(&mut self) -> Result<(), OperatorError> {
        self.thread.begin(self.settings.model.as_ref().map(|_| self.device))?;
        if let Some(directory) = &self.settings.model {
            let model = Model::load(Path::new(directory), self.device, Kind::Float)?;
            let (decoder, parameters, files) = (model.decoder, model.parameters, Arc::new(model.files));
            let weights = SharedWeights { decoder, parameters, files, version: 0 };
            self.weights = Some(Reading::of(Arc::new(weights))?);
        }
        Ok(())
    }

    /// The items' log-probabilities, under the weights that arrived where there is no model of its own.
    ///
    /// # Errors
    /// When no weights arrived, or an item has tokens that the model has not.
    pub fn logps(&self, items: &[&Item], arrived: Option<&Weights>) -> Result<Vec<Logps>, OperatorError> {
        let arrived = arrived.filter(|_| self.weights.is_none()).map(shared).transpose()?;
        let weights = self.weights.as_ref().or(arrived.as_ref()).ok_or("no weights arrived at this step")?;
        let examples: Vec<Example> = items.iter().map(|item| example(item)).collect();
        let size = self.settings.batch_size();
        let scores = score(&weights.decoder, &weights.parameters, &examples, &self.compute, size)?;
        let both =
            |score: sapo_flow_training::learner::ResponseScore| (f64::from(score.logps), f64::from(score.mean()));
        let logps = scores
            .iter()
            .map(|score| Logps { first: both(score.chosen), rejected: score.rejected.map_or((0.0, 0.0), both) });
        Ok(logps.collect())
    }
}

fn example(item: &Item) -> Example {
    let ids = |part: Part| item.ids(part).map(<[u32]>::to_vec);
    Example {
        prompt_ids: ids(Part::Prompt).unwrap_or_default(),
        chosen_ids: ids(Part::Chosen).or_else(|| ids(Part::Response)).unwrap_or_default(),
        rejected_ids: ids(Part::Rejected),
        label: item.label(),
        ..Example::default()
    }
}
