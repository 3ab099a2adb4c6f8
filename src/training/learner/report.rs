//! What a step's passes report, read from the device and checked.

use tch::{Device, Tensor};

use super::pass::Outcome;
use super::{Example, StepMetrics};
use crate::{Error, Result};

/// Refuses numbers that are not finite; what the objective carries into the next step.
pub(super) fn check_finite(
    step: u64,
    parts: &[&[Example]],
    outcomes: &[Outcome],
    metrics: &StepMetrics,
) -> Result<Vec<(String, f64)>> {
    if let Some(what) = not_finite(metrics) {
        return Err(Error::NonFinite { step, what, examples: blamed(parts, outcomes)? });
    }
    let state = read_state(outcomes)?;
    match state.iter().find(|(_, value)| !value.is_finite()) {
        Some((name, value)) => {
            Err(Error::Argument(format!("step {step}: the objective's state `{name}` became {value}")))
        }
        None => Ok(state),
    }
}

/// The batch's metrics: the sum of the parts' shares, and the gradients' norm if it is known yet. A wait for the device.
pub(super) fn read_metrics(outcomes: &[Outcome], norm: Option<&Tensor>) -> Result<StepMetrics> {
    let mut values = Vec::new();
    for outcome in outcomes {
        values.extend(outcome.metrics.iter().map(|(_, value)| value.shallow_clone()));
    }
    values.extend(norm.map(Tensor::shallow_clone));
    let values = Vec::<f32>::try_from(Tensor::f_stack(&values, 0)?.f_to_device(Device::Cpu)?)?;
    let mut metrics = StepMetrics::new();
    let names = outcomes.iter().flat_map(|outcome| outcome.metrics.iter().map(|(name, _)| name.as_str()));
    for (name, value) in names.chain(["grad_norm"]).zip(values) {
        *metrics.entry(name.to_owned()).or_insert(0.0) += f64::from(value);
    }
    Ok(metrics)
}

/// What the objective carries into the next step.
fn read_state(outcomes: &[Outcome]) -> Result<Vec<(String, f64)>> {
    let states = outcomes.iter().flat_map(|outcome| &outcome.state);
    states.map(|(name, value)| Ok((name.clone(), value.f_double_value(&[])?))).collect()
}

fn not_finite(metrics: &StepMetrics) -> Option<&'static str> {
    [("loss", "loss"), ("grad_norm", "norm of the gradients")]
        .into_iter()
        .find(|(name, _)| metrics.get(*name).is_some_and(|value| !value.is_finite()))
        .map(|(_, what)| what)
}

/// Labels of the examples whose own loss is not finite; of all where there is none.
fn blamed(parts: &[&[Example]], outcomes: &[Outcome]) -> Result<Vec<String>> {
    let blame: Vec<&Tensor> = outcomes.iter().map(|outcome| &outcome.blame).collect();
    let blame = Vec::<f32>::try_from(Tensor::f_cat(&blame, 0)?.f_to_device(Device::Cpu)?)?;
    let labels = |guilty: &dyn Fn(f32) -> bool| -> Vec<String> {
        let chosen = parts.iter().copied().flatten().zip(&blame).filter(|(_, blame)| guilty(**blame));
        chosen.map(|(example, _)| example.label.clone()).collect()
    };
    let guilty = labels(&|blame| !blame.is_finite());
    Ok(if guilty.is_empty() { labels(&|_| true) } else { guilty })
}
