//! AdamW by ATen's fused kernel: on CUDA all parameters in a few launches, in one pass over memory.

use tch::{Device, Kind};

use super::span::{Span, Update};
use crate::Result;
use crate::device::upload;
use crate::native::{FusedAdamw, FusedTensors, fused_adamw};

/// Whether these spans, whole parameters, are for the fused kernel.
pub(super) fn takes(spans: &[Span]) -> bool {
    let is_for_it = |span: &Span| span.parameter.device() != Device::Cpu && span.parameter.kind() == Kind::Float;
    !spans.is_empty() && spans.iter().all(is_for_it)
}

/// The update of [`adamw::update`](super::adamw::update), of all these at once.
pub(super) fn adamw(spans: Vec<Span>, update: &Update, betas: [f64; 2], eps: f64, weight_decay: f64) -> Result<()> {
    let Some(device) = spans.first().map(|span| span.parameter.device()) else { return Ok(()) };
    let steps = upload(&[update.step as f32], device)?.f_squeeze()?;
    let divisor = match update.gradient_scale {
        1.0 => None,
        scale => Some(upload(&[1.0 / scale as f32], device)?.f_squeeze()?),
    };
    // The kernel knows one weight decay a call.
    let (decaying, others): (Vec<_>, Vec<_>) = spans.into_iter().partition(|span| span.decays);
    for (group, weight_decay) in [(decaying, weight_decay), (others, 0.0)] {
        if group.is_empty() {
            continue;
        }
        let mut tensors = FusedTensors::default();
        for Span { parameter, gradient, state, .. } in group {
            tensors.parameters.push(parameter);
            tensors.gradients.push(gradient);
            for (list, tensor) in [&mut tensors.means, &mut tensors.mean_squares].into_iter().zip(state) {
                list.push(tensor);
            }
            tensors.steps.push(steps.shallow_clone());
        }
        let [beta1, beta2] = betas;
        let settings = FusedAdamw { learning_rate: update.learning_rate, beta1, beta2, weight_decay, eps };
        fused_adamw(&tensors, settings, divisor.as_ref())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tch::{Tensor, no_grad};

    use super::*;
    use crate::optim::{Optimizer, Part, Rule};

    const RULE: Rule = Rule::Adamw { beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.1 };

    /// A matrix, which decays, and a vector.
    fn parameters() -> Vec<(String, Tensor)> {
        let numbers = |count: i64| (Tensor::arange(count, (Kind::Float, Device::Cpu)) * 1.3).sin();
        vec![("matrix".into(), numbers(7 * 301).view([7, 301])), ("vector".into(), numbers(33))]
    }

    fn gradients(step: i64) -> Vec<Tensor> {
        parameters().iter().map(|(_, parameter)| (parameter * step).cos()).collect()
    }

    /// ATen has the kernel for CPUs too, and the plain path is compared with PyTorch's optimizer elsewhere.
    #[test]
    fn the_fused_kernel_updates_as_the_plain_path_does() {
        let (plain, fused) = (parameters(), parameters());
        let mut optimizers = [Optimizer::new(RULE, &plain, 0).unwrap(), Optimizer::new(RULE, &fused, 0).unwrap()];
        for step in 1..=5 {
            let scale = if step == 3 { 0.25 } else { 1.0 };
            let [plainly, by_kernel] = &mut optimizers;
            plainly.step(&plain, gradients(step), 0.01, scale).unwrap();
            let parts = fused.iter().zip(gradients(step)).enumerate();
            let part = |(index, ((_, parameter), gradient)): (usize, (&(String, Tensor), Tensor))| {
                by_kernel.span(&Part { index, parameter: parameter.shallow_clone(), gradient }).unwrap()
            };
            let spans: Vec<Span> = parts.map(part).collect();
            let update = Update {
                rule: RULE,
                learning_rate: 0.01,
                gradient_scale: scale,
                step: step as u64,
                maps: None,
                rounding: None,
            };
            no_grad(|| adamw(spans, &update, [0.9, 0.98], 1e-8, 0.1)).unwrap();
        }
        for ((name, plain), (_, fused)) in plain.iter().zip(&fused) {
            assert!(plain.allclose(fused, 1e-6, 1e-7, false), "{name}");
        }
        assert!(plain[0].1 != parameters()[0].1);
    }
}
