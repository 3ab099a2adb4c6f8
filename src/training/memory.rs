//! How much memory tensors of a model take, estimated from its shape: nothing is loaded.
//!
//! For its backward pass autograd keeps at each position of a layer, with e bytes for a number of the compute type, a for
//! one in attention (4 on a CPU):
//!
//! - each of two norms: its input and its quotient in float32, its result: 2 (8 + e) hidden_size + 8; with fused kernels,
//!   and on CUDA, its input as it is: 4 e hidden_size + 8;
//! - attention: query, key, value and result, keys and values repeated to the query's heads, and a normaliser for each
//!   head: 4 a heads head_dim + 4 heads; the result in the compute type, where that is another: e heads head_dim; fused:
//!   nothing repeated, and the result in the compute type alone: a (heads + 2 key heads) head_dim + e heads head_dim + 4
//!   heads;
//! - with norms on queries and keys: input and quotient: 8 (heads + key heads) head_dim; fused, and on CUDA:
//!   (e head_dim + 4) (heads + key heads);
//! - the feed-forward block: gate, its silu, up, their product: 4 e intermediate_size; fused: 3 e, without the silu.
//!
//! Where pairs share a prompt, each has prompt + 2 response positions. Attention, unless fused, then works on copies: of the
//! first sequence's queries, and of both sequences' keys and values, prompt included: a (7 prompt + 9 response) heads
//! head_dim for a pair, and its parts' results are joined in a copy of the compute type.
//!
//! That is what PyTorch's `saved_tensors_hooks` count for the same operations where kernels are plain. Where the compute type
//! is not float32, each layer's weights are kept in it too. What a forward pass without gradients has in memory at a time is
//! taken to be as much as one layer would keep.
//!
//! An optimizer whose kernels are not fused works on blocks of a parameter, on a CPU within its cache; on other devices
//! what it has in memory for a block is counted. Where gradients are released, a step has three phases: the loss, with the
//! head's gradient and logits; the layers, with one layer's activations and gradients at a time; the embedding, with its
//! gradient. A head tied to the embedding keeps its gradient until then. Where the compute type is not float32, each chunk's part
//! of the head's gradient is there in the compute type before it is added: one at a time.
//!
//! With plain kernels all logits are there at once: at the most in float32 their log-softmax, its gradient and their own.
//! When the head's gradient is there, in the compute type and in float32, of these the last is left, in the compute type.
//!
//! GPUs repeat no keys and values where there is no mask and the compute type is bfloat16; they are counted all the same, and
//! stand for the shared queries that are computed a second time there.
//!
//! Not counted: what libtorch's kernels use inside; in fused attention a block's scores and their gradients, 1 KiB for each
//! head and key of the longest sequence; and the code that oneDNN generates.

use tch::{Device, Kind};

use crate::blocks::DEVICE_BLOCK;
use crate::generate::{Choice, Decoding, Layout, PASS_TOKENS, Recording};
use crate::logps::Limits;
use crate::model::{Compute, Decoder, Kernels, attention_kind};
use crate::optim::Rule;

/// Bytes of an f32.
const FLOAT: u64 = 4;
/// Bytes for each logit that a choice on the device looks at: it sorted, its token, and its scaled value, 16; weights, shares and
/// their sums, five times 8.
const CHOOSING: u64 = 56;

/// A model on a device, in a compute type.
#[derive(Clone, Copy)]
pub struct Footprint<'a> {
    /// The architecture.
    pub decoder: &'a Decoder,
    /// Where it computes; the decoder's own device plays no part.
    pub device: Device,
    /// Kind of the matrix products.
    pub kind: Kind,
    /// What works between them.
    pub kernels: Kernels,
    /// Kind of the weights, and of their gradients.
    pub weights: Kind,
}

/// What goes through the model at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Rows padded to the longest.
    Rows {
        /// How many.
        rows: u64,
        /// Tokens of the longest.
        tokens: u64,
    },
    /// Pairs of responses that share a prompt.
    Pairs {
        /// How many.
        pairs: u64,
        /// Tokens that both sequences of a pair begin with.
        prompt: u64,
        /// Tokens of each response.
        response: u64,
    },
}

impl Shape {
    /// Positions in the forward pass.
    pub fn positions(self) -> u64 {
        match self {
            Shape::Rows { rows, tokens } => rows * tokens,
            Shape::Pairs { pairs, prompt, response } => pairs * (prompt + 2 * response),
        }
    }
}

/// What a pass of the model takes, of which log-probabilities are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scored {
    /// What goes through the model.
    pub shape: Shape,
    /// Positions whose logits are needed: those that predict a token that counts.
    pub logit_rows: u64,
}

/// A step of training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainingStep {
    /// One forward and backward pass.
    pub pass: Scored,
    /// Passes in one update.
    pub passes: u64,
    /// Whether activations are computed again in the backward pass.
    pub gradient_checkpointing: bool,
    /// Whether each layer's gradients are freed before the next layer's are there.
    pub release_gradients: bool,
    /// What makes updates of gradients.
    pub optimizer: Rule,
}

impl Footprint<'_> {
    /// Parameters of the model.
    pub fn parameters(&self) -> u64 {
        self.decoder.expected_parameters().iter().map(|(_, shape)| elements(shape)).sum()
    }

    /// What autograd keeps of one layer.
    pub fn layer(&self, shape: Shape) -> u64 {
        let config = &self.decoder.config;
        let size = |size: i64| size as u64;
        let (heads, key_heads) = (size(config.num_attention_heads), size(config.num_key_value_heads));
        let (e, a) = (bytes(self.kind), bytes(attention_kind(self.device, self.kind)));
        let width = heads * size(config.head_dim);
        let (hidden, head_dim) = (size(config.hidden_size), size(config.head_dim));
        let fused = Compute { kind: self.kind, kernels: self.kernels }.is_fused(self.device);
        // On CUDA libtorch has a kernel for norms, too.
        let (norms, head_norm) = match fused || matches!(self.device, Device::Cuda(_)) {
            true => (4 * e * hidden + 8, e * head_dim + 4),
            false => (2 * (8 + e) * hidden + 8, 8 * head_dim),
        };
        let gated = if fused { 3 * e } else { 4 * e };
        let head_norms = if config.qk_norm { head_norm * (heads + key_heads) } else { 0 };
        let per_position = norms + head_norms + 4 * heads + gated * size(config.intermediate_size);
        let attention = match shape {
            _ if fused => shape.positions() * (a * (width + 2 * key_heads * head_dim) + e * width),
            Shape::Rows { rows, tokens } => rows * tokens * width * (4 * a + if e == a { 0 } else { e }),
            Shape::Pairs { pairs, prompt, response } => {
                pairs * width * (a * (7 * prompt + 9 * response) + e * (prompt + 2 * response))
            }
        };
        shape.positions() * per_position + attention
    }

    /// The weights.
    pub fn weights(&self) -> u64 {
        bytes(self.weights) * self.parameters()
    }

    /// What an optimizer keeps.
    pub fn optimizer_state(&self, rule: Rule) -> u64 {
        self.decoder.expected_parameters().iter().map(|(_, shape)| rule.state_bytes(elements(shape))).sum()
    }

    /// The most that an update needs besides weights and optimizer state: activations, gradients, logits.
    ///
    /// While a backward pass goes on, activations make room for gradients; those of earlier passes of the step are there
    /// from its beginning.
    pub fn training(&self, step: TrainingStep) -> u64 {
        if step.release_gradients {
            return self.training_with_release(step);
        }
        let layers = self.decoder.config.num_hidden_layers as u64;
        let activations = match step.gradient_checkpointing {
            false => layers * self.layer(step.pass.shape) + self.copies(self.layer_parameters()),
            true => self.layer_inputs(step.pass.shape) + self.one_layer(step.pass.shape),
        };
        let gradients = bytes(self.weights) * self.parameters();
        let (head, head_gradient) = (self.copies(self.head_parameters()), FLOAT * self.head_parameters());
        // Where passes add up, bfloat16 is too coarse for the sums.
        let sums = if step.passes > 1 && self.weights != Kind::Float { FLOAT * self.parameters() } else { 0 };
        let updating = gradients + sums + self.updating(step.optimizer);
        let layers_and_gradients = if step.passes > 1 { activations + updating } else { activations.max(updating) };
        head + head_gradient + self.at_the_head(step.pass) + layers_and_gradients
    }

    fn training_with_release(&self, step: TrainingStep) -> u64 {
        let (inputs, updating) = (self.layer_inputs(step.pass.shape), self.updating(step.optimizer));
        let head_gradient = FLOAT * self.head_parameters();
        let kept = if self.decoder.config.tie_word_embeddings { head_gradient } else { 0 };
        let layer_gradients = bytes(self.weights) * self.layer_parameters() / self.layers();
        let loss = inputs + head_gradient + self.at_the_head(step.pass).max(updating);
        let layers = inputs + kept + self.one_layer(step.pass.shape).max(updating) + layer_gradients;
        let embedding = kept + bytes(self.weights) * self.head_parameters() + updating;
        self.copies(self.head_parameters()) + loss.max(layers).max(embedding)
    }

    /// What a checkpointed forward pass keeps.
    fn layer_inputs(&self, shape: Shape) -> u64 {
        (self.layers() + 1) * shape.positions() * self.hidden()
    }

    /// One layer's activations, and its weights in the compute type.
    fn one_layer(&self, shape: Shape) -> u64 {
        self.layer(shape) + self.copies(self.layer_parameters()) / self.layers()
    }

    /// Logits and gradients between the last hidden states and the loss, but for the sum of the head's.
    fn at_the_head(&self, pass: Scored) -> u64 {
        let all = pass.logit_rows * self.logits();
        // A part of the head's gradient, where the compute type is not that of the sum.
        let product = if self.kind == Kind::Float { 0 } else { bytes(self.kind) * self.head_parameters() };
        match self.kernels {
            Kernels::Fused => all.min(Limits::default().kept_bytes as u64) + self.chunk(pass) + product,
            Kernels::Plain => (3 * self.float_logits(pass)).max(all + product + FLOAT * self.head_parameters()),
        }
    }

    /// A chunk of logits, and what its log-softmax is made in, where no kernel of ours does it within the processor's cache.
    fn chunk(&self, pass: Scored) -> u64 {
        let most = Limits::default().chunk_bytes as u64;
        let fused = Compute { kind: self.kind, kernels: self.kernels }.is_fused(self.device);
        let in_float = if fused { 0 } else { self.float_logits(pass).min(most) };
        (pass.logit_rows * self.logits()).min(most) + in_float
    }

    /// All rows of logits in f32.
    fn float_logits(&self, pass: Scored) -> u64 {
        FLOAT * pass.logit_rows * self.decoder.config.vocab_size as u64
    }

    /// What an optimizer has in memory while it updates a block of the largest parameter.
    fn updating(&self, rule: Rule) -> u64 {
        if self.device == Device::Cpu {
            return 0;
        }
        let largest = self.decoder.expected_parameters().iter().map(|(_, shape)| elements(shape)).max();
        rule.working_bytes(self.weights) * largest.unwrap_or(0).min(DEVICE_BLOCK as u64)
    }

    /// What it takes to score the responses of a batch, without gradients.
    pub fn scoring(&self, pass: Scored) -> u64 {
        let logits = match self.kernels {
            Kernels::Fused => self.chunk(pass),
            // And their log-softmax.
            Kernels::Plain => 2 * self.float_logits(pass),
        };
        self.layer(pass.shape) + self.copies(self.head_parameters()) + logits
    }

    /// What it takes to average the weights of `policy` into these: a copy of those on another device, and the next average
    /// beside the last, unless it takes its place. A GPU that averages all of them together in place takes a copy of weights
    /// that are not in float32, too.
    pub fn averaging(&self, policy: &Footprint, in_place: bool) -> u64 {
        let moved = if policy.device == self.device { 0 } else { policy.weights() };
        let together = self.device != Device::Cpu && self.weights == Kind::Float && self.kernels == Kernels::Fused;
        let converted = together && policy.weights != Kind::Float;
        moved + if !in_place || converted { self.weights() } else { 0 }
    }

    /// What it takes to generate so many responses: a cache for rows of so many tokens, prompts included, the weights in
    /// the compute type where they are not in it, the weights as they are laid out for many rows on a CPU, or in 8 bits,
    /// which take the others' place if these were copies and no prompt waits for them, the pass over the prompts, and where
    /// the device chooses tokens, what it makes of the logits that it looks at: without top-k all of them.
    pub fn generating(&self, responses: u64, tokens: u64, decoding: &Decoding, choice: &Choice) -> u64 {
        let rows = decoding.rows(responses as usize) as u64;
        let config = &self.decoder.config;
        let keys = (config.num_key_value_heads * config.head_dim) as u64;
        let layers = config.num_hidden_layers as u64;
        let cache = rows * tokens * layers * 2 * keys * bytes(attention_kind(self.device, self.kind));
        let looked_at = match choice {
            Choice::Sample(warpers) if decoding.look_every(self.device) > 1 => warpers.candidates(config.vocab_size),
            Choice::Sample(_) | Choice::Greedy => 0,
        };
        let logits = config.vocab_size as u64 * (FLOAT + bytes(self.kind));
        let logits = rows * (logits + looked_at as u64 * CHOOSING);
        let pass = (rows * tokens).min(tokens.max(PASS_TOKENS as u64));
        // Recorded work keeps its own, whatever else is under way.
        let logits = if decoding.recording == Recording::CudaGraph { 2 * logits } else { logits };
        let freed = if rows == responses { self.copies(self.layer_parameters()) } else { 0 };
        let weights = match decoding.layout(self.device, self.kernels, rows as usize, tokens as usize) {
            Layout::Plain | Layout::InPlace => self.copies(self.parameters()),
            Layout::Packed => self.copies(self.parameters()) - freed + self.parameters() * bytes(self.kind),
            Layout::Int8 => self.copies(self.parameters()) - freed + self.parameters(),
        };
        weights + cache + self.layer(Shape::Rows { rows: 1, tokens: pass }) + logits
    }

    /// Weights once more in the compute type, where that is another.
    fn copies(&self, parameters: u64) -> u64 {
        if self.kind == self.weights { 0 } else { parameters * bytes(self.kind) }
    }

    /// One position's hidden state.
    fn hidden(&self) -> u64 {
        self.decoder.config.hidden_size as u64 * bytes(self.kind)
    }

    /// One position's logits.
    fn logits(&self) -> u64 {
        self.decoder.config.vocab_size as u64 * bytes(self.kind)
    }

    fn layers(&self) -> u64 {
        self.decoder.config.num_hidden_layers.max(1) as u64
    }

    fn head_parameters(&self) -> u64 {
        (self.decoder.config.vocab_size * self.decoder.config.hidden_size) as u64
    }

    fn layer_parameters(&self) -> u64 {
        let parameters = self.decoder.expected_parameters();
        let of_layers = parameters.iter().filter(|(name, _)| name.starts_with("model.layers."));
        of_layers.map(|(_, shape)| elements(shape)).sum()
    }
}

fn elements(shape: &[i64]) -> u64 {
    shape.iter().product::<i64>() as u64
}

fn bytes(kind: Kind) -> u64 {
    kind.elt_size_in_bytes() as u64
}

#[cfg(test)]
mod tests;
