"""Losses of TRL that tests/golden does not have, on random inputs: writes losses.json beside this file.

    pip install torch transformers accelerate datasets trl==0.24.0 && python tests/trl/losses.py

TRL 0.24.0 is the last release in which all of them are functions of tensors: the unpaired losses of KTOTrainer and
BCOTrainer, and XPOTrainer's. (1.16's KTOTrainer computes the same within its step; BCO and XPO have left TRL.) Values are
float64. A case says what is asked of which objective, its inputs, the loss of each row, and gradients of their sum; one
that `follows` another begins with the state in which that one ended.
"""

import json
import pathlib
import types

import torch

# Without what trainers can do besides (vLLM, judges, ...), so that those packages are not needed.
import transformers.utils.import_utils  # noqa: E402

_is_package_available = transformers.utils.import_utils._is_package_available
transformers.utils.import_utils._is_package_available = (
    lambda _, return_version=False: (False, "N/A") if return_version else False
)
import trl.import_utils  # noqa: E402

transformers.utils.import_utils._is_package_available = _is_package_available

from trl import BCOTrainer, KTOTrainer, XPOTrainer  # noqa: E402
from trl.trainer.utils import RunningMoments  # noqa: E402

ROWS = 6
DESIRABLE = 4


def trainer(kind, **attributes):
    """A trainer without a model: its losses read nothing but settings."""
    made = object.__new__(kind)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def leaves(generator, *names):
    draw = lambda: (-5 - 40 * torch.rand(ROWS, generator=generator, dtype=torch.float64)).requires_grad_()
    return {name: draw() for name in names}


def case(objective, params, inputs, losses, numbers, **more):
    inputs_with_gradient = {name: value for name, value in inputs.items() if not name.startswith("ref_")}
    grads = torch.autograd.grad(losses.sum(), list(inputs_with_gradient.values()), allow_unused=True)
    written = lambda tensor: tensor.detach().tolist()
    return {
        "objective": objective,
        "params": params,
        "inputs": {name: written(value) for name, value in inputs.items()},
        "numbers": {name: written(value) for name, value in numbers.items()},
        "losses": written(losses),
        "grads_of_sum": {
            name: written(torch.zeros(ROWS) if grad is None else grad)
            for name, grad in zip(inputs_with_gradient, grads)
        },
        **more,
    }


def main():
    generator = torch.Generator().manual_seed(20240524)
    desirable = torch.tensor([1.0] * DESIRABLE + [0.0] * (ROWS - DESIRABLE))
    split = lambda tensor: (tensor[:DESIRABLE], tensor[DESIRABLE:])
    cases = []

    for loss_type, ours in (("kto", "kto"), ("apo_zero_unpaired", "apo_zero_unpaired")):
        for beta, good, bad in ((0.1, 1.0, 1.0), (0.4, 1.3, 0.7)):
            # The rejected response is another row's answer, for KTO's estimate of the KL term.
            names = ["chosen_logps", "ref_chosen_logps"] + ["rejected_logps", "ref_rejected_logps"] * (ours == "kto")
            inputs = leaves(generator, *names)
            if good != 1 and ours == "kto":
                # So that the KL estimate, which is no less than 0, is above it.
                inputs["ref_rejected_logps"] = inputs["ref_rejected_logps"] - 20
            kto = trainer(
                KTOTrainer,
                beta=beta,
                loss_type=loss_type,
                desirable_weight=good,
                undesirable_weight=bad,
                calculate_KL=ours == "kto",
                accelerator=types.SimpleNamespace(device="cpu", gather_for_metrics=lambda tensor: tensor),
            )
            chosen, rejected = split(inputs["chosen_logps"])
            ref_chosen, ref_rejected = split(inputs["ref_chosen_logps"])
            # TRL runs the mismatched answers without a gradient.
            kl = [inputs[name].detach() for name in names[2:]] or [None, None]
            losses = kto.kto_loss(chosen, rejected, kl[0], ref_chosen, ref_rejected, kl[1])[0]
            params = {"beta": beta, "desirable_weight": good, "undesirable_weight": bad}
            cases.append(case(ours, params, inputs, losses, {"values.desirable": desirable}))

    for beta in (0.1, 0.3):
        running = RunningMoments(types.SimpleNamespace(use_distributed=False))
        for step in range(3):
            inputs = leaves(generator, "chosen_logps", "ref_chosen_logps")
            bco = trainer(BCOTrainer, beta=beta, running=running, embedding_func=None, embedding_tokenizer=None)
            chosen, rejected = split(inputs["chosen_logps"])
            losses = bco.bco_loss(chosen, rejected, *split(inputs["ref_chosen_logps"]), None, None)[0]
            cases.append(
                case("bco", {"beta": beta}, inputs, losses, {"values.desirable": desirable}, follows=step > 0)
            )

    for alpha, beta in ((1e-5, 0.1), (0.05, 0.4)):
        names = ("chosen_logps", "ref_chosen_logps", "rejected_logps", "ref_rejected_logps")
        inputs = leaves(generator, *names)
        xpo = trainer(
            XPOTrainer, _alpha=alpha, _beta=beta, args=types.SimpleNamespace(loss_type="sigmoid"), state=None
        )
        # Whether the policy's own response is the chosen one.
        own = torch.rand(ROWS, generator=generator) < 0.5
        chosen, ref_chosen, rejected, ref_rejected = (inputs[name] for name in names)
        pick = lambda first, second: torch.where(own, first, second).unsqueeze(1)
        whole = xpo._compute_losses(
            pick(chosen, rejected), pick(rejected, chosen), pick(ref_rejected, ref_chosen), pick(ref_chosen, ref_rejected),
            own,
        )
        losses = whole[1] + whole[2]
        torch.testing.assert_close(whole[0], losses.mean())
        numbers = {"values.chosen_reference": (~own).double(), "values.rejected_reference": own.double()}
        cases.append(case("xpo", {"alpha": alpha, "beta": beta}, inputs, losses, numbers))

    path = pathlib.Path(__file__).with_name("losses.json")
    path.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    print(f"{path}: {len(cases)} cases")


if __name__ == "__main__":
    main()
