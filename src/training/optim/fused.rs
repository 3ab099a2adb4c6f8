//! AdamW by ATen's fused kernel: one pass over memory, on CUDA in a few launches for all parameters.

use tch::Kind;

use super::span::{Span, Update};
use crate::Result;
use crate::device::upload;
use crate::native::{FusedAdamw, FusedTensors, fused_adamw};

/// Whether these spans, whole parameters, are of the type that the fused kernel is for.
pub(super) fn takes(spans: &[Span]) -> bool {
    spans.iter().all(|span| span.parameter.kind() == Kind::Float)
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
    use tch::{Device, Tensor};

    use crate::device;
    use crate::model::Kernels;
    use crate::optim::{Optimizer, Rule};

    use super::*;

    const RULE: Rule = Rule::Adamw { beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.1 };

    /// A matrix, which decays and is long enough to be shared out to threads, and a vector.
    fn parameters() -> Vec<(String, Tensor)> {
        let numbers = |count: i64| (Tensor::arange(count, (Kind::Float, Device::Cpu)) * 1.3).sin();
        vec![("matrix".into(), numbers(7 * 30_011).view([7, 30_011])), ("vector".into(), numbers(33))]
    }

    fn gradients(step: i64) -> Vec<Tensor> {
        parameters().iter().map(|(_, parameter)| (parameter * step).cos()).collect()
    }

    /// The parameters after five updates, the third of which is clipped.
    fn updated(kernels: Kernels, threads: usize) -> Vec<(String, Tensor)> {
        device::set_threads(threads);
        let parameters = parameters();
        let mut optimizer = Optimizer::new(RULE, kernels, &parameters, 0).unwrap();
        for step in 1..=5 {
            let scale = if step == 3 { 0.25 } else { 1.0 };
            optimizer.step(&parameters, gradients(step), 0.01, scale).unwrap();
        }
        parameters
    }

    /// The plain path is compared with PyTorch's optimizer elsewhere.
    #[test]
    fn the_fused_kernel_updates_as_the_plain_path_does() {
        let (plain, fused) = (updated(Kernels::Plain, 1), updated(Kernels::Fused, 1));
        for ((name, plain), (_, fused)) in plain.iter().zip(&fused) {
            assert!(plain.allclose(fused, 1e-6, 1e-7, false), "{name}");
        }
        assert!(plain[0].1 != parameters()[0].1);
        assert!(plain[0].1 != fused[0].1, "sums in another order differ in some last bit");
    }

    #[test]
    fn the_fused_kernel_gives_the_same_bytes_with_any_number_of_threads() {
        let alone = updated(Kernels::Fused, 1);
        for threads in [2, 3, 7] {
            assert_eq!(updated(Kernels::Fused, threads), alone, "{threads} threads");
        }
    }
}
