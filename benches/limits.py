#!/usr/bin/env python3
"""What this machine can do, through PyTorch: matmul rates and memory bandwidth, as one JSON object."""

import json
import time

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fastest(function, seconds=1.5):
    """Least time of a call, repeated for so many seconds."""
    function()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - began)
    return best


def main():
    """Matmul rates in GFLOPS at sizes that a learner meets, by the faster library and by PyTorch's default; and bytes a
    second of reading one array, and of copying."""
    size = 2048
    out = {}
    for name, dtype in DTYPES.items():
        left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        default = fastest(lambda: left @ right)
        # PyTorch goes to oneDNN for bfloat16, and to MKL for float32, which is not always the faster one.
        onednn = fastest(lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""))
        out[f"matmul_{name}"] = 2 * size**3 / min(default, onednn) / 1e9
        out[f"matmul_{name}_default"] = 2 * size**3 / default / 1e9
    source = torch.ones(1 << 27, dtype=torch.float32)  # 512 MiB, far above any cache
    target = torch.empty_like(source)
    out["copy"] = 2 * source.nbytes / fastest(lambda: target.copy_(source)) / 1e9
    out["read"] = source.nbytes / fastest(lambda: source.sum()) / 1e9
    print(json.dumps(out | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
