//! What `preference_learner` takes under `with`, and what the training core makes of it.

use sapo_flow_engine::graph::Dtype;
use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_training::learner::LayoutKind;
use sapo_flow_training::model::Kernels;
use sapo_flow_training::optim::{Rule, ScheduleKind, Warmup};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::compute::device_issue;
use crate::objectives::ObjectiveConfig;

/// Update rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerName {
    /// Adam with decoupled weight decay.
    Adamw,
    /// The same with its state in 8 bits, torchao's.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// RMSprop, PyTorch's.
    Rmsprop,
    /// Gradient descent.
    Sgd,
}

/// Courses of the learning rate after warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleName {
    /// Down to 0 in a straight line.
    Linear,
    /// Down to 0 along half a cosine.
    Cosine,
    /// As one over the square root of the step.
    InverseSqrt,
    /// Stays where warmup, if there is one, has brought it.
    Constant,
}

/// How pairs stand in a forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LayoutName {
    /// What both responses begin with once, and no padding.
    SharedPrefix,
    /// Each response in a padded row of its own.
    Padded,
}

/// What `preference_learner` takes under `with`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PreferenceLearnerConfig {
    /// Directory of the model to train, in Hugging Face's layout.
    pub model: String,
    /// What is minimised: the name of an objective, `{name: dpo, beta: 0.2}` with params, a formula of your own
    /// (`{use: log_ratios, formula: "..."}`) or a `{file: PATH}` with one, or a list of these, each with a `weight`, for
    /// their sum.
    pub objective: ObjectiveConfig,
    /// Update rule: adamw, adamw_8bit, rmsprop or sgd. adamw_8bit keeps its state in 8 bits (torchao's AdamW8bit): 2 bytes
    /// a parameter instead of 8. Weight decay applies to matrices only, as in Hugging Face's Trainer.
    #[serde(default = "default_optimizer")]
    pub optimizer: OptimizerName,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// AdamW, in 8 bits or not: decay of the running means of gradients and of their squares (default [0.9, 0.999]).
    pub betas: Option<[f64; 2]>,
    /// RMSprop only: decay of the running mean of squared gradients (default 0.99).
    pub alpha: Option<f64>,
    /// AdamW and RMSprop: added to the denominator (default 1e-8).
    pub eps: Option<f64>,
    /// Weight decay: decoupled for AdamW, an addition to the gradient for the others.
    #[serde(default)]
    pub weight_decay: f64,
    /// Course of the learning rate: linear, cosine, inverse_sqrt or constant.
    #[serde(default = "default_schedule")]
    pub schedule: ScheduleName,
    /// Steps in which the learning rate rises from 0 (default 0).
    pub warmup_steps: Option<u64>,
    /// The same as a fraction of all steps; one of the two at most.
    pub warmup_ratio: Option<f64>,
    /// Gradients are scaled down to this norm where theirs is larger; absent: never.
    pub max_grad_norm: Option<f64>,
    /// How pairs stand in a forward pass: shared_prefix computes what both responses begin with once, padded is the
    /// plain way. Both give the same update. Absent: shared_prefix, or padded where the run's kernels are plain.
    pub layout: Option<LayoutName>,
    /// Recompute each layer's activations in the backward pass: less memory, about a third more time.
    #[serde(default)]
    pub gradient_checkpointing: bool,
    /// Let each layer's gradients go into the optimizer, and free them, before the next layer's are computed: less memory by
    /// almost all gradients. It takes `gradient_checkpointing`, no `max_grad_norm`, and one batch a step. A gradient that is
    /// not finite is then found only when the weights have changed.
    #[serde(default)]
    pub release_gradients: bool,
    /// Type of the weights that are trained: float32, or bfloat16 for half the memory of weights and gradients. Updates are
    /// computed in float32 and rounded stochastically, so that small ones are not lost; some precision is.
    #[serde(default = "default_weights")]
    pub weights: Dtype,
    /// Parameters that stay as they are, by name; `*` stands for anything: `model.embed_tokens.*`.
    #[serde(default)]
    pub freeze: Vec<String>,
    /// Where to compute; absent: the run's device.
    pub device: Option<String>,
}

fn default_optimizer() -> OptimizerName {
    OptimizerName::Adamw
}

fn default_weights() -> Dtype {
    Dtype::Float32
}

fn default_schedule() -> ScheduleName {
    ScheduleName::Linear
}

impl PreferenceLearnerConfig {
    /// The update rule with its settings.
    pub fn rule(&self) -> Rule {
        let eps = self.eps.unwrap_or(1e-8);
        let weight_decay = self.weight_decay;
        match self.optimizer {
            OptimizerName::Adamw => {
                let [beta1, beta2] = self.betas.unwrap_or([0.9, 0.999]);
                Rule::Adamw { beta1, beta2, eps, weight_decay }
            }
            OptimizerName::Adamw8bit => {
                let [beta1, beta2] = self.betas.unwrap_or([0.9, 0.999]);
                Rule::Adamw8bit { beta1, beta2, eps, weight_decay }
            }
            OptimizerName::Rmsprop => Rule::Rmsprop { alpha: self.alpha.unwrap_or(0.99), eps, weight_decay },
            OptimizerName::Sgd => Rule::Sgd { weight_decay },
        }
    }

    /// How pairs stand in a forward pass of a run with these kernels.
    pub fn layout(&self, kernels: Kernels) -> LayoutKind {
        match self.layout {
            None => LayoutKind::suited_to(kernels),
            Some(LayoutName::SharedPrefix) => LayoutKind::SharedPrefix,
            Some(LayoutName::Padded) => LayoutKind::Padded,
        }
    }

    /// The learning rate's course.
    pub fn schedule(&self) -> (ScheduleKind, Warmup) {
        let kind = match self.schedule {
            ScheduleName::Linear => ScheduleKind::Linear,
            ScheduleName::Cosine => ScheduleKind::Cosine,
            ScheduleName::InverseSqrt => ScheduleKind::InverseSqrt,
            ScheduleName::Constant => ScheduleKind::ConstantWithWarmup,
        };
        let warmup = match self.warmup_ratio {
            Some(ratio) => Warmup::Ratio(ratio),
            None => Warmup::Steps(self.warmup_steps.unwrap_or(0)),
        };
        (kind, warmup)
    }

    /// What is wrong with the settings: values out of range, and values that would have no effect.
    pub fn issues(&self) -> Vec<ConfigIssue> {
        let mut issues = Vec::new();
        let mut no_effect = |set: bool, key: &str, why: &str| {
            if set {
                issues.push(ConfigIssue::new(key, format!("has no effect: {why}")));
            }
        };
        let is_adamw = matches!(self.optimizer, OptimizerName::Adamw | OptimizerName::Adamw8bit);
        no_effect(self.betas.is_some() && !is_adamw, "betas", "they are adamw's");
        no_effect(self.alpha.is_some() && self.optimizer != OptimizerName::Rmsprop, "alpha", "it is rmsprop's");
        no_effect(self.eps.is_some() && self.optimizer == OptimizerName::Sgd, "eps", "sgd has none");
        let both = self.warmup_steps.is_some() && self.warmup_ratio.is_some();
        no_effect(both, "warmup_steps", "warmup_ratio is given too");

        let mut wrong = |key: &str, message: String| issues.push(ConfigIssue::new(key, message));
        if let Err(error) = self.rule().check() {
            let message = error.to_string();
            let key = message.split_once(':').map_or("optimizer", |(key, _)| key);
            // beta1 and beta2 are written as one list.
            wrong(if matches!(key, "beta1" | "beta2") { "betas" } else { key }, message.clone());
        }
        if !(self.learning_rate.is_finite() && self.learning_rate > 0.0) {
            wrong("learning_rate", format!("expected a finite number above 0, found {}", self.learning_rate));
        }
        if self.warmup_ratio.is_some_and(|ratio| !(0.0..=1.0).contains(&ratio)) {
            wrong("warmup_ratio", format!("expected a number from 0 to 1, found {}", self.warmup_ratio.unwrap_or(0.0)));
        }
        if let Some(norm) = self.max_grad_norm.filter(|norm| !(norm.is_finite() && *norm > 0.0)) {
            wrong("max_grad_norm", format!("expected a finite number above 0, found {norm}"));
        }
        if self.release_gradients && self.max_grad_norm.is_some() {
            let message = "cannot be released before their norm is known, and `max_grad_norm` scales them by it";
            wrong("release_gradients", message.into());
        }
        if self.release_gradients && !self.gradient_checkpointing {
            wrong("release_gradients", "needs `gradient_checkpointing: true`, which goes layer by layer".into());
        }
        issues.extend(device_issue(self.device.as_deref()));
        issues.extend(self.objective.compile().err().into_iter().flatten());
        issues
    }
}

#[cfg(test)]
mod tests {
    use sapo_flow_training::optim::Schedule;

    use super::*;

    fn config(more: &str) -> PreferenceLearnerConfig {
        let text = format!("{{model: m, objective: orpo, learning_rate: 1e-5, {more}}}");
        serde_yaml::from_str(&text).expect("a test's own YAML")
    }

    #[test]
    fn every_schedule_takes_a_warmup() {
        for name in ["linear", "cosine", "inverse_sqrt", "constant"] {
            for warmup in ["warmup_steps: 4", "warmup_ratio: 0.4"] {
                let config = config(&format!("schedule: {name}, {warmup}"));
                assert_eq!(config.issues(), []);
                let (kind, warmup) = config.schedule();
                let schedule = Schedule::new(kind, warmup, 10).expect("a sound schedule");
                let rise: Vec<f64> = (0..5).map(|step| schedule.multiplier(step)).collect();
                assert_eq!(rise, [0.0, 0.25, 0.5, 0.75, 1.0], "{name}");
            }
        }
        let (kind, warmup) = config("schedule: constant").schedule();
        let schedule = Schedule::new(kind, warmup, 10).expect("a sound schedule");
        assert_eq!([0, 9].map(|step| schedule.multiplier(step)), [1.0, 1.0]);
    }

    #[test]
    fn plain_kernels_go_with_the_plain_layout_unless_another_is_given() {
        use LayoutKind::{Padded, SharedPrefix};
        let layouts = |more| [Kernels::Fused, Kernels::Plain].map(|kernels| config(more).layout(kernels));
        assert_eq!(layouts(""), [SharedPrefix, Padded]);
        assert_eq!(layouts("layout: shared_prefix"), [SharedPrefix; 2]);
        assert_eq!(layouts("layout: padded"), [Padded; 2]);
    }

    #[test]
    fn settings_without_effect_are_errors() {
        for (more, key) in [
            ("alpha: 0.9", "alpha"),
            ("optimizer: sgd, eps: 1e-8", "eps"),
            ("optimizer: rmsprop, betas: [0.9, 0.95]", "betas"),
            ("warmup_steps: 3, warmup_ratio: 0.1", "warmup_steps"),
        ] {
            let issues = config(more).issues();
            assert_eq!(issues.iter().map(|issue| issue.key.as_str()).collect::<Vec<_>>(), [key], "{more}");
            assert!(issues[0].message.starts_with("has no effect"), "{}", issues[0].message);
        }
    }

    #[test]
    fn values_out_of_range_name_their_key() {
        for rate in ["0", "-1e-5", ".nan"] {
            let text = format!("{{model: m, objective: orpo, learning_rate: {rate}}}");
            let config: PreferenceLearnerConfig = serde_yaml::from_str(&text).expect("a test's own YAML");
            assert_eq!(config.issues().iter().map(|issue| issue.key.as_str()).collect::<Vec<_>>(), ["learning_rate"]);
        }
        for (more, key) in [
            ("weight_decay: -1", "weight_decay"),
            ("betas: [0.9, 1.0]", "betas"),
            ("max_grad_norm: 0", "max_grad_norm"),
            ("max_grad_norm: .inf", "max_grad_norm"),
            ("max_grad_norm: .nan", "max_grad_norm"),
            ("optimizer: adamw_8bit, betas: [1.0, 0.9]", "betas"),
            ("release_gradients: true", "release_gradients"),
            ("release_gradients: true, gradient_checkpointing: true, max_grad_norm: 1.0", "release_gradients"),
            ("device: gpuu", "device"),
        ] {
            let issues = config(more).issues();
            assert_eq!(issues.iter().map(|issue| issue.key.as_str()).collect::<Vec<_>>(), [key], "{more}: {issues:?}");
        }
    }
}
