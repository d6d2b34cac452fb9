"""Textbook SASRec (Kang and McAuley, 2018): padding to the full length, explicit attention, full logits, ranks by sorting.

Reference for :mod:`corec.sasrec`: the same function of the same parameters, without optimisations.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corec.params import SasrecParams


class Block(nn.Module):
    """Attention with an explicit mask and softmax, then the feed-forward layer (pre-norm)."""

    def __init__(self, params: SasrecParams) -> None:
        super().__init__()
        width = params.hidden
        self.heads, self.dropout = params.heads, params.dropout
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        """Map states [batch, length, hidden] of one layer to those of the next."""
        batch, length, width = states.shape
        parts = self.qkv(self.norm_attention(states)).chunk(3, dim=-1)
        query, key, value = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        weights = query @ key.transpose(2, 3) / (width / self.heads) ** 0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = weights.masked_fill(future, -torch.inf).softmax(-1) @ value
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        states = states + F.dropout(mixed, self.dropout, self.training)
        inner = F.dropout(self.inner(self.norm_forward(states)).relu(), self.dropout, self.training)
        return states + F.dropout(self.outer(inner), self.dropout, self.training)


class Textbook(nn.Module):
    """Textbook SASRec. Its parameters have the names of those of :class:`corec.sasrec.SASRec`, so state dicts can be exchanged.

    Parameters
    ----------
    n_items
        Number of items; item 0 is padding.
    params
        Parameters of SASRec.
    """

    def __init__(self, n_items: int, params: SasrecParams) -> None:
        super().__init__()
        self.params = params
        self.items = nn.Embedding(n_items + 1, params.hidden, padding_idx=0)
        self.positions = nn.Embedding(params.max_length, params.hidden)
        self.blocks = nn.ModuleList(Block(params) for _ in range(params.layers))
        self.norm = nn.LayerNorm(params.hidden)

    def forward(self, sequences: Tensor) -> Tensor:
        """States [batch, length, hidden] of padded `sequences` [batch, length]."""
        states = self.items(sequences) + self.positions.weight[: sequences.shape[1]]
        states = F.dropout(states, self.params.dropout, self.training)
        for block in self.blocks:
            states = block(states)
        return self.norm(states)

    def loss(self, sequences: Tensor) -> Tensor:
        """Mean cross-entropy of the next item at every position of `sequences` [batch, length], padding ignored."""
        logits = self(sequences[:, :-1]) @ self.items.weight.T  # [batch, length, n_items + 1]
        logits[..., 0] = -torch.inf
        return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten(), ignore_index=0)


def pad_full(pieces: list[np.ndarray], length: int) -> Tensor:
    """Pad sequences on the right with 0 and stack them [sequences, length]."""
    return torch.from_numpy(np.stack([np.pad(piece, (0, length - len(piece))) for piece in pieces]))


def train_epoch(model: Textbook, optimizer: torch.optim.Optimizer, pieces: list[np.ndarray], rng: np.random.Generator) -> float:
    """Train for one epoch, in random order of the sequences.

    Parameters
    ----------
    model, optimizer
        Model and the optimiser of its parameters.
    pieces
        Item sequences, each of at most ``max_length + 1`` items.
    rng
        Generator of the order.

    Returns
    -------
    Mean loss per position.
    """
    model.train()
    order, size = rng.permutation(len(pieces)), model.params.batch_size
    total, count = 0.0, 0
    for start in range(0, len(order), size):
        batch = [pieces[place] for place in order[start : start + size]]
        value = model.loss(pad_full(batch, model.params.max_length + 1))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        positions = sum(len(piece) - 1 for piece in batch)
        total, count = total + value.item() * positions, count + positions
    return total / count


@torch.inference_mode()
def ranks(model: Textbook, inputs: list[np.ndarray], targets: np.ndarray, seen: list[np.ndarray]) -> np.ndarray:
    """Rank (1 = best) of each target in the sorted list of all unseen items.

    Parameters
    ----------
    model
        The model.
    inputs
        Latest items before each target, oldest first.
    targets
        Target items [queries].
    seen
        All items that the user has seen before each target.

    Returns
    -------
    Ranks [queries].
    """
    model.eval()
    result = []
    for items, target, excluded in zip(inputs, targets, seen, strict=True):
        scores = model(torch.from_numpy(items)[None])[0, -1] @ model.items.weight.T
        scores[0] = -torch.inf
        scores[torch.from_numpy(excluded)] = -torch.inf
        result.append((scores.argsort(descending=True) == int(target)).nonzero().item() + 1)
    return np.array(result)
