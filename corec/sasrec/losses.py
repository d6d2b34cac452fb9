"""The losses of SASRec, over every position that has a next item."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from corec import machine
from corec.params import SasrecParams
from corec.sasrec.model import SASRec

BLOCK = 256  # positions whose scores are computed at a time


class FullSoftmax(torch.autograd.Function):
    """Mean cross-entropy against all items, with its gradients, `BLOCK` positions at a time.

    What ``cross_entropy(states @ items.T, targets)`` is. That would write all scores to memory and read them again
    several times; here a block of them stays in the cache (of up to some ten thousand items) until its share of both
    gradients is done. The three products are made in `dtype`; with bfloat16 scores and gradients are rounded to it, the
    rest is float32.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, items: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Loss of `states` [positions, hidden] against `items` [n_items, hidden], whose rows `targets` count from 0."""
        count, rows, table = len(states), states.to(dtype), items.to(dtype)
        to_states, to_items, total = torch.empty_like(rows), torch.zeros_like(items), states.new_zeros(())
        for start in range(0, count, BLOCK):
            part = slice(start, start + BLOCK)
            wanted = targets[part, None]
            scores = (rows[part] @ table.T).float()  # [block, n_items]
            scores -= scores.amax(1, keepdim=True)
            own = scores.gather(1, wanted)
            sums = scores.exp_().sum(1, keepdim=True)
            total += (sums.log() - own).sum()
            scores /= sums * count
            scores.scatter_add_(1, wanted, torch.full_like(own, -1 / count))
            shares = scores.to(dtype)
            torch.mm(shares, table, out=to_states[part])
            if dtype == items.dtype:
                to_items.addmm_(shares.T, rows[part])
            else:
                to_items += shares.T @ rows[part]
        ctx.save_for_backward(to_states.to(states.dtype), to_items)
        return total / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Scale what :meth:`forward` has found."""
        to_states, to_items = ctx.saved_tensors
        return gradients[0] * to_states, gradients[0] * to_items, None, None


def loss(model: SASRec, sequences: Tensor, params: SasrecParams) -> Tensor:
    """Mean loss over every position of right-padded `sequences` [batch, length + 1] that has a next item.

    ``ce``: cross-entropy against the full softmax over all items. ``bce``: the original's binary cross-entropy,
    each true next item against one uniform negative that is not in the same row of `sequences`. ``sampled``: cross-entropy
    against `negatives` uniform items, drawn for each row of `sequences` and shared by its positions. ``gbce``: binary
    cross-entropy against as many, the positive's probability raised to the power beta (Petrov and Macdonald, RecSys
    2023, who draw them for each position), with beta = a (t (1 - 1/a) + 1/a), a = negatives / (n_items - 1), t = `gbce_t`.
    """
    inputs, targets = sequences[:, :-1], sequences[:, 1:]
    real = targets > 0
    encoded = model(inputs)  # [batch, length, hidden]
    states, wanted = encoded[real], targets[real]  # [positions, hidden], [positions]
    n_items = model.items.num_embeddings - 1
    if params.loss == "ce" and not params.fast:
        return F.cross_entropy(model.scores(states), wanted)
    if params.loss == "ce":
        softmax = FullSoftmax.apply(states, model.items.weight[1:], wanted - 1, machine.resolve_dtype(params.dtype))
        return softmax  # type: ignore[no-any-return]
    if params.loss == "bce":
        negatives = torch.randint_like(targets, 1, n_items + 1)
        for _ in range(10):  # draw again where a negative is one of the user's own items
            own = (negatives[:, :, None] == sequences[:, None, :]).any(-1)
            if not own.any():
                break
            negatives = torch.where(own, torch.randint_like(targets, 1, n_items + 1), negatives)
        pairs = torch.stack([wanted, negatives[real]], -1)  # [positions, 2]
        logits = (model.items(pairs) * states[:, None]).sum(-1)
        return F.binary_cross_entropy_with_logits(logits, torch.tensor([1.0, 0.0]).to(logits).expand_as(logits))
    drawn = torch.randint(1, n_items + 1, (len(targets), params.negatives), device=sequences.device)
    positive = (states * model.items(wanted)).sum(-1, keepdim=True)  # [positions, 1]
    negative = (encoded @ model.items(drawn).mT)[real]  # [positions, negatives]
    rows = real.nonzero()[:, 0]
    negative = negative.masked_fill(drawn[rows] == wanted[:, None], -torch.inf)
    if params.loss == "sampled":
        return (torch.logsumexp(torch.cat([positive, negative], 1), 1) - positive[:, 0]).mean()
    share = params.negatives / (n_items - 1)
    beta = share * (params.gbce_t * (1 - 1 / share) + 1 / share)
    return (-beta * F.logsigmoid(positive[:, 0]) - F.logsigmoid(-negative).sum(1)).mean()
