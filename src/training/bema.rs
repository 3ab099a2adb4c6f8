//! BEMA, averages of weights whose lag behind the policy is corrected: Block and Zhang 2025, arXiv 2508.00180, algorithm 1, as
//! TRL's `BEMACallback` computes it.

use tch::no_grad;

use crate::ema;
use crate::model::Kernels;
use crate::parameters::ParameterSet;
use crate::{Error, Result};

/// How far an average follows the policy after so many updates, and how much of its lag is made up for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Powers {
    /// Updates that the schedules are ahead of the run (the paper's rho).
    pub lag: f64,
    /// Age that an update adds (gamma).
    pub multiplier: f64,
    /// The policy's share falls with this power of the age (kappa); 0 copies the policy.
    pub ema: f64,
    /// The correction falls with this power of the age (eta); 0 keeps all of it.
    pub bias: f64,
    /// The policy's share falls no further than this.
    pub min_share: f64,
}

impl Powers {
    /// beta_t, the policy's share of the average after update t: (lag + multiplier t)^-ema.
    pub fn share(&self, update: u64) -> f64 {
        self.age(update).powf(-self.ema).max(self.min_share)
    }

    /// alpha_t, the weight of the correction: (lag + multiplier t)^-bias.
    pub fn correction(&self, update: u64) -> f64 {
        self.age(update).powf(-self.bias)
    }

    fn age(&self, update: u64) -> f64 {
        self.lag + self.multiplier * update as f64
    }
}

/// Take update t of the policy into the `average`, in place, and give the corrected one, in memory of its own:
/// average + alpha_t (policy - first). All are float32, the policy may be of any type and on any device.
///
/// # Errors
/// When the sets are of different models, or memory is short.
pub fn update(
    average: &mut ParameterSet,
    policy: &ParameterSet,
    first: &ParameterSet,
    powers: &Powers,
    kernels: Kernels,
    t: u64,
) -> Result<ParameterSet> {
    let share = powers.share(t);
    if !(0.0..=1.0).contains(&share) {
        return Err(Error::Argument(format!("BEMA: after update {t} the policy's share is {share}, expected 0 to 1")));
    }
    ema::update(average, policy, 1.0 - share, kernels, t)?;
    let correction = powers.correction(t);
    let corrected =
        average.iter().zip(policy.iter().zip(first.iter())).map(|((name, average), ((_, policy), (_, first)))| {
            let policy = policy.f_detach()?.f_to_device(average.device())?.f_to_kind(average.kind())?;
            let moved = no_grad(|| Ok::<_, Error>((policy.f_sub(first)? * correction).f_add_(average)?))?;
            Ok((name.to_owned(), moved))
        });
    corrected.collect()
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;

    fn set(values: [f32; 2]) -> ParameterSet {
        [("weight".to_owned(), Tensor::from_slice(&values))].into_iter().collect()
    }

    fn values(set: &ParameterSet) -> Vec<f32> {
        Vec::try_from(set.get("weight").unwrap()).unwrap()
    }

    /// At age 1 + 3 the policy's share is 4^-0.5 = 0.5, and the correction 4^-1 = 0.25: from (0, 4) to (8, 0) the average is
    /// (4, 2), and with a quarter of what the policy moved (6, 1).
    #[test]
    fn the_average_lags_and_its_correction_makes_up_for_it() {
        let powers = Powers { lag: 1.0, multiplier: 1.0, ema: 0.5, bias: 1.0, min_share: 0.0 };
        let (mut average, first, policy) = (set([0.0, 4.0]), set([0.0, 4.0]), set([8.0, 0.0]));
        let corrected = update(&mut average, &policy, &first, &powers, Kernels::Fused, 3).unwrap();
        assert_eq!(values(&average), [4.0, 2.0]);
        assert_eq!(values(&corrected), [6.0, 1.0]);
        assert_eq!(values(&policy), [8.0, 0.0]);
        assert_eq!(Powers { min_share: 0.75, ..powers }.share(3), 0.75);
    }

    #[test]
    fn weights_of_another_model_and_impossible_shares_are_refused() {
        let powers = Powers { lag: 1.0, multiplier: 1.0, ema: 0.5, bias: 1.0, min_share: 0.0 };
        let other = [("bias".to_owned(), Tensor::from_slice(&[1.0f32]))].into_iter().collect();
        let error =
            update(&mut set([0.0; 2]), &other, &set([0.0; 2]), &powers, Kernels::Fused, 3).unwrap_err().to_string();
        assert!(error.contains("weight") && error.contains("bias"), "{error}");
        let error = update(
            &mut set([0.0; 2]),
            &set([0.0; 2]),
            &set([0.0; 2]),
            &Powers { lag: 0.25, ..powers },
            Kernels::Fused,
            0,
        );
        assert!(error.unwrap_err().to_string().contains("share is 2"), "0.25^-0.5 = 2");
    }
}
