#!/usr/bin/env python3
"""Times SAPO steps of sapo-flow and of the peer (peer_sapo.py), and writes BENCHMARKS.md.

    bench.py                                            every case, seven pairs
    bench.py --minutes 10 --case smollm2/orpo/float32   that case; as many pairs as fit, seven at most

Needs a release build, the model and the data of `make setup`. Both sides run one after the other, ABAB..., on the same
cores with as many threads, over the same file of conversations: answers and questions of data/chat.jsonl joined until
they have the lengths that the bench is about. Both do the same work: the peer rewrites the rows that sapo-flow drew, from
the same starts and to the same lengths, and both learn from what they wrote in that step; that the tokens are as many is
checked. The first step of a run warms up, and counts for the start-up time only.

The peer's Python is a virtual environment in the cache of scripts/setup.py, made the first time from PyPI (2 to 3 GB to
download, 5 GB kept: PyTorch comes with CUDA there); --python takes one that has torch, transformers and trl already.
"""

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time

sys.dont_write_bytecode = True

from gpu_report import kept_section, placed  # noqa: E402
from report import decoded, report  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
CHECKOUT = os.path.dirname(HERE)
PEER, LIMITS, RANDOM_MODEL = (os.path.join(HERE, name) for name in ("peer_sapo.py", "limits.py", "random_model.py"))
WORK = os.path.join(CHECKOUT, "runs", "bench")
DATA = os.path.join(WORK, "chat.jsonl")
PLAN = os.path.join(WORK, "plan.jsonl")
RESULTS = os.path.join(WORK, "results.json")
BOUNDS = os.path.join(HERE, "bounds.md")
MODELS = {
    "smollm2": os.path.join(CHECKOUT, "models", "smollm2-135m-instruct"),
    "3m": os.path.join(WORK, "model-3m"),
}
CASES = [f"{model}/{objective}/{dtype}" for model in MODELS for objective in ("orpo", "dpo")
         for dtype in ("float32", "bfloat16")]
REQUIREMENTS = ["torch==2.11.0", "transformers==5.23.0", "trl==1.16.0", "numpy"]

BATCH = 4
WHOLE_RUN = ("ema", "reference", "engine")  # parts of a step that are known as means over a run
ANSWER_WORDS = (110, 150)  # 1.3 tokens a word: 128 tokens and more
PROMPT_WORDS = (20, 120)
ROWS = 256


def say(message):
    print(f"bench: {message}", flush=True)


def venv(more=()):
    """A Python that has what the peer needs, and `more`."""
    sys.path.insert(0, os.path.join(CHECKOUT, "scripts"))
    from setup import shared_cache
    from wheels import scratch

    wanted = [*REQUIREMENTS, *more]
    with shared_cache() as cache:
        folder = os.path.join(cache, "bench-" + "-".join([*REQUIREMENTS[:3], *more]).replace("==", "-"))
        python = os.path.join(folder, "bin", "python")
        ready = os.path.join(folder, "ready")
        if not os.path.exists(ready):
            say(f"installing {', '.join(wanted)} from PyPI into the cache: 2 to 3 GB to download")
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            with scratch(cache) as temporary:
                environment = os.environ | {"TMPDIR": temporary}
                pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-cache-dir"]
                subprocess.run(pip + wanted, check=True, env=environment)
            with open(ready, "w", encoding="ascii"):
                pass
    return python


# What both sides read


def write_data(source, target=DATA, prompt_words=PROMPT_WORDS, answer_words=ANSWER_WORDS):
    """Conversations with long answers and prompts of many lengths, joined from short ones."""
    with open(source, encoding="utf-8") as file:
        turns = [json.loads(line)["messages"][-2:] for line in file]
    chance = random.Random(0)
    os.makedirs(WORK, exist_ok=True)
    with open(target, "w", encoding="utf-8") as file:
        for _ in range(ROWS):
            messages, words, wanted = [], 0, chance.randint(*prompt_words)
            while words < wanted:
                turn = chance.choice(turns)
                words += sum(len(message["content"].split()) for message in turn)
                messages += turn
            if messages:
                messages.pop()
            answer, wanted = [], chance.randint(*answer_words)
            while len(answer) < wanted:
                answer += chance.choice(turns)[-1]["content"].split()
            messages.append({"role": "assistant", "content": " ".join(answer)})
            file.write(json.dumps({"messages": messages}) + "\n")


def model_bytes(folder):
    """Bytes of the weights; reading them also brings them into the page cache."""
    total = 0
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            with open(os.path.join(folder, name), "rb") as file:
                while chunk := file.read(1 << 24):
                    total += len(chunk)
    return total


def parameters(folder):
    """(all, those of the layers, those of the output head) of a model, by the heads of its files."""
    sizes = {}
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            with open(os.path.join(folder, name), "rb") as file:
                tensors = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            sizes |= {tensor: math.prod(tensors[tensor]["shape"]) for tensor in tensors.keys() - {"__metadata__"}}
    head = sizes["model.embed_tokens.weight"]
    return sum(sizes.values()), sum(sizes.values()) - head - sizes.get("lm_head.weight", 0), head


# Runs


def run(command, cores):
    """(lines with the seconds at which they came, seconds until the end, peak bytes, CPU seconds) of a process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(len(cores)), "HF_HUB_OFFLINE": "1"}
    environment["RUST_LOG"] = "warn,sapo_flow_training=debug"  # what an update takes
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=CHECKOUT,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    lines = [(line.rstrip("\n"), time.perf_counter() - began) for line in process.stdout]
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    took = time.perf_counter() - began
    if process.returncode != 0:
        output = "\n".join(line for line, _ in lines[-30:])
        sys.exit(f"this failed: {' '.join(command)}\n{output}")
    return lines, took, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def record(done, steps, peak, cpu, parts):
    """What a run came to. `done`: the second at which each step was done; `parts`: of each step after the first."""
    if len(done) != steps:
        sys.exit(f"expected {steps} steps in the output of a run, found {len(done)}")
    return {
        "first_step": done[0],
        "step": [after - before for before, after in zip(done, done[1:])],
        "peak_bytes": peak,
        "cpu_seconds": cpu,
        "parts": parts,
    }


def settings(model, objective, dtype, steps, seed):
    """A case's pipeline, and the params of a run of it."""
    params = {"model": MODELS[model], "data": DATA, "dtype": dtype, "steps": steps, "batch_size": BATCH, "seed": seed}
    return os.path.join(HERE, f"sapo_{objective}.yaml"), params


def as_arguments(params):
    """Params as sapo-flow takes them."""
    return [word for name, value in params.items() for word in ("-S", f"{name}={value}")]


def totals(lines):
    """Seconds of all steps by node, and the engine's, from the table at a run's end: "ema      0.3   2%"."""
    rows = (re.fullmatch(r"(?:the )?(\S+) +([\d.]+) +[\d.]+%", line) for line, _ in lines)
    return {row[1]: float(row[2]) for row in rows if row}


def run_ours(sapo_flow, pipeline, params, cores):
    """A run of sapo-flow: times of steps from its lines, of their parts from its metrics; and what it drew, in PLAN."""
    directory, steps = os.path.join(WORK, "run"), params["steps"]
    shutil.rmtree(directory, ignore_errors=True)
    command = [sapo_flow, "run", pipeline, "--run-dir", directory]
    lines, _, peak, cpu = run(command + as_arguments(params), cores)
    done = [seconds for line, seconds in lines if line.startswith("step ")]
    with open(os.path.join(directory, "metrics.jsonl"), encoding="utf-8") as file:
        metrics = [json.loads(line) for line in file]
    whole_run = {name: seconds / steps for name, seconds in totals(lines).items() if name in WHOLE_RUN}
    parts = []
    for before, line, done_by_learner in zip(metrics, metrics[1:], learner_steps(lines)[1:]):
        tokens = line["num_tokens"] - before["num_tokens"]
        generated = line["segments/generated_tokens"]
        learner = tokens / line["tokens/s"]
        parts.append({
            "generated_tokens": generated, "generation": generated / line["segments/tokens/s"],
            "tokens": tokens, "learner": learner, **done_by_learner,
            "forward_backward": learner - done_by_learner["optimizer"],
            **whole_run,
        })
    os.replace(os.path.join(directory, "samples.jsonl"), PLAN)
    shutil.rmtree(directory)
    return record(done, steps, peak, cpu, parts)


def learner_steps(lines):
    """What the learner says of each step: positions that went through the model, rows of logits, and the update's time."""
    steps, work = [], {"positions": 0, "logit_rows": 0}
    for line, _ in lines:
        if found := re.search(r"forward and backward pass positions=(\d+) logit_rows=(\d+)", line):
            work = {"positions": work["positions"] + int(found[1]), "logit_rows": work["logit_rows"] + int(found[2])}
        elif found := re.search(r"weights updated step=\d+(?: seconds=([0-9.e-]+))?", line):
            # Where gradients are released, updates are part of the backward pass.
            steps.append(work | {"optimizer": float(found[1] or 0)})
            work = {"positions": 0, "logit_rows": 0}
    return steps


def run_peer(python, objective, params, cores):
    """A run of the peer, which prints what each step and its parts took, and does what sapo-flow's last run did."""
    command = [python, PEER, "--objective", objective, "--plan", PLAN]
    for name, value in params.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    lines, _, peak, cpu = run(command, cores)
    lines = [(json.loads(line), seconds) for line, seconds in lines if line.startswith('{"step"')]
    done = [seconds for _, seconds in lines]
    parts = [line | {"learner": line["forward_backward"] + line["optimizer"]} for line, _ in lines[1:]]
    return record(done, params["steps"], peak, cpu, parts)


def busy_seconds():
    """CPU seconds that all processes of the machine have taken, and those its host took away."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def begun(options, python, cores):
    """What there is before any run is measured: nothing, or with --go-on what was measured last."""
    if options.go_on:
        with open(RESULTS, encoding="utf-8") as file:
            results = json.load(file)
        for name, given in (("steps", options.steps), ("cores", len(cores))):
            if results[name] != given:
                sys.exit(f"--go-on: {RESULTS} has {name} {results[name]}, found {given}")
        return results
    lines, *_ = run([python, LIMITS], cores)
    return {
        "limits": json.loads(lines[-1][0]),
        "decoding": decoding(options, cores, MODELS["smollm2"], BATCH),
        "model_bytes": {name: model_bytes(folder) for name, folder in MODELS.items()},
        "head_parameters": {name: parameters(folder)[2] for name, folder in MODELS.items()},
        "versions": versions(python, options),
        "cores": len(cores),
        "steps": options.steps,
        "batch": BATCH,
        "others": [],  # share of the processor's time that other processes took, by pair
        "cases": {case: {"ours": [], "peer": []} for case in options.case},
    }


def run_pair(pair, ours, peer):
    """Both sides, one after the other. Each is the first of every other pair, lest one always finds the machine as the other
    left it. For the peer to be the first, a run that does not count finds out what there is to do."""
    order = ["ours", "peer"] if pair % 2 == 0 else ["plan", "peer", "ours"]
    return {side: peer() if side == "peer" else ours() for side in order}


def measure(options, python):
    """All pairs of runs into the report, the cases in turn, so that each sees the same course of the machine."""
    cores = set(sorted(os.sched_getaffinity(0))[:options.cores])
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    results = begun(options, python, cores)
    took = dict.fromkeys(options.case, 0.0)
    for pair in range(options.pairs):
        for case, runs in results["cases"].items():
            if case not in took or len(runs["peer"]) != pair or time.monotonic() + took[case] > deadline:
                continue
            model, objective, dtype = case.split("/")
            # Each pair of runs has a seed of its own: other rows, and other places in their answers.
            pipeline, params = settings(model, objective, dtype, options.steps + 1, pair)
            began, busy = time.monotonic(), busy_seconds()
            done = run_pair(pair, lambda: run_ours(options.sapo_flow, pipeline, params, cores),
                            lambda: run_peer(python, objective, params, cores))
            check_same_work(case, done["ours"], done["peer"])
            for side, those in runs.items():
                those.append(done[side])
            took[case] = time.monotonic() - began
            own = sum(one["cpu_seconds"] for one in done.values())
            results["others"].append(max(0.0, busy_seconds() - busy - own) / (took[case] * os.cpu_count()))
            ours, peer = (statistics.median(runs[side][-1]["step"]) for side in ("ours", "peer"))
            say(f"{case}, pair {pair + 1}: {ours:.2f} s, peer {peer:.2f} s, ratio {peer / ours:.2f}")
            # At once, so that nothing is lost when the rest is cut short.
            with open(RESULTS, "w", encoding="utf-8") as file:
                json.dump(results, file)
            write_report(results, options.output)


def decode_speed(sapo_flow):
    """Where the example of the training crate is, if it was built."""
    return os.path.join(os.path.dirname(sapo_flow), "examples", "decode_speed")


def decoding(options, cores, model, rows, *more):
    """What decode_speed prints of a model and a batch of so many rows, if it was built. `more` of its arguments."""
    program = decode_speed(options.sapo_flow)
    if not os.path.exists(program):
        say(f"{program} is not there, so decoding by itself is left out: cargo build --release --workspace --examples")
        return []
    lines = [line for line, _ in run([program, model, str(rows), str(len(cores)), *more], cores)[0]]
    decoded(lines)  # ends here, and not in a report after an hour, where that does not understand them
    return lines


def check_same_work(case, ours, peer):
    """Both sides must have written and learned from as many tokens in every step."""
    work = [[(part["generated_tokens"], part["tokens"]) for part in side["parts"]] for side in (ours, peer)]
    if work[0] != work[1]:
        sys.exit(f"{case}: tokens written and learned from by step: {work[0]} by sapo-flow, {work[1]} by the peer")


def write_report(results, path):
    """What was measured, and what bounds it, which people have found out with profiles. gpu.py's section stays as it is."""
    with open(BOUNDS, encoding="utf-8") as file:
        text = report(results) + "\n" + file.read()
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        text = placed(text, kept_section(file.read()))
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def versions(python, options, packages=("torch", "transformers", "trl")):
    """What ran, and on what."""
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]), sys.version.split()[0])"
    found = subprocess.check_output([python, "-c", code, *packages], text=True).split()
    return machine(options) | dict(zip([*packages, "python"], found))


def located(program):
    """Where a program is, as runs are in another folder: in PATH if it is a bare name."""
    return os.path.abspath(shutil.which(program) or program)


def machine(options):
    """The day, the processor and what it can do, and sapo-flow's version."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpuinfo = file.read()
    field = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in cpuinfo.splitlines() if ":" in line}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in field.get("flags", "").split()]
    ours = subprocess.check_output([options.sapo_flow, "--version"], text=True).strip()
    if options.sapo_flow.startswith(CHECKOUT + os.sep):
        with contextlib.suppress(subprocess.CalledProcessError, OSError):
            describe = ["git", "describe", "--always", "--dirty"]
            ours += f" (commit {subprocess.check_output(describe, text=True, cwd=CHECKOUT).strip()})"
    return {"date": time.strftime("%Y-%m-%d"), "cpu": field.get("model name", "unknown"), "flags": wide, "ours": ours}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    release = os.path.join(CHECKOUT, "target", "release", "sapo-flow")
    parser.add_argument("--sapo-flow", metavar="BINARY", default=release)
    parser.add_argument("--python", help="a Python with torch, transformers and trl; without it one is set up")
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated; without it every case")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs of each case")
    parser.add_argument("--steps", type=int, default=3, help="steps measured in each run, after the first")
    parser.add_argument("--minutes", type=float, help="start no pair that would end later than that")
    parser.add_argument("--cores", type=int, default=2, help="cores, and threads, of each side")
    parser.add_argument("--go-on", action="store_true", help="add pairs to what was measured last, by the same program")
    parser.add_argument("--report", action="store_true", help="measure nothing: write what was measured last anew")
    parser.add_argument("--output", default=os.path.join(CHECKOUT, "BENCHMARKS.md"))
    options = parser.parse_args()
    if options.report:
        with open(RESULTS, encoding="utf-8") as file:
            return write_report(json.load(file), options.output)
    options.case = options.case or CASES
    options.sapo_flow = located(options.sapo_flow)
    if not os.path.exists(os.path.join(MODELS["smollm2"], "config.json")) or not os.path.exists(options.sapo_flow):
        sys.exit("the model or the program is not there: `make setup` brings both")
    python = located(options.python) if options.python else venv()
    write_data(os.path.join(CHECKOUT, "data", "chat.jsonl"))
    if not os.path.exists(os.path.join(MODELS["3m"], "config.json")):
        subprocess.run([python, RANDOM_MODEL, MODELS["3m"], DATA], check=True)
    subprocess.run([python, PEER, "--check", os.path.join(CHECKOUT, "tests", "golden")], check=True)
    measure(options, python)
    say(f"wrote {os.path.relpath(options.output, CHECKOUT)}")


if __name__ == "__main__":
    main()
