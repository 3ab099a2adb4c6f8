#!/usr/bin/env python3
"""The peer of `make bench`: SAPO's step with PyTorch and transformers, as a good user would write it.

    peer_sapo.py --model DIR --data chat.jsonl --objective orpo --dtype float32 --steps 3
    peer_sapo.py ... --plan samples.jsonl  the same work as that run of sapo-flow: its rows, starts and lengths
    peer_sapo.py --check tests/golden      compares losses, segments, splices and draws with stored values

A step is what sapo_orpo.yaml and sapo_dpo.yaml beside this file do: the EMA model rewrites a segment of each answer
(transformers' generate: KV cache, one batch, left padding), the pairs enter a replay buffer, a batch is drawn, one
concatenated forward pass over chosen and rejected as in TRL's trainers, TRL's losses, clipping, fused AdamW, EMA.

bfloat16 is how TRL's `bf16=True` trains: float32 weights under torch.autocast, and logits in float32 for the loss, as
accelerate hands them out. What is only read, the EMA model when it writes and DPO's reference, is a bfloat16 copy,
which needs no casting at every call.

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
from collections import deque  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

IGNORED = -100  # the label of a position that no loss covers
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BETA = {"orpo": 0.05, "dpo": 0.1}
EMA_DECAY = 0.5
LEARNING_RATE = 1e-7  # as in the pipelines: the model stays as it is
MAX_GRAD_NORM = 1.0
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.95}


# Data and segments: the rules of operators/segments.rs.


def read_rows(path, tokenizer):
    """(prompt ids, answer ids) of each conversation; the answer ends in EOS."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            messages = json.loads(line)["messages"]
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            answer_ids = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
            rows.append((prompt_ids, answer_ids + [tokenizer.eos_token_id]))
    return rows


def read_plan(path):
    """What sapo-flow's sample_sink wrote: for each step (row, start, tokens written, whether EOS is the last of them)."""
    steps = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            pair = json.loads(line)
            segment = pair["segment"]
            planned = (pair["row"], segment["start"], segment["len"], segment["ended"])
            steps.setdefault(pair["step"], []).append(planned)
    return steps


def fit(prompt, answer, max_length, max_prompt):
    """Cut to max_length together, where they are longer: the prompt's beginning, then the answer's end."""
    if len(prompt) + len(answer) <= max_length:
        return prompt, answer
    kept = min(len(prompt), max_prompt, max_length)
    return prompt[len(prompt) - kept:], answer[:max_length - kept]


def segment_bounds(prompt_tokens, answer_tokens, segment_tokens, max_length, max_prompt):
    """A segment's length, and the largest start it may have."""
    room = max(0, max_length - min(prompt_tokens, max_prompt))
    length = min(segment_tokens, answer_tokens)
    last_start = min(max(0, answer_tokens - 3 - length), max(0, room - length))
    return (min(length, room) if prompt_tokens + answer_tokens > max_length else length), last_start


def splice(answer, start, length, generated, eos):
    """The rejected response: `generated` in place of the segment, ending at its EOS if it has one."""
    generated = generated[:length]
    if eos in generated:
        return answer[:start] + generated[:generated.index(eos) + 1]
    return answer[:start] + generated + answer[start + length:]


class ReplayBuffer:
    """First in, first out; draws with p proportional to 1 / (1 + times drawn), or of the oldest, which leave."""

    def __init__(self, capacity=2000):
        self.pairs, self.drawn = deque(maxlen=capacity), deque(maxlen=capacity)

    def add(self, pair):
        self.pairs.append(pair)
        self.drawn.append(0)

    def probabilities(self):
        weights = [1 / (1 + drawn) for drawn in self.drawn]
        total = sum(weights)
        return [weight / total for weight in weights]

    def draw(self, count, chance):
        count = min(count, len(self.pairs))
        indices = chance.choices(range(len(self.pairs)), weights=self.probabilities(), k=count)
        for index in indices:
            self.drawn[index] += 1
        return [self.pairs[index] for index in indices]

    def take(self, count):
        pairs = [self.pairs.popleft() for _ in range(min(count, len(self.pairs)))]
        for _ in pairs:
            self.drawn.popleft()
        return pairs


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
    out = model.generate(ids, attention_mask=mask, **ends, **SAMPLING)
    pairs, count = [], 0
    for index, ((prompt, answer, start, length), row) in enumerate(zip(tasks, out[:, longest:].tolist())):
        if planned:
            row = as_planned(row, *planned[index][2:], eos)
        generated = row[:row.index(eos) + 1] if eos in row else row
        count += len(generated)
        pairs.append((prompt, answer, splice(answer, start, length, generated, eos)))
    return pairs, count


# Losses


def selective_log_softmax(logits, index):
    """log_softmax at `index`, as trl.trainer.utils has it; restated because importing TRL alone takes seconds."""
    if logits.dtype in (torch.float32, torch.float64):
        selected = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        # One row at a time: less memory at the peak.
        return selected - torch.stack([row.logsumexp(-1) for row in logits])
    rows = [F.log_softmax(row, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) for row, labels in zip(logits, index)]
    return torch.stack(rows)


def concatenated(pairs, pad):
    """Chosen rows, then rejected ones, padded on the right: ids, attention mask, labels of the responses."""
    rows = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids, mask, labels = [], [], []
    for prompt, response in rows:
        length = len(prompt) + len(response)
        padding = longest - length
        ids.append(prompt + response + [pad] * padding)
        mask.append([1] * length + [0] * padding)
        labels.append([IGNORED] * len(prompt) + response + [IGNORED] * padding)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


def forward(model, ids, mask, labels):
    """Logits, summed log-probabilities of the responses, and their numbers of tokens."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    targets = labels[:, 1:]
    covered = targets != IGNORED
    logps = selective_log_softmax(logits[:, :-1], targets.clamp(min=0)) * covered
    return logits, logps.sum(-1), covered.sum(-1)


def orpo_loss(model, batch, beta):
    """As in TRL's ORPOTrainer: NLL over prompt and chosen response, and the odds ratio. Loss and NLL."""
    ids, mask, labels = batch
    logits, logps, lengths = forward(model, ids, mask, labels)
    pairs = len(ids) // 2
    targets = ids.masked_fill(mask == 0, IGNORED)[:pairs, 1:]
    nll = F.cross_entropy(logits[:pairs, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    chosen, rejected = (logps / lengths).split(pairs)
    log_odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return nll - beta * F.logsigmoid(log_odds).mean(), nll


def summed_logps(model, batch):
    """Log-probabilities of the responses: by a head that TRL's add_fused_lm_head made, or from all logits."""
    if getattr(model, "has_trl_head", False):
        ids, mask, labels = batch
        return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs.sum(-1)
    return forward(model, *batch)[1]


def dpo_loss(model, reference_logps, batch, beta):
    """The sigmoid loss, as in TRL's DPOTrainer."""
    logps = summed_logps(model, batch)
    chosen, rejected = (logps - reference_logps).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


# The loop


@torch.no_grad()
def update_ema(ema, policy, written):
    """ema = decay * ema + (1 - decay) * policy; `written`, in bfloat16, follows it."""
    averages = list(ema.parameters())
    torch._foreach_lerp_(averages, list(policy.parameters()), 1 - EMA_DECAY)
    if written is not ema:
        torch._foreach_copy_(list(written.parameters()), averages)


def load(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    return model.train()


def give_trl_head(policy, reference):
    """The head by which TRL's DPOTrainer computes log-probabilities: in tiles, again in the backward pass."""
    from trl.trainer.utils import add_fused_lm_head

    # What DPOTrainer asks of its policy, for its metrics too.
    add_fused_lm_head(policy, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    add_fused_lm_head(reference)
    policy.has_trl_head = reference.has_trl_head = True


def frozen(model, dtype):
    return copy.deepcopy(model).to(dtype).eval().requires_grad_(False)


class Clock:
    """Seconds between calls."""

    def __init__(self):
        self.last = time.perf_counter()

    def lap(self):
        now = time.perf_counter()
        self.last, took = now, now - self.last
        return took


def train(settings):
    """All steps; what each took goes to standard output."""
    torch.manual_seed(settings.seed)
    chance = random.Random(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    dtype = DTYPES[settings.dtype]
    policy = load(settings.model)
    ema = frozen(policy, torch.float32)
    written = ema if dtype == torch.float32 else frozen(policy, dtype)
    reference = frozen(policy, dtype) if settings.objective == "dpo" else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    mixed = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()
    if settings.trl_head:
        give_trl_head(policy, reference)
    rows = read_rows(settings.data, tokenizer)
    order = [row for row, (prompt, _) in enumerate(rows) if len(prompt) <= settings.max_prompt_tokens]
    chance.shuffle(order)
    plan = read_plan(settings.plan) if settings.plan else None
    replay, beta = ReplayBuffer(), BETA[settings.objective]
    for step in range(settings.steps):
        clock, began = Clock(), time.perf_counter()
        if planned := plan and plan[step]:
            taken = [row for row, *_ in planned]
        else:
            taken = [order[(step * settings.batch_size + row) % len(order)] for row in range(settings.batch_size)]
        tasks = segments_of([rows[row] for row in taken], settings, chance, planned)
        pairs, generated = rewrite(written, tasks, tokenizer, planned)
        for pair in pairs:
            replay.add(pair)
        line = {"step": step, "generated_tokens": generated, "generation": clock.lap()}
        drawn = replay.take(settings.batch_size) if plan else replay.draw(settings.batch_size, chance)
        batch = concatenated(drawn, tokenizer.eos_token_id)
        if reference is not None:
            with torch.inference_mode():
                reference_logps = summed_logps(reference, batch).float()
            line["reference"] = clock.lap()
        with mixed:
            if reference is not None:
                loss = dpo_loss(policy, reference_logps.clone(), batch, beta)
            else:
                loss, _ = orpo_loss(policy, batch, beta)
        loss.backward()
        line |= {"tokens": int(batch[1].sum()), "positions": batch[0].numel(), "logit_rows": batch[0].numel()}
        line |= {"loss": loss.item(), "forward_backward": clock.lap()}
        torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        line["optimizer"] = clock.lap()
        update_ema(ema, policy, written)
        line["ema"] = clock.lap()
        now = time.perf_counter()
        print(json.dumps(line | {"seconds": now - began, "since_start": now - STARTED}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_bytes": peak, "threads": torch.get_num_threads()}), flush=True)


# Checks against the stored values that the tests of sapo-flow compare with


def near(name, ours, stored, tolerance=1e-5):
    difference = max(abs(a - b) for a, b in zip(ours, stored, strict=True))
    if not difference <= tolerance:
        raise SystemExit(f"{name}: {ours} here, {stored} stored")
    print(f"{name}: differs from the stored value by {difference:.1e} at most")


def check_losses(golden):
    model_directory = os.path.join(golden, "models", "smollm")
    with open(os.path.join(model_directory, "expected.json"), encoding="utf-8") as file:
        expected = json.load(file)["step"]
    pairs = [(pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]) for pair in expected["pairs"]]
    batch = concatenated(pairs, pad=0)
    model, reference = load(model_directory), load(os.path.join(model_directory, "reference"))
    stored = expected["orpo_trl"]
    loss, nll = orpo_loss(model, batch, stored["beta"])
    near("ORPO loss and NLL", [loss.item(), nll.item()], [stored["loss"], stored["nll_loss"]])
    loss.backward()
    gradients = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    near("ORPO gradient norms", [gradients[name] for name in stored["grad_norms"]], stored["grad_norms"].values(), 1e-4)
    with torch.no_grad():
        reference_logps = forward(reference, *batch)[1]
        loss = dpo_loss(model, reference_logps, batch, expected["dpo_reference"]["beta"])
    near("DPO loss", [loss.item()], [expected["dpo_reference"]["loss"]])


def check(golden):
    """Losses, segments, splices, and the buffer."""
    check_losses(golden)

    def cases(name):
        with open(os.path.join(golden, name), encoding="utf-8") as file:
            return json.load(file)

    segments = [case for case in cases("segments.json") if "sequence" in case]
    for case in segments:
        prompt, answer = case["prompt_ids"], case["chosen_ids"] + [case["eos"]]
        sizes = (case["max_length"], case["max_prompt_length"])
        length, last_start = segment_bounds(len(prompt), len(answer), case["segment_tokens"], *sizes)
        assert length == case["segment_len"] and last_start == (case["draw"] or [0, 0])[1], case
        if case["truncation"] == "keep_end":
            assert sum(fit(prompt, answer, *sizes), []) == case["sequence"], case
    splices = cases("splice.json")
    for case in splices:
        spliced = splice(case["chosen_ids"], case["segment_start"], case["segment_len"], case["generated"], case["eos"])
        assert case["prompt_ids"] + spliced == case["rejected_sequence"], case
    stored = cases("replay_buffer.json")
    replay, added = ReplayBuffer(stored["capacity"]), 0
    for moment in stored["trace"]:
        for _ in range(moment["add"]):
            replay.add(added)
            added += 1
        assert list(replay.pairs) == moment["contents"]
        assert all(abs(a - b) < 1e-12 for a, b in zip(replay.probabilities(), moment["probabilities"], strict=True))
        for drawn in moment["sampled"]:
            replay.drawn[replay.pairs.index(drawn)] += 1
    print(f"{len(segments)} segments, {len(splices)} splices, {len(stored['trace'])} states of the buffer: equal")
    check_trl()


def check_trl():
    """The one function taken from TRL is TRL's."""
    from trl.trainer.utils import selective_log_softmax as theirs

    logits, index = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    for dtype in DTYPES.values():
        assert torch.equal(theirs(logits.to(dtype), index), selective_log_softmax(logits.to(dtype), index)), dtype
    print("selective_log_softmax: equal to TRL's")


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
    parser.add_argument("--plan", metavar="FILE", help="samples.jsonl of a run of sapo-flow: the same work as there")
    parser.add_argument("--trl-head", action="store_true", help="DPO's log-probabilities by TRL's add_fused_lm_head")
    settings = parser.parse_args()
    logging.disable_progress_bar()
    if settings.check:
        check(settings.check)
    else:
        train(settings)


if __name__ == "__main__":
    main()
