"""Checks the peer against the stored values that the tests of sapo-flow compare with."""

import json
import os

import torch

from peer_losses import concatenated, dpo_loss, forward, orpo_loss, selective_log_softmax
from peer_segments import ReplayBuffer, fit, segment_bounds, splice


def near(name, ours, stored, tolerance=1e-5):
    difference = max(abs(a - b) for a, b in zip(ours, stored, strict=True))
    if not difference <= tolerance:
        raise SystemExit(f"{name}: {ours} here, {stored} stored")
    print(f"{name}: differs from the stored value by {difference:.1e} at most")


def check_losses(golden, load):
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


def check(golden, load):
    """Losses, segments, splices, and the buffer."""
    check_losses(golden, load)

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
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(theirs(logits.to(dtype), index), selective_log_softmax(logits.to(dtype), index)), dtype
    print("selective_log_softmax: equal to TRL's")
