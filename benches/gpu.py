#!/usr/bin/env python3
"""Times SAPO-ORPO steps of sapo-flow and of the peer on a GPU, and writes the section "On a GPU" of BENCHMARKS.md.

    gpu.py                                      1B and 8B parameters on cuda:0, three pairs of runs each
    gpu.py --shape 1b --pairs 1 --minutes 8     one of them, what fits
    gpu.py --device cpu --shape tiny --shape tiny-lean --pairs 1 --steps 1
                                                tries the script out on a CPU; its report stays in runs/bench

Needs a release build against a libtorch with CUDA (LIBTORCH_USE_PYTORCH=1 make build), the decode_speed example of it,
nvidia-smi, the conversations of `make data`, and a Python (--python) with torch, transformers and, for the lean shapes,
bitsandbytes. Nothing is downloaded then. The GPU must be free of others' work. Models are random, with Llama's shapes:
2.5 and 16 GB on disk, in runs/bench.

Both sides do the same work, as in bench.py: what the pipeline is told as params the peer is told as options. The lean
shapes keep weights and average in bfloat16 and AdamW's state in 8 bits, compute activations twice, and let gradients go as
soon as they are used: 8 billion parameters fit into 80 GB that way.
"""

import argparse
import contextlib
import json
import os
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
BATCH = bench.BATCH

FULL = {"weights": "float32", "optimizer": "adamw", "max_grad_norm": "1.0", "gradient_checkpointing": "false",
        "release_gradients": "false"}
LEAN = {"weights": "bfloat16", "optimizer": "adamw_8bit", "max_grad_norm": "null", "gradient_checkpointing": "true",
        "release_gradients": "true"}
# Most tokens of prompt and answer, of the prompt, and of a segment: as many as the peer has memory for, whose logits are all
# there at once. And how many words prompts and answers have, at 1.3 tokens each and more.
LENGTHS = {
    "tiny": ((384, 256, 64), bench.PROMPT_WORDS, bench.ANSWER_WORDS),
    "1b": ((1024, 512, 128), (40, 250), (330, 400)),
    "8b": ((1024, 512, 128), (40, 250), (330, 400)),
}
CASES = {"tiny": ("tiny", FULL), "tiny-lean": ("tiny", LEAN), "1b": ("1b", FULL), "1b-lean": ("1b", LEAN), "8b": ("8b", LEAN)}


# What is there


def check(options, python):
    """Ends with what is missing."""
    on_gpu, complaints = options.device != "cpu", []
    for path, remedy in ((options.sapo_flow, "LIBTORCH_USE_PYTORCH=1 make build"), (options.data, "make data")):
        if not os.path.exists(path):
            complaints.append(f"{path} is not there: {remedy}")
    modules = ["torch", "transformers"] + ["bitsandbytes"] * any(CASES[case][1] is LEAN for case in options.shape)
    for module in modules:
        found = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True)
        if found.returncode != 0:
            reason = (found.stderr.strip().splitlines() or ["no reason"])[-1]
            complaints.append(f"{python} cannot import {module} ({reason}): {python} -m pip install {module}")
    if on_gpu and subprocess.run(["which", "nvidia-smi"], capture_output=True).returncode != 0:
        complaints.append("nvidia-smi is not there, which says how much memory is in use")
    if complaints:
        sys.exit("\n".join(["gpu.py lacks:", *complaints]))
    if on_gpu:
        code = "import sys, torch; torch.zeros(1, device=sys.argv[1])"
        found = subprocess.run([python, "-c", code, options.device], capture_output=True, text=True)
        if found.returncode != 0:
            sys.exit(f"PyTorch of {python} has no {options.device}: {found.stderr.strip().splitlines()[-1]}")


def parameters(folder):
    """(all, those of the layers, those of the output head) of a model, by the heads of its files."""
    sizes = {}
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            with open(os.path.join(folder, name), "rb") as file:
                tensors = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for tensor in tensors.keys() - {"__metadata__"}:
                sizes[tensor] = 1
                for size in tensors[tensor]["shape"]:
                    sizes[tensor] *= size
    head = sizes["model.embed_tokens.weight"]
    return sum(sizes.values()), sum(sizes.values()) - head - sizes.get("lm_head.weight", 0), head


def begin(case, options, python, cores):
    """The case's model and data, if they are not there; and what there is to know of it before any run."""
    shape, settings = CASES[case]
    (max_length, max_prompt_tokens, segment_tokens), prompt_words, answer_words = LENGTHS[shape]
    model, data = (os.path.join(bench.WORK, name) for name in (f"model-{shape}", f"chat-{shape}.jsonl"))
    bench.write_data(options.data, data, prompt_words, answer_words)
    if not os.path.exists(os.path.join(model, "config.json")):
        say(f"writing a random model of shape {shape}")
        subprocess.run([python, bench.RANDOM_MODEL, model, data, shape, options.device], check=True)
    params = {"model": model, "data": data, "device": options.device, "dtype": "bfloat16", "steps": options.steps + 1,
              "batch_size": BATCH, "max_length": max_length, "max_prompt_tokens": max_prompt_tokens,
              "segment_tokens": segment_tokens, "cuda_graphs": str(options.cuda_graphs).lower(), **settings}
    every, body, head = parameters(model)
    try:
        said = expected([PIPELINE, *bench.as_arguments(params)], options.device, options.sapo_flow)
    except subprocess.CalledProcessError:
        sys.exit(f"{options.sapo_flow} cannot run the pipeline on {options.device}. Where its libtorch is without CUDA, "
                 "build it against a PyTorch that has it: LIBTORCH_USE_PYTORCH=1 make build")
    decoding = []
    with failing() as failed:
        decoding += bench.decoding(options, cores, model, options.device)
        if options.device != "cpu" and decoding:
            # Work that is launched as a whole has not been tried everywhere; it may fail.
            decoding += bench.decoding(options, cores, model, options.device, "recorded")
    return {"shape": shape, "params": params, "parameters": every, "body": body, "head": head, "dry_run": said,
            "decoding": decoding, "not_decoded": failed.get("reason"), "ours": [], "peer": [], "failed": None}


# Runs


@contextlib.contextmanager
def failing():
    """Goes on where a program failed; what it gives holds the last line of its output as the reason."""
    failed = {}
    try:
        yield failed
    except SystemExit as error:
        say(str(error))
        failed["reason"] = str(error).strip().splitlines()[-1]


@contextlib.contextmanager
def watched(device):
    """What it gives is called to know the most bytes in use on the device meanwhile, less those before."""
    query = ["nvidia-smi", "-i", device, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    before = int(subprocess.check_output(query, text=True))
    process = subprocess.Popen([*query, "--loop-ms=100"], stdout=subprocess.PIPE, text=True)
    seen = [before]

    def watch():
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # of a line that is cut off at the end
                seen.append(int(line))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: (max(seen) - before) << 20
    finally:
        process.terminate()
        process.wait()
        thread.join()


def with_device_memory(limits, run):
    """A run, its peak of memory being the device's: both sides' by the same means. On a CPU it is the process's own."""
    if "uuid" not in limits:
        return run()
    with watched(limits["uuid"]) as most:
        done = run()
        return done | {"peak_bytes": most()}


def pair_of_runs(number, case, options, python, cores, limits):
    """Both sides, once. The peer may fail, for lack of memory maybe: the other side's figures are worth having."""
    params = case["params"] | {"seed": number}
    told = {name: value for name, value in params.items() if name != "cuda_graphs"}

    def ours():
        return with_device_memory(limits, lambda: bench.run_ours(options.sapo_flow, PIPELINE, params, cores))

    def peer():
        with failing() as failed:
            return with_device_memory(limits, lambda: bench.run_peer(python, "orpo", told, cores))
        case["failed"] = failed["reason"]
        return None

    return {"ours": ours()} if case["failed"] else bench.run_pair(number, ours, peer)


def measure(options, python, cores, paths):
    """All pairs of runs into the report, the cases in turn."""
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    packages = ["torch", "transformers"] + ["bitsandbytes"] * any(CASES[case][1] is LEAN for case in options.shape)
    limits = json.loads(bench.run([python, bench.LIMITS, "--device", options.device], cores)[0][-1][0])
    earlier = others(options, paths[0])
    results = {"device": options.device, "limits": limits, "steps": options.steps,
               "versions": earlier["versions"] | bench.versions(python, options, packages),
               "cases": earlier["cases"] | {case: begin(case, options, python, cores) for case in options.shape}}
    took = dict.fromkeys(options.shape, 0.0)
    for number in range(options.pairs):
        for name in options.shape:
            case = results["cases"][name]
            if len(case["ours"]) != number or time.monotonic() + took[name] > deadline:
                continue
            began = time.monotonic()
            done = pair_of_runs(number, case, options, python, cores, limits)
            case["ours"].append(done["ours"])
            steps = f"{name}, pair {number + 1}: {statistics.median(done['ours']['step']):.3f} s"
            if done.get("peer"):
                bench.check_same_work(name, done["ours"], done["peer"])
                case["peer"].append(done["peer"])
                steps += f", peer {statistics.median(done['peer']['step']):.3f} s"
            say(steps)
            took[name] = time.monotonic() - began
            write(results, paths)


def others(options, path):
    """With --go-on, what was measured before these shapes."""
    if not options.go_on:
        return {"versions": {}, "cases": {}}
    with open(path, encoding="utf-8") as file:
        earlier = json.load(file)
    if (earlier["device"], earlier["steps"]) != (options.device, options.steps):
        sys.exit(f"--go-on: {path} has {earlier['steps']} steps on {earlier['device']}")
    return earlier


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
    parser.add_argument("--shape", action="append", choices=CASES, help="may be repeated; without it 1b and 8b")
    parser.add_argument("--sapo-flow", metavar="BINARY", default=release)
    parser.add_argument("--python", help="a Python with what the peer needs; without it that of bench.py is set up")
    parser.add_argument("--data", metavar="FILE", default=os.path.join(bench.CHECKOUT, "data", "chat.jsonl"))
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs of each shape")
    parser.add_argument("--steps", type=int, default=6, help="steps measured in each run, after the first")
    parser.add_argument("--minutes", type=float, help="start no pair that would end later than that")
    parser.add_argument("--cuda-graphs", action="store_true", help="sapo-flow decodes with a token's work launched as a whole")
    parser.add_argument("--go-on", action="store_true", help="keep what was measured before of other shapes, on the same machine")
    parser.add_argument("--output", metavar="FILE", help="the report; without it BENCHMARKS.md")
    options = parser.parse_args()
    options.device = "cuda:0" if options.device == "cuda" else options.device
    options.shape = list(dict.fromkeys(options.shape or ["1b", "8b"]))
    options.sapo_flow = os.path.abspath(options.sapo_flow)
    paths = [bench.GPU_RESULTS, options.output or os.path.join(bench.CHECKOUT, "BENCHMARKS.md")]
    if options.device == "cpu":
        # What a CPU does says nothing of a GPU: it stays out of the report.
        paths = [os.path.join(bench.WORK, "gpu-tried.json"), options.output or os.path.join(bench.WORK, "gpu-tried.md")]
    python = options.python or bench.venv()
    check(options, python)
    measure(options, python, set(os.sched_getaffinity(0)), paths)
    say(f"wrote {os.path.relpath(paths[1], bench.CHECKOUT)}")


if __name__ == "__main__":
    main()
