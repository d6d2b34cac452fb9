"""Layers of the retriever SASRec (Kang and McAuley, 2018).

Sequences are padded on the right. With a causal mask, real positions never attend to padding, and the state at position t
depends on items 0 … t only, so one pass trains every position and encodes every prefix.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corec.params import SasrecParams


class Noise:
    """Dropout with masks from random bytes, seeded by the training loop before every step.

    PyTorch draws one 32-bit number per mask element on one core; one byte is enough and much faster. The share of kept elements
    is a multiple of 1/256, and kept elements are scaled by its inverse. Without `fast`, and on a GPU, PyTorch's dropout is used.

    Parameters
    ----------
    rate
        Probability that an element is dropped.
    fast
        Use random bytes on the CPU.
    """

    def __init__(self, rate: float, fast: bool) -> None:
        self.rate, self.fast, self.dropped = rate, fast, round(256 * rate)
        self.generator = np.random.Generator(np.random.SFC64(0))

    def seed(self, *seeds: int) -> None:
        """Seed the random generator, once per training step."""
        self.generator = np.random.Generator(np.random.SFC64(seeds))

    def __call__(self, states: Tensor, training: bool) -> Tensor:
        """Apply dropout to `states` (any shape) if `training`."""
        if not self.fast or states.is_cuda:
            return F.dropout(states, self.rate, training)
        if not training or not self.dropped:
            return states
        drawn = torch.from_numpy(self.generator.integers(0, 256, states.shape, dtype=np.uint8))
        return states * ((drawn >= self.dropped) * (256 / (256 - self.dropped)))


class Block(nn.Module):
    """Causal self-attention and a position-wise feed-forward layer, each after layer normalisation (pre-norm).

    Dropout applies to the output of each layer, not to the attention weights, so that the fused attention kernel can be used.
    """

    def __init__(self, params: SasrecParams, noise: Noise) -> None:
        super().__init__()
        width = params.hidden
        self.heads, self.noise = params.heads, noise
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        """Map states [batch, length, hidden] to the states after this block, of the same shape."""
        batch, length, width = states.shape
        qkv = self.qkv(self.norm_attention(states)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)  # [batch, heads, length, width]
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        states = states + self.noise(mixed, self.training)
        inner = self.noise(self.inner(self.norm_forward(states)).relu(), self.training)
        return states + self.noise(self.outer(inner), self.training)


class SASRec(nn.Module):
    """Self-attentive sequential recommendation: the score of a next item is its inner product with the current state.

    Parameters
    ----------
    n_items
        Number of items; items count from 1, and 0 is padding.
    params
        Parameters of stage 02: widths, depth, dropout.
    """

    def __init__(self, n_items: int, params: SasrecParams) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items + 1, params.hidden, padding_idx=0)
        self.positions = nn.Embedding(params.max_length, params.hidden)
        self.noise = Noise(params.dropout, params.fast)
        self.blocks = nn.ModuleList(Block(params, self.noise) for _ in range(params.layers))
        self.norm = nn.LayerNorm(params.hidden)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=params.hidden**-0.5)
        with torch.no_grad():
            self.items.weight[0] = 0

    def forward(self, sequences: Tensor) -> Tensor:
        """States [batch, length, hidden] of right-padded `sequences` [batch, length]."""
        length = sequences.shape[1]
        states = self.items(sequences) + self.positions.weight[:length]
        states = self.noise(states, self.training)
        for block in self.blocks:
            states = block(states)
        return self.norm(states)

    def scores(self, states: Tensor) -> Tensor:
        """Scores [..., n_items + 1] of all items after `states` [..., hidden]; padding gets minus infinity."""
        scores = states @ self.items.weight.T
        scores[..., 0] = -torch.inf
        return scores
