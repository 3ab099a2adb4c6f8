"""The peer's losses: TRL's."""

import torch
import torch.nn.functional as F

IGNORED = -100  # the label of a position that no loss covers


def selective_log_softmax(logits, index):
    """log_softmax at `index`, as trl.trainer.utils has it; restated because importing TRL alone takes seconds."""
    if logits.dtype in (torch.float32, torch.float64):
        selected = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        # One row at a time: less memory at the peak.
        return selected - torch.stack([row.logsumexp(-1) for row in logits])
    rows = [F.log_softmax(row, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) for row, labels in zip(logits, index)]
    return torch.stack(rows)


def concatenated(pairs, pad):
    """Chosen rows, then rejected ones, padded on the right: ids, attention mask, labels of the responses."""
    rows = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids, mask, labels = [], [], []
    for prompt, response in rows:
        length = len(prompt) + len(response)
        padding = longest - length
        ids.append(prompt + response + [pad] * padding)
        mask.append([1] * length + [0] * padding)
        labels.append([IGNORED] * len(prompt) + response + [IGNORED] * padding)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


def forward(model, ids, mask, labels):
    """Logits, summed log-probabilities of the responses, and their numbers of tokens."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    targets = labels[:, 1:]
    covered = targets != IGNORED
    logps = selective_log_softmax(logits[:, :-1], targets.clamp(min=0)) * covered
    return logits, logps.sum(-1), covered.sum(-1)


def orpo_loss(model, batch, beta):
    """As in TRL's ORPOTrainer: NLL over prompt and chosen response, and the odds ratio. Loss and NLL."""
    ids, mask, labels = batch
    logits, logps, lengths = forward(model, ids, mask, labels)
    pairs = len(ids) // 2
    targets = ids.masked_fill(mask == 0, IGNORED)[:pairs, 1:]
    nll = F.cross_entropy(logits[:pairs, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    chosen, rejected = (logps / lengths).split(pairs)
    log_odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return nll - beta * F.logsigmoid(log_odds).mean(), nll


def summed_logps(model, batch):
    """Log-probabilities of the responses: by a head that TRL's add_fused_lm_head made, or from all logits."""
    if getattr(model, "has_trl_head", False):
        ids, mask, labels = batch
        return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs.sum(-1)
    return forward(model, *batch)[1]


def dpo_loss(model, reference_logps, batch, beta):
    """The sigmoid loss, as in TRL's DPOTrainer."""
    logps = summed_logps(model, batch)
    chosen, rejected = (logps - reference_logps).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()
