//! Exponential moving averages of weights: average = decay * average + (1 - decay) * policy.
//!
//! `decay` is the share of the old average that stays (PyTorch's and TRL's convention; the SAPO authors' ema_beta).
//!
//! An average is float32, or bfloat16 in half the memory. A bfloat16 average is computed in float32, block by block, and
//! rounded stochastically: rounded to the nearest number, one with a decay near 1 would never move, since what is averaged
//! in is less than half a unit in the last place.

use tch::{Device, Kind, Tensor, no_grad};

use crate::blocks::{Blockwise, in_blocks};
use crate::model::Kernels;
use crate::native::foreach_lerp;
use crate::parameters::ParameterSet;
use crate::rounding::Rounding;
use crate::{Error, Result};

/// Update `average` in place; with fused `kernels` on CUDA all tensors in a few launches. How a bfloat16 average is rounded
/// is a function of `seed`, which should be another for every update.
pub fn update(
    average: &mut ParameterSet,
    policy: &ParameterSet,
    decay: f64,
    kernels: Kernels,
    seed: u64,
) -> Result<()> {
    check(average, policy, decay)?;
    let is_for_it = |tensor: &Tensor| tensor.device() != Device::Cpu && tensor.kind() == Kind::Float;
    if kernels == Kernels::Fused && average.iter().all(|(_, tensor)| is_for_it(tensor)) {
        return no_grad(|| lerp_together(average, policy, 1.0 - decay));
    }
    let target = average.shallow_clone();
    mix(average, policy, decay, seed, &target)
}

/// The updated average in memory of its own; `average` stays as it is for those who still read it.
pub fn updated(average: &ParameterSet, policy: &ParameterSet, decay: f64, seed: u64) -> Result<ParameterSet> {
    let empty = |(name, tensor): (&str, &Tensor)| Ok((name.to_owned(), tensor.f_empty_like()?));
    let mut buffers = average.iter().map(empty).collect::<Result<ParameterSet>>()?;
    update_into(average, policy, decay, seed, &mut buffers)?;
    Ok(buffers)
}

/// Like [`updated`], into the memory of an average that nobody reads any more.
pub fn update_into(
    average: &ParameterSet,
    policy: &ParameterSet,
    decay: f64,
    seed: u64,
    buffers: &mut ParameterSet,
) -> Result<()> {
    check(average, policy, decay)?;
    check(average, buffers, decay)?;
    mix(average, policy, decay, seed, buffers)
}

/// Write the updated average to `target`, which may be the average itself.
fn mix(average: &ParameterSet, policy: &ParameterSet, decay: f64, seed: u64, target: &ParameterSet) -> Result<()> {
    let mut rounded = Vec::new();
    for (index, ((_, average), ((_, policy), (_, target)))) in
        average.iter().zip(policy.iter().zip(target.iter())).enumerate()
    {
        let policy = policy.f_detach()?.f_to_device(average.device())?;
        let mut target = target.shallow_clone();
        if average.kind() != Kind::BFloat16 {
            let policy = policy.f_to_kind(average.kind())?;
            let _ = no_grad(|| average.f_lerp_scalar_out(&target, &policy, 1.0 - decay))?;
        } else if decay == 0.0 {
            no_grad(|| target.f_copy_(&policy))?;
        } else {
            let flat = |tensor: &Tensor| tensor.f_view([-1]);
            let (average, policy, target) = (flat(average)?, flat(&policy.f_contiguous()?)?, flat(&target)?);
            rounded.push(Rounded { average, policy, target, index: index as u64, first: 0 });
        }
    }
    let Some(device) = rounded.first().map(|part| part.average.device()) else { return Ok(()) };
    let rounding = Rounding::new(seed, device)?;
    in_blocks(device, rounded, |part| part.mix(decay, &rounding))
}

/// All tensors in a few kernels.
fn lerp_together(average: &ParameterSet, policy: &ParameterSet, weight: f64) -> Result<()> {
    let policy = average
        .iter()
        .zip(policy.iter())
        .map(|((_, average), (_, policy))| like(policy, average))
        .collect::<Result<Vec<_>>>()?;
    let average: Vec<Tensor> = average.iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
    foreach_lerp(&average, &policy, weight)
}

/// Flat views of part of a bfloat16 average.
struct Rounded {
    average: Tensor,
    policy: Tensor,
    target: Tensor,
    /// The tensor's number, and where in it the part begins.
    index: u64,
    first: i64,
}

impl Blockwise for Rounded {
    fn elements(&self) -> i64 {
        self.average.numel() as i64
    }

    fn narrow(&self, start: i64, length: i64) -> Result<Self> {
        let part = |tensor: &Tensor| tensor.f_narrow(0, start, length);
        let (average, policy, target) = (part(&self.average)?, part(&self.policy)?, part(&self.target)?);
        Ok(Rounded { average, policy, target, first: self.first + start, ..*self })
    }
}

impl Rounded {
    fn mix(mut self, decay: f64, rounding: &Rounding) -> Result<()> {
        let mut mixed = self.average.f_to_kind(Kind::Float)?;
        let _ = mixed.f_lerp_(&self.policy.f_to_kind(Kind::Float)?, 1.0 - decay)?;
        self.target.f_copy_(&rounding.round(&mixed, self.index, self.first)?)?;
        Ok(())
    }
}

/// `tensor` on the device and of the kind of `other`; no copy where it is so already.
fn like(tensor: &Tensor, other: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_to_device(other.device())?.f_to_kind(other.kind())?)
}

fn check(average: &ParameterSet, other: &ParameterSet, decay: f64) -> Result<()> {
    if !(0.0..=1.0).contains(&decay) {
        return Err(Error::Argument(format!("decay: expected 0 to 1, found {decay}")));
    }
    let shapes = |set: &ParameterSet| -> Vec<(String, Vec<i64>)> {
        set.iter().map(|(name, tensor)| (name.to_owned(), tensor.size())).collect()
    };
    let (expected, found) = (shapes(average), shapes(other));
    match expected.iter().zip(&found).find(|(expected, found)| expected != found) {
        Some((expected, found)) => {
            Err(Error::Argument(format!("average of weights: expected {expected:?}, found {found:?}")))
        }
        None if expected.len() != found.len() => {
            let message = format!("average of weights: expected {} tensors, found {}", expected.len(), found.len());
            Err(Error::Argument(message))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(values: [f32; 3]) -> ParameterSet {
        [("weight".to_owned(), Tensor::from_slice(&values))].into_iter().collect()
    }

    fn values(set: &ParameterSet) -> Vec<f32> {
        Vec::try_from(set.get("weight").unwrap()).unwrap()
    }

    #[test]
    fn the_average_keeps_its_share_of_the_old_values() {
        let policy = set([1.0, -2.0, 8.0]);
        // decay * average + (1 - decay) * policy by hand; all numbers are exact in f32.
        for (decay, expected) in
            [(0.5, [0.5, 1.0, 6.0]), (0.75, [0.25, 2.5, 5.0]), (1.0, [0.0, 4.0, 4.0]), (0.0, [1.0, -2.0, 8.0])]
        {
            let mut average = set([0.0, 4.0, 4.0]);
            let mut buffers = set([f32::NAN; 3]);
            update_into(&average, &policy, decay, 0, &mut buffers).unwrap();
            assert_eq!(values(&buffers), expected);
            assert_eq!(values(&updated(&average, &policy, decay, 0).unwrap()), expected);
            assert_eq!(values(&average), [0.0, 4.0, 4.0], "the old average is left alone");
            update(&mut average, &policy, decay, Kernels::Fused, 0).unwrap();
            assert_eq!(values(&average), expected);
        }
    }

    #[test]
    fn weights_of_another_model_are_refused() {
        let other = [("bias".to_owned(), Tensor::from_slice(&[1.0f32]))].into_iter().collect();
        let error = update(&mut set([0.0; 3]), &other, 0.5, Kernels::Fused, 0).unwrap_err().to_string();
        assert!(error.contains("weight") && error.contains("bias"), "{error}");
        assert!(updated(&set([0.0; 3]), &ParameterSet::default(), 0.5, 0).is_err());
    }

    #[test]
    fn tensors_together_are_mixed_as_one_by_one() {
        let (mut plain, together, policy) = (set([0.0, 4.0, 4.0]), set([0.0, 4.0, 4.0]), set([1.0, -2.0, 8.0]));
        update(&mut plain, &policy, 0.75, Kernels::Plain, 0).unwrap();
        no_grad(|| lerp_together(&together, &policy, 0.25)).unwrap();
        assert_eq!(values(&together), values(&plain));
    }

    /// From 1 towards 2 with decay 0.999: after 100 updates 2 - 0.999^100 = 1.09521. Each update is less than half a unit
    /// in the last place, 1/256. The mean of 10000 numbers that were rounded 100 times, each time to one of two numbers
    /// 1/128 apart, has a standard deviation below sqrt(100) / 256 / 100 = 0.0004.
    #[test]
    fn an_average_in_bfloat16_moves_as_one_in_float32_does() {
        let weight = |value: f64, kind| -> ParameterSet {
            [("weight".to_owned(), Tensor::full([10_000], value, (kind, Device::Cpu)))].into_iter().collect()
        };
        let mut average = weight(1.0, Kind::BFloat16);
        let policy = weight(2.0, Kind::Float);
        for step in 0..100 {
            if step == 50 {
                let before = average.deep_copy();
                average = updated(&before, &policy, 0.999, step).unwrap();
                assert_ne!(average.get("weight").unwrap(), before.get("weight").unwrap());
                let again = updated(&before, &policy, 0.999, step).unwrap();
                assert_eq!(average.get("weight").unwrap(), again.get("weight").unwrap());
            } else {
                update(&mut average, &policy, 0.999, Kernels::Fused, step).unwrap();
            }
        }
        let average = average.get("weight").unwrap();
        assert_eq!(average.kind(), Kind::BFloat16);
        let mean = average.mean(Kind::Double).double_value(&[]);
        assert!((mean - 1.09521).abs() < 0.002, "{mean}");
        // Copies are to the nearest number.
        let copied = updated(&weight(1.0, Kind::BFloat16), &weight(1.0 + 0.7 / 128.0, Kind::Float), 0.0, 1).unwrap();
        assert_eq!(copied.get("weight").unwrap().mean(Kind::Double).double_value(&[]), 1.0078125);
    }
}
