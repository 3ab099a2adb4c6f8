#!/usr/bin/env python3
"""Compares what `run --dry-run` says of memory with what runs take, and prints a table.

    memory.py                                  the two SAPO pipelines with the small settings in their headers
    memory.py -S dtype=float32 sapo_orpo       one of them, with values of its params besides
    memory.py -S epochs=5 sapo_orpo+plain      with what is no param: plain kernels, five steps
    memory.py -S gradient_checkpointing=true sapo_orpo+lean
                                               AdamW in 8 bits, weights in bfloat16, gradients released

Needs what `make run` needs: a release build, the model and the data. A run takes its memory by itself, whatever else the
machine does.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SAPO_FLOW = os.path.join(CHECKOUT, "target", "release", "sapo-flow")
# What takes libtorch's operators in a pipeline: a text there, and what takes its place.
PLAIN = ("\nrun:\n", "\nrun:\n  kernels: plain\n")
# What a word after a pipeline's name changes there, likewise.
EDITS = {
    "lean": [("optimizer: adamw\n", "optimizer: adamw_8bit\n      weights: bfloat16\n      release_gradients: true\n"),
             ("      max_grad_norm: 1.0\n", "")],
    "plain": [PLAIN, ('  epochs: "${epochs}"\n', '  steps: "${epochs}"\n')],
}
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def small_settings(pipeline):
    """The options for a small machine in a pipeline's header."""
    with open(pipeline) as file:
        return shlex.split(next(line for line in file if line.startswith("# small machine: "))[len("# small machine: ") :])


def edited(name, folder):
    """The path of a pipeline: one of the repository's, or of its edited copy."""
    name, *edits = name.split("+")
    path = os.path.join(CHECKOUT, "pipelines", f"{name}.yaml")
    if not edits:
        return path
    with open(path, encoding="utf-8") as file:
        text = file.read()
    for old, new in (pair for edit in edits for pair in EDITS[edit]):
        assert old in text, old
        text = text.replace(old, new, 1)
    text = text.replace("include: ../", f"include: {CHECKOUT}/")
    copy = os.path.join(folder, f"{name}.yaml")
    with open(copy, "w", encoding="utf-8") as file:
        file.write(text)
    return copy


def expected(arguments, device="cpu", sapo_flow=SAPO_FLOW):
    """Bytes that a dry run expects on a device."""
    said = subprocess.run([sapo_flow, "run", *arguments, "--dry-run"], cwd=CHECKOUT, check=True, text=True, stdout=-1)
    number, unit = re.search(rf"^memory +{device}: about ([\d.]+) (\w+)", said.stdout, re.M).groups()
    return float(number) * UNITS[unit]


def taken(arguments):
    """Bytes that the run has resident at most."""
    with tempfile.TemporaryDirectory() as directory:
        run_directory = os.path.join(directory, "run")
        process = subprocess.Popen([SAPO_FLOW, "run", *arguments, "--run-dir", run_directory, "-q"], cwd=CHECKOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"memory.py: the run of {arguments[0]} failed")
    return usage.ru_maxrss * 1024


def main():
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("-h", "--help"):
        sys.exit(__doc__)
    values, names = [], []
    while arguments:
        argument = arguments.pop(0)
        if argument == "-S" and arguments:
            values.append(arguments.pop(0))
        else:
            names.append(argument)
    print("| pipeline | settings | dry run | run | dry run / run |\n|---|---|---|---|---|")
    for name in names or ["sapo_orpo", "sapo_dpo"]:
        with tempfile.TemporaryDirectory() as folder:
            pipeline = edited(name, folder)
            given = [option for value in values for option in ("-S", value)]
            replaced = {value.split("=")[0] for value in values}
            small = small_settings(pipeline)
            kept = [option for option in zip(small[::2], small[1::2]) if option[1].split("=")[0] not in replaced]
            options = [pipeline, *(part for option in kept for part in option), *given]
            said, took = expected(options), taken(options)
        shown = [name, ", ".join(values) or "small", f"{said / 2**30:.2f} GiB", f"{took / 2**30:.2f} GiB"]
        print("| " + " | ".join([*shown, f"{said / took:.2f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
