//! Gradient clipping by global norm, as PyTorch's `clip_grad_norm_`.

use tch::{Kind, Tensor, no_grad};

use crate::Result;

/// The L2 norm of one gradient; a scalar f32 tensor on its device.
pub fn norm(gradient: &Tensor) -> Result<Tensor> {
    no_grad(|| Ok(gradient.f_norm_scalaropt_dtype(2, Kind::Float)?))
}

/// The L2 norm of gradients taken together that have these [norms](norm); a scalar f32 tensor on their device.
pub fn joined_norm(norms: &[Tensor]) -> Result<Tensor> {
    no_grad(|| Ok(Tensor::f_stack(norms, 0)?.f_norm()?))
}

/// The L2 norm of all gradients taken together; a scalar f32 tensor on their device.
pub fn global_norm(gradients: &[Tensor]) -> Result<Tensor> {
    joined_norm(&gradients.iter().map(norm).collect::<Result<Vec<_>>>()?)
}

/// What gradients of this global norm are multiplied by to keep it within `max_norm`.
pub fn clip_scale(norm: f64, max_norm: f64) -> f64 {
    (max_norm / (norm + 1e-6)).min(1.0)
}
