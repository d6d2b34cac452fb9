"""Losses of SASRec, averaged over all positions that have a next item."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from corec import machine
from corec.params import SasrecParams
from corec.sasrec.model import SASRec

BLOCK = 256  # positions per block


class FullSoftmax(torch.autograd.Function):
    """Mean cross-entropy against all items, computed with its gradients `BLOCK` positions at a time.

    Equal to ``cross_entropy(states @ items.T, targets)``, which writes all scores to memory and reads them several times. Here
    the scores of a block stay in the cache (with up to about ten thousand items) until their part of both gradients is
    computed. The three products use `dtype`; with bfloat16, scores and gradients are rounded to it, and the rest is float32.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, items: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute the loss and both gradients.

        Parameters
        ----------
        states
            States [positions, hidden].
        items
            Item table [n_items, hidden], without the padding row.
        targets
            Row of the next item in `items` [positions], counted from 0.
        dtype
            Number format of the products.
        """
        count, rows, table = len(states), states.to(dtype), items.to(dtype)
        to_states, to_items, total = torch.empty_like(rows), torch.zeros_like(items), states.new_zeros(())
        for start in range(0, count, BLOCK):
            part = slice(start, start + BLOCK)
            target = targets[part, None]
            scores = (rows[part] @ table.T).float()  # [block, n_items]
            scores -= scores.amax(1, keepdim=True)
            target_scores = scores.gather(1, target)
            sums = scores.exp_().sum(1, keepdim=True)
            total += (sums.log() - target_scores).sum()
            scores /= sums * count
            scores.scatter_add_(1, target, torch.full_like(target_scores, -1 / count))
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
        """Scale the gradients computed in :meth:`forward`."""
        to_states, to_items = ctx.saved_tensors
        return gradients[0] * to_states, gradients[0] * to_items, None, None


def loss(model: SASRec, sequences: Tensor, params: SasrecParams) -> Tensor:
    """Mean loss over the positions of right-padded `sequences` that have a next item.

    - ``ce``: cross-entropy against the full softmax over all items.
    - ``bce``: binary cross-entropy of the original, each next item against one uniform negative that is not in
      its row (drawn again up to ten times).
    - ``sampled``: cross-entropy against `negatives` uniform items, drawn for each row and shared by its positions.
    - ``gbce``: binary cross-entropy against as many, with the probability of the positive raised to the power
      beta = a (t (1 - 1/a) + 1/a), a = negatives / (n_items - 1), t = `gbce_t` (gSASRec, Petrov and Macdonald, RecSys 2023, who
      draw the negatives for each position).

    Parameters
    ----------
    model
        The retriever.
    sequences
        Items [batch, length + 1]; 0 is padding.
    params
        Parameters of stage 02.
    """
    inputs, targets = sequences[:, :-1], sequences[:, 1:]
    real = targets > 0
    encoded = model(inputs)  # [batch, length, hidden]
    states, next_items = encoded[real], targets[real]  # [positions, hidden], [positions]
    n_items = model.items.num_embeddings - 1
    if params.loss == "ce" and not params.fast:
        return F.cross_entropy(model.scores(states), next_items)
    if params.loss == "ce":
        softmax = FullSoftmax.apply(states, model.items.weight[1:], next_items - 1, machine.resolve_dtype(params.dtype))
        return softmax  # type: ignore[no-any-return]
    if params.loss == "bce":
        negatives = torch.randint_like(targets, 1, n_items + 1)
        for _ in range(10):  # draw again the negatives that are in their row
            clash = (negatives[:, :, None] == sequences[:, None, :]).any(-1)
            if not clash.any():
                break
            negatives = torch.where(clash, torch.randint_like(targets, 1, n_items + 1), negatives)
        pairs = torch.stack([next_items, negatives[real]], -1)  # [positions, 2]
        logits = (model.items(pairs) * states[:, None]).sum(-1)
        return F.binary_cross_entropy_with_logits(logits, torch.tensor([1.0, 0.0]).to(logits).expand_as(logits))
    drawn = torch.randint(1, n_items + 1, (len(targets), params.negatives), device=sequences.device)
    positive = (states * model.items(next_items)).sum(-1, keepdim=True)  # [positions, 1]
    negative = (encoded @ model.items(drawn).mT)[real]  # [positions, negatives]
    rows = real.nonzero()[:, 0]
    negative = negative.masked_fill(drawn[rows] == next_items[:, None], -torch.inf)
    if params.loss == "sampled":
        return (torch.logsumexp(torch.cat([positive, negative], 1), 1) - positive[:, 0]).mean()
    share = params.negatives / (n_items - 1)
    beta = share * (params.gbce_t * (1 - 1 / share) + 1 / share)
    return (-beta * F.logsigmoid(positive[:, 0]) - F.logsigmoid(-negative).sum(1)).mean()
