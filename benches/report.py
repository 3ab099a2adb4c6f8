"""BENCHMARKS.md from what bench.py measured."""

import statistics

BYTES = {"float32": 4, "bfloat16": 2}
NAMES = {"smollm2": "SmolLM2-135M", "3m": "3M parameters, random"}
SIDES = ("ours", "peer")


def values(runs, name):
    """A figure of every measured step of all runs."""
    return [part[name] for one in runs for part in one["parts"] if name in part]


def rate(runs, tokens, seconds):
    """Tokens a second, over all measured steps."""
    return sum(values(runs, tokens)) / sum(values(runs, seconds))


def medians(runs):
    """The figures of one side of a case, by name: medians over runs of each run's median step; a run measures steps after one that warms up, here {steps}. The time to
the first step counts from the start of the process, the model being in the page cache. Both sides draw their own
segments, anew for each pair of runs, so the tokens of a step differ a little; rates hardly depend on that. Tokens
learned from are those of prompt and response, chosen and rejected, without padding; sapo-flow computes what both have
in common once, and still counts it twice.

{summary}
Tokens/s and peak memory are sapo-flow's over the peer's: below 1 is less memory.

## The machine's limits

Measured in the same run, through PyTorch with {threads} threads:

- matrix multiplication (2048 x 2048): {matmul_float32:.0f} GFLOPS in float32, {matmul_bfloat16:.0f} in bfloat16
- memory: reading {read:.1f} GB/s, copying {copy:.1f} GB/s (read and written together)

The bandwidth limit of generation is all weights read once for each token of the batch; the time that its share is taken
of includes the prompts' forward pass. The learner's share counts 6 operations a parameter and token.

## By case

"""
