#!/usr/bin/env python3
"""Counts what SAPO-ORPO steps allocate, and compares allocators: ours, parts of it, and others that are there.

    allocators.py [--runs 2] [--dtype bfloat16] [--way default ...] [--library mimalloc=PATH ...]

Needs what fast_paths.py needs, and a C++ compiler: count_allocations.cpp is compiled against libtorch's headers and loaded
before all other libraries, as the other allocators are (LD_PRELOAD). What a step takes is the difference of a long run and a
short one of the same seed, so that the start drops out. Rust's own allocations go to the mimalloc inside the program: they
are compared by nothing here, and counted only in a program that is built without `#[global_allocator]` (--sapo-flow).

Debian's libjemalloc2, libtcmalloc-minimal4 and libmimalloc2.0 are found where apt installs them. A newer mimalloc comes out of
the crate that the build has downloaded, libmimalloc-sys, in its folder c_src/mimalloc/v3:

    cc -O3 -DNDEBUG -fvisibility=hidden -ftls-model=initial-exec -shared -fPIC -DMI_SHARED_LIB -DMI_SHARED_LIB_EXPORT \\
        -DMI_MALLOC_OVERRIDE -I include src/static.c -lpthread -o libmimalloc.so
"""

import argparse
import glob
import json
import os
import statistics
import subprocess
import tempfile
from unittest import mock

import bench

SOURCE = os.path.join(bench.HERE, "count_allocations.cpp")
LIBTORCH = os.environ.get("LIBTORCH", os.path.join(bench.CHECKOUT, ".deps", "libtorch"))
SHORT, LONG = 2, 6  # steps of the two runs

# What the product's allocators are without, by way.
OURS = {
    "default": {},
    "no heap for large tensors": {"WITHOUT_HEAP": "1"},
    "glibc not told to keep memory": {"WITHOUT_MALLOPT": "1"},
    "neither: glibc as it comes": {"WITHOUT_HEAP": "1", "WITHOUT_MALLOPT": "1"},
}
# Ways that allocate differently, all others as one of them; `operator new` of other allocators passes the counter by.
COUNTED = ("default", "no heap for large tensors")
# Other allocators: where they are installed, and what makes them keep what is freed.
OTHERS = {
    "jemalloc": ("/usr/lib/*/libjemalloc.so.2", {"MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}),
    "mimalloc": ("/usr/lib/*/libmimalloc.so.*", {"MIMALLOC_PURGE_DELAY": "-1"}),
    "tcmalloc": ("/usr/lib/*/libtcmalloc_minimal.so.4", {}),
}


def ways(libraries):
    """Environments by way; `libraries`: paths of other allocators by name."""
    found = dict(OURS)
    for name, path in libraries.items():
        keeping = OTHERS[name][1] if name in OTHERS else {}
        found[f"{name}, and the heap for large tensors"] = {"LIBRARY": path}
        found[name] = {"LIBRARY": path, "WITHOUT_HEAP": "1"}
        if keeping:
            found[f"{name}, told to keep memory"] = {"LIBRARY": path, "WITHOUT_HEAP": "1"} | keeping
    return found


def installed():
    """Paths of the allocators that are where Debian puts them."""
    found = {name: sorted(glob.glob(pattern)) for name, (pattern, _) in OTHERS.items()}
    return {name: paths[0] for name, paths in found.items() if paths}


def compile_counter(folder):
    """The path of count_allocations.cpp as a library."""
    path = os.path.join(folder, "count_allocations.so")
    include = os.path.join(LIBTORCH, "include")
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-w", "-shared", "-fPIC", f"-I{include}"]
    subprocess.run([*command, SOURCE, "-o", path], check=True)
    return path


def measure(counter, way, sapo_flow, dtype, seed, folder):
    """What a step of a way comes to: counts, seconds and peak bytes."""
    counts = os.path.join(folder, "counts.json")
    values = dict(way)
    preload = [counter, *([values.pop("LIBRARY")] if "LIBRARY" in values else [])]
    cores = set(sorted(os.sched_getaffinity(0))[:2])
    runs = []
    for steps in (SHORT, LONG):
        with mock.patch.dict(os.environ, values | {"LD_PRELOAD": ":".join(preload), "COUNTS": counts}):
            pipeline, params = bench.settings("smollm2", "orpo", dtype, steps, seed)
            record = bench.run_ours(sapo_flow, pipeline, params, cores)
        with open(counts, encoding="ascii") as file:
            runs.append((record, json.load(file)))
        os.remove(counts)
    (_, short), (record, long) = runs
    found = {name: (long[name] - short[name]) / (LONG - SHORT) for name in long}
    found["step"] = statistics.median(record["step"])
    found["learner"] = statistics.median(part["learner"] for part in record["parts"])
    return found | {"peak_bytes": record["peak_bytes"]}


def medians(found):
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def print_tables(dtype, found):
    """One of counts, and one of what the ways cost."""
    print(f"\n{dtype}, a step:\n\n| way | calls of malloc | GB | tensors in their heap | GB |\n|---|---:|---:|---:|---:|")
    for way, runs in found.items():
        if way in COUNTED:
            one = medians(runs)
            calls, tensors = (f"{one[name]:,.0f}" for name in ("mallocs", "tensors"))
            print(f"| {way} | {calls} | {one['malloc_bytes'] / 1e9:.2f} | {tensors} | {one['tensor_bytes'] / 1e9:.2f} |")
    head = ["allocator", "step, s", "learner, s", "system time, s", "page faults", "peak memory, GB"]
    print("\n| " + " | ".join(head) + " |\n|---" + "|---:" * (len(head) - 1) + "|")
    for way, runs in found.items():
        one = medians(runs)
        times = " | ".join(f"{one[name]:.2f}" for name in ("step", "learner", "system"))
        print(f"| {way} | {times} | {one['faults']:,.0f} | {one['peak_bytes'] / 1e9:.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    release = os.path.join(bench.CHECKOUT, "target", "release", "sapo-flow")
    parser.add_argument("--sapo-flow", metavar="BINARY", default=release)
    parser.add_argument("--runs", type=int, default=2, help="runs of each length of each way")
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float32"], help="may be repeated")
    parser.add_argument("--library", action="append", default=[], metavar="NAME=PATH", help="another allocator")
    parser.add_argument("--way", action="append", metavar="ALLOCATOR", help="a row of the table; may be repeated")
    options = parser.parse_args()
    libraries = installed() | dict(given.split("=", 1) for given in options.library)
    chosen = {name: way for name, way in ways(libraries).items() if not options.way or name in options.way}
    if missing := set(options.way or []) - set(chosen):
        parser.error(f"{'; '.join(sorted(missing))}: there are {'; '.join(ways(libraries))}")
    with tempfile.TemporaryDirectory() as folder:
        counter = compile_counter(folder)
        for dtype in options.dtype or ["bfloat16", "float32"]:
            found = {name: [] for name in chosen}
            for seed in range(options.runs):
                for name, way in chosen.items():
                    found[name].append(measure(counter, way, options.sapo_flow, dtype, seed, folder))
            print_tables(dtype, found)


if __name__ == "__main__":
    main()
