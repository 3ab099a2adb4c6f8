#!/usr/bin/env python3
"""What the fast paths are worth: SAPO-ORPO steps by default, with the learner's pairs padded, and with plain kernels.

    fast_paths.py [--runs 2] [--dtype bfloat16 ...]

Needs what `make run` needs, and what bench.py has made: the release build, the model and runs/bench/chat.jsonl. The ways take
turns; each run measures three steps after one that warms up. Prints a table for bounds.md.
"""

import argparse
import os
import statistics
import tempfile

import bench
from memory import PLAIN

# What a way changes in the pipeline of the bench: a text there, and what takes its place.
WAYS = {
    "default": ("", ""),
    "`layout: padded`": ("      objective:", "      layout: padded\n      objective:"),
    "`kernels: plain`": PLAIN,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sapo-flow", metavar="BINARY", default=os.path.join(bench.CHECKOUT, "target/release/sapo-flow"))
    parser.add_argument("--runs", type=int, default=2, help="runs of each way")
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float32"], help="may be repeated")
    options = parser.parse_args()
    with open(os.path.join(bench.HERE, "sapo_orpo.yaml"), encoding="utf-8") as file:
        pipeline = file.read()
    print("| dtype | way | step, s | learner, s | peak memory, GB |\n|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        changed = os.path.join(folder, "sapo_orpo.yaml")
        for dtype in options.dtype or ["bfloat16", "float32"]:
            runs = {way: [] for way in WAYS}
            for seed in range(options.runs):
                for way, (text, other) in WAYS.items():
                    assert text in pipeline, way
                    with open(changed, "w", encoding="utf-8") as file:
                        file.write(pipeline.replace(text, other, 1))
                    cores = set(sorted(os.sched_getaffinity(0))[:2])
                    _, params = bench.settings("smollm2", "orpo", dtype, 4, seed)
                    runs[way].append(bench.run_ours(options.sapo_flow, changed, params, cores))
            for way, found in runs.items():
                step = statistics.median(seconds for one in found for seconds in one["step"])
                learner = statistics.median(part["learner"] for one in found for part in one["parts"])
                peak = statistics.median(one["peak_bytes"] for one in found) / 1e9
                print(f"| {dtype} | {way} | {step:.2f} | {learner:.2f} | {peak:.1f} |", flush=True)


if __name__ == "__main__":
    main()
