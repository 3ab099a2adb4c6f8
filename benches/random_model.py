#!/usr/bin/env python3
"""A Llama model of random parameters, with a tokenizer of 4096 tokens made from a file of conversations.

    random_model.py DIR chat.jsonl                3M parameters in float32, the small model of bench.py
    random_model.py DIR chat.jsonl 8b [cuda:0]    one of gpu.py's shapes in bfloat16; a GPU draws the numbers faster

The larger ones are written file by file, each of 2 GB at most, so that a few GB are in memory.
"""

import json
import os
import sys

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENS = 4096  # of the tokenizer: a model of more writes tokens that stand for no text
ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# As in the config.json of Llama 3.2 1B and Llama 3.1 8B; the tiny one is for trying things out.
SHAPES = {
    "tiny": {
        "vocab_size": 16384, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False,
        "rope_scaling": ROPE | {"factor": 8.0},
    },
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "rope_scaling": ROPE | {"factor": 32.0},
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "rope_scaling": ROPE | {"factor": 8.0},
    },
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
FILE_BYTES = 2 << 30


def write_tokenizer(directory, data):
    """A tokenizer made from `data`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": TOKENS, "special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train([data], trainers.BpeTrainer(**options))
    unknown, begin, end = SPECIAL
    names = {"unk_token": unknown, "bos_token": begin, "eos_token": end, "pad_token": end}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(directory)


def write_small(directory):
    """The model of 3M parameters; how many they are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, **IDS,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def tensors(shape):
    """Name and size of each tensor."""
    hidden, intermediate = shape["hidden_size"], shape["intermediate_size"]
    queries, keys = (shape[f"num_{name}_heads"] * shape["head_dim"] for name in ("attention", "key_value"))
    yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)
    for layer in range(shape["num_hidden_layers"]):
        for name, size in (
            ("input_layernorm", (hidden,)), ("self_attn.q_proj", (queries, hidden)), ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.v_proj", (keys, hidden)), ("self_attn.o_proj", (hidden, queries)),
            ("post_attention_layernorm", (hidden,)), ("mlp.gate_proj", (intermediate, hidden)),
            ("mlp.up_proj", (intermediate, hidden)), ("mlp.down_proj", (hidden, intermediate)),
        ):
            yield f"model.layers.{layer}.{name}.weight", size
    yield "model.norm.weight", (hidden,)
    if not shape["tie_word_embeddings"]:
        yield "lm_head.weight", (shape["vocab_size"], hidden)


def numel(size):
    return torch.Size(size).numel()


def files(shape):
    """The tensors in groups, each for a file."""
    groups, held = [[]], 0
    for name, size in tensors(shape):
        held += 2 * numel(size)
        if groups[-1] and held > FILE_BYTES:
            groups.append([])
            held = 2 * numel(size)
        groups[-1].append((name, size))
    return groups


def write_shape(directory, shape, device):
    """A model of one of the shapes: ones in norms, elsewhere normal numbers as Llama begins with."""
    chance = torch.Generator(device).manual_seed(0)
    kept_in, groups = {}, files(shape)
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        weights = {}
        for name, size in group:
            weight = torch.empty(size, dtype=torch.bfloat16, device=device)
            weights[name] = weight.fill_(1.0) if len(size) == 1 else weight.normal_(0.0, 0.02, generator=chance)
        save_file(weights, os.path.join(directory, file), metadata={"format": "pt"})
        kept_in |= dict.fromkeys(weights, file)
    parameters = sum(numel(size) for _, size in tensors(shape))
    write_json(directory, "model.safetensors.index.json", {"metadata": {"total_size": 2 * parameters}, "weight_map": kept_in})
    return parameters


def write_config(directory, shape):
    """Last of all: with it the model is there."""
    write_json(directory, "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "initializer_range": 0.02,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "use_cache": True, **IDS, **shape,
    })


def write_json(directory, name, content):
    with open(os.path.join(directory, name), "w", encoding="ascii") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def main(directory, data, name=None, device="cpu"):
    os.makedirs(directory, exist_ok=True)
    write_tokenizer(directory, data)
    if name is None:
        parameters = write_small(directory)
    else:
        parameters = write_shape(directory, SHAPES[name], device)
        write_config(directory, SHAPES[name])
    print(f"{directory}: {parameters} parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
