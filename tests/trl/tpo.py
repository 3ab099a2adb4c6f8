"""TPO's losses by TRL's TPOTrainer on random logits, and BEMA's averages by its BEMACallback: writes tpo.json and bema.json.

    pip install torch transformers accelerate datasets trl==1.16.0 && python tests/trl/tpo.py

TPO: three rows of prompt, chosen, rejected and gold answer. A case says the loss type and params, log-probabilities and
lengths of the pairs' and the gold answers (two lists of rows each), TRL's loss, and its gradient by each log-probability.
Values are float64. The trainer computes a loss from logits; rows of these are moved by a number each on their targets, which
gives the gradient by the row's log-probability: that of the number, over the sum of 1 - p of the targets.

BEMA: a model of one tensor takes steps; a case says the settings and the averaged weights after each step, in float32.
"""

import collections
import json
import pathlib
import types

import torch
from transformers import PretrainedConfig, PreTrainedModel

from trl import BEMACallback
from trl.experimental.tpo import TPOTrainer

ROWS, LENGTH, VOCABULARY = 3, 9, 7


class Metrics:
    """What the trainer asks of its accelerator."""

    gather = gather_for_metrics = staticmethod(lambda tensor: tensor)


def tpo(generator, loss_type, beta, alpha, **more):
    trainer = object.__new__(TPOTrainer)
    metrics = {"train": collections.defaultdict(list)}
    trainer.loss_type, trainer.beta, trainer.tpo_alpha = loss_type, beta, alpha
    trainer.label_smoothing, trainer.tpo_l_gamma = more.get("label_smoothing", 0.0), more.get("gamma", 0.5)
    trainer.model, trainer.accelerator = types.SimpleNamespace(training=True), Metrics()
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = metrics, 0, 1
    rows = 3 * ROWS
    ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)
    mask = torch.zeros(rows, LENGTH, dtype=torch.long)
    for row in range(rows):
        start = 2 + row % 2
        mask[row, start : start + 2 + int(torch.randint(4, (1,), generator=generator))] = 1
    base = 3 * torch.randn(rows, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
    moved = torch.zeros(rows, dtype=torch.float64, requires_grad=True)
    targets = torch.nn.functional.one_hot(torch.roll(ids, -1, 1), VOCABULARY)
    logits = base + moved[:, None, None] * targets
    model = type("Model", (), {"__call__": lambda self, **_: types.SimpleNamespace(logits=logits), "training": True})()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    loss = trainer._compute_loss(model, inputs, False)
    (gradient,) = torch.autograd.grad(loss, moved)
    logps = torch.log_softmax(base[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    counted = mask[:, 1:]
    share = ((1 - logps.exp()) * counted).sum(1)
    sums, lengths = (logps * counted).sum(1), counted.sum(1)
    part = lambda tensor: dict(zip(("chosen", "rejected", "gold"), (one.tolist() for one in tensor.chunk(3))))
    params = {"loss": loss_type.replace("-", "_"), "beta": beta, "alpha": alpha, **more}
    return {"params": params, "logps": part(sums), "lengths": part(lengths), "loss": loss.item(), "grads": part(gradient / share)}


class Config(PretrainedConfig):
    model_type = "one_tensor"


class OneTensor(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.post_init()


def bema(generator, steps, **settings):
    model = OneTensor(Config())
    with torch.no_grad():
        model.weight.copy_(torch.randn(4, generator=generator))
    callback = BEMACallback(**settings)
    callback.on_train_begin(None, None, None, model)
    policy, averages = [model.weight.tolist()], []
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.add_(0.1 * torch.randn(4, generator=generator))
        callback.on_step_end(None, types.SimpleNamespace(global_step=step), None, model)
        policy.append(model.weight.tolist())
        averages.append(callback.running_model.weight.tolist())
    return {"settings": settings, "policy": policy, "averages": averages}


def main():
    generator = torch.Generator().manual_seed(20240524)
    folder = pathlib.Path(__file__).parent
    cases = [
        tpo(generator, "sigmoid", 0.01, 1.0),
        tpo(generator, "sigmoid", 0.3, 0.5, label_smoothing=0.1),
        tpo(generator, "tpo-l", 2.0, 1.0, gamma=0.7),
        tpo(generator, "hinge", 0.1, 1.0),
        tpo(generator, "ipo", 0.1, 2.0),
    ]
    write = lambda cases: "[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n"
    (folder / "tpo.json").write_text(write(cases))
    averages = [
        bema(generator, 6, update_freq=1),
        bema(generator, 9, update_freq=3, ema_power=0.3, bias_power=0.7, lag=2, multiplier=0.5, min_ema_multiplier=0.6),
        bema(generator, 8, update_freq=2, update_after=3),
    ]
    (folder / "bema.json").write_text(write(averages))


main()
