"""The section of BENCHMARKS.md about a GPU, from what gpu.py measured."""

import re

from report import SIDES, decoded, medians, number, operations, ratios, table

HEADING = "## On a GPU\n"
BEFORE = "## What bounds it\n"  # the section that follows
COMPUTED_BYTES = 2  # of a bfloat16 number


def placed(text, section):
    """The report with this section in it, in the place of an older one if there is one."""
    text = re.sub(rf"^{HEADING}.*?(?=^## |\Z)", "", text, flags=re.M | re.S)
    before, found, after = text.partition(BEFORE)
    return f"{before.rstrip()}\n\n{section}\n{found}{after}".lstrip()


def figures(runs, case, limits):
    """Medians of one side, and its shares of what the device can do; nothing where it could not run."""
    if not runs:
        return {}
    body, head = case["body"], case["head"]
    found = medians(runs)
    read = found["generation_rate"] / case["params"]["batch_size"] * (body + head) * COMPUTED_BYTES
    found["bandwidth"] = 100 * read / limits["read"] / 1e9
    found["matmul"] = 100 * operations(runs, body, head) / limits["matmul_bfloat16"] / 1e9
    found["rest"] = found["step"] - found["learner"]
    return found


def written(cases):
    """How each case learns: what both sides are told."""
    lines = []
    for name, case in cases.items():
        params = case["params"]
        clipped = "no clipping" if params["max_grad_norm"] == "null" else f"clipping at {params['max_grad_norm']}"
        parts = [f"weights and average in {params['weights']}", f"`{params['optimizer']}`", clipped]
        parts += [f"`{key}`" for key in ("gradient_checkpointing", "release_gradients", "cuda_graphs") if params[key] == "true"]
        lengths = ("{batch_size} pairs a step, prompts up to {max_prompt_tokens} tokens, segments of {segment_tokens}, prompt "
                   "and answer up to {max_length}").format(**params)
        lines.append(f"- {name}: {case['parameters'] / 1e9:.2f}B parameters; {', '.join(parts)}; {lengths}")
    return "\n".join(lines)


def summary(cases, limits):
    """One line for each case."""
    rows = []
    for name, case in cases.items():
        ours, peer = (figures(case[side], case, limits) for side in SIDES)
        steps = [number(1 / ours["step"]), number(1 / peer["step"]) if peer else "failed"]
        faster = f"{peer['step'] / ours['step']:.2f}x" if peer else ""
        shares = [f"{side['matmul']:.0f}%" if side else "" for side in (ours, peer)]
        peaks = [f"{side['peak_bytes'] / 1e9:.1f}" if side else "" for side in (ours, peer)]
        said = f"{case['dry_run'] / 1e9:.1f} ({case['dry_run'] / ours['peak_bytes']:.2f})"
        rows.append([name, *steps, faster, *shares, *peaks, said])
    head = ["case", "steps/s", "peer's", "faster", "learner, of the matmul rate", "peer's", "peak memory, GB", "peer's"]
    return table([*head, "dry run said (of the peak)"], rows)


def decoding(cases):
    """Decoding by itself."""
    rows = [
        [f"{case['shape']}, prompts of {prompts} length{'' if layout == 'plain' else ', ' + layout}", *rates, f"{share}%"]
        for case in {case["shape"]: case for case in cases.values()}.values()
        for _, prompts, layout, *rates, share, _ in decoded(case["decoding"])
    ]
    failed = [f"{case['shape']}: {case['not_decoded']}" for case in cases.values() if case.get("not_decoded")]
    head = ["bfloat16, after the prompts' pass", "a token of each row, ms", "tokens/s", "of the limit"]
    text = table(head, rows) if rows else ""
    return text + "".join(f"\nNot all could be measured: {line}\n" for line in dict.fromkeys(failed))


def detail(name, case, limits):
    """Everything about one case."""
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
    pairs = len(case["peer"])
    noise = f"Pairs of runs: {pairs}. Ratios of their steps: {ratios(case)}." if pairs else f"The peer failed: {case['failed']}"
    return f"### {name}\n\n{noise}\n\n" + table(["", "sapo-flow", "peer"], rows)


def gpu_section(results):
    """The section."""
    cases = {name: case for name, case in results["cases"].items() if case["ours"]}
    limits = results["limits"]
    facts = limits | results["versions"] | {"steps": results["steps"], "written": written(cases)}
    facts |= {"name": limits.get("name", results["device"]), "memory": limits.get("memory", 0) / 1e9}
    facts["matmul"] = limits["matmul_bfloat16"] / 1e3
    facts["others"] = f"bitsandbytes {facts['bitsandbytes']}, " if "bitsandbytes" in facts else ""
    text = HEADING + (TRIED if results["device"] == "cpu" else "")
    text += TEXT.format(**facts, summary=summary(cases, limits), decoding=decoding(cases))
    return text + "\n" + "\n".join(detail(name, case, limits) for name, case in cases.items())


TRIED = "\nTried out on a CPU: none of this is a figure of a GPU.\n"

TEXT = """
SAPO-ORPO steps of sapo-flow and of the peer with random weights of Llama's shapes, in turn on one device. `make bench-gpu`
repeats it; [gpu.py](benches/gpu.py) says how. Measured on {date} on one {name} with {memory:.0f} GB. {ours};
PyTorch {torch}, transformers {transformers}, {others}Python {python}.

Both compute in bfloat16, and both are told the same:

{written}

Times are medians over runs of each run's median step, of {steps} after one that warms up. What was sent to the device is
waited for where a part's time is taken, but for sapo-flow's average, which counts to its generation. Peak memory is what
`nvidia-smi` says is in use on the device, less what was before the run: PyTorch's and CUDA's own included, which the dry
run does not count.

{summary}
Measured in the same run through PyTorch: matrix multiplication in bfloat16 {matmul:.0f} TFLOPS (the better of 4096 and 8192
squared), reading {read:.0f} GB/s, copying {copy:.0f} GB/s (read and written together). The learner's share counts 6 operations
for each parameter of a layer and position computed, and for each of the head and row of logits; what is computed a second
time for lack of memory is not counted. The limit of decoding is all weights read once for each token of the batch.

{decoding}"""
