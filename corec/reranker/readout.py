"""From states to scores, and the loss.

Read-outs (`late` and `candidate` are ours, for small backbones):

- ``index``: s_i = logit of candidate i's index token where the answer would come (the paper's).
- ``candidate``: s_i = w · h_i, with h_i the state of candidate i's line, which has seen the request.
- ``late``: s_i = (P h_i) · (Q g) / sqrt(width) + w · h_i, with g the state of the request that follows.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corec.params import RerankerParams


class Head(nn.Module):
    """What turns states into scores for the read-outs `candidate` and `late` (float32).

    States come from the last layer, or from a mix of all layers with learned weights (softmax, equal at the
    start; ELMo's scalar mix): the last layer of a language model tells of the token to come, lower ones of the
    token itself. P and Q start equal, so that the product starts as a similarity of the two states.
    """

    def __init__(self, hidden: int, layers: int, params: RerankerParams) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(layers if params.layers == "mix" else 1))
        self.relevance = nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.relevance.weight)
        if params.readout == "late":
            self.candidate = nn.Linear(hidden, params.head_width, bias=False)
            self.request = nn.Linear(hidden, params.head_width, bias=False)
            self.request.weight = nn.Parameter(self.candidate.weight.detach().clone())

    def pool(self, weights: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Mixed, pooled states [batch, N, hidden] of `states` [batch, L, hidden] a layer, by `weights` [batch, N, L]."""
        pooled = torch.stack([weights @ layer.float() for layer in states])  # [layers, batch, N, hidden]
        return torch.tensordot(self.mix.softmax(0), F.layer_norm(pooled, pooled.shape[-1:]), dims=1)

    def forward(self, candidates: Tensor, requests: Tensor) -> Tensor:
        """Scores [batch, R, K] of states [batch, K, hidden] under requests [batch, R, hidden]."""
        relevance = self.relevance(candidates).transpose(1, 2)  # [batch, 1, K]
        if not hasattr(self, "candidate"):
            return relevance.expand(-1, requests.shape[1], -1)
        ours, theirs = self.candidate(candidates), self.request(requests)
        return theirs @ ours.transpose(1, 2) / math.sqrt(ours.shape[-1]) + relevance


def ranknet(scores: Tensor, control: Tensor) -> Tensor:
    """RankNet on control scores: mean of softplus(-(s_i - s_j)) over all pairs with r_i > r_j, then over requests.

    Parameters
    ----------
    scores, control
        s and r, both [..., K]. A request all of whose r are equal has no pair and a loss of 0.
    """
    above = control[..., :, None] > control[..., None, :]
    terms = F.softplus(scores[..., None, :] - scores[..., :, None]) * above
    return (terms.sum((-1, -2)) / above.sum((-1, -2)).clamp(min=1)).mean()
