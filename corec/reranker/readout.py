"""Read-outs (from states to the parts of a score) and the training losses.

- ``index``: the logit of the index token of candidate i at the answer position (the paper's read-out).
- ``candidate``: w · h_i, where h_i is the state of candidate i's line, which attends to the request.
- ``late``: w · h_i + control(h_i, g), where g is the state of the request, which follows the candidates. The control term is
  (P h_i) · (Q g) / sqrt(width), or, with ``control: constraints``, c * sum_j sigmoid(a_1 (P h_i) · (Q g_j) / sqrt(width) + a_0)
  over the states g_j of the constraints, with c = ``control_logits`` and learned a_1 and a_0: each summand is the probability
  that the candidate meets the constraint.

With a prior p_i, the score is s_i = beta(g) p_i + w · h_i + strength * control_i; the gate beta(g) = beta_0 + v · g starts at 1.
``candidate`` and ``late`` are not in the paper; they were added for small backbones.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corec.params import RerankerParams


class Parts(NamedTuple):
    """Parts of the scores of a batch: R requests and K candidates per row, n constraints per request."""

    relevance: Tensor  # [batch, 1 or R, K]
    control: Tensor  # [batch, R, K], at strength 1
    gate: Tensor | None = None  # [batch, R], factor of the prior; None if the model has no prior
    match: Tensor | None = None  # [batch, R, n, K], log-odds that a candidate meets a constraint; with ``control: constraints``
    auxiliary: Tensor | None = None  # scores of the read-out ``candidate`` [batch, R, K] beside those of ``index``, in training

    def scores(self, prior: Tensor | None = None, strength: float | Tensor = 1.0) -> Tensor:
        """Scores [batch, R, K].

        Parameters
        ----------
        prior
            Scores of the combiner [batch, K]; required if the model has a gate.
        strength
            Weight of the control term; a number, or one for each request [batch, R, 1].
        """
        scores = self.relevance + strength * self.control
        return scores if prior is None or self.gate is None else scores + self.gate[..., None] * prior[:, None]


class Head(nn.Module):
    """Scoring head of the read-outs `candidate` and `late` (float32).

    The states are those of the last layer, or a softmax-weighted mean of all layers with learned weights, equal at
    initialisation (scalar mix of ELMo; Peters et al., 2018): the last layer of a language model encodes the next token,
    lower layers the current one. P and Q are initialised equal, so their product starts as a similarity of the two states.

    Parameters
    ----------
    hidden
        Width of the backbone's states.
    layers
        Number of hidden states of the backbone, the embeddings included.
    params
        Read-out, control term, prior, layers and `head_width`.
    """

    def __init__(self, hidden: int, layers: int, params: RerankerParams) -> None:
        super().__init__()
        self.logits = params.control_logits
        self.mix = nn.Parameter(torch.zeros(layers if params.layers == "mix" else 1))
        self.relevance = nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.relevance.weight)
        if params.readout == "late":
            self.candidate = nn.Linear(hidden, params.head_width, bias=False)
            self.request = nn.Linear(hidden, params.head_width, bias=False)
            self.request.weight = nn.Parameter(self.candidate.weight.detach().clone())
        if params.control == "constraints":
            self.scale, self.shift = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))
        if params.soft_width:
            self.soft = nn.Linear(params.soft_width, hidden, bias=False)
            nn.init.zeros_(self.soft.weight)
        if params.prior:
            self.gate = nn.Linear(hidden, 1)
            nn.init.zeros_(self.gate.weight)
            nn.init.ones_(self.gate.bias)

    def pool(self, weights: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Pool the states over tokens, apply layer normalisation, and mix the layers.

        Parameters
        ----------
        weights
            Pooling weights [batch, N, L].
        states
            One tensor [batch, L, hidden] per layer.

        Returns
        -------
        Pooled states [batch, N, hidden].
        """
        pooled = torch.stack([weights @ layer.float() for layer in states])  # [layers, batch, N, hidden]
        return torch.tensordot(self.mix.softmax(0), F.layer_norm(pooled, pooled.shape[-1:]), dims=1)

    def forward(self, candidates: Tensor, requests: Tensor, constraints: Tensor | None = None) -> Parts:
        """Parts of the scores.

        Parameters
        ----------
        candidates, requests
            States [batch, K, hidden] and [batch, R, hidden].
        constraints
            States [batch, R, n, hidden] of the constraints, zero where a request has fewer; needed for ``control: constraints``.
        """
        relevance = self.relevance(candidates).transpose(1, 2)  # [batch, 1, K]
        gate = self.gate(requests)[..., 0] if hasattr(self, "gate") else None
        if not hasattr(self, "candidate"):  # the candidates have met the request: all of their score is control
            return Parts(torch.zeros_like(relevance), relevance.expand(-1, requests.shape[1], -1), gate)
        keys = self.candidate(candidates)
        if not hasattr(self, "scale"):
            control = self.request(requests) @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
            return Parts(relevance, control, gate)
        assert constraints is not None, "the control term needs the states of the constraints"
        queries = self.request(constraints).flatten(1, 2)  # [batch, R * n, width]
        products = (queries @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])).unflatten(1, constraints.shape[1:3])
        match = self.scale * products + self.shift
        present = constraints.any(dim=-1)[..., None]  # [batch, R, n, 1]
        return Parts(relevance, self.logits * (match.sigmoid() * present).sum(dim=2), gate, match)


def ranknet(scores: Tensor, control: Tensor) -> Tensor:
    """RankNet loss (Burges et al., 2005) on control scores.

    Mean of softplus(-(s_i - s_j)) over all pairs with r_i > r_j, then mean over requests.

    Parameters
    ----------
    scores, control
        s and r, both [..., K]. A request whose r are all equal has no pair and a loss of 0.
    """
    above = control[..., :, None] > control[..., None, :]
    terms = F.softplus(scores[..., None, :] - scores[..., :, None]) * above
    return (terms.sum((-1, -2)) / above.sum((-1, -2)).clamp(min=1)).mean()


def listwise(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the softmax of `scores` to that of `targets` (both [..., K]), less the entropy of the latter.

    This is their Kullback-Leibler divergence, mean over requests: 0 if the scores equal the targets up to a constant.
    """
    wanted = targets.log_softmax(-1)
    return (wanted.exp() * (wanted - scores.log_softmax(-1))).sum(-1).mean()


def match_loss(match: Tensor, met: Tensor, present: Tensor, known: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of the log-odds `match` to the constraints met.

    Mean over the constraints of each window that are `present`, then over the windows.

    Parameters
    ----------
    match, met
        Log-odds and 0 or 1, both [windows, R, n, K].
    present
        Whether a request has the constraint [windows, R, n], 0 or 1.
    known
        Whether it is known if a candidate meets the constraint [windows, R, n, K], 0 or 1; other pairs are omitted. None: all.
    """
    each = F.binary_cross_entropy_with_logits(match, met, weight=known, reduction="none")
    terms = (each.mean(-1) if known is None else each.sum(-1) / known.sum(-1).clamp(min=1)) * present
    return (terms.sum((1, 2)) / present.sum((1, 2)).clamp(min=1)).mean()
