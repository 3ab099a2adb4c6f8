//! Estimates against counts by hand, and by PyTorch.

use std::path::Path;

use serde_json::json;

use super::*;
use crate::generate::Warpers;
use crate::model::ModelConfig;

const ADAMW: Rule = Rule::Adamw { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
/// A pass of which all positions' logits are needed.
fn all(shape: Shape) -> Scored {
    Scored { shape, logit_rows: shape.positions() }
}

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
/// input in float32, but with the input, 2 (8 - 2) 576; no silu, 2 1536; of keys and values 192 each in float32, not 576, and
/// no result in float32, 4 (2 384 + 576).
#[test]
fn fused_kernels_keep_less() {
    let decoder = smollm2();
    let fused = Footprint { kernels: Kernels::Fused, ..on_cpu(&decoder, Kind::BFloat16) };
    let rows = Shape::Rows { rows: 8, tokens: 128 };
    assert_eq!(fused.layer(rows), 1024 * (34_220 - 6_912 - 3_072 - 5_376));
    // Pairs of 40 + 2 * 30 positions are no more than these.
    let pairs = Shape::Pairs { pairs: 4, prompt: 40, response: 30 };
    assert_eq!(fused.layer(pairs), 400 * 18_860);
    // On GPUs libtorch fuses norms alone, with any kernels, and attention is in bfloat16: 576 (4 4 + 2 - 4 2) less.
    for kernels in [Kernels::Fused, Kernels::Plain] {
        let on_gpu = Footprint { device: Device::Cuda(0), kernels, ..fused };
        assert_eq!(on_gpu.layer(rows), 1024 * (34_220 - 6_912 - 5_760));
    }
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
        pass: all(shape),
        passes: 1,
        gradient_checkpointing: false,
        release_gradients: false,
        optimizer: ADAMW,
    };
    let activations = 30 * 2048 * 34_220 + 2 * 30 * layer_parameters;
    // The head in bfloat16 and its gradient; in float32 the log-softmax of all positions' logits, its gradient and theirs.
    let around_the_head = 2 * head + 4 * head + 3 * 2048 * 49_152 * 4;
    assert_eq!(bf16.training(step), activations + around_the_head);
    // Gradients, 538 MB, are added where an earlier pass left them.
    let gradients = 4 * 134_515_008;
    assert_eq!(bf16.training(TrainingStep { passes: 2, ..step }), activations + gradients + around_the_head);
    // With checkpointing less is kept than the gradients take later.
    let few = TrainingStep { gradient_checkpointing: true, ..step };
    assert!(31 * 2048 * 576 * 2 + 2048 * 34_220 + 2 * layer_parameters < gradients);
    assert_eq!(bf16.training(few), gradients + around_the_head);
    // Of the logits, 201 MB, fused kernels keep 134 MB at most, and have as large a chunk at most, and its part of the head's
    // gradient in bfloat16. A layer keeps less.
    let fused = Footprint { kernels: Kernels::Fused, ..bf16 };
    let around_the_head = 2 * head + 4 * head + 2 * head + (256 << 20);
    let activations = 30 * 2048 * 18_860 + 2 * 30 * layer_parameters;
    assert_eq!(fused.training(step), activations + around_the_head);
}

/// Where positions are few the head's gradient takes more than log-probabilities do, and as autograd makes it before it is
/// added: in float32 alone, or in bfloat16 before.
#[test]
fn plain_log_probabilities_by_hand() {
    let decoder = smollm2();
    let (bf16, float) = (on_cpu(&decoder, Kind::BFloat16), on_cpu(&decoder, Kind::Float));
    let head: u64 = 49_152 * 576;
    let at = |positions: u64| all(Shape::Rows { rows: 1, tokens: positions });
    let logits = |positions: u64| positions * 49_152;
    // 12 bytes a logit, or 2 and 6 a parameter of the head: 10 * 345.6 are as many as 6 * 576.
    assert_eq!(bf16.at_the_head(at(345)), 2 * logits(345) + 6 * head);
    assert_eq!(bf16.at_the_head(at(346)), 12 * logits(346));
    // 12 bytes a logit, or 4 and 4 a parameter: 8 * 288 are as many as 4 * 576.
    assert_eq!(float.at_the_head(at(287)), 4 * logits(287) + 4 * head);
    assert_eq!(float.at_the_head(at(289)), 12 * logits(289));
    // Of so many positions few may count.
    assert_eq!(bf16.at_the_head(Scored { logit_rows: 400, ..at(1000) }), 12 * logits(400));
    // GPUs, too.
    assert_eq!(Footprint { device: Device::Cuda(0), ..bf16 }.at_the_head(at(1000)), 12 * logits(1000));
    // Without a gradient: logits and their log-softmax in float32, not a chunk of 134 MB.
    let fused = Footprint { kernels: Kernels::Fused, ..bf16 };
    let beside = |footprint: Footprint| footprint.scoring(at(2048)) - footprint.layer(at(2048).shape);
    assert_eq!((beside(bf16), beside(float)), (2 * head + 8 * logits(2048), 8 * logits(2048)));
    assert_eq!(beside(fused), 2 * head + (128 << 20));
}

#[test]
fn generation_by_hand() {
    let decoder = smollm2();
    let (plain, greedy) = (Decoding { pack_weights: false, ..Decoding::default() }, &Choice::Greedy);
    // 4 rows of 100 tokens: keys and values of 192 f32 in 30 layers; the pass over the prompts; f32 logits twice.
    let cache = 4 * 100 * 30 * 2 * 192 * 4;
    let float = cache + 400 * 47_660 + 4 * 49_152 * 8;
    assert_eq!(on_cpu(&decoder, Kind::Float).generating(4, 100, &plain, greedy), float);
    // In bfloat16 the weights are there once more, and the cache stays as it is on a CPU.
    let bf16 = cache + 400 * 34_220 + 4 * 49_152 * 6;
    assert_eq!(on_cpu(&decoder, Kind::BFloat16).generating(4, 100, &plain, greedy), 2 * 134_515_008 + bf16);
    // Few rows take the weights as they are, with fused kernels; a layer then keeps 33,836 and 18,860 bytes a position.
    let packed = Decoding::default();
    let fused = |kind: Kind| Footprint { kernels: Kernels::Fused, ..on_cpu(&decoder, kind) };
    let few = cache + 400 * 33_836 + 4 * 49_152 * 8;
    assert_eq!(fused(Kind::Float).generating(4, 100, &packed, greedy), few);
    let few = cache + 400 * 18_860 + 4 * 49_152 * 6;
    assert_eq!(fused(Kind::BFloat16).generating(4, 100, &packed, greedy), 2 * 134_515_008 + few);
    // The plain way lays them out: the layers' weights take the copies' place, all but the embedding and the last norm.
    assert_eq!(on_cpu(&decoder, Kind::Float).generating(4, 100, &packed, greedy), 4 * 134_515_008 + float);
    let kept = 2 * (49_152 * 576 + 576);
    assert_eq!(on_cpu(&decoder, Kind::BFloat16).generating(4, 100, &packed, greedy), 2 * 134_515_008 + kept + bf16);
    // So do those in 8 bits.
    let int8 = Decoding { int8_weights: true, ..packed };
    assert_eq!(on_cpu(&decoder, Kind::Float).generating(4, 100, &int8, greedy), 134_515_008 + float);
    assert_eq!(on_cpu(&decoder, Kind::BFloat16).generating(4, 100, &int8, greedy), 134_515_008 + kept + bf16);
    // Of 10 responses 4 at a time: the prompts that wait need the copies.
    let four = Decoding { concurrent_responses: Some(4), ..packed };
    assert_eq!(on_cpu(&decoder, Kind::BFloat16).generating(10, 100, &four, greedy), 4 * 134_515_008 + bf16);
    // Many rows are laid out with fused kernels, too.
    let [few, many] = [16, 17].map(|rows| fused(Kind::Float).generating(rows, 100, &packed, greedy));
    assert_eq!(many - few, 4 * 134_515_008 + 100 * 30 * 2 * 192 * 4 + 49_152 * 8 + 100 * 33_836);
    // A pass over prompts holds 4096 tokens, or one longer prompt.
    let passes = |rows, tokens| {
        let rest = rows * tokens * 30 * 2 * 192 * 4 + rows * 49_152 * 8;
        (on_cpu(&decoder, Kind::Float).generating(rows, tokens, &plain, greedy) - rest) / 47_660
    };
    assert_eq!((passes(100, 100), passes(4, 5000)), (4096, 5000));
}

#[test]
fn choosing_on_the_device_takes_more_without_top_k() {
    let decoder = smollm2();
    let gpu = Footprint { device: Device::Cuda(0), ..on_cpu(&decoder, Kind::BFloat16) };
    let choosing = |footprint: &Footprint, top_k, decoding: Decoding| {
        let choice = Choice::Sample(Warpers { temperature: 1.0, top_k, top_p: None });
        let generating = |choice| footprint.generating(4, 100, &decoding, choice);
        generating(&choice) - generating(&Choice::Greedy)
    };
    let plain = Decoding::default();
    assert_eq!(choosing(&gpu, None, plain), 4 * 49_152 * 56);
    // 64 more are looked at for ties.
    assert_eq!(choosing(&gpu, Some(50), plain), 4 * 114 * 56);
    assert_eq!(choosing(&gpu, None, Decoding { recording: Recording::CudaGraph, ..plain }), 2 * 4 * 49_152 * 56);
    // The host chooses with memory of its own.
    assert_eq!(choosing(&on_cpu(&decoder, Kind::BFloat16), None, plain), 0);
}

#[test]
fn averaging_copies_what_is_elsewhere_or_of_another_kind() {
    let decoder = smollm2();
    let fused = Footprint { kernels: Kernels::Fused, ..on_cpu(&decoder, Kind::BFloat16) };
    let of = |device, weights| Footprint { device, weights, ..fused };
    let (cpu, first, second) = (Device::Cpu, Device::Cuda(0), Device::Cuda(1));
    let (float, bf16) = (4 * 134_515_008, 2 * 134_515_008);
    for (average, policy, in_place, expected) in [
        (of(first, Kind::Float), of(first, Kind::Float), true, 0),
        (of(first, Kind::Float), of(first, Kind::BFloat16), true, float),
        (of(first, Kind::BFloat16), of(first, Kind::Float), true, 0),
        (of(cpu, Kind::Float), of(cpu, Kind::BFloat16), true, 0),
        (of(first, Kind::BFloat16), of(first, Kind::Float), false, bf16),
        (of(second, Kind::Float), of(first, Kind::BFloat16), true, bf16 + float),
        (of(second, Kind::BFloat16), of(first, Kind::Float), false, float + bf16),
    ] {
        assert_eq!(average.averaging(&policy, in_place), expected);
    }
    // One tensor after the other.
    let plain = Footprint { kernels: Kernels::Plain, ..of(first, Kind::Float) };
    assert_eq!(plain.averaging(&of(first, Kind::BFloat16), true), 0);
}

#[test]
fn released_gradients_by_hand() {
    let decoder = smollm2();
    let plain = on_cpu(&decoder, Kind::BFloat16);
    let bf16 = Footprint { kernels: Kernels::Fused, ..plain };
    let (layer_parameters, head): (u64, u64) = (3_540_096, 49_152 * 576);
    let shape = Shape::Rows { rows: 2, tokens: 64 };
    let step = TrainingStep {
        pass: all(shape),
        passes: 1,
        gradient_checkpointing: true,
        release_gradients: true,
        optimizer: ADAMW,
    };
    // The head in bfloat16 and its gradient stay until the embedding's is there: tied, they are one weight.
    assert_eq!(bf16.training(step), 2 * head + 4 * head + 4 * head);
    // Plain kernels take most for the loss: 31 inputs of layers, the head's gradient, autograd's, and the logits' in bfloat16.
    assert_eq!(plain.training(step), 2 * head + 31 * 128 * 576 * 2 + 4 * head + 6 * head + 128 * 49_152 * 2);
    // With more positions the loss takes most: 31 inputs of layers, the head's gradient and a part of it, twice 128 MiB of
    // logits.
    let shape = Shape::Rows { rows: 48, tokens: 256 };
    let loss = 31 * 12_288 * 576 * 2 + 4 * head + 2 * head + (256 << 20);
    let layer = 31 * 12_288 * 576 * 2 + 4 * head + 12_288 * 18_860 + 2 * layer_parameters + 4 * layer_parameters;
    assert!(layer < loss);
    assert_eq!(bf16.training(TrainingStep { pass: all(shape), ..step }), 2 * head + loss);
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
        pass: all(shape),
        passes: 1,
        gradient_checkpointing: true,
        release_gradients: true,
        optimizer: ADAMW_8BIT,
    };
    let generating = ema.generating(4, 2048, &Decoding::default(), &Choice::Greedy);
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
