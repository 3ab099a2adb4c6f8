"""BENCHMARKS.md from what bench.py measured."""

import re
import statistics
import sys

BYTES = {"float32": 4, "bfloat16": 2}
NAMES = {"smollm2": "SmolLM2-135M", "3m": "3M parameters, random"}
SIDES = ("ours", "peer")
COUNTS = ("generated", "learned", "positions", "logit_rows")


def values(runs, name):
    """A figure of every measured step of all runs."""
    return [part[name] for one in runs for part in one["parts"] if name in part]


def rate(runs, tokens, seconds):
    """Tokens a second, over all measured steps."""
    return sum(values(runs, tokens)) / sum(values(runs, seconds))


def medians(runs):
    """The figures of one side of a case, by name: medians over runs of each run's median."""

    def median(name):
        per_run = [statistics.median(values([one], name)) for one in runs if values([one], name)]
        return statistics.median(per_run) if per_run else None

    steps = [statistics.median(one["step"]) for one in runs]
    figures = {"step": statistics.median(steps), "fastest": min(steps), "slowest": max(steps)}
    figures |= {name: statistics.median(one[name] for one in runs) for name in ("first_step", "peak_bytes")}
    names = ("generation", "reference", "learner", "forward_backward", "optimizer", "ema", "engine")
    figures |= {name: median(name) for name in names}
    figures["generated"] = statistics.mean(values(runs, "generated_tokens"))
    figures["learned"] = statistics.mean(values(runs, "tokens"))
    figures |= {name: statistics.mean(values(runs, name)) for name in ("positions", "logit_rows")}
    figures["generation_rate"] = rate(runs, "generated_tokens", "generation")
    figures["learner_rate"] = rate(runs, "tokens", "learner")
    return figures


def table(head, rows):
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)] + rows
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value, digits=2):
    if value is None:
        return ""
    return f"{value:.{digits if value >= 0.1 else 3}f}" if value < 100 else f"{value:.0f}"


def title(case):
    model, objective, dtype = case.split("/")
    return f"{NAMES[model]}, {objective.upper()}, {dtype}"


def summary(cases):
    """One line for each case."""
    rows = []
    for case, (ours, peer) in cases.items():
        # The tokens are as many, so these are ratios of times.
        rates = [f"{ours[name] / peer[name]:.2f}x" for name in ("generation_rate", "learner_rate")]
        steps = [number(ours["step"]), number(peer["step"]), f"{peer['step'] / ours['step']:.2f}x"]
        starts = [number(ours["first_step"], 1), number(peer["first_step"], 1)]
        rows.append([title(case), *steps, *rates, f"{ours['peak_bytes'] / peer['peak_bytes']:.2f}", *starts])
    head = ["case", "step, s", "peer's step, s", "faster", "generation", "learner", "peak memory"]
    text = table(head + ["first step done after, s", "peer's, s"], rows)
    for case, (ours, _) in cases.items():
        plain = case.replace("bfloat16", "float32")
        if case != plain and plain in cases:
            faster = cases[plain][1]["step"] / ours["step"]
            text += f"\n{title(case)} against the peer in float32, the script's default: {faster:.2f}x.\n"
    return text


def ratios(runs):
    """Lowest and highest ratio of a pair of runs: how much the machine's noise may have done."""
    steps = [[statistics.median(one["step"]) for one in runs[side]] for side in SIDES]
    each = [peer / ours for ours, peer in zip(*steps)]
    return f"{min(each):.2f}x to {max(each):.2f}x"


def operations(runs, body, head):
    """Operations of the learner's matrix products a second: for each parameter two forward, and four backward."""
    positions, rows = (sum(values(runs, name)) for name in ("positions", "logit_rows"))
    return 6 * (body * positions + head * rows) / sum(values(runs, "learner"))


def detail(case, runs, limits, parameters, head):
    """Everything about one case; the model has so many parameters, and of them so many in its head."""
    model, _, dtype = case.split("/")
    sides = [medians(runs[side]) for side in SIDES]

    def row(name, key, digits=2):
        ours, peer = (side[key] for side in sides)
        factor = ""
        if ours and peer and key not in COUNTS:
            factor = f"{ours / peer if key.endswith('rate') else peer / ours:.2f}x"
        return [name, number(ours, digits), number(peer, digits), factor]

    def spread(side):
        return f"{number(side['step'])} ({number(side['fastest'])} to {number(side['slowest'])})"

    rows = [["step, s (fastest to slowest run)", *map(spread, sides), f"{sides[1]['step'] / sides[0]['step']:.2f}x"]]
    rows += [row("generation, s", "generation"), row("generation, tokens/s", "generation_rate", 1)]
    if sides[1]["reference"] is not None:
        rows.append(row("reference, s", "reference"))
    rows += [row("learner: forward, backward, optimizer, s", "learner"), row("learner, tokens/s", "learner_rate", 1)]
    rows.append(row("of it forward and backward, s", "forward_backward"))
    rows.append(row("of it clipping and optimizer, s", "optimizer"))
    rows.append(row("EMA, s", "ema"))
    peaks = [side["peak_bytes"] / 1e9 for side in sides]
    rows.append(["peak memory, GB", *(number(peak) for peak in peaks), f"{peaks[1] / peaks[0]:.2f}x"])
    rows.append(row("first step done after, s", "first_step", 1))
    rows += [row("tokens generated a step", "generated", 0), row("tokens learned from a step", "learned", 0)]
    rows += [row("positions computed for them", "positions", 0), row("rows of logits", "logit_rows", 0)]
    # All weights are read once for each token of the batch.
    gigabytes = parameters * BYTES[dtype] / 1e9
    decoding = [100 * side["generation_rate"] / limits["batch"] * gigabytes / limits["read"] for side in sides]
    gigaflops = limits[f"matmul_{dtype}"]
    learning = [100 * operations(runs[side], parameters - head, head) / gigaflops / 1e9 for side in SIDES]
    rows.append(["generation, % of the bandwidth limit", *(f"{share:.0f}" for share in decoding), ""])
    rows.append(["learner, % of the matmul rate", *(f"{share:.0f}" for share in learning), ""])
    ours = sides[0]
    parts = {name: ours[name] for name in ("generation", "reference", "learner", "ema") if ours[name]}
    shares = ", ".join(f"{name} {100 * seconds / ours['step']:.0f}%" for name, seconds in parts.items())
    pairs = len(runs["peer"])
    text = f"### {title(case)}\n\nPairs of runs: {pairs}. Ratios of their steps: {ratios(runs)}.\n\n"
    text += table(["", "sapo-flow", "peer", "better by"], rows)
    engine = 100 * ours["engine"] / ours["step"]
    return text + f"\nWhere sapo-flow's step goes: {shares}; the dataflow engine itself {engine:.2f}%.\n"


def decoded(lines):
    """What decode_speed says, line by line: type, prompts, layout, ms a step, tokens/s, share of the limit, and GB/s.
    Others' lines may be among them: warnings of libraries."""
    pattern = r"(\w+), (\w+) prompts, (\w+): .* ([\d.]+) ms a step, (\d+) tokens/s, (\d+)% of the limit at ([\d.]+) GB/s"
    found = [match.groups() for match in (re.fullmatch(pattern, line) for line in lines) if match]
    if lines and not found:
        sys.exit("decode_speed says nothing that is understood here:\n" + "\n".join(lines))
    return found


def decoding(lines, batch):
    """Decoding by itself, of the default layouts and int8 weights."""
    rows = []
    for kind, prompts, layout, milliseconds, rate, share, bandwidth in decoded(lines):
        if layout != "plain":
            name = {"Float": "float32", "BFloat16": "bfloat16"}[kind] + (", int8 weights" if layout == "int8" else "")
            rows.append([f"{name}, prompts of {prompts} length", milliseconds, rate, bandwidth, f"{share}%"])
    if not rows:
        return ""
    head = ["SmolLM2-135M, after the prompts' pass", "a token of each row, ms", "tokens/s", "reading, GB/s", "of the limit"]
    return DECODING.format(batch=batch) + table(head, rows) + "\n"


def report(results):
    """The whole file."""
    measured = {case: sides for case, sides in results["cases"].items() if sides["peer"]}
    cases = {case: [medians(sides[side]) for side in SIDES] for case, sides in measured.items()}
    limits = results["limits"] | {"batch": results["batch"]}
    versions = results["versions"] | {"flags": ", ".join(results["versions"]["flags"])}
    facts = versions | limits | {"cores": results["cores"], "steps": results["steps"]}
    facts["decoding"] = decoding(results["decoding"], results["batch"])
    text = TEXT.format(**facts, noise=noise(statistics.mean(results["others"])), summary=summary(cases))

    def details(case, runs):
        model = case.split("/")[0]
        stored_in_float32 = results["model_bytes"][model] / 4
        return detail(case, runs, limits, stored_in_float32, results["head_parameters"][model])

    return text + "\n".join(details(case, runs) for case, runs in measured.items())


def noise(others):
    """How much else went on."""
    share = f"Other processes took {100 * others:.0f}% of the processor's time meanwhile"
    if others < 0.03:
        return share + "."
    return share + ": the machine was not quiet, and the figures are worth less for it."


DECODING = """\
Decoding by itself (`decode_speed`, an example of the training crate): {batch} rows, and what can be read in a second measured
before and after each line, since it changes with what else uses the memory.

"""

TEXT = """\
# Benchmarks

SAPO steps of sapo-flow and of a peer, [a script](benches/peer_sapo.py) that does the same with PyTorch and
transformers: the same model, conversations, lengths, batch and number format, one after the other in turn on the same
cores. `make bench` repeats it; [bench.py](benches/bench.py) says how to choose cases, pairs of runs and time.

Measured on {date} on a machine with {cpu} ({flags}), {cores} cores and as many threads for each side.
{ours}; PyTorch {torch}, transformers {transformers}, TRL {trl}, Python {python}.
{noise}

Batch {batch}, prompts up to 256 tokens, segments of 64, prompt and answer up to 384; AdamW on both sides. Times are
medians over runs of each run's median step; a run measures steps after one that warms up, here {steps}. The time to
the first step counts from the start of the process, the model being in the page cache. Both sides do the same work: the
peer repeats the rows, the starts and the lengths of the segments that sapo-flow drew, anew for each pair of runs, and each
step learns from the pairs made in it, so that none comes twice. Tokens learned from are those of prompt and response,
chosen and rejected, without padding. Of positions sapo-flow computes those that chosen and rejected have in common once, and
logits only where a loss needs them; the peer computes padded rows, and all logits.

{summary}
Generation and learner: how much faster sapo-flow's are. Peak memory is sapo-flow's over the peer's.

## The machine's limits

Measured in the same run, through PyTorch with {threads} threads:

- matrix multiplication (2048 x 2048): {matmul_float32:.0f} GFLOPS in float32 ({matmul_float32_default:.0f} by PyTorch's
  default), {matmul_bfloat16:.0f} in bfloat16
- memory: reading {read:.1f} GB/s, copying {copy:.1f} GB/s (read and written together)

The bandwidth limit of generation is all weights read once for each token of the batch; the time that its share is taken
of includes the prompts' forward pass. The learner's share counts 6 operations for each parameter of a layer and position
computed, and for each of the head and row of logits.

{decoding}## By case

"""
