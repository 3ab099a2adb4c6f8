#!/usr/bin/env python3
"""Measures how sapo-flow's time and memory grow, and writes GROWTH.md.

    growth.py                               every curve, three times
    growth.py --quick                       fewer and smaller points, once: minutes
    growth.py --curve buffer --minutes 10   that curve; as many repetitions as fit

Needs a release build and python3, nothing else: models are random (scripts/tiny_model.py), and so are the data. Times are
taken from the timelines that `run --trace` writes, memory is the process's peak. One thing varies in each curve, and the
exponents say how what is measured depends on it: 0 is flat, 1 linear, 2 quadratic.
"""

import argparse
import json
import math
import os
import random
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Callable

sys.dont_write_bytecode = True

import bench  # noqa: E402
from report import table  # noqa: E402

sys.path.insert(0, os.path.join(bench.CHECKOUT, "scripts"))
import tiny_model  # noqa: E402

WORK = os.path.join(bench.CHECKOUT, "runs", "growth")
DATA = os.path.join(WORK, "rows.jsonl")
CACHE = os.path.join(WORK, "cache")
MODEL_VOCABULARY = 8192
CHAIN_STEPS, MANY_STEPS = 60, 240  # the engine's time is the difference: building the dataflow is in both
SPECIAL = tiny_model.SPECIAL


# Models and data: words that are a token each


def write_model(vocabulary):
    """A random Llama model with a tokenizer of so many words; its directory."""
    directory = os.path.join(WORK, f"model-{vocabulary}")
    if os.path.exists(os.path.join(directory, "config.json")):
        return directory
    os.makedirs(directory, exist_ok=True)
    words = [*SPECIAL, "user", "assistant"]
    words += [f"w{number}" for number in range(vocabulary - len(words))]
    model = {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(words)}, "unk_token": SPECIAL[0]}
    tiny_model.write_tokenizer_files(directory, {"type": "WhitespaceSplit"}, None, model)
    tiny_model.write_weights(directory, vocabulary)
    tiny_model.write_config(directory, vocabulary)
    return directory


def text(chance, words):
    """So many words that every model knows."""
    return " ".join(f"w{chance.randrange(MODEL_VOCABULARY // 2)}" for _ in range(words))


def write_chats(prompt, answer, rows=64):
    """Conversations with prompts and answers of so many words."""
    chance = random.Random(0)
    with open(DATA, "w", encoding="ascii") as file:
        for _ in range(rows):
            messages = [{"role": "user", "content": text(chance, prompt)},
                        {"role": "assistant", "content": text(chance, answer)}]
            file.write(json.dumps({"messages": messages}) + "\n")


def write_pairs(rows):
    """Preference pairs of sixty words or so, as they are: no template."""
    chance = random.Random(0)
    some = [{"prompt": text(chance, 20), "chosen": " " + text(chance, 20), "rejected": " " + text(chance, 20)}
            for _ in range(1000)]
    lines = [json.dumps(row) + "\n" for row in some]
    with open(DATA, "w", encoding="ascii") as file:
        for number in range(rows):
            # No two rows are alike.
            file.write(lines[number % 1000].replace('"prompt": "', f'"prompt": "w{number % 4000} w{number // 4000} ', 1))


# Pipelines


def sapo(steps=8, batch=4, prompt=64, answer=128, vocabulary=MODEL_VOCABULARY):
    """SAPO steps with the pipeline of `make bench`: its file, and its params."""
    write_chats(prompt, answer)
    # Beside the words stand a handful of tokens of the chat template.
    params = {"model": write_model(vocabulary), "data": DATA, "dtype": "float32", "steps": steps, "batch_size": batch,
              "max_prompt_tokens": prompt + 32, "max_length": prompt + answer + 64, "segment_tokens": 64}
    return os.path.join(bench.HERE, "sapo_orpo.yaml"), params


def pipeline(steps, nodes):
    """A pipeline of these nodes, in JSON, which is YAML."""
    path = os.path.join(WORK, "pipeline.yaml")
    run = {"steps": "${steps}", "device": "cpu", "threads": 1}
    with open(path, "w", encoding="ascii") as file:
        json.dump({"version": 1, "params": {"steps": steps}, "run": run, "nodes": nodes}, file, indent=1)
    return path, {"steps": steps}


def source(batch):
    """Pairs from the file."""
    model = write_model(MODEL_VOCABULARY)
    return {"op": "prompt_source", "with": {"path": DATA, "tokenizer": model, "batch_size": batch, "shuffle": True}}


def ending(pairs, measured=()):
    """What takes the pairs in the end, and the metrics of these nodes."""
    metrics = [f"{node}.metrics" for node in ("batches", *measured)]
    return {"batches": {"op": "batcher", "in": pairs, "with": {"batch_size": 4, "max_length": 96}},
            "metrics": {"op": "metrics_sink", "in": metrics, "with": {"tensorboard": False}}}


def buffer(capacity):
    """A replay buffer that has been full for a while, and no model."""
    write_pairs(4000)
    replay = {"op": "replay_buffer", "in": "prompts.pairs", "with": {"capacity": capacity, "draws": 4}}
    return pipeline(capacity // 4 + 1000, {"prompts": source(4), "replay": replay, **ending("replay.pairs", ["replay"])})


def rows(number):
    """One step over a file of so many rows, and no model: the time to read it."""
    write_pairs(number)
    return pipeline(1, {"prompts": source(4), **ending("prompts.pairs")})


def chain(number, link):
    """A chain of nodes that do next to nothing, by name, behind a source; and the last one's name."""
    write_pairs(1000)
    links, last = {}, "prompts.pairs"
    for place in range(number):
        links[f"link{place}"] = {**link, "in": last}
        last = f"link{place}"
    return links, last


def filters(number):
    """Operators on threads of their own, and one that gathers the metrics of all."""
    links, last = chain(number, {"op": "filter", "with": {"where": "chosen_len > 0"}})
    return pipeline(CHAIN_STEPS, {"prompts": source(4), **links, **ending(last, links)})


def buffers(number):
    """Operators on the worker, each with a view that differential dataflow maintains."""
    links, last = chain(number, {"op": "replay_buffer", "with": {"capacity": 8, "draws": 4, "sampling": "fifo"}})
    samples = {"op": "sample_sink", "in": last, "with": {"tokenizer": write_model(MODEL_VOCABULARY), "every": 1000}}
    return pipeline(CHAIN_STEPS, {"prompts": source(4), **links, "samples": samples})


# Measuring


@dataclass
class Curve:
    """How something grows."""

    title: str
    unit: str
    points: list
    quick: list
    make: Callable
    figures: list = field(default_factory=lambda: ["step", "peak"])
    note: str = ""


CURVES = {
    "batch": Curve("Batch", "rows a step", [1, 2, 4, 8, 16], [1, 4, 16], lambda x: sapo(batch=x)),
    "answer": Curve("Length of the answer", "tokens", [64, 128, 256, 512, 1024], [64, 256, 1024], lambda x: sapo(answer=x),
                    note="Segments have 64 tokens at any length. Attention grows with the square."),
    "prompt": Curve("Length of the prompt", "tokens", [64, 128, 256, 512, 1024], [64, 256, 1024],
                    lambda x: sapo(prompt=x)),
    "vocabulary": Curve("Vocabulary", "tokens", [8192, 16384, 32768, 65536, 131072], [8192, 32768],
                        lambda x: sapo(vocabulary=x), note="The model grows with it: 128 parameters a token."),
    "buffer": Curve("Replay buffer", "pairs", [100, 1000, 10_000, 100_000], [100, 1000, 10_000], buffer,
                    note="Steps without a model, once the buffer is full."),
    "rows": Curve("Rows of the data", "rows", [1000, 10_000, 100_000, 1_000_000], [1000, 10_000, 100_000], rows,
                  ["whole", "again", "peak"],
                  note="A run of one step without a model; and again, which finds the tokens of 16 MiB of data or more."),
    "filters": Curve("Nodes on threads of their own", "nodes", [10, 30, 100, 300, 1000], [10, 100, 300], filters,
                     ["step", "engine", "validate", "peak"], note="A chain of `filter`, without a model, and a sink that takes the metrics of all."),
    "buffers": Curve("Nodes on the worker", "nodes", [10, 30, 100, 300, 1000], [10, 100, 300], buffers,
                     ["step", "engine", "validate", "peak"],
                     note="A chain of `replay_buffer`, each with a view, without a model."),
}

FIGURES = {  # heading, and by how much what is measured in seconds and bytes is divided
    "step": ("step, ms", 1e-3),
    "whole": ("the run, s", 1),
    "again": ("again, s", 1),
    "engine": ("the engine, ms a step", 1e-3),
    "validate": ("validate, ms", 1e-3),
    "peak": ("peak memory, MB", 1e6),
}


def seconds_between_steps(trace):
    """From the end of each step to the end of the next, over the last thousand steps, the first three left out."""
    with open(trace, encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    ends = {}
    for event in events:
        if event.get("cat") == "step":
            step = event["args"]["step"]
            ends[step] = max(ends.get(step, 0), event["ts"] + event["dur"])
    ends = [ends[step] for step in sorted(ends)][min(3, len(ends) - 1):][-1001:]
    return [(after - before) / 1e6 for before, after in zip(ends, ends[1:])]


def measure(curve, point, options, cores):
    """The figures of one run, by name, in seconds and bytes."""
    path, params = curve.make(point)
    directory, trace = os.path.join(WORK, "run"), os.path.join(WORK, "trace.json")
    shutil.rmtree(directory, ignore_errors=True)
    run = [options.sapo_flow, "run", path, "--run-dir", directory]
    command = run + ["--trace", trace] + bench.as_arguments(params)
    shutil.rmtree(CACHE, ignore_errors=True)
    lines, whole, peak, _ = bench.run(command, cores)
    figures = {"whole": whole, "peak": peak}
    if "again" in curve.figures:
        shutil.rmtree(directory)
        figures["again"] = bench.run(command, cores)[1]
    if "step" in curve.figures:
        between = seconds_between_steps(trace)
        figures["step"] = statistics.median(between)
    if "engine" in curve.figures:
        shutil.rmtree(directory)
        more = bench.run(run + bench.as_arguments(params | {"steps": MANY_STEPS}), cores)[0]
        figures["engine"] = (bench.totals(more)["engine"] - bench.totals(lines)["engine"]) / (MANY_STEPS - CHAIN_STEPS)
    if "validate" in curve.figures:
        figures["validate"] = bench.run([options.sapo_flow, "validate", path], cores)[1]
    shutil.rmtree(directory)
    return figures


def measure_all(options):
    """All runs into the report, the points in turn, so that each sees the same course of the machine."""
    cores = set(sorted(os.sched_getaffinity(0))[:options.cores])
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    versions = bench.machine(options)  # before the report changes the checkout
    found = {name: {} for name in options.curve}
    took = {}
    for repetition in range(options.repeats):
        for name in options.curve:
            curve = CURVES[name]
            for point in curve.quick if options.quick else curve.points:
                if time.monotonic() + took.get((name, point), 0) > deadline:
                    continue
                began = time.monotonic()
                figures = measure(curve, point, options, cores)
                took[name, point] = time.monotonic() - began
                found[name].setdefault(point, []).append(figures)
                shown = ", ".join(f"{FIGURES[figure][0]} {figures[figure] / FIGURES[figure][1]:.3g}"
                                  for figure in curve.figures)
                bench.say(f"{name} {point}, {repetition + 1}: {shown}")
            with open(options.output, "w", encoding="utf-8") as file:
                file.write(report(found, versions, len(cores)))


# The report


def exponent(points):
    """The slope of a straight line through the logarithms of points: least squares."""
    logs = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(logs) < 2:
        return None
    mean_x, mean_y = (statistics.mean(values) for values in zip(*logs))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def shown(value):
    """Three digits or so."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def section(curve, runs):
    """A curve as a table: medians, and below them the exponents, of all and from point to point."""
    text = f"## {curve.title}\n\n"
    if curve.note:
        text += curve.note + "\n\n"
    points = sorted(runs)
    medians = {figure: [(x, statistics.median(run[figure] for run in runs[x])) for x in points]
               for figure in curve.figures}
    rows_shown, summary = [], []
    for place, x in enumerate(points):
        cells = [f"{x:,}".replace(",", " ")]
        for figure in curve.figures:
            scale = FIGURES[figure][1]
            values = [run[figure] / scale for run in runs[x]]
            cell = shown(medians[figure][place][1] / scale)
            if len(values) > 1:
                cell += f" ({shown(min(values))} to {shown(max(values))})"
            slope = exponent(medians[figure][place - 1 : place + 1]) if place else None
            cells += [cell, "" if slope is None else f"{slope:.2f}"]
        rows_shown.append(cells)
    for figure in curve.figures:
        slope = exponent(medians[figure])
        summary.append(f"{FIGURES[figure][0].split(',')[0]} {'-' if slope is None else f'{slope:.2f}'}")
    headings = [curve.unit] + [heading for figure in curve.figures for heading in (FIGURES[figure][0], "exponent")]
    return text + table(headings, rows_shown) + f"\nExponents over all points: {', '.join(summary)}.\n"


def report(found, versions, cores):
    """The whole file."""
    counts = {len(runs) for curve in found.values() for runs in curve.values()}
    times = "once each" if counts == {1} else f"{min(counts)} to {max(counts)} times each" if len(counts) > 1 else \
        f"{max(counts)} times each"
    times += "" if counts == {1} else "; medians, with least and greatest"
    sections = [section(CURVES[name], runs) for name, runs in found.items() if runs]
    return TEXT.format(**versions | {"flags": ", ".join(versions["flags"])}, cores=cores, times=times) + "\n".join(sections)


TEXT = """\
# Growth

How time and memory of sapo-flow grow when one thing grows and all else stays. `make bench-growth` repeats it;
[growth.py](benches/growth.py) says how to choose curves and time, and makes the random models and data.

Measured on {date} on a machine with {cpu} ({flags}), {cores} cores.
{ours}. Runs: {times}.

A model has 0.8 million parameters and 128 for each token of its vocabulary; batch 4, prompts of 64 tokens, answers of 128,
segments of 64 and a vocabulary of 8192 where nothing else is said.

An exponent says how steep the line to the point before is on a plot of logarithms: 0 is flat, 1 linear. Where fixed costs
prevail it is near 0, so that the last ones of a curve tell most. A step's time is from the end of one to the end of the
next, by the run's timeline. The engine is processor time of the dataflow itself, the difference of two runs of many steps
and of few. What is known of why a curve bends stands in [BENCHMARKS.md](BENCHMARKS.md).

"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    release = os.path.join(bench.CHECKOUT, "target", "release", "sapo-flow")
    parser.add_argument("--sapo-flow", metavar="BINARY", default=release)
    parser.add_argument("--curve", action="append", choices=CURVES, help="may be repeated; without it every curve")
    parser.add_argument("--quick", action="store_true", help="fewer points, once")
    parser.add_argument("--repeats", type=int, help="runs of each point; three without --quick")
    parser.add_argument("--minutes", type=float, help="start no run that would end later than that")
    parser.add_argument("--cores", type=int, default=2, help="cores, and threads")
    parser.add_argument("--output", default=os.path.join(bench.CHECKOUT, "GROWTH.md"))
    options = parser.parse_args()
    options.curve = options.curve or list(CURVES)
    options.repeats = options.repeats or (1 if options.quick else 3)
    options.sapo_flow = os.path.abspath(options.sapo_flow)
    if not os.path.exists(options.sapo_flow):
        sys.exit("the program is not there: `make build` makes it")
    os.makedirs(WORK, exist_ok=True)
    os.environ["SAPO_FLOW_CACHE"] = CACHE
    measure_all(options)
    bench.say(f"wrote {os.path.relpath(options.output, bench.CHECKOUT)}")


if __name__ == "__main__":
    main()
