//! AdamW with running means in 8 bits (Dettmers et al. 2021, arXiv 2110.02861): torchao's AdamW8bit.

use super::span::{Span, Update};
use super::{adamw, quantised};
use crate::Result;

/// The fractions of both running means.
pub(super) struct Maps {
    pub mean: quantised::Codes,
    pub mean_square: quantised::Codes,
}

/// AdamW on the means in f32, which exist for this span alone; the update takes them before they are rounded.
pub(super) fn update(
    span: &mut Span,
    update: &Update,
    maps: &Maps,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
) -> Result<()> {
    let mut state = std::mem::take(&mut span.state);
    let [codes, scales, square_codes, square_scales] = state.as_mut_slice() else {
        // A parameter too small for codes.
        span.state = state;
        return adamw::update(span, update, betas, eps, weight_decay);
    };
    span.state = vec![maps.mean.read(codes, scales)?, maps.mean_square.read(square_codes, square_scales)?];
    adamw::update(span, update, betas, eps, weight_decay)?;
    maps.mean.write(&span.state[0], codes, scales)?;
    maps.mean_square.write(&span.state[1], square_codes, square_scales)?;
    span.state = state;
    Ok(())
}
