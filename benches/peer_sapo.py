#!/usr/bin/env python3
"""The peer of `make bench`: SAPO's step with PyTorch and transformers, as a good user would write it.

    peer_sapo.py --model DIR --data chat.jsonl --objective orpo --dtype float32 --steps 3
    peer_sapo.py ... --plan samples.jsonl  the same work as that run of sapo-flow: its rows, starts and lengths
    peer_sapo.py ... --device cuda:0       on a GPU; what else gpu.py asks for has the names that sapo_orpo.yaml has for it
    peer_sapo.py --check tests/golden      compares losses, segments, splices and draws with stored values

A step is what sapo_orpo.yaml and sapo_dpo.yaml beside this file do: the EMA model rewrites a segment of each answer
(transformers' generate: KV cache, one batch, left padding), the pairs enter a replay buffer, a batch is drawn, one
concatenated forward pass over chosen and rejected as in TRL's trainers, TRL's losses, clipping, fused AdamW, EMA.

bfloat16 is how TRL's `bf16=True` trains: float32 weights under torch.autocast, and logits in float32 for the loss, as
accelerate hands them out. What is only read, the EMA model when it writes and DPO's reference, is a bfloat16 copy,
which needs no casting at every call. With --weights bfloat16 policy and EMA are in it themselves, and nothing is cast; with
--release-gradients true each parameter is updated when its gradient is there, and the gradient freed.

With --plan, segments begin where those of a run of sapo-flow did and have as many tokens, and a step learns from its own
pairs: a batch is written to the end of its longest row, and each row's tokens are cut to the length that is asked for.

One JSON object a line: what a step took, in seconds; at last the peak of resident memory.
"""

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import copy  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402

# Before the import, or it would not be seen; the second is the name that torch had for it first.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # as its own message advises where memory ends

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

sys.dont_write_bytecode = True

from peer_losses import concatenated, dpo_loss, orpo_loss, summed_logps  # noqa: E402
from peer_segments import ReplayBuffer, fit, read_plan, read_rows, segment_bounds, splice  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BETA = {"orpo": 0.05, "dpo": 0.1}
EMA_DECAY = 0.5
LEARNING_RATE = 1e-7  # as in the pipelines: the model stays as it is
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95}


# Generation


def segments_of(rows, settings, chance, planned=None):
    """(prompt, answer, start, length) of the segment to rewrite in each of the rows."""
    tasks = []
    for index, (prompt, answer) in enumerate(rows):
        sizes = (settings.segment_tokens, settings.max_length, settings.max_prompt_tokens)
        length, last_start = segment_bounds(len(prompt), len(answer), *sizes)
        start = planned[index][1] if planned else chance.randint(0, last_start)
        assert start <= last_start, "the plan is of other data"
        tasks.append((*fit(prompt, answer, *sizes[1:]), start, length))
    return tasks


def as_planned(row, tokens, ended, eos):
    """The first tokens of a row that was written without EOS, and EOS as the last of them where the plan says so."""
    return row[:tokens - 1] + [eos] if ended else row[:tokens]


@torch.inference_mode()
def rewrite(model, tasks, tokenizer, planned=None):
    """Pairs (prompt, chosen, rejected) of token ids, and the number of tokens generated."""
    prefixes = [prompt + answer[:start] for prompt, answer, start, _ in tasks]
    longest = max(map(len, prefixes))
    eos = tokenizer.eos_token_id
    ids = torch.tensor([[eos] * (longest - len(prefix)) + prefix for prefix in prefixes])
    mask = torch.tensor([[0] * (longest - len(prefix)) + [1] * len(prefix) for prefix in prefixes])
    new_tokens = max(tokens for _, _, tokens, _ in planned) if planned else max(length for *_, length in tasks)
    ends = {"max_new_tokens": new_tokens, "eos_token_id": eos, "pad_token_id": eos}
    if planned:
        ends["min_new_tokens"] = new_tokens
    ids, mask = ids.to(model.device), mask.to(model.device)
    out = model.generate(ids, attention_mask=mask, **ends, **SAMPLING)
    pairs, count = [], 0
    for index, ((prompt, answer, start, length), row) in enumerate(zip(tasks, out[:, longest:].tolist())):
        if planned:
            row = as_planned(row, *planned[index][2:], eos)
        generated = row[:row.index(eos) + 1] if eos in row else row
        count += len(generated)
        pairs.append((prompt, answer, splice(answer, start, length, generated, eos)))
    return pairs, count


# The loop


@torch.no_grad()
def update_ema(ema, policy, written):
    """ema = decay * ema + (1 - decay) * policy; `written`, in bfloat16, follows it."""
    averages = list(ema.parameters())
    torch._foreach_lerp_(averages, list(policy.parameters()), 1 - EMA_DECAY)
    if written is not ema:
        torch._foreach_copy_(list(written.parameters()), averages)


def load(path, dtype=torch.float32, device="cpu"):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).train()


def give_trl_head(policy, reference):
    """The head by which TRL's DPOTrainer computes log-probabilities: in tiles, again in the backward pass."""
    from trl.trainer.utils import add_fused_lm_head

    # What DPOTrainer asks of its policy, for its metrics too.
    add_fused_lm_head(policy, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    add_fused_lm_head(reference)
    policy.has_trl_head = reference.has_trl_head = True


def frozen(model, dtype):
    """A copy with its parameters in `dtype`; rotary frequencies stay in float32, as where a model is loaded so."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def make_optimizer(name, parameters):
    """AdamW, or with its state in 8 bits that of bitsandbytes, as SAPO's authors have it."""
    settings = {"lr": LEARNING_RATE, "weight_decay": 0.0}
    if name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        sys.exit(f"--optimizer {name} is bitsandbytes', which this Python cannot import ({error}): pip install bitsandbytes")
    return AdamW8bit(parameters, **settings)


def update_in_backward(name, parameters):
    """Each parameter has an optimizer of its own, which takes its gradient as soon as it is there, and frees it."""

    def follow(parameter):
        optimizer = make_optimizer(name, [parameter])

        def update(_):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        parameter.register_post_accumulate_grad_hook(update)

    for parameter in parameters:
        follow(parameter)


class Clock:
    """Seconds between calls; what was sent to a GPU is waited for."""

    def __init__(self, device):
        self.device, self.last = device, time.perf_counter()

    def lap(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.last, took = now, now - self.last
        return took


class Models:
    """The policy with its optimizer, and the models that follow it or stay as it began."""

    def __init__(self, settings, device):
        dtype, weights = DTYPES[settings.dtype], DTYPES[settings.weights]
        self.policy = load(settings.model, weights, device)
        self.ema = frozen(self.policy, weights)
        self.written = self.ema if dtype == weights else frozen(self.policy, dtype)
        self.reference = frozen(self.policy, dtype) if settings.objective == "dpo" else None
        self.mixed = torch.autocast(device.type, dtype) if dtype != weights else contextlib.nullcontext()
        self.optimizer, self.max_grad_norm = None, settings.max_grad_norm
        if settings.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if settings.release_gradients:
            update_in_backward(settings.optimizer, self.policy.parameters())
        else:
            self.optimizer = make_optimizer(settings.optimizer, self.policy.parameters())
        if settings.trl_head:
            give_trl_head(self.policy, self.reference)


def update(models):
    """Clipping and the optimizer's step, where the backward pass has not been both."""
    if models.optimizer is None:
        return
    if models.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(models.policy.parameters(), models.max_grad_norm, foreach=True)
    models.optimizer.step()
    models.optimizer.zero_grad(set_to_none=True)


def learn(models, batch, beta, clock):
    """The policy's update by a batch, and the average's; what their parts took."""
    line = {}
    if models.reference is not None:
        with torch.inference_mode():
            reference_logps = summed_logps(models.reference, batch).float()
        line["reference"] = clock.lap()
    with models.mixed:
        if models.reference is not None:
            loss = dpo_loss(models.policy, reference_logps.clone(), batch, beta)
        else:
            loss, _ = orpo_loss(models.policy, batch, beta)
    loss.backward()
    line |= {"tokens": int(batch[1].sum()), "positions": batch[0].numel(), "logit_rows": batch[0].numel()}
    line |= {"loss": loss.item(), "forward_backward": clock.lap()}
    update(models)
    line["optimizer"] = clock.lap()
    update_ema(models.ema, models.policy, models.written)
    return line | {"ema": clock.lap()}


def train(settings):
    """All steps; what each took goes to standard output."""
    torch.manual_seed(settings.seed)
    chance = random.Random(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    device = torch.device(settings.device)
    models = Models(settings, device)
    rows = read_rows(settings.data, tokenizer)
    order = [row for row, (prompt, _) in enumerate(rows) if len(prompt) <= settings.max_prompt_tokens]
    chance.shuffle(order)
    plan = read_plan(settings.plan) if settings.plan else None
    replay = ReplayBuffer()
    for step in range(settings.steps):
        clock, began = Clock(device), time.perf_counter()
        if planned := plan and plan[step]:
            taken = [row for row, *_ in planned]
        else:
            taken = [order[(step * settings.batch_size + row) % len(order)] for row in range(settings.batch_size)]
        tasks = segments_of([rows[row] for row in taken], settings, chance, planned)
        pairs, generated = rewrite(models.written, tasks, tokenizer, planned)
        for pair in pairs:
            replay.add(pair)
        line = {"step": step, "generated_tokens": generated, "generation": clock.lap()}
        drawn = replay.take(settings.batch_size) if plan else replay.draw(settings.batch_size, chance)
        batch = tuple(tensor.to(device) for tensor in concatenated(drawn, tokenizer.eos_token_id))
        line |= learn(models, batch, BETA[settings.objective], clock)
        now = time.perf_counter()
        print(json.dumps(line | {"seconds": now - began, "since_start": now - STARTED}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_bytes": peak, "threads": torch.get_num_threads()}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", metavar="GOLDEN")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--objective", choices=BETA, default="orpo")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--segment-tokens", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--max-prompt-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", choices=DTYPES, default="float32", help="type of policy and EMA")
    parser.add_argument("--optimizer", choices=["adamw", "adamw_8bit"], default="adamw")
    parser.add_argument("--max-grad-norm", type=json.loads, default=1.0, help="or null")
    parser.add_argument("--gradient-checkpointing", type=json.loads, default=False, help="true or false")
    parser.add_argument("--release-gradients", type=json.loads, default=False, help="true, without clipping, or false")
    parser.add_argument("--plan", metavar="FILE", help="samples.jsonl of a run of sapo-flow: the same work as there")
    parser.add_argument("--trl-head", action="store_true", help="DPO's log-probabilities by TRL's add_fused_lm_head")
    settings = parser.parse_args()
    logging.disable_progress_bar()
    if settings.release_gradients and settings.max_grad_norm is not None:
        sys.exit("--release-gradients true goes with --max-grad-norm null: gradients are gone before their norm is known")
    if settings.check:
        from peer_check import check

        check(settings.check, load)
    else:
        train(settings)


if __name__ == "__main__":
    main()
