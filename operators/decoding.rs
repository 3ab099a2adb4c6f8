//! How a sampler arranges its work: the keys that operators which generate have in common.

use sapo_flow_engine::operator::ConfigIssue;
use sapo_flow_training::generate::{Decoding, Recording};
use schemars::JsonSchema;
use serde::Deserialize;

/// What an operator that generates takes under `with.decoding`. What is generated depends on it by no more than the order
/// of floating-point sums, but for `int8_weights`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DecodingConfig {
    /// Most responses under way at a time: when one ends, the next prompt takes its place. Without it all are, at once.
    pub concurrent_responses: Option<usize>,
    /// Run a prompt through the model once for all its responses, and with it those that it begins with; false is the
    /// plain way.
    pub share_prompts: bool,
    /// Tokens drawn on the device before the host looks which responses have ended. 1 is the plain way: the host draws
    /// each token. Without it 16 on a GPU, and 1 on a CPU.
    pub look_every: Option<usize>,
    /// Decode on a CPU by the way that reads the weights fastest: up to 16 responses in one call a layer, with activations in
    /// float32; more with the weights laid out anew, where that pays. False is the plain way.
    pub pack_weights: bool,
    /// Decode with linear layers' weights in 8 bits, on a CPU: half the reading of bfloat16, a quarter of float32's. What is
    /// generated comes from another, nearby model, and so do log-probabilities of it; off-policy data tolerates that.
    pub int8_weights: bool,
    /// On a GPU, record the work of a token once and launch it as a whole, where launching its kernels one by one takes longer
    /// than they do. Attention then reads up to 255 tokens more, through a mask. Has not been tried on a GPU yet.
    pub cuda_graphs: bool,
}

impl Default for DecodingConfig {
    fn default() -> Self {
        let Decoding { concurrent_responses, share_prompts, look_every, pack_weights, int8_weights, recording } =
            Decoding::default();
        let cuda_graphs = recording == Recording::CudaGraph;
        DecodingConfig { concurrent_responses, share_prompts, look_every, pack_weights, int8_weights, cuda_graphs }
    }
}

impl DecodingConfig {
    /// As the training core takes it.
    pub fn settings(self) -> Decoding {
        let DecodingConfig { concurrent_responses, share_prompts, look_every, pack_weights, int8_weights, .. } = self;
        let recording = if self.cuda_graphs { Recording::CudaGraph } else { Recording::None };
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
        assert_eq!(config("{}").settings(), Decoding::default());
        let plain = config("{share_prompts: false, look_every: 1, pack_weights: false}").settings();
        let expected =
            Decoding { share_prompts: false, look_every: Some(1), pack_weights: false, ..Decoding::default() };
        assert_eq!(plain, expected);
        let quantized = Decoding { int8_weights: true, ..Decoding::default() };
        assert_eq!(config("{int8_weights: true}").settings(), quantized);
        assert_eq!(config("{cuda_graphs: true}").settings().recording, Recording::CudaGraph);
    }

    #[test]
    fn zeros_are_named() {
        let issues = config("{concurrent_responses: 0, look_every: 0}").issues();
        let keys: Vec<&str> = issues.iter().map(|issue| issue.key.as_str()).collect();
        assert_eq!(keys, ["decoding.concurrent_responses", "decoding.look_every"]);
    }

    #[test]
    fn nothing_is_recorded_where_the_host_draws() {
        assert!(config("{cuda_graphs: true}").issues().is_empty());
        let issues = config("{cuda_graphs: true, look_every: 1}").issues();
        assert_eq!(issues[0].key, "decoding.cuda_graphs");
    }
}
