"""The section of BENCHMARKS.md about a GPU, from what gpu.py measured."""

import re

from report import SIDES, decoded, medians, number, operations, ratios, table

HEADING = "## On a GPU\n"
SECTION = re.compile(rf"^{HEADING}.*?(?=^## |\Z)", flags=re.M | re.S)
BEFORE = "## What bounds it\n"  # the section that follows
COMPUTED_BYTES = 2  # of a bfloat16 number


def placed(text, section):
    """The report with this section in it, in the place of an older one if there is one."""
    if not section:
        return text
    before, found, after = SECTION.sub("", text).partition(BEFORE)
    return f"{before.rstrip()}\n\n{section.rstrip()}\n\n{found}{after}".strip() + "\n"


def kept_section(text):
    """The section that a report has, or nothing."""
    found = SECTION.search(text)
    return found[0] if found else ""


def bandwidth(limits):
    """GB/s that the device's memory has been seen to do: what reads one array may not be all there is."""
    return max(limits["read"], limits["copy"])


def figures(runs, case, limits):
    """Medians of one side, and its shares of what the device can do; nothing where it could not run."""
    if not runs:
        return {}
    body, head = case["body"], case["head"]
    found = medians(runs)
    read = found["generation_rate"] / case["params"]["batch_size"] * (body + head) * COMPUTED_BYTES
    found["bandwidth"] = 100 * read / bandwidth(limits) / 1e9
    found["matmul"] = 100 * operations(runs, body, head) / limits["matmul_bfloat16"] / 1e9
    found["rest"] = found["step"] - found["learner"]
    return found


def written(cases):
    """How each case learns: what both sides are told."""
    lines = []
    for name, case in cases.items():
        params = case["params"]
        same = params["weights"] == params["average"]
        kept = "weights and average" if same else f"weights in {params['weights']}, average"
        clipped = "no clipping" if params["max_grad_norm"] == "null" else f"clipping at {params['max_grad_norm']}"
        parts = [f"{kept} in {params['average']}", f"`{params['optimizer']}`", clipped]
        on = ("gradient_checkpointing", "release_gradients", "cuda_graphs")
        parts += [f"`{key}`" for key in on if params[key] == "true"]
        lengths = ("{batch_size} pairs a step, prompts up to {max_prompt_tokens} tokens, segments of {segment_tokens}, "
                   "prompt and answer up to {max_length}").format(**params)
        lines.append(f"- {name}: {case['parameters'] / 1e9:.2f}B parameters; {', '.join(parts)}; {lengths}")
    return "\n".join(lines)


def summary(cases, limits):
    """One line for each case."""
    rows = []
    for name, case in cases.items():
        ours, peer = sides = [figures(case[side], case, limits) for side in SIDES]
        steps = [number(1 / found["step"]) if found else "none" for found in sides]
        faster = f"{peer['step'] / ours['step']:.2f}x" if ours and peer else ""
        shares = [f"{found['matmul']:.0f}%" if found else "" for found in sides]
        peaks = [f"{found['peak_bytes'] / 1e9:.1f}" if found else "" for found in sides]
        said = f"{case['dry_run'] / 1e9:.1f}"
        # CUDA's own is not the run's.
        if ours and (taken := ours["peak_bytes"] - limits.get("context", 0)) > 0:
            said += f" ({case['dry_run'] / taken:.2f})"
        rows.append([name, *steps, faster, *shares, *peaks, said])
    head = ["case", "steps/s", "peer's", "faster", "learner, of the matmul rate", "peer's", "peak memory, GB", "peer's"]
    return table([*head, "dry run said (of the peak less CUDA's own)"], rows)


def decoding(models, limits):
    """Decoding by itself, by model."""
    rows, failed = [], ""
    for shape, found in models.items():
        for _, prompts, layout, milliseconds, rate, share, read in decoded(found["lines"]):
            name = f"{shape}, prompts of {prompts} length{'' if layout == 'plain' else ', ' + layout}"
            # Of the same limit as all other shares here.
            share = float(share) * float(read) / max(float(read), bandwidth(limits))
            rows.append([name, milliseconds, rate, read, f"{share:.0f}%"])
        if found["failed"]:
            failed += f"\nNot all could be measured: {shape}: {found['failed']}\n"
    head = ["bfloat16, after the prompts' pass", "a token of each row, ms", "tokens/s", "reading, GB/s", "of the limit"]
    return (table(head, rows) if rows else "") + failed


def outcome(case):
    """What went through, and why the rest did not."""
    text = f"Pairs of runs: {len(case['peer'])}. Ratios of their steps: {ratios(case)}. " if case["peer"] else ""
    if not case["peer"] and case["ours"]:
        text += f"Runs of sapo-flow alone: {len(case['ours'])}. "
    for side, name in (("ours", "sapo-flow"), ("peer", "the peer")):
        if reason := case["failed"].get(side):
            text += f"No{' more' if case[side] else ''} runs of {name}: {reason}. "
    return text.strip() or "No runs yet."


def detail(name, case, limits):
    """Everything about one case."""
    text = f"### {name}\n\n{outcome(case)}\n"
    if not case["ours"]:
        return text
    sides = [figures(case[side], case, limits) for side in SIDES]
    rows = []
    for what, key, digits in (
        ("step, s", "step", 3), ("fastest run's", "fastest", 3), ("slowest run's", "slowest", 3),
        ("learner, s", "learner", 3), ("of it forward and backward, s", "forward_backward", 3),
        ("of it clipping and optimizer, s", "optimizer", 3), ("learner, tokens/s", "learner_rate", 0),
        ("learner, % of the matmul rate", "matmul", 0), ("the rest: generation and average, s", "rest", 3),
        ("generation, tokens/s", "generation_rate", 0), ("generation, % of the bandwidth", "bandwidth", 0),
        ("tokens generated a step", "generated", 0), ("tokens learned from a step", "learned", 0),
        ("positions computed for them", "positions", 0), ("rows of logits", "logit_rows", 0),
        ("first step done after, s", "first_step", 1),
    ):
        rows.append([what, *(number(side.get(key), digits) for side in sides)])
    return text + "\n" + table(["", "sapo-flow", "peer"], rows)


def gpu_section(results):
    """The section."""
    cases, limits = results["cases"], results["limits"]
    facts = limits | results["versions"] | {"steps": results["steps"], "written": written(cases)}
    facts |= {"name": limits.get("name", results["device"]), "memory": limits.get("memory", 0) / 1e9}
    facts |= {"matmul": limits["matmul_bfloat16"] / 1e3, "best": bandwidth(limits)}
    facts |= {"context": limits.get("context", 0) / 1e9}
    facts["others"] = f"bitsandbytes {facts['bitsandbytes']}, " if "bitsandbytes" in facts else ""
    facts["driver"] = f"driver {facts['driver']}, CUDA {facts['cuda']}, " if "driver" in facts else ""
    text = HEADING + (TRIED if results["device"] == "cpu" else "")
    text += TEXT.format(**facts, summary=summary(cases, limits), decoding=decoding(results["decoding"], limits))
    return text + "\n" + "\n".join(detail(name, case, limits) for name, case in cases.items())


TRIED = "\nTried out on a CPU: none of this is a figure of a GPU.\n"

TEXT = """
SAPO-ORPO steps of sapo-flow and of the peer with random weights of Llama's shapes, in turn on one device. `make bench-gpu`
repeats it; [gpu.py](benches/gpu.py) says how. Measured on {date} on one {name} with {memory:.0f} GB. {ours};
{driver}PyTorch {torch}, transformers {transformers}, {others}Python {python}.

The aims: at least 50% of the matmul rate in the learner, and 60% of the memory's bandwidth in decoding.

Both compute in bfloat16, and both are told the same:

{written}

Times are medians over runs of each run's median step, of {steps} after one that warms up. What was sent to the device is
waited for where a part's time is taken, but for sapo-flow's average, which counts to its generation. Peak memory is what
`nvidia-smi` says is in use on the device, less what was before the run: CUDA's own included, {context:.2f} GB of a process
with next to nothing on the device, which the dry run does not count.

{summary}
Measured in the same run through PyTorch: matrix multiplication in bfloat16 {matmul:.0f} TFLOPS (the better of 4096 and
8192 squared), reading {read:.0f} GB/s, copying {copy:.0f} GB/s (read and written together); the higher of the two,
{best:.0f}, is the bandwidth that shares are of. The learner's share counts 6 operations for each parameter of a layer and
position computed, and for each of the head and row of logits; what is computed a second time for lack of memory is not
counted. The limit of decoding is all weights read once for each token of the batch.

What is not the same:

- The peer is eager: SDPA, a cache that grows, no `torch.compile`; with expandable segments of memory.
- It computes padding too, and logits of all its positions; its share of the matmul rate counts these.
- bitsandbytes' optimizer in 8 bits may wait for the device after every parameter: the library's handicap, not the peer's.
- Weights and average in bfloat16 are rounded stochastically by sapo-flow, to the nearest by the peer.
- Where the average is in float32, its copy in bfloat16 counts to generation with sapo-flow, to the average with the peer.
- A step's generation includes the prompts' pass, and its share of the bandwidth does; decoding by itself does not.
- With `release_gradients` the optimizer's time is part of forward and backward.

{decoding}"""
