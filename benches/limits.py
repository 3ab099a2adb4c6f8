#!/usr/bin/env python3
"""What a device can do, through PyTorch: matmul rates and memory bandwidth, as one JSON object.

    limits.py [--device cuda:0]
"""

import argparse
import json
import time

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fastest(function, device, seconds=1.5):
    """Least time of a call, repeated for so many seconds. A GPU gets several at a time, lest it wait for the next."""
    on_gpu = device.type == "cuda"
    calls = 10 if on_gpu else 1

    def timed():
        began = time.perf_counter()
        for _ in range(calls):
            function()
        if on_gpu:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / calls

    timed()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, timed())
    return best


def matmul_rates(device, size):
    """GFLOPS by type, by the faster library and by PyTorch's default."""
    out = {}
    for name, dtype in DTYPES.items():
        left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        default = best = fastest(lambda: left @ right, device)
        if device.type == "cpu":
            # PyTorch goes to oneDNN for bfloat16, and to MKL for float32, which is not always the faster one.
            onednn = fastest(lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""), device)
            best = min(default, onednn)
        out[f"matmul_{name}"] = 2 * size**3 / best / 1e9
        out[f"matmul_{name}_default"] = 2 * size**3 / default / 1e9
    return out


def main():
    """Matmul rates in GFLOPS at sizes that a learner meets; and bytes a second of reading one array, and of copying."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cpu")
    device = parser.parse_args().device
    on_gpu = device.type == "cuda"
    rates = [matmul_rates(device, size) for size in ((4096, 8192) if on_gpu else (2048,))]
    out = {name: max(rate[name] for rate in rates) for name in rates[0]}
    # 512 MiB, or 4 GiB, far above any cache.
    source = torch.ones(1 << (30 if on_gpu else 27), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    out["copy"] = 2 * source.nbytes / fastest(lambda: target.copy_(source), device) / 1e9
    out["read"] = source.nbytes / fastest(lambda: source.sum(), device) / 1e9
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        out |= {"name": properties.name, "memory": properties.total_memory, "uuid": f"GPU-{properties.uuid}"}
        out["cuda"] = torch.version.cuda
    print(json.dumps(out | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
