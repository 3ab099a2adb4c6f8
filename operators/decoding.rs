//! How a sampler arranges its work: the keys that operators which generate have in common.

use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_training::generate::{Decoding, Recording};
use sapo_flow_training::model::Kernels;
use schemars::JsonSchema;
use serde::Deserialize;

/// What an operator that generates takes under `with.decoding`. In float32 what is generated depends on it by no more than the
/// order of floating-point sums, but for `int8_weights`; in bfloat16 `pack_weights` also changes what is rounded.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DecodingConfig {
    /// Most responses under way at a time: when one ends, the next prompt takes its place. Without it all are, at once.
    pub concurrent_responses: Option<usize>,
    /// Run a prompt through the model once for all its responses, and with it those that it begins with, even where some of
    /// them wait for others to end; false is the plain way. Absent: true, or false where the run's kernels are plain.
    pub share_prompts: Option<bool>,
    /// Tokens drawn on the device before the host looks which responses have ended. 1 is the plain way: the host draws
    /// each token. Absent: 1 on a CPU, and on a GPU 16, or 1 where the run's kernels are plain.
    pub look_every: Option<usize>,
    /// Decode on a CPU by the way that reads the weights fastest: up to 16 responses in one call a layer, with activations in
    /// float32, which the plain way rounds to bfloat16 where the run computes in it; more with the weights laid out anew, where
    /// that pays. False is the plain way. Absent: true, or false where the run's kernels are plain.
    pub pack_weights: Option<bool>,
    /// Decode with linear layers' weights in 8 bits, on a CPU: half the reading of bfloat16, a quarter of float32's. What is
    /// generated comes from another, nearby model, and so do log-probabilities of it; off-policy data tolerates that. With
    /// SmolLM2-135M it was 0.003 nats a token away from float32, computing in bfloat16 0.001 (KL divergence).
    pub int8_weights: bool,
    /// On a GPU, record the work of a token once and launch it as a whole, where launching its kernels one by one takes longer
    /// than they do. Attention then reads up to 255 tokens more, through a mask. Has not been tried on a GPU yet.
    pub cuda_graphs: bool,
}

impl DecodingConfig {
    /// As the training core takes it, in a run with these kernels.
    pub fn settings(self, kernels: Kernels) -> Decoding {
        let DecodingConfig { concurrent_responses, int8_weights, .. } = self;
        let unsaid = Decoding::suited_to(kernels);
        // A recording is asked for, and is of several tokens.
        let (recording, look_every) = match self.cuda_graphs {
            true => (Recording::CudaGraph, self.look_every),
            false => (Recording::None, self.look_every.or(unsaid.look_every)),
        };
        let share_prompts = self.share_prompts.unwrap_or(unsaid.share_prompts);
        let pack_weights = self.pack_weights.unwrap_or(unsaid.pack_weights);
        Decoding { concurrent_responses, share_prompts, look_every, pack_weights, int8_weights, recording }
    }

    /// What is wrong with it.
    pub fn issues(self) -> Vec<ConfigIssue> {
        let numbers =
            [("decoding.concurrent_responses", self.concurrent_responses), ("decoding.look_every", self.look_every)];
        let zeros = numbers.into_iter().filter(|(_, number)| *number == Some(0));
        let mut issues: Vec<ConfigIssue> =
            zeros.map(|(key, _)| ConfigIssue::new(key, "expected a number above 0, found 0")).collect();
        if self.cuda_graphs && self.look_every == Some(1) {
            let message = "has no effect: with `look_every: 1` the host draws each token";
            issues.push(ConfigIssue::new("decoding.cuda_graphs", message));
        }
        if self.int8_weights && self.pack_weights == Some(false) {
            let message =
                "has no effect: `int8_weights: true` has a layout of its own, and there is no plain way to it";
            issues.push(ConfigIssue::new("decoding.pack_weights", message));
        }
        issues
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(yaml: &str) -> DecodingConfig {
        serde_yaml::from_str(yaml).unwrap()
    }

    #[test]
    fn what_is_left_out_is_as_fast_as_can_be() {
        let settings = |yaml| config(yaml).settings(Kernels::Fused);
        assert_eq!(settings("{}"), Decoding::default());
        let plain = settings("{share_prompts: false, look_every: 1, pack_weights: false}");
        assert_eq!(plain, Decoding::suited_to(Kernels::Plain));
        let quantized = Decoding { int8_weights: true, ..Decoding::default() };
        assert_eq!(settings("{int8_weights: true}"), quantized);
        assert_eq!(settings("{cuda_graphs: true}").recording, Recording::CudaGraph);
    }

    #[test]
    fn with_plain_kernels_what_is_left_out_is_plain() {
        let settings = |yaml| config(yaml).settings(Kernels::Plain);
        let plain = Decoding { share_prompts: false, look_every: Some(1), pack_weights: false, ..Decoding::default() };
        assert_eq!(settings("{}"), plain);
        assert_eq!(settings("{share_prompts: true}"), Decoding { share_prompts: true, ..plain });
        assert_eq!(settings("{pack_weights: true}"), Decoding { pack_weights: true, ..plain });
        assert_eq!(settings("{look_every: 8}"), Decoding { look_every: Some(8), ..plain });
        // It would have no effect where the host draws.
        assert_eq!(settings("{cuda_graphs: true}").look_every, None);
    }

    #[test]
    fn zeros_are_named() {
        let issues = config("{concurrent_responses: 0, look_every: 0}").issues();
        let keys: Vec<&str> = issues.iter().map(|issue| issue.key.as_str()).collect();
        assert_eq!(keys, ["decoding.concurrent_responses", "decoding.look_every"]);
    }

    #[test]
    fn there_is_no_plain_way_to_8_bits() {
        assert!(config("{int8_weights: true}").issues().is_empty());
        assert!(config("{pack_weights: false}").issues().is_empty());
        let issues = config("{pack_weights: false, int8_weights: true}").issues();
        assert_eq!(issues.iter().map(|issue| issue.key.as_str()).collect::<Vec<_>>(), ["decoding.pack_weights"]);
    }

    #[test]
    fn nothing_is_recorded_where_the_host_draws() {
        assert!(config("{cuda_graphs: true}").issues().is_empty());
        let issues = config("{cuda_graphs: true, look_every: 1}").issues();
        assert_eq!(issues[0].key, "decoding.cuda_graphs");
    }
}
