"""AdamW with 8-bit state as torchao computes it: writes adamw_8bit.json beside this file.

    pip install torch torchao==0.18.0 && python tests/torchao/adamw_8bit.py

A matrix of 4096 elements, which torchao quantises, and one of 768, which it leaves in float32, take ten steps. Gradients
are a formula in integers and powers of two, exact in float32, so that they need not be stored. Compilation is off: what
counts is the arithmetic as it is written. Bytes are in hexadecimal, float32 in little endian.
"""

import json
import os
import pathlib

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch  # noqa: E402
from torchao.optim import AdamW8bit  # noqa: E402
from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned  # noqa: E402

SHAPES = {"quantised": (64, 64), "plain": (32, 24)}
SETTINGS = {"lr": 0.01, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}
STEPS = 10
RECORDED = [1, 2, 10]


def numbers(count, step):
    """From -1 to 1, and down to a 2^-20th of that, in no order that matters."""
    index = torch.arange(count, dtype=torch.int64)
    signed = (index * 7919 + step * 104729) % 2003 - 1001
    return signed.float() / 1024 * torch.exp2(-((index * 31 + step * 17) % 21).float())


def written(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes().hex()


def main():
    parameters = {name: torch.nn.Parameter(numbers(a * b, 0).view(a, b)) for name, (a, b) in SHAPES.items()}
    optimizer = AdamW8bit(parameters.values(), **{**SETTINGS, "betas": tuple(SETTINGS["betas"])})
    steps = {}
    for step in range(1, STEPS + 1):
        for parameter in parameters.values():
            parameter.grad = numbers(parameter.numel(), step).view(parameter.shape)
        optimizer.step()
        if step in RECORDED:
            steps[step] = {name: written(parameter) for name, parameter in parameters.items()}
            state = optimizer.state[parameters["quantised"]]
            for moment in ["exp_avg", "exp_avg_sq"]:
                steps[step][f"{moment}.codes"] = written(state[moment].codes)
                steps[step][f"{moment}.scale"] = written(state[moment].scale)
    result = {
        "torch": torch.__version__,
        "shapes": SHAPES,
        "settings": SETTINGS,
        "signed": written(torch.tensor(get_qmap_signed())),
        "unsigned": written(torch.tensor(get_qmap_unsigned())),
        "steps": steps,
    }
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")


main()
