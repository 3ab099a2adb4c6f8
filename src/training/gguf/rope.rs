//! Rotary scaling: GGUF's keys, and the frequency factors that stand for Llama 3's, as Hugging Face's `rope_scaling`.

use super::metadata::Metadata;
use crate::Result;
use serde_json::{Value, json};
use std::f64::consts::TAU;
use std::io::{Read, Seek};

/// The tensor that divides the rotary frequencies.
pub const FREQUENCY_FACTORS: &str = "rope_freqs.weight";

/// Llama 3.1's constants, which GGUF does not record. They are checked against the factors it does.
const LOW_FREQ_FACTOR: f64 = 1.0;
const HIGH_FREQ_FACTOR: f64 = 4.0;
const ORIGINAL_CONTEXT: usize = 8192;

/// `rope_scaling` of config.json.
pub fn scaling(
    metadata: &Metadata,
    reader: &mut (impl Read + Seek),
    architecture: &str,
    rope_theta: f64,
    head_dim: usize,
) -> Result<Option<Value>> {
    if metadata.has_tensor(FREQUENCY_FACTORS) {
        let factors = metadata.tensor(reader, FREQUENCY_FACTORS)?;
        let factors = factors.flatten_all().and_then(|factors| factors.to_vec1::<f32>());
        let factors = factors.map_err(|error| metadata.error(format!("{FREQUENCY_FACTORS}: {error}")))?;
        return llama3(&factors, rope_theta, head_dim).map(Some).ok_or_else(|| {
            metadata.error(format!("{FREQUENCY_FACTORS}: expected the factors of Llama 3's rope scaling, found others"))
        });
    }
    let key = |name: &str| format!("{architecture}.rope.scaling.{name}");
    match metadata.text(&key("type"))? {
        None | Some("none") => Ok(None),
        Some("linear") => {
            let factor = metadata.need(&key("factor"), Metadata::real)?;
            Ok(Some(json!({"rope_type": "linear", "factor": factor})))
        }
        Some("yarn") => {
            let factor = metadata.need(&key("factor"), Metadata::real)?;
            let original = metadata.need(&key("original_context_length"), Metadata::number)?;
            Ok(Some(json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
            })))
        }
        Some(other) => {
            Err(metadata.error(format!("{}: expected none, linear or yarn, found \"{other}\"", key("type"))))
        }
    }
}

/// Llama 3's scaling, if that is where the factors come from.
fn llama3(factors: &[f32], rope_theta: f64, head_dim: usize) -> Option<Value> {
    let factor = f64::from(*factors.last()?);
    let original = ORIGINAL_CONTEXT as f64;
    let expected = (0..head_dim / 2).map(|index| {
        let wavelength = TAU * rope_theta.powf(2.0 * index as f64 / head_dim as f64);
        let smooth = (original / wavelength - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR);
        let smooth = smooth.clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / factor + smooth)
    });
    let agrees = factors.len() == head_dim / 2
        && factors.iter().zip(expected).all(|(&found, expected)| (f64::from(found) / expected - 1.0).abs() < 1e-3);
    agrees.then(|| {
        json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LOW_FREQ_FACTOR,
            "high_freq_factor": HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": ORIGINAL_CONTEXT,
        })
    })
}
