"""Read-outs (from states to scores) and the training loss.

- ``index``: s_i = logit of the index token of candidate i at the answer position (the paper's read-out).
- ``candidate``: s_i = w · h_i, where h_i is the state of candidate i's line, which attends to the request.
- ``late``: s_i = (P h_i) · (Q g) / sqrt(width) + w · h_i, where g is the state of the request, which follows the candidates.

``candidate`` and ``late`` are not in the paper; they were added for small backbones.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corec.params import RerankerParams


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
        Read-out, layers and `head_width`.
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

    def forward(self, candidates: Tensor, requests: Tensor) -> Tensor:
        """Scores [batch, R, K] of candidate states [batch, K, hidden] under request states [batch, R, hidden]."""
        relevance = self.relevance(candidates).transpose(1, 2)  # [batch, 1, K]
        if not hasattr(self, "candidate"):
            return relevance.expand(-1, requests.shape[1], -1)
        keys, queries = self.candidate(candidates), self.request(requests)
        return queries @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1]) + relevance


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
