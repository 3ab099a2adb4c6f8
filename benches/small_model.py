#!/usr/bin/env python3
"""A Llama model of 3M random parameters, with a tokenizer of 4096 tokens made from a file of conversations.

    small_model.py DIR chat.jsonl
"""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_model(directory, data):
    """A Llama model of 3M random parameters, and a tokenizer of 4096 tokens made from `data`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 4096, "special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train([data], trainers.BpeTrainer(**options))
    unknown, begin, end = SPECIAL
    names = {"unk_token": unknown, "bos_token": begin, "eos_token": end, "pad_token": end}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    wrapped.chat_template = TEMPLATE
    model.save_pretrained(directory)
    wrapped.save_pretrained(directory)
    print(f"{directory}: {sum(parameter.numel() for parameter in model.parameters())} parameters")


if __name__ == "__main__":
    make_model(*sys.argv[1:])
