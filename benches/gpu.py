#!/usr/bin/env python3
"""Times SAPO-ORPO steps of sapo-flow and of the peer on a GPU, and writes the section "On a GPU" of BENCHMARKS.md.

    LIBTORCH_USE_PYTORCH=1 make bench-gpu BENCH="--python $(which python3)"
                                               builds what is missing; then 1b and 8b on cuda:0, three pairs of runs each
    gpu.py --case 1b --pairs 1 --minutes 8     one of them, what fits
    gpu.py --device cpu --case tiny --case tiny-lean --pairs 1 --steps 1
                                               tries the script out on a CPU; its report stays in runs/bench

Needs a release build against a libtorch with CUDA and its decode_speed example, which the first command makes of that
python3's PyTorch 2.11.0; nvidia-smi; the conversations of `make data`; and a Python (--python) with torch, transformers and,
for the peer with AdamW in 8 bits, bitsandbytes. Nothing is downloaded then. The GPU must be free of others' work. Models are
random, with Llama's shapes: 2.5 and 16 GB on disk, in runs/bench.

Both sides do the same work, as in bench.py: what the pipeline is told as params the peer is told as options. 1b-lean and 8b
keep weights and average in bfloat16 and AdamW's state in 8 bits, compute activations twice, and let gradients go as soon as
they are used: by sapo-flow's formulas 8 billion parameters fit into 80 GB so, and with the policy in float32 and longer rows
(8b-float32) barely; that is not among the peer's options, and sapo-flow runs alone.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time

sys.dont_write_bytecode = True

import bench  # noqa: E402
from bench import say  # noqa: E402
from gpu_report import gpu_section, placed  # noqa: E402
from memory import expected  # noqa: E402

PIPELINE = os.path.join(bench.HERE, "sapo_orpo_gpu.yaml")
RESULTS = os.path.join(bench.WORK, "gpu.json")
PACKAGES = ["torch", "transformers"]
BITSANDBYTES = "bitsandbytes==0.50.2"
WITH_CUDA = "LIBTORCH_USE_PYTORCH=1"  # what builds need
POLL_SECONDS = 0.3

FULL = {"weights": "float32", "average": "float32", "optimizer": "adamw", "max_grad_norm": "1.0",
        "gradient_checkpointing": "false", "release_gradients": "false"}
LEAN = {"weights": "bfloat16", "average": "bfloat16", "optimizer": "adamw_8bit", "max_grad_norm": "null",
        "gradient_checkpointing": "true", "release_gradients": "true"}
OURS_ALONE = ("average", "cuda_graphs")  # what the peer has no option for
# Most tokens of prompt and answer, of the prompt, and of a segment: 1024 is what the peer has memory for, whose logits are
# all there at once. And how many words prompts and answers have, at 1.3 tokens each and more.
LENGTHS = {
    "384": ((384, 256, 64), bench.PROMPT_WORDS, bench.ANSWER_WORDS),
    "1024": ((1024, 512, 128), (40, 250), (330, 400)),
    "2048": ((2048, 1024, 128), (80, 500), (660, 800)),
}
CASES = {
    "tiny": ("tiny", "384", FULL), "tiny-lean": ("tiny", "384", LEAN),
    "1b": ("1b", "1024", FULL), "1b-lean": ("1b", "1024", LEAN),
    "8b": ("8b", "1024", LEAN), "8b-float32": ("8b", "2048", LEAN | {"weights": "float32"}),
}


# What is there


def cannot_import(python, module):
    """Why a Python cannot, or None."""
    found = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True)
    return None if found.returncode == 0 else last_line(found.stderr)


def last_line(text):
    return (text.strip().splitlines() or ["no reason given"])[-1]


def check(options, python):
    """The packages that matter and are there. Ends with what is missing; the peer of some cases can be."""
    on_gpu, complaints = options.device != "cpu", []
    example = f"{WITH_CUDA} cargo build --release --workspace --example decode_speed"
    remedies = {options.sapo_flow: f"{WITH_CUDA} make build", options.data: "make data",
                bench.decode_speed(options.sapo_flow): example}
    for path, remedy in remedies.items():
        if not os.path.exists(path):
            complaints.append(f"{path} is not there: {remedy}")
    for module in PACKAGES:
        if reason := cannot_import(python, module):
            complaints.append(f"{python} cannot import {module} ({reason}): {python} -m pip install {module}")
    if on_gpu and not shutil.which("nvidia-smi"):
        complaints.append("nvidia-smi is not there, which says how much memory is in use")
    if complaints:
        sys.exit("\n".join(["gpu.py lacks:", *complaints]))
    if on_gpu:
        code = "import sys, torch; torch.zeros(1, device=sys.argv[1])"
        found = subprocess.run([python, "-c", code, options.device], capture_output=True, text=True)
        if found.returncode != 0:
            sys.exit(f"PyTorch of {python} has no {options.device}: {last_line(found.stderr)}")
    everything = [*PACKAGES, "bitsandbytes"]
    if reason := cannot_import(python, "bitsandbytes"):
        if without := [case for case in options.case if peerless(case, PACKAGES) and not peerless(case, everything)]:
            say(f"warning: {python} cannot import bitsandbytes ({reason}), so the peer is left out of "
                f"{', '.join(without)}: {python} -m pip install {BITSANDBYTES}")
        return PACKAGES
    return everything


def peerless(case, packages):
    """Why the peer cannot run a case, or None."""
    settings = CASES[case][2]
    if settings["average"] != settings["weights"]:
        return "its average has the type of its weights"
    if settings["optimizer"] == "adamw_8bit" and "bitsandbytes" not in packages:
        return "its AdamW in 8 bits is bitsandbytes', which is not there"
    return None


def begin(name, options, python, packages):
    """The case's model and data, if they are not there; and what there is to know of it before any run."""
    shape, lengths, settings = CASES[name]
    (max_length, max_prompt_tokens, segment_tokens), prompt_words, answer_words = LENGTHS[lengths]
    model, data = (os.path.join(bench.WORK, file) for file in (f"model-{shape}", f"chat-{lengths}.jsonl"))
    bench.write_data(options.data, data, prompt_words, answer_words)
    if not os.path.exists(os.path.join(model, "config.json")):
        say(f"writing a random model of shape {shape}")
        subprocess.run([python, bench.RANDOM_MODEL, model, options.data, shape, options.device], check=True)
    params = {"model": model, "data": data, "device": options.device, "dtype": "bfloat16", "steps": options.steps + 1,
              "batch_size": options.batch_size, "max_length": max_length, "max_prompt_tokens": max_prompt_tokens,
              "segment_tokens": segment_tokens, "cuda_graphs": str(options.cuda_graphs).lower(), **settings}
    every, body, head = bench.parameters(model)
    try:
        said = expected([PIPELINE, *bench.as_arguments(params)], options.device, options.sapo_flow)
    except subprocess.CalledProcessError:
        sys.exit(f"{options.sapo_flow} cannot run the pipeline on {options.device}. Where its libtorch is without "
                 f"CUDA, build it against a PyTorch that has it: {WITH_CUDA} make build")
    reason = peerless(name, packages)
    return {"shape": shape, "params": params, "parameters": every, "body": body, "head": head, "dry_run": said,
            "ours": [], "peer": [], "failed": {"peer": reason} if reason else {}}


def decode(model, options, cores):
    """What decode_speed says of a model; it may fail."""
    lines = []
    with failing() as failed:
        lines += bench.decoding(options, cores, model, options.batch_size, options.device)
        if options.device != "cpu":
            # Work that is launched as a whole has not been tried everywhere; it may fail.
            lines += bench.decoding(options, cores, model, options.batch_size, options.device, "recorded")
    return {"lines": lines, "failed": failed.get("reason")}


# The device's memory


def ask(uuid, what):
    """What nvidia-smi says of a device."""
    command = ["nvidia-smi", "-i", uuid, f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"`{' '.join(command)}` failed: {last_line(done.stdout + done.stderr)}")
    return done.stdout.strip()


def bytes_in_use(uuid):
    said = ask(uuid, "memory.used")
    try:
        return int(said) << 20
    except ValueError:
        sys.exit(f"nvidia-smi says `{said}` when asked for the memory in use; of a part of a device it knows none")


@contextlib.contextmanager
def watched(uuid):
    """What it gives is called to know the most bytes in use on the device meanwhile, less those before. Allocators keep
    what they have, so to look now and then is enough."""
    before = bytes_in_use(uuid)
    seen, trouble, ended = [], [], threading.Event()

    def watch():
        try:
            while not seen or not ended.wait(POLL_SECONDS):
                seen.append(bytes_in_use(uuid))
        except SystemExit as error:
            trouble.append(error)

    def most():
        if trouble:
            raise trouble[0]
        if max(seen, default=0) <= before:
            sys.exit(f"nvidia-smi saw no more memory in use than {before >> 20} MiB, which were before the run")
        return max(seen) - before

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def context_bytes(python, device, uuid):
    """What a process takes on a device with a tensor of one number: CUDA's own."""
    code = "import sys, time, torch; torch.zeros(1, device=sys.argv[1]); time.sleep(float(sys.argv[2]))"
    with watched(uuid) as most:
        subprocess.run([python, "-c", code, device, str(10 * POLL_SECONDS)], check=True)
        return most()


def with_device_memory(limits, run):
    """A run, its peak of memory being the device's: both sides' by the same means. On a CPU it is the process's own."""
    if "uuid" not in limits:
        return run()
    with watched(limits["uuid"]) as most:
        done = run()
        return done | {"peak_bytes": most()}


# Runs


@contextlib.contextmanager
def failing():
    """Goes on where a program failed; what it gives holds the last line of its output as the reason."""
    failed = {}
    try:
        yield failed
    except SystemExit as error:
        say(str(error))
        failed["reason"] = last_line(str(error))


def pair_of_runs(number, case, options, python, cores, limits):
    """Both sides, once. Either may fail, for lack of memory maybe: what else was measured is worth having."""
    params = case["params"] | {"seed": number}
    told = {name: value for name, value in params.items() if name not in OURS_ALONE}

    def ours():
        return with_device_memory(limits, lambda: bench.run_ours(options.sapo_flow, PIPELINE, params, cores))

    def peer():
        with failing() as failed:
            return with_device_memory(limits, lambda: bench.run_peer(python, "orpo", told, cores))
        case["failed"]["peer"] = failed["reason"]
        return None

    with failing() as failed:
        return {"ours": ours()} if "peer" in case["failed"] else bench.run_pair(number, ours, peer)
    case["failed"]["ours"] = failed["reason"]
    return {}


def begun(options, python, cores, packages, path):
    """What there is before any case: the device's limits, versions, and with --go-on other cases' figures."""
    limits = json.loads(bench.run([python, bench.LIMITS, "--device", options.device], cores)[0][-1][0])
    if "uuid" in limits:
        limits |= {"driver": ask(limits["uuid"], "driver_version"),
                   "context": context_bytes(python, options.device, limits["uuid"])}
    results = {"device": options.device, "steps": options.steps, "batch_size": options.batch_size, "limits": limits,
               "versions": bench.versions(python, options, packages), "decoding": {}, "cases": {}}
    if not options.go_on:
        return results
    with open(path, encoding="utf-8") as file:
        earlier = json.load(file)
    # One date, one commit and one device stand above all figures.
    for name, now in same_for_all(results).items():
        if now != (before := same_for_all(earlier).get(name)):
            sys.exit(f"--go-on: {path} has {name} {before}, found {now}; without --go-on all is measured anew")
    return earlier


def same_for_all(results):
    """What figures of one report have in common."""
    common = {name: results.get(name) for name in ("device", "steps", "batch_size")}
    return common | {"uuid": results["limits"].get("uuid")} | results["versions"]


def measure(options, python, cores, paths):
    """All pairs of runs into the report, the cases in turn. The results."""
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    packages = check(options, python)
    results = begun(options, python, cores, packages, paths[0])
    for name in options.case:
        case = results["cases"][name] = begin(name, options, python, packages)
        if not results["decoding"].get(case["shape"], {}).get("lines"):
            results["decoding"][case["shape"]] = decode(case["params"]["model"], options, cores)
        write(results, paths)
    took = dict.fromkeys(options.case, 0.0)
    for number in range(options.pairs):
        for name in options.case:
            case = results["cases"][name]
            if len(case["ours"]) != number or "ours" in case["failed"] or time.monotonic() + took[name] > deadline:
                continue
            began = time.monotonic()
            take(name, number, case, pair_of_runs(number, case, options, python, cores, results["limits"]))
            took[name] = time.monotonic() - began
            write(results, paths)
    return results


def take(name, number, case, done):
    """What a pair of runs came to, with the case's others."""
    if "ours" not in done:
        return
    case["ours"].append(done["ours"])
    steps = f"{name}, pair {number + 1}: {statistics.median(done['ours']['step']):.3f} s"
    if done.get("peer"):
        bench.check_same_work(name, done["ours"], done["peer"])
        case["peer"].append(done["peer"])
        steps += f", peer {statistics.median(done['peer']['step']):.3f} s"
    say(steps)


def write(results, paths):
    """At once, so that nothing is lost when the rest is cut short."""
    kept, report = paths
    with open(kept, "w", encoding="utf-8") as file:
        json.dump(results, file)
    text = ""
    with contextlib.suppress(FileNotFoundError), open(report, encoding="utf-8") as file:
        text = file.read()
    with open(report, "w", encoding="utf-8") as file:
        file.write(placed(text, gpu_section(results)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    release = os.path.join(bench.CHECKOUT, "target", "release", "sapo-flow")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu for trying this out")
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated; without it 1b and 8b")
    parser.add_argument("--sapo-flow", metavar="BINARY", default=release)
    parser.add_argument("--python", help="a Python with what the peer needs; without it one is set up from PyPI")
    parser.add_argument("--data", metavar="FILE", default=os.path.join(bench.CHECKOUT, "data", "chat.jsonl"))
    parser.add_argument("--batch-size", type=int, default=bench.BATCH, help="pairs of a step, and rows that decode")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs of each case")
    parser.add_argument("--steps", type=int, default=6, help="steps measured in each run, after the first")
    parser.add_argument("--minutes", type=float, help="start no pair that would end later than that")
    parser.add_argument("--cuda-graphs", action="store_true", help="launch a token's work as a whole")
    parser.add_argument("--go-on", action="store_true",
                        help="keep other cases' figures of the same day, commit and device")
    parser.add_argument("--output", metavar="FILE", help="the report; without it BENCHMARKS.md")
    options = parser.parse_args()
    options.device = "cuda:0" if options.device == "cuda" else options.device
    options.case = list(dict.fromkeys(options.case or ["1b", "8b"]))
    options.sapo_flow = bench.located(options.sapo_flow)
    paths = [RESULTS, options.output or os.path.join(bench.CHECKOUT, "BENCHMARKS.md")]
    if options.device == "cpu":
        # What a CPU does says nothing of a GPU: it stays out of the report.
        paths = [os.path.join(bench.WORK, "gpu-tried.json"), options.output or os.path.join(bench.WORK, "gpu-tried.md")]
    on_gpu = options.device != "cpu"
    python = bench.located(options.python) if options.python else bench.venv([BITSANDBYTES] if on_gpu else [])
    results = measure(options, python, set(os.sched_getaffinity(0)), paths)
    say(f"wrote {os.path.relpath(paths[1], bench.CHECKOUT)}")
    failed = {name: case["failed"].get("ours") for name, case in results["cases"].items()}
    if lines := [f"{name}: {reason}" for name, reason in failed.items() if reason]:
        sys.exit("\n".join(["sapo-flow failed:", *lines]))


if __name__ == "__main__":
    main()
