#!/usr/bin/env python3
"""A Llama model of a million random parameters, with a tokenizer of 2048 tokens made from a file of conversations.

    tiny_model.py DIR chat.jsonl

For trying pipelines and sweeps within minutes, on any machine; what it says is noise until it is trained. Needs python3
alone. The same bytes each time.
"""

import array
import collections
import json
import os
import random
import re
import struct
import sys

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 2048
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_VALUE_HEADS = 128, 384, 4, 4, 2
HEAD = HIDDEN // HEADS


def byte_alphabet():
    """The letter that byte-level tokenizers write for each byte (GPT-2's)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain}
    letters.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return letters


def words(path):
    """The words of a file of conversations, in the alphabet of bytes, with how often each occurs."""
    letters = byte_alphabet()
    counts = collections.Counter()
    with open(path, encoding="utf-8") as file:
        for line in file:
            for message in json.loads(line)["messages"]:
                counts.update(re.findall(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+", message["content"]))
    return {tuple(letters[byte] for byte in word.encode()): count for word, count in counts.items()}


def learn_merges(counts, number):
    """Byte-pair encoding: the pair that occurs most often becomes one, again and again."""
    merges = []
    while len(merges) < number:
        pairs = collections.Counter()
        for word, count in counts.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        counts = {merged(word, best): count for word, count in counts.items()}
    return merges


def merged(word, pair):
    """A word with every occurrence of the pair made one."""
    out, at = [], 0
    while at < len(word):
        both = word[at : at + 2] == pair
        out.append(word[at] + word[at + 1] if both else word[at])
        at += 2 if both else 1
    return tuple(out)


def write_json(directory, name, content):
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")


def write_tokenizer(directory, data):
    """The tokenizer; how many tokens it has."""
    alphabet = list(byte_alphabet().values())
    merges = learn_merges(words(data), VOCABULARY - len(SPECIAL) - len(alphabet))
    tokens = SPECIAL + alphabet + [left + right for left, right in merges]
    # Two ways may lead to one token.
    tokens = list(dict.fromkeys(tokens))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    write_tokenizer_files(directory, level, level, {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [f"{left} {right}" for left, right in merges],
    })
    return len(tokens)


def write_tokenizer_files(directory, pre_tokenizer, decoder, model):
    """A tokenizer whose vocabulary begins with the special tokens."""
    added = [
        {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for number, token in enumerate(SPECIAL)
    ]
    write_json(directory, "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": model,
    })
    write_json(directory, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": SPECIAL[1], "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[2], "unk_token": SPECIAL[0], "chat_template": TEMPLATE, "model_max_length": 2048,
    })


def shapes(vocabulary):
    """The tensors of a Llama model with tied embeddings."""
    yield "model.embed_tokens.weight", (vocabulary, HIDDEN)
    key_value = KEY_VALUE_HEADS * HEAD
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        yield f"{name}.self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield f"{name}.self_attn.k_proj.weight", (key_value, HIDDEN)
        yield f"{name}.self_attn.v_proj.weight", (key_value, HIDDEN)
        yield f"{name}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{name}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{name}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{name}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        yield f"{name}.input_layernorm.weight", (HIDDEN,)
        yield f"{name}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)


def write_weights(directory, vocabulary):
    """Normal weights of standard deviation 0.02, norms of 1, in safetensors; how many parameters there are."""
    generator = random.Random(0)
    header, tensors, end = {}, [], 0
    for name, shape in shapes(vocabulary):
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        values = array.array("f", [1.0] * count if len(shape) == 1 else (generator.gauss(0, 0.02) for _ in range(count)))
        if sys.byteorder == "big":
            values.byteswap()
        tensors.append(values.tobytes())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * count]}
        end += 4 * count
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(directory, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(tensors)
    return end // 4


def write_config(directory, vocabulary):
    """The configuration. What is looked for when asked whether the model is there comes last."""
    write_json(directory, "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    write_json(directory, "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "hidden_act": "silu",
        "vocab_size": vocabulary, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2, "initializer_range": 0.02,
    })


def make_model(directory, data):
    """A model directory, whole or not at all."""
    if os.path.exists(os.path.join(directory, "config.json")):
        return print(f"tiny model: present in {directory}")
    os.makedirs(directory, exist_ok=True)
    vocabulary = write_tokenizer(directory, data)
    parameters = write_weights(directory, vocabulary)
    write_config(directory, vocabulary)
    print(f"tiny model: {parameters} parameters, {vocabulary} tokens in {directory}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    make_model(*sys.argv[1:])
