//! The run's settings as the training core takes them.

use std::path::Path;

use sapo_flow_engine::graph::Dtype;
use sapo_flow_engine::{NodePlan, OperatorError, RunSettings};
use sapo_flow_training::device;
use sapo_flow_training::model::{Compute, Decoder, ModelConfig};
use tch::{Device, Kind};

/// How to compute: in the run's dtype.
pub fn compute(run: &RunSettings) -> Compute {
    let kind = match run.dtype {
        Dtype::Float32 => Kind::Float,
        Dtype::Bfloat16 => Kind::BFloat16,
    };
    Compute { kind }
}

/// The plan of a node that holds a model, at so many bytes a parameter. Reads the model's configuration only.
///
/// # Errors
/// When the configuration cannot be read.
pub fn plan_model(directory: &Path, device: &str, bytes_per_parameter: u64) -> Result<NodePlan, OperatorError> {
    let decoder = Decoder::new(ModelConfig::load(directory)?, Device::Cpu)?;
    let shapes = decoder.expected_parameters();
    let parameters: i64 = shapes.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
    let device = match device::parse(device)? {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".into(),
    };
    let peak_bytes = vec![(device, parameters as u64 * bytes_per_parameter)];
    let notes = vec![format!("{bytes_per_parameter} bytes a parameter, activations not counted")];
    Ok(NodePlan { parameters: Some(parameters as u64), peak_bytes, notes, ..NodePlan::default() })
}
