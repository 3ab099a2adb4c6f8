//! Learning rate schedules, as in transformers' `optimization.py`: warmup from 0, then decay.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The decay after warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Down to 0 in a straight line at the run's end.
    Linear,
    /// Down to 0 at the run's end along half a cosine.
    Cosine,
    /// As one over the square root of the step.
    InverseSqrt,
    /// None, and no warmup.
    Constant,
    /// None.
    ConstantWithWarmup,
}

/// How long the learning rate rises from 0 in a straight line.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Warmup {
    /// So many steps.
    Steps(u64),
    /// This fraction of all steps, rounded up.
    Ratio(f64),
}

/// A learning rate's course over a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    kind: ScheduleKind,
    warmup_steps: u64,
    total_steps: u64,
}

impl Schedule {
    /// A schedule over a run of `total_steps` updates.
    pub fn new(kind: ScheduleKind, warmup: Warmup, total_steps: u64) -> Result<Self> {
        let warmup_steps = match warmup {
            Warmup::Steps(steps) => steps,
            Warmup::Ratio(ratio) if (0.0..=1.0).contains(&ratio) => (ratio * total_steps as f64).ceil() as u64,
            Warmup::Ratio(ratio) => {
                return Err(Error::Argument(format!("warmup ratio: expected 0 to 1, found {ratio}")));
            }
        };
        if kind == ScheduleKind::Constant && warmup_steps > 0 {
            let message = "schedule `constant` has no warmup: expected 0 warmup steps, or `constant_with_warmup`";
            return Err(Error::Argument(message.into()));
        }
        Ok(Schedule { kind, warmup_steps, total_steps })
    }

    /// What the learning rate is multiplied by at a step, counted from 0.
    pub fn multiplier(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / decay_steps).min(1.0);
        match self.kind {
            ScheduleKind::Linear => self.total_steps.saturating_sub(step) as f64 / decay_steps,
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            ScheduleKind::InverseSqrt => {
                // Without warmup the decay's unit is 10,000 steps.
                let unit = if self.warmup_steps == 0 { 10_000 } else { self.warmup_steps };
                let step = step + unit - self.warmup_steps;
                1.0 / (step as f64 / unit as f64).sqrt()
            }
            ScheduleKind::Constant | ScheduleKind::ConstantWithWarmup => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Schedule, ScheduleKind, Warmup};

    #[test]
    fn a_warmup_ratio_is_rounded_up_to_steps() {
        let by_ratio = Schedule::new(ScheduleKind::Linear, Warmup::Ratio(0.1), 45).unwrap();
        let by_steps = Schedule::new(ScheduleKind::Linear, Warmup::Steps(5), 45).unwrap();
        assert_eq!(by_ratio, by_steps);
    }

    #[test]
    fn a_warmup_that_would_do_nothing_is_refused() {
        let error = Schedule::new(ScheduleKind::Constant, Warmup::Steps(5), 45).unwrap_err();
        assert!(error.to_string().contains("constant_with_warmup"), "{error}");
        let error = Schedule::new(ScheduleKind::Linear, Warmup::Ratio(-0.1), 45).unwrap_err();
        assert!(error.to_string().contains("expected 0 to 1, found -0.1"), "{error}");
    }
}
