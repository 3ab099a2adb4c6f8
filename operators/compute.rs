//! The run's settings as the training core takes them, and what its models take in return.

use std::path::Path;

use sapo_flow_engine::graph::{self, Dtype, DtypeChoice};
use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_engine::plan::{Emits, Memory, PlanContext};
use sapo_flow_engine::{BuildContext, OperatorError, RunSettings};
use sapo_flow_training::device;
use sapo_flow_training::generate::{Choice, Decoding};
use sapo_flow_training::learner::LayoutKind;
use sapo_flow_training::memory::{Footprint, Scored, Shape};
use sapo_flow_training::model::{Compute, Decoder, Kernels, ModelConfig};
use sapo_flow_training::native::stream;
use tch::{Device, Kind};

use crate::planned_batches::{BatchLengths, PlannedBatches, logit_rows, pairs_of};

/// libtorch's name for a type.
pub fn kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::Float32 => Kind::Float,
        Dtype::Bfloat16 => Kind::BFloat16,
    }
}

/// How to compute: in the run's dtype, with its kernels.
pub fn compute(run: &RunSettings) -> Compute {
    Compute { kind: kind(settled_dtype(run)), kernels: kernels(run) }
}

/// The run's kernels, which also decide what is not said of layouts, decoding and kept log-probabilities.
pub fn kernels(run: &RunSettings) -> Kernels {
    match run.kernels {
        graph::Kernels::Fused => Kernels::Fused,
        graph::Kernels::Plain => Kernels::Plain,
    }
}

/// The run's dtype, decided where it is `auto`: by the run's device. (Where there is no such device, that is an error of its
/// own.)
pub fn settled_dtype(run: &RunSettings) -> Dtype {
    let is_fast = || device::parse(&run.device).is_ok_and(device::is_fast_in_bfloat16);
    match run.dtype {
        DtypeChoice::Bfloat16 => Dtype::Bfloat16,
        DtypeChoice::Auto if is_fast() => Dtype::Bfloat16,
        DtypeChoice::Float32 | DtypeChoice::Auto => Dtype::Float32,
    }
}

/// What the thread of a node does its tensor work with.
#[derive(Clone, Copy, Debug)]
pub struct NodeThread {
    processors: usize,
    own_stream: bool,
}

impl NodeThread {
    /// As the run says. Where nodes can work at the same time, each has a stream of its own on a GPU.
    pub fn of(context: &BuildContext) -> Self {
        NodeThread { processors: context.threads, own_stream: context.overlaps }
    }

    /// Settles it for the calling thread, whose node works on a device, if that is known before weights arrive: the first
    /// thing that a node does at its start.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn begin(self, device: Option<Device>) -> sapo_flow_training::Result<()> {
        device::set_threads(self.processors);
        stream::begin(self.own_stream);
        device.map_or(Ok(()), stream::enter)
    }
}

/// What is wrong with the name of a device under the key `device`. Whether there is such a device, only the machine that
/// runs the pipeline knows.
pub fn device_issue(name: Option<&str>) -> Option<ConfigIssue> {
    let error = name?.parse::<device::Named>().err()?;
    Some(ConfigIssue::new("device", error.to_string()))
}

/// The shape of a model that a node will work with, and where: what its plan needs. Nothing is loaded but its
/// configuration.
pub struct PlannedModel {
    decoder: Decoder,
    device: Device,
    compute: Compute,
    weights: Dtype,
}

impl PlannedModel {
    /// The model in a directory, on the device that a node names or the run's, with weights in float32.
    ///
    /// # Errors
    /// When the configuration cannot be read, or there is no such device.
    pub fn load(directory: &Path, device: Option<&str>, run: &RunSettings) -> Result<Self, OperatorError> {
        let decoder = Decoder::new(ModelConfig::load(directory)?, Device::Cpu)?;
        let device = device::parse(device.unwrap_or(&run.device))?;
        Ok(PlannedModel { decoder, device, compute: compute(run), weights: Dtype::Float32 })
    }

    /// The same with weights of another type.
    pub fn with_weights(self, weights: Dtype) -> Self {
        PlannedModel { weights, ..self }
    }

    /// The model whose weights arrive at an input, where they are; none if it is unknown.
    ///
    /// # Errors
    /// Those of [`load`](Self::load).
    pub fn arriving(context: &PlanContext, port: &str) -> Result<Option<(Self, Emits)>, OperatorError> {
        let arrives = context.input(port);
        let Some(directory) = &arrives.model else { return Ok(None) };
        let model = PlannedModel::load(directory, arrives.device.as_deref(), context.run)?;
        Ok(Some((model.with_weights(arrives.dtype.unwrap_or(Dtype::Float32)), arrives)))
    }

    /// The model whose weights arrive at input `weights` to be averaged, where the average is to be kept: on the device
    /// given, or theirs. What arrives is told as being there.
    ///
    /// # Errors
    /// Those of [`load`](Self::load).
    pub fn averaged(context: &PlanContext, on: Option<&str>) -> Result<Option<(Self, Emits)>, OperatorError> {
        let Some((model, arrives)) = PlannedModel::arriving(context, "weights")? else { return Ok(None) };
        let (Some(name), Some(directory)) = (on, &arrives.model) else { return Ok(Some((model, arrives))) };
        let model = PlannedModel::load(directory, Some(name), context.run)?;
        Ok(Some((model, Emits { device: Some(device::name(device::parse(name)?)), ..arrives })))
    }

    /// What is to be said of sequences of so many tokens, where the model was made for shorter ones.
    pub fn note_on_length(&self, tokens: u64) -> Option<String> {
        let most = self.decoder.config.max_position_embeddings;
        let is_longer = i64::try_from(tokens).is_ok_and(|tokens| tokens > most);
        is_longer.then(|| {
            format!(
                "sequences of up to {tokens} tokens, which is more than the model was made for: max_position_embeddings \
                 {most}"
            )
        })
    }

    /// What it takes in bytes.
    pub fn footprint(&self) -> Footprint<'_> {
        let Compute { kind: of_products, kernels } = self.compute;
        let (device, weights) = (self.device, kind(self.weights));
        Footprint { decoder: &self.decoder, device, kind: of_products, kernels, weights }
    }

    /// Bytes that it takes to score so many pairs, in the layout that goes with the run's kernels.
    pub fn scoring(&self, pairs: u64, batch: &BatchLengths) -> u64 {
        let layout = LayoutKind::suited_to(self.compute.kernels);
        let shape = match layout {
            LayoutKind::SharedPrefix => pairs_of(pairs, batch.mean),
            LayoutKind::Padded => Shape::Rows { rows: 2 * pairs, tokens: batch.longest.tokens() },
        };
        self.footprint().scoring(Scored { shape, logit_rows: pairs * logit_rows(batch.mean, layout, false, true) })
    }

    /// Bytes of its weights.
    pub fn weights(&self) -> u64 {
        self.footprint().weights()
    }

    /// What a sampler takes that continues prompts to `emits` rows with the weights at its input `weights`, choosing tokens by
    /// `choice`; none where that cannot be told.
    ///
    /// # Errors
    /// Those of [`load`](Self::load), and where the device cannot decode that way.
    pub fn sampling(
        context: &PlanContext,
        emits: &Emits,
        decoding: &Decoding,
        choice: &Choice,
    ) -> Result<Option<Memory>, OperatorError> {
        let Some((model, _)) = PlannedModel::arriving(context, "weights")? else { return Ok(None) };
        decoding.check(&model.decoder, model.device)?;
        let footprint = model.footprint();
        let generating = |rows: u64| {
            let working = |batch: &BatchLengths| footprint.generating(rows, batch.longest.tokens(), decoding, choice);
            model.memory(0, &PlannedBatches::new(context, emits, rows), working)
        };
        Ok(emits.rows.map(generating))
    }

    /// So many bytes kept on its device, and what `working` says of batches.
    pub fn memory(&self, kept: u64, batches: &PlannedBatches, working: impl Fn(&BatchLengths) -> u64) -> Memory {
        let most = working(&batches.most);
        let expected = batches.expected.as_ref().map_or(most, |expected| working(expected).min(most));
        Memory { device: device::name(self.device), kept, working: most, working_expected: expected, brief: false }
    }

    /// So many bytes kept on its device, and so many more for a moment of every step.
    pub fn steady_memory(&self, kept: u64, working: u64) -> Memory {
        Memory { device: device::name(self.device), kept, working, working_expected: working, brief: true }
    }
}
