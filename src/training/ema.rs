//! Exponential moving averages of weights: average = decay * average + (1 - decay) * policy.
//!
//! `decay` is the share of the old average that stays (PyTorch's and TRL's convention; the SAPO authors' ema_beta).
//! Keep averages in f32: in bfloat16 a decay near 1 changes nothing, since the updates are below half a unit in the
//! last place.

use tch::{Tensor, no_grad};

use crate::parameters::ParameterSet;
use crate::{Error, Result};

/// Update `average` in place.
pub fn update(average: &mut ParameterSet, policy: &ParameterSet, decay: f64) -> Result<()> {
    check(average, policy, decay)?;
    no_grad(|| {
        for ((_, average), (_, policy)) in average.iter_mut().zip(policy.iter()) {
            let _ = average.f_lerp_(&like(policy, average)?, 1.0 - decay)?;
        }
        Ok(())
    })
}

/// The updated average in memory of its own; `average` stays as it is for those who still read it.
pub fn updated(average: &ParameterSet, policy: &ParameterSet, decay: f64) -> Result<ParameterSet> {
    let zeros = |(name, tensor): (&str, &Tensor)| Ok((name.to_owned(), tensor.f_empty_like()?));
    let mut buffers = average.iter().map(zeros).collect::<Result<ParameterSet>>()?;
    update_into(average, policy, decay, &mut buffers)?;
    Ok(buffers)
}

/// Like [`updated`], into the memory of an average that nobody reads any more.
pub fn update_into(
    average: &ParameterSet,
    policy: &ParameterSet,
    decay: f64,
    buffers: &mut ParameterSet,
) -> Result<()> {
    check(average, policy, decay)?;
    check(average, buffers, decay)?;
    no_grad(|| {
        for (((_, average), (_, policy)), (_, buffer)) in average.iter().zip(policy.iter()).zip(buffers.iter_mut()) {
            let _ = average.f_lerp_scalar_out(buffer, &like(policy, average)?, 1.0 - decay)?;
        }
        Ok(())
    })
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
    use tch::Tensor;

    use super::{update, update_into, updated};
    use crate::parameters::ParameterSet;

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
            update_into(&average, &policy, decay, &mut buffers).unwrap();
            assert_eq!(values(&buffers), expected);
            assert_eq!(values(&updated(&average, &policy, decay).unwrap()), expected);
            assert_eq!(values(&average), [0.0, 4.0, 4.0], "the old average is left alone");
            update(&mut average, &policy, decay).unwrap();
            assert_eq!(values(&average), expected);
        }
    }

    #[test]
    fn weights_of_another_model_are_refused() {
        let other = [("bias".to_owned(), Tensor::from_slice(&[1.0f32]))].into_iter().collect();
        let error = update(&mut set([0.0; 3]), &other, 0.5).unwrap_err().to_string();
        assert!(error.contains("weight") && error.contains("bias"), "{error}");
        assert!(updated(&set([0.0; 3]), &ParameterSet::default(), 0.5).is_err());
    }
}
