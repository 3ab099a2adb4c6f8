//! Rotary position embeddings (RoFormer, arXiv 2104.09864) and the ways in which models stretch them.
//!
//! Frequencies follow transformers' `modeling_rope_utils`: position interpolation (`linear`, arXiv 2306.15595), NTK
//! (`dynamic`), `yarn` (arXiv 2309.00071), `longrope` (arXiv 2402.13753) and Llama 3.1's own (`llama3`).

mod reading;

use std::f64::consts::PI;

use tch::{Device, Kind, Tensor};

use crate::device::upload;
use crate::{Error, Result};

/// Rotary position embeddings of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base: frequencies are theta^(-2i/dim).
    pub theta: f64,
    /// Number of rotated dimensions: all of a head's.
    pub dim: i64,
    /// Longest sequence, in tokens, that the model was made for.
    pub max_position_embeddings: i64,
    /// How the frequencies are changed for long sequences.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are changed for sequences longer than those of pre-training.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All divided by `factor`.
    Linear {
        /// How much longer sequences may be.
        factor: f64,
    },
    /// A larger base once a sequence exceeds max_position_embeddings.
    Dynamic {
        /// How much longer sequences may be.
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, smooth in between.
    Llama3 {
        /// How much longer sequences may be.
        factor: f64,
        /// Wavelengths above original_max_position_embeddings / low_freq_factor are stretched.
        low_freq_factor: f64,
        /// Wavelengths below original_max_position_embeddings / high_freq_factor are kept.
        high_freq_factor: f64,
        /// Tokens in pre-training's sequences.
        original_max_position_embeddings: f64,
    },
    /// A ramp between interpolated and kept frequencies, and warmer attention.
    Yarn {
        /// How much longer sequences may be.
        factor: f64,
        /// Multiplies sines and cosines.
        attention_factor: f64,
        /// Rotations above which frequencies are kept.
        beta_fast: f64,
        /// Rotations below which frequencies are interpolated.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
        /// Tokens in pre-training's sequences.
        original_max_position_embeddings: f64,
    },
    /// A searched factor for each frequency, with another set for long sequences.
    LongRope {
        /// Multiplies sines and cosines.
        attention_factor: f64,
        /// Divisors for sequences of at most original_max_position_embeddings tokens.
        short_factor: Vec<f32>,
        /// Divisors for longer ones.
        long_factor: Vec<f32>,
        /// Tokens in pre-training's sequences.
        original_max_position_embeddings: f64,
    },
}

/// Rotates queries and keys by their positions.
#[derive(Clone, Debug)]
pub struct Rope {
    config: RopeConfig,
    /// For sequences no longer than those of pre-training.
    inverse_frequencies: Vec<f32>,
    attention_factor: f64,
}

/// Cosines and sines of the rotation angles at a batch's positions: (batch, tokens, 1, head_dim / 2) each.
#[derive(Debug)]
pub struct Rotation {
    /// (batch, tokens, 1, head_dim / 2)
    pub(super) cosine: Tensor,
    /// Of the same shape.
    pub(super) sine: Tensor,
}

impl Rotation {
    /// Cosines and sines in one piece of memory each.
    pub(crate) fn contiguous(&self) -> Result<[Tensor; 2]> {
        Ok([self.cosine.f_contiguous()?, self.sine.f_contiguous()?])
    }
}

impl Rope {
    /// Computes the frequencies of `config`.
    pub fn new(config: RopeConfig) -> Result<Self> {
        if config.dim < 2 || config.theta <= 0.0 {
            let (dim, theta) = (config.dim, config.theta);
            return Err(Error::Argument(format!("rotary embeddings of {dim} dimensions with base {theta}")));
        }
        let inverse_frequencies = inverse_frequencies(&config, 0)?;
        let attention_factor = match config.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor
            }
            _ => 1.0,
        };
        Ok(Rope { config, inverse_frequencies, attention_factor })
    }

    /// Whether the rotation at a position depends on how long its sequence is.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.config.scaling, RopeScaling::Dynamic { .. } | RopeScaling::LongRope { .. })
    }

    /// The rotation at `positions` (batch, tokens), as `kind`, where the longest sequence has `longest` tokens: one more than
    /// the last position. (To ask the device for that would be to wait for all it has to do.)
    pub fn at(&self, positions: &Tensor, longest: i64, kind: Kind) -> Result<Rotation> {
        let frequencies = if self.depends_on_length() {
            to_tensor(&inverse_frequencies(&self.config, longest)?, positions.device())?
        } else {
            to_tensor(&self.inverse_frequencies, positions.device())?
        };
        // (batch, tokens, 1, 1) * (head_dim / 2) -> (batch, tokens, 1, head_dim / 2)
        let angles = positions.f_to_kind(Kind::Float)?.f_unsqueeze(-1)?.f_unsqueeze(-1)?.f_mul(&frequencies)?;
        let scaled = |tensor: Tensor| -> Result<Tensor> {
            let tensor =
                if self.attention_factor == 1.0 { tensor } else { tensor.f_mul_scalar(self.attention_factor)? };
            Ok(tensor.f_to_kind(kind)?)
        };
        Ok(Rotation { cosine: scaled(angles.f_cos()?)?, sine: scaled(angles.f_sin()?)? })
    }
}

impl Rotation {
    /// The rotations at `positions` (batch, tokens), where these are those of one sequence from position 0 on.
    pub(crate) fn select(&self, positions: &Tensor) -> Result<Rotation> {
        let (batch, tokens) = positions.size2()?;
        let positions = positions.f_reshape([-1])?;
        // (1, all tokens, 1, head_dim / 2) -> (batch, tokens, 1, head_dim / 2)
        let select = |of_all: &Tensor| of_all.f_index_select(1, &positions)?.f_view([batch, tokens, 1, -1]);
        Ok(Rotation { cosine: select(&self.cosine)?, sine: select(&self.sine)? })
    }

    /// Rotates (batch, tokens, heads, head_dim): dimension i pairs with i + head_dim / 2.
    pub fn apply(&self, vectors: &Tensor) -> Result<Tensor> {
        let half = vectors.size().last().copied().unwrap_or(0) / 2;
        let (left, right) = (vectors.f_narrow(-1, 0, half)?, vectors.f_narrow(-1, half, half)?);
        let rotated_left = left.f_mul(&self.cosine)?.f_sub(&right.f_mul(&self.sine)?)?;
        let rotated_right = right.f_mul(&self.cosine)?.f_add(&left.f_mul(&self.sine)?)?;
        Ok(Tensor::f_cat(&[rotated_left, rotated_right], -1)?)
    }
}

fn to_tensor(frequencies: &[f32], device: Device) -> Result<Tensor> {
    upload(frequencies, device)
}

/// Frequencies for a sequence of `length` tokens, computed in f32 as transformers does.
fn inverse_frequencies(config: &RopeConfig, length: i64) -> Result<Vec<f32>> {
    let plain = powers(config.theta, config.dim)?.into_iter().map(f32::recip);
    Ok(match &config.scaling {
        RopeScaling::Default => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|frequency| frequency / *factor as f32).collect(),
        RopeScaling::Dynamic { factor } => {
            let (dim, longest) = (config.dim as f64, config.max_position_embeddings as f64);
            let length = (length as f64).max(longest);
            let theta = config.theta * (factor * length / longest - (factor - 1.0)).powf(dim / (dim - 2.0));
            powers(theta, config.dim)?.into_iter().map(f32::recip).collect()
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let (factor, low, high) = (*factor as f32, *low_freq_factor as f32, *high_freq_factor as f32);
            let original = *original_max_position_embeddings as f32;
            let stretch = |frequency: f32| {
                let wavelength = (2.0 * PI) as f32 / frequency;
                if wavelength < original / high {
                    return frequency;
                }
                if wavelength > original / low {
                    return frequency / factor;
                }
                let smooth = (original / wavelength - low) / (high - low);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            };
            plain.map(stretch).collect()
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, truncate, original_max_position_embeddings, .. } => {
            let dim = config.dim as f64;
            let dimension_of = |rotations: f64| {
                dim * (original_max_position_embeddings / (rotations * 2.0 * PI)).ln() / (2.0 * config.theta.ln())
            };
            let (mut low, mut high) = (dimension_of(*beta_fast), dimension_of(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
            if low == high {
                high += 0.001;
            }
            let mix = |(index, power): (usize, f32)| {
                let kept = 1.0 - ((index as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                (*factor as f32 * power).recip() * (1.0 - kept) + power.recip() * kept
            };
            powers(config.theta, config.dim)?.into_iter().enumerate().map(mix).collect()
        }
        RopeScaling::LongRope { short_factor, long_factor, original_max_position_embeddings, .. } => {
            let long = length as f64 > *original_max_position_embeddings;
            let factors = if long { long_factor } else { short_factor };
            let powers = powers(config.theta, config.dim)?;
            factors.iter().zip(powers).map(|(factor, power)| (factor * power).recip()).collect()
        }
    })
}

/// theta^(2i/dim) for i in 0..dim/2, with libtorch's own `pow`, so that angles far out agree with transformers'.
fn powers(theta: f64, dim: i64) -> Result<Vec<f32>> {
    let exponents = Tensor::f_arange_start_step(0, dim, 2, (Kind::Int64, Device::Cpu))?;
    let exponents = exponents.f_to_kind(Kind::Float)?.f_div_scalar(dim as f64)?;
    Ok(Vec::<f32>::try_from(Tensor::f_pow_scalar(theta, &exponents)?)?)
}
