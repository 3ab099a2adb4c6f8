//! Generation: batched decoding with a cache of keys and values.
//!
//! A request's result depends on the weights, its prompt and its seed, not on the requests it shares a batch with
//! (except for the last bits of floating-point sums, whose order varies with a batch's shape).

mod batch;
mod cache;
mod choice;
mod few_rows;
mod on_device;
mod packed;
mod prefill;
pub mod random;
mod recorded;
mod warpers;
mod weights;

use tch::Device;

use batch::Batch;
pub(crate) use cache::CachePass;
pub use cache::KvCache;
pub use choice::{Choice, Chosen, choose};
pub use on_device::{Drawn, choose_on_device};
pub use packed::PackedWeights;
pub use prefill::PASS_TOKENS;
pub use warpers::Warpers;
pub(crate) use weights::Layout;

use crate::model::{Compute, Decoder, Kernels};
use crate::parameters::ParameterSet;
use crate::{Error, Result, device};

/// A prompt to be continued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The tokens before the first generated one; at least one.
    pub prompt_ids: Vec<u32>,
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// Decides all draws: the one for the token at index i is a function of the seed and i.
    pub seed: u64,
}

/// How to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// How each token is chosen.
    pub choice: Choice,
    /// Tokens after which a row ends; they are part of it.
    pub eos_ids: Vec<u32>,
    /// How the model computes.
    pub compute: Compute,
    /// How the work is arranged.
    pub decoding: Decoding,
}

/// How the work of generation is arranged. It changes speed and memory. Results in float32 differ by no more than the order of
/// floating-point sums, but for `int8_weights`. In bfloat16 `pack_weights` rounds elsewhere, too: a few rows on a CPU keep in
/// float32 what the plain way rounds between operators, and so differ from it by bfloat16's last bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoding {
    /// Most responses under way at a time: when one ends, the next request takes its place. None for all at once.
    pub concurrent_responses: Option<usize>,
    /// Whether a prompt that another begins with, or that equals another, is taken from that one's pass, or from the row of a
    /// response to it.
    pub share_prompts: bool,
    /// Tokens drawn on the device before the host looks which responses have ended; 1 for drawing on the host. None for
    /// what suits the device.
    pub look_every: Option<usize>,
    /// Whether decoding on a CPU may take a way of its own: a few rows layer by layer with activations in f32 whatever the
    /// compute type, more with the weights laid out anew where that pays, and activations in the compute type.
    pub pack_weights: bool,
    /// Whether responses are decoded with linear layers' weights in 8 bits, on a CPU: half the reading of bfloat16, and
    /// another, nearby model. Prompts go through the weights as they are.
    pub int8_weights: bool,
    /// Whether the tokens between two looks are drawn by work in fixed places. Attention then reads up to 255 slots more,
    /// through a mask.
    pub recording: Recording,
}

/// How the work of a token is repeated for the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recording {
    /// As any other work: kernel by kernel, where rows are as long as they are.
    #[default]
    None,
    /// A GPU has recorded it once, and launches it as a whole.
    CudaGraph,
    /// What would be recorded is done anew each time, on any device: nothing is gained, but it can be compared.
    Repeated,
}

impl Default for Decoding {
    /// The fastest on any device.
    fn default() -> Self {
        Decoding {
            concurrent_responses: None,
            share_prompts: true,
            look_every: None,
            pack_weights: true,
            int8_weights: false,
            recording: Recording::None,
        }
    }
}

/// Tokens between two looks at what a GPU has drawn: a response that ends is continued for half as many on average.
const GPU_LOOKS_EVERY: usize = 16;

impl Decoding {
    /// What goes with these kernels where nothing else is said: the fastest, or with the plain ones the plain way.
    pub fn suited_to(kernels: Kernels) -> Self {
        match kernels {
            Kernels::Fused => Decoding::default(),
            Kernels::Plain => {
                Decoding { share_prompts: false, look_every: Some(1), pack_weights: false, ..Decoding::default() }
            }
        }
    }

    /// Responses under way at a time, of so many.
    pub fn rows(&self, responses: usize) -> usize {
        self.concurrent_responses.unwrap_or(usize::MAX).min(responses)
    }

    /// Whether a decoder can work that way on a device; its own plays no part.
    ///
    /// # Errors
    /// When it cannot, or a number that must be positive is 0.
    pub fn check(&self, decoder: &Decoder, device: Device) -> Result<()> {
        let numbers = [("concurrent_responses", self.concurrent_responses), ("look_every", self.look_every)];
        if let Some((name, _)) = numbers.iter().find(|(_, number)| *number == Some(0)) {
            return Err(Error::Argument(format!("{name}: expected a positive number, found 0")));
        }
        if self.int8_weights && device != Device::Cpu {
            let message = format!("int8_weights: expected a model on a CPU, found one on {}", device::name(device));
            return Err(Error::Argument(message));
        }
        if self.recording == Recording::CudaGraph && device == Device::Cpu {
            return Err(Error::Argument("cuda_graphs: expected a model on a GPU, found one on cpu".into()));
        }
        if self.recording != Recording::None && decoder.rope.depends_on_length() {
            let message = "cuda_graphs: expected rotary embeddings that are the same for sequences of any length";
            return Err(Error::Argument(message.into()));
        }
        Ok(())
    }

    pub(crate) fn look_every(&self, device: Device) -> usize {
        self.look_every.unwrap_or(if device == Device::Cpu { 1 } else { GPU_LOOKS_EVERY })
    }
}

/// What a request got.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// The generated tokens.
    pub tokens: Vec<u32>,
    /// Log-probability of each under the model itself, before temperature, top-k and top-p, in nats.
    pub logps: Vec<f32>,
    /// Whether the last token is one of the EOS tokens.
    pub ended: bool,
}

/// Continues all prompts. Where not all can be under way at a time, they are in their order, or with `share_prompts` in one
/// that brings those together that begin alike.
pub fn generate(
    decoder: &Decoder,
    weights: &ParameterSet,
    requests: &[Request],
    sampling: &Sampling,
) -> Result<Vec<Generation>> {
    let _guard = tch::no_grad_guard();
    check(decoder, requests, sampling)?;
    Batch::start(decoder, weights, requests, sampling)?.finish()
}

fn check(decoder: &Decoder, requests: &[Request], sampling: &Sampling) -> Result<()> {
    if let Choice::Sample(warpers) = &sampling.choice {
        warpers.check()?;
    }
    sampling.decoding.check(decoder, decoder.device)?;
    for (index, request) in requests.iter().enumerate() {
        if request.prompt_ids.is_empty() {
            return Err(Error::Argument(format!(
                "request {index}: expected a prompt of at least one token, found none"
            )));
        }
        decoder.check_ids(&request.prompt_ids).map_err(|error| Error::Argument(format!("request {index}: {error}")))?;
    }
    Ok(())
}
