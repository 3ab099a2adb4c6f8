//! Model weights shared between the operators of a process.

use std::collections::VecDeque;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapo_flow_engine::record::{Record, Weights};
use sapo_flow_engine::{OperatorError, Outputs};
use sapo_flow_training::model::{self, Decoder, SourceFiles};
use sapo_flow_training::native::stream;
use sapo_flow_training::parameters::{ParameterSet, WEIGHTS_FILE};
use tch::Device;

use crate::Error;

/// One version of a model's weights: what the handle of a [`Weights`] record points at.
pub struct SharedWeights {
    /// The architecture.
    pub decoder: Arc<Decoder>,
    /// The weights, float32 or bfloat16, without gradients.
    pub parameters: ParameterSet,
    /// Tokenizer and chat template, to be saved with the weights.
    pub files: Arc<SourceFiles>,
    /// How many updates the weights have had.
    pub version: u64,
}

// SAFETY: libtorch allows any number of threads to read a tensor at the same time. Nothing writes to these: whoever
// shares them writes only through `Versions::exclusive`, which `Arc::get_mut` grants when nobody else holds them. On a GPU
// they are whole when they are emitted, and done with when a `Reading` lets go of them.
unsafe impl Sync for SharedWeights {}

impl SharedWeights {
    /// The same weights on a device; where they are there already, no tensor is copied.
    ///
    /// # Errors
    /// When the device has no room for them.
    pub fn on(&self, device: Device) -> Result<SharedWeights, OperatorError> {
        let there = self.version(self.version, self.parameters.to_device(device)?);
        match self.decoder.device == device {
            true => Ok(there),
            false => {
                Ok(SharedWeights { decoder: Arc::new(Decoder::new(self.decoder.config.clone(), device)?), ..there })
            }
        }
    }

    /// Another version of the same model.
    pub fn version(&self, version: u64, parameters: ParameterSet) -> SharedWeights {
        SharedWeights { decoder: self.decoder.clone(), parameters, files: self.files.clone(), version }
    }
}

/// Weights that the calling thread works with. They are let go of when what it has asked of a GPU is done: others may then
/// write to them, or free them.
pub struct Reading(Arc<SharedWeights>);

impl Reading {
    /// Weights that are whole. Their device becomes the thread's own.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn of(weights: Arc<SharedWeights>) -> Result<Self, OperatorError> {
        stream::enter(weights.decoder.device)?;
        Ok(Reading(weights))
    }
}

impl Deref for Reading {
    type Target = SharedWeights;

    fn deref(&self) -> &SharedWeights {
        &self.0
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if let Err(error) = stream::finish() {
            tracing::warn!("a device failed in work that was under way: {error}");
        }
    }
}

/// The tensors a record points at.
///
/// # Errors
/// When the record lost its handle on the way, or points at something else.
pub fn shared(weights: &Weights) -> Result<Reading, OperatorError> {
    let handle = weights.handle.clone().ok_or_else(|| format!("{weights:?} cannot be read in this process"))?;
    let weights = handle.downcast().map_err(|_| format!("{weights:?} does not hold a model's tensors"))?;
    Reading::of(weights)
}

/// The tensors a record points at, on a device where one is given; where they are there already, no tensor is copied.
///
/// # Errors
/// Those of [`shared`], and when the device has no room.
pub fn shared_on(weights: &Weights, device: Option<Device>) -> Result<Reading, OperatorError> {
    let shared = shared(weights)?;
    match device.filter(|device| *device != shared.decoder.device) {
        // The copy belongs to this thread; `shared` is let go of when it is there.
        Some(device) => Reading::of(Arc::new(shared.on(device)?)),
        None => Ok(shared),
    }
}

/// The versions of one model that may still be read: the newest, and as many older ones as feedback edges delay.
pub struct Versions {
    model: String,
    keep: usize,
    kept: VecDeque<Arc<SharedWeights>>,
}

impl Versions {
    /// No version yet, of the model of a node, of which `keep` versions are kept.
    pub fn new(node: &str, keep: u64) -> Self {
        Versions { model: node.into(), keep: keep as usize, kept: VecDeque::new() }
    }

    /// Add the newest version.
    pub fn push(&mut self, weights: SharedWeights) {
        self.kept.push_back(Arc::new(weights));
        while self.kept.len() > self.keep {
            self.kept.pop_front();
        }
    }

    /// Add another version of the model, after the first.
    ///
    /// # Errors
    /// When there is no version yet.
    pub fn push_next(&mut self, version: u64, parameters: ParameterSet) -> Result<(), OperatorError> {
        let next = self.newest().ok_or("stepped before its start")?.version(version, parameters);
        self.push(next);
        Ok(())
    }

    /// The newest version.
    pub fn newest(&self) -> Option<&Arc<SharedWeights>> {
        self.kept.back()
    }

    /// The newest version for writing, if it needs to stay readable for nobody.
    pub fn exclusive(&mut self) -> Option<&mut SharedWeights> {
        if self.keep > 1 {
            return None;
        }
        Arc::get_mut(self.kept.back_mut()?)
    }

    /// What an operator emits whose only output these are.
    ///
    /// # Errors
    /// When a device failed in work that makes the weights.
    pub fn outputs(&self) -> Result<Outputs, OperatorError> {
        let mut outputs = Outputs::new();
        self.emit(&mut outputs)?;
        Ok(outputs)
    }

    /// Emit the newest version on port `weights`, once it is whole.
    ///
    /// # Errors
    /// When a device failed in work that makes the weights.
    pub fn emit(&self, outputs: &mut Outputs) -> Result<(), OperatorError> {
        if let Some(newest) = self.newest() {
            stream::finish()?;
            let weights = Weights { model: self.model.clone(), version: newest.version, handle: Some(newest.clone()) };
            outputs.push("weights", Record::Weights(weights));
        }
        Ok(())
    }

    /// Write all versions that are kept, each as a model directory.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn snapshot(&self, directory: &Path) -> Result<(), OperatorError> {
        write(self.kept.iter(), directory)
    }

    /// Write all versions that are kept but the newest.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn snapshot_older(&self, directory: &Path) -> Result<(), OperatorError> {
        write(self.kept.iter().rev().skip(1), directory)
    }

    /// Read the versions that [`snapshot`](Self::snapshot) wrote.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn restore(&mut self, directory: &Path, like: &SharedWeights) -> Result<(), OperatorError> {
        let expected = like.decoder.expected_parameters();
        let mut versions: Vec<u64> = std::fs::read_dir(directory)
            .map_err(Error::io(directory))?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix(PREFIX)?.parse().ok())
            .collect();
        versions.sort_unstable();
        for version in versions {
            let path = model_directory(directory, version).join(WEIGHTS_FILE);
            let parameters = ParameterSet::load_file(&path, &expected, like.decoder.device)?;
            self.push(like.version(version, parameters));
        }
        Ok(())
    }

    /// Point a record of ours at its version again.
    ///
    /// # Errors
    /// When that version is not kept.
    pub fn reattach(&self, record: &mut Record) -> Result<(), OperatorError> {
        if let Record::Weights(weights) = record {
            let kept = self.kept.iter().find(|kept| kept.version == weights.version);
            let kept =
                kept.ok_or_else(|| format!("the checkpoint has no version {} of the weights", weights.version))?;
            weights.handle = Some(kept.clone());
        }
        Ok(())
    }
}

fn write<'a>(versions: impl Iterator<Item = &'a Arc<SharedWeights>>, directory: &Path) -> Result<(), OperatorError> {
    for weights in versions {
        let path = model_directory(directory, weights.version);
        let parameters = &weights.parameters;
        model::save(&path, &weights.decoder.config, parameters, &weights.files, parameters.kind())?;
    }
    Ok(())
}

const PREFIX: &str = "version-";

fn model_directory(directory: &Path, version: u64) -> PathBuf {
    directory.join(format!("{PREFIX}{version}"))
}
