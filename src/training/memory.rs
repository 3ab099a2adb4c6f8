//! How much memory tensors of a model take, estimated from its shape: nothing is loaded.
//!
//! For its backward pass autograd keeps at each position of a layer, with e bytes for a number of the compute type, a for
//! one in attention (4 on a CPU):
//!
//! - each of two norms: its input and its quotient in float32, its result: 2 (8 + e) hidden_size + 8; with fused kernels its
//!   input as it is: 4 e hidden_size + 8;
//! - attention: query, key, value and result, keys and values repeated to the query's heads, and a normaliser for each
//!   head: 4 a heads head_dim + 4 heads; the result in the compute type, where that is another: e heads head_dim;
//! - with norms on queries and keys: input and quotient: 8 (heads + key heads) head_dim; fused: (e head_dim + 4) (heads + key
//!   heads);
//! - the feed-forward block: gate, its silu, up, their product: 4 e intermediate_size; fused: 3 e, without the silu.
//!
//! Where pairs share a prompt, each has prompt + 2 response positions. Attention then works on copies: of the first
//! sequence's queries, and of both sequences' keys and values, prompt included: a (7 prompt + 9 response) heads head_dim
//! for a pair, and its parts' results are joined in a copy of the compute type.
//!
//! That is what PyTorch's `saved_tensors_hooks` count for the same operations where kernels are plain. Where the compute type is not float32, each
//! layer's weights are kept in it too. What a forward pass without gradients has in memory at a time is taken to be as much
//! as one layer would keep.
//!
//! An optimizer whose kernels are not fused works on blocks of a parameter, on a CPU within its cache; on other devices
//! what it has in memory for a block is counted. Where gradients are released, a step has three phases: the loss, with the
//! head's gradient and logits; the layers, with one layer's activations and gradients at a time; the embedding, with its
//! gradient. A head tied to the embedding keeps its gradient until then.
//!
//! Not counted: what libtorch's kernels use inside, and the gaps that freed memory leaves in the heap.

use tch::{Device, Kind};

use crate::blocks::DEVICE_BLOCK;
use crate::generate::{Decoding, PASS_TOKENS};
use crate::logps::{CHUNK_BYTES, KEPT_BYTES};
use crate::model::{Compute, Decoder, Kernels, attention_kind};
use crate::optim::Rule;

/// Bytes of an f32.
const FLOAT: u64 = 4;

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

/// A step of training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainingStep {
    /// One forward and backward pass.
    pub shape: Shape,
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
        let (norms, head_norm, gated) = match (Compute { kind: self.kind, kernels: self.kernels }).is_fused(self.device)
        {
            true => (4 * e * hidden + 8, e * head_dim + 4, 3 * e),
            false => (2 * (8 + e) * hidden + 8, 8 * head_dim, 4 * e),
        };
        let head_norms = if config.qk_norm { head_norm * (heads + key_heads) } else { 0 };
        let per_position = norms + head_norms + 4 * heads + gated * size(config.intermediate_size);
        let attention = match shape {
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
            false => layers * self.layer(step.shape) + self.copies(self.layer_parameters()),
            true => self.layer_inputs(step.shape) + self.one_layer(step.shape),
        };
        let gradients = bytes(self.weights) * self.parameters();
        let (head, head_gradient) = (self.copies(self.head_parameters()), FLOAT * self.head_parameters());
        let updating = gradients + self.updating(step.optimizer);
        let layers_and_gradients = if step.passes > 1 { activations + updating } else { activations.max(updating) };
        head + head_gradient + self.logits_at_a_time(step.shape) + layers_and_gradients
    }

    fn training_with_release(&self, step: TrainingStep) -> u64 {
        let (inputs, updating) = (self.layer_inputs(step.shape), self.updating(step.optimizer));
        let head_gradient = FLOAT * self.head_parameters();
        let kept = if self.decoder.config.tie_word_embeddings { head_gradient } else { 0 };
        let layer_gradients = bytes(self.weights) * self.layer_parameters() / self.layers();
        let loss = inputs + head_gradient + self.logits_at_a_time(step.shape).max(updating);
        let layers = inputs + kept + self.one_layer(step.shape).max(updating) + layer_gradients;
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

    fn logits_at_a_time(&self, shape: Shape) -> u64 {
        let all = shape.positions() * self.logits();
        all.min(KEPT_BYTES as u64) + all.min(CHUNK_BYTES as u64)
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
    pub fn scoring(&self, shape: Shape) -> u64 {
        let logits = (shape.positions() * self.logits()).min(CHUNK_BYTES as u64);
        self.layer(shape) + self.copies(self.head_parameters()) + logits
    }

    /// What it takes to generate so many responses: a cache for rows of so many tokens, prompts included, the weights in
    /// the compute type where they are not in it, the weights as they are laid out for decoding on a CPU, which take the
    /// others' place if these were copies and no prompt waits for them, and the pass over the prompts.
    pub fn generating(&self, responses: u64, tokens: u64, decoding: &Decoding) -> u64 {
        let rows = decoding.rows(responses as usize) as u64;
        let config = &self.decoder.config;
        let keys = (config.num_key_value_heads * config.head_dim) as u64;
        let layers = config.num_hidden_layers as u64;
        let cache = rows * tokens * layers * 2 * keys * bytes(attention_kind(self.device, self.kind));
        let logits = rows * config.vocab_size as u64 * (FLOAT + bytes(self.kind));
        let pass = (rows * tokens).min(tokens.max(PASS_TOKENS as u64));
        let weights = match self.device == Device::Cpu && decoding.pack_weights {
            false => self.copies(self.parameters()),
            true => {
                let freed = if rows == responses { self.copies(self.layer_parameters()) } else { 0 };
                self.copies(self.parameters()) - freed + self.parameters() * bytes(self.kind)
            }
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
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::model::ModelConfig;

    const ADAMW: Rule = Rule::Adamw { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
    const ADAMW_8BIT: Rule = Rule::Adamw8bit { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };

    fn smollm2() -> Decoder {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": true,
        });
        decoder(config)
    }

    /// Llama 3.1 8B.
    fn llama_8b() -> Decoder {
        decoder(json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": false,
        }))
    }

    fn decoder(config: serde_json::Value) -> Decoder {
        let config = config.as_object().expect("an object was written").clone();
        Decoder::new(ModelConfig::new(Path::new("config.json"), config, None).unwrap(), Device::Cpu).unwrap()
    }

    fn on_cpu(decoder: &Decoder, kind: Kind) -> Footprint<'_> {
        Footprint { decoder, device: Device::Cpu, kind, kernels: Kernels::Plain, weights: Kind::Float }
    }

    /// A layer of SmolLM2 in bfloat16, from the plain one's 34,220 bytes a position: two norms without the quotient and the
    /// input in float32, but with the input, 2 (8 - 2) 576; no silu, 2 1536.
    #[test]
    fn fused_kernels_keep_less() {
        let decoder = smollm2();
        let fused = Footprint { kernels: Kernels::Fused, ..on_cpu(&decoder, Kind::BFloat16) };
        let rows = Shape::Rows { rows: 8, tokens: 128 };
        assert_eq!(fused.layer(rows), 1024 * (34_220 - 6_912 - 3_072));
        // GPUs have kernels of their own.
        let on_gpu = Footprint { device: Device::Cuda(0), ..fused };
        assert_eq!(on_gpu.layer(rows), Footprint { kernels: Kernels::Plain, ..on_gpu }.layer(rows));
    }

    /// Counted by `torch.autograd.graph.saved_tensors_hooks` (PyTorch 2.11), weights left out.
    #[test]
    fn a_layer_keeps_what_pytorch_counts() {
        let decoder = smollm2();
        let (bf16, float) = (on_cpu(&decoder, Kind::BFloat16), on_cpu(&decoder, Kind::Float));
        let rows = Shape::Rows { rows: 8, tokens: 128 };
        assert_eq!((bf16.layer(rows), float.layer(rows)), (1024 * 34_220, 1024 * 47_660));
        let pairs = Shape::Pairs { pairs: 4, prompt: 40, response: 30 };
        assert_eq!((bf16.layer(pairs), float.layer(pairs)), (15_070_400, 21_368_000));
    }

    #[test]
    fn a_step_by_hand() {
        let decoder = smollm2();
        let bf16 = on_cpu(&decoder, Kind::BFloat16);
        // A layer: q and o 576 * 576, k and v 192 * 576, gate, up and down 1536 * 576, two norms 576.
        let layer_parameters = 2 * 331_776 + 2 * 110_592 + 3 * 884_736 + 2 * 576;
        let head = 49_152 * 576;
        assert_eq!(bf16.parameters(), 30 * layer_parameters + 576 + head);
        assert_eq!(bf16.parameters(), 134_515_008);

        // 8 sequences of 256 tokens, in bfloat16: 2048 positions.
        let shape = Shape::Rows { rows: 8, tokens: 256 };
        let step = TrainingStep {
            shape,
            passes: 1,
            gradient_checkpointing: false,
            release_gradients: false,
            optimizer: ADAMW,
        };
        let activations = 30 * 2048 * 34_220 + 2 * 30 * layer_parameters;
        // The head in bfloat16 and its gradient; logits of all positions, 201 MB, and a chunk of at most 134 MB.
        let around_the_head = 2 * head + 4 * head + 2048 * 49_152 * 2 + (128 << 20);
        assert_eq!(bf16.training(step), activations + around_the_head);
        // Gradients, 538 MB, are added where an earlier pass left them.
        let gradients = 4 * 134_515_008;
        assert_eq!(bf16.training(TrainingStep { passes: 2, ..step }), activations + gradients + around_the_head);
        // With checkpointing less is kept than the gradients take later.
        let few = TrainingStep { gradient_checkpointing: true, ..step };
        assert!(31 * 2048 * 576 * 2 + 2048 * 34_220 + 2 * layer_parameters < gradients);
        assert_eq!(bf16.training(few), gradients + around_the_head);
    }

    #[test]
    fn generation_by_hand() {
        let decoder = smollm2();
        let plain = Decoding { pack_weights: false, ..Decoding::default() };
        // 4 rows of 100 tokens: keys and values of 192 f32 in 30 layers; the pass over the prompts; f32 logits twice.
        let cache = 4 * 100 * 30 * 2 * 192 * 4;
        let float = cache + 400 * 47_660 + 4 * 49_152 * 8;
        assert_eq!(on_cpu(&decoder, Kind::Float).generating(4, 100, &plain), float);
        // In bfloat16 the weights are there once more, and the cache stays as it is on a CPU.
        let bf16 = cache + 400 * 34_220 + 4 * 49_152 * 6;
        assert_eq!(on_cpu(&decoder, Kind::BFloat16).generating(4, 100, &plain), 2 * 134_515_008 + bf16);
        // Laid out for decoding, the layers' weights take the copies' place, all but the embedding and the last norm.
        let laid_out = Decoding::default();
        assert_eq!(on_cpu(&decoder, Kind::Float).generating(4, 100, &laid_out), 4 * 134_515_008 + float);
        let kept = 2 * (49_152 * 576 + 576);
        assert_eq!(on_cpu(&decoder, Kind::BFloat16).generating(4, 100, &laid_out), 2 * 134_515_008 + kept + bf16);
        // Of 10 responses 4 at a time: the prompts that wait need the copies.
        let four = Decoding { concurrent_responses: Some(4), ..laid_out };
        assert_eq!(on_cpu(&decoder, Kind::BFloat16).generating(10, 100, &four), 4 * 134_515_008 + bf16);
        // A pass over prompts holds 4096 tokens, or one longer prompt.
        let passes = |rows, tokens| {
            let rest = rows * tokens * 30 * 2 * 192 * 4 + rows * 49_152 * 8;
            (on_cpu(&decoder, Kind::Float).generating(rows, tokens, &plain) - rest) / 47_660
        };
        assert_eq!((passes(100, 100), passes(4, 5000)), (4096, 5000));
    }

    #[test]
    fn released_gradients_by_hand() {
        let decoder = smollm2();
        let bf16 = on_cpu(&decoder, Kind::BFloat16);
        let (layer_parameters, head): (u64, u64) = (3_540_096, 49_152 * 576);
        let shape = Shape::Rows { rows: 2, tokens: 64 };
        let step =
            TrainingStep { shape, passes: 1, gradient_checkpointing: true, release_gradients: true, optimizer: ADAMW };
        // The head in bfloat16 and its gradient stay until the embedding's is there: tied, they are one weight.
        assert_eq!(bf16.training(step), 2 * head + 4 * head + 4 * head);
        // With more positions the loss takes most: 31 inputs of layers, the head's gradient, 512 and 128 MiB of logits.
        let shape = Shape::Rows { rows: 64, tokens: 256 };
        let loss = 31 * 16_384 * 576 * 2 + 4 * head + (640 << 20);
        let layer = 31 * 16_384 * 576 * 2 + 4 * head + 16_384 * 34_220 + 2 * layer_parameters + 4 * layer_parameters;
        assert!(layer < loss);
        assert_eq!(bf16.training(TrainingStep { shape, ..step }), 2 * head + loss);
    }

    /// An ORPO step of SAPO on one device of 80 GB: 4 pairs of 2048 tokens, of which the prompt has half.
    #[test]
    fn a_model_of_8_billion_parameters_fits_80_gb() {
        let decoder = llama_8b();
        let (kind, kernels) = (Kind::BFloat16, Kernels::Fused);
        let on_cuda = |weights| Footprint { decoder: &decoder, device: Device::Cuda(0), kind, kernels, weights };
        let (policy, ema) = (on_cuda(Kind::Float), on_cuda(Kind::BFloat16));
        // A layer: q and o 4096 * 4096, k and v 1024 * 4096, gate, up and down 14336 * 4096, two norms 4096.
        let layer: u64 = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14_336 * 4096 + 2 * 4096;
        let head: u64 = 128_256 * 4096;
        let parameters = 32 * layer + 2 * head + 4096;
        assert_eq!((policy.weights(), ema.weights()), (4 * parameters, 2 * parameters));
        // All parameters have whole blocks of 256, and the norms' 4096 elements are enough to be quantised.
        let state = 2 * parameters + 2 * 4 * parameters / 256;
        assert_eq!(policy.optimizer_state(ADAMW_8BIT), state);
        let kept = policy.weights() + state + ema.weights();

        let shape = Shape::Pairs { pairs: 4, prompt: 1024, response: 1024 };
        let step = TrainingStep {
            shape,
            passes: 1,
            gradient_checkpointing: true,
            release_gradients: true,
            optimizer: ADAMW_8BIT,
        };
        let generating = ema.generating(4, 2048, &Decoding::default());
        let working = policy.training(step).max(generating);
        // Nothing is converted for the sampler.
        assert!(generating < 4 << 30);
        assert!(kept + working < 80_000_000_000, "{kept} + {working}");
        // With gradients kept, f32 state or a float32 average it would not.
        let plain = TrainingStep { release_gradients: false, ..step };
        assert!(kept + policy.training(plain) > 80_000_000_000);
        assert!(kept - state + policy.optimizer_state(ADAMW) > 80_000_000_000);
        assert!(kept + 2 * parameters + working > 80_000_000_000);
    }
}
