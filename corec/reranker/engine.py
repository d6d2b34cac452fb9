"""Incremental scoring: compute and cache the prefix of a window once, then score requests one at a time.

:meth:`corec.reranker.Reranker.forward` scores all requests of a window in one row, if they are known in advance. This
module caches the keys and values of the prefix (instruction, history, candidates) and, for the read-out `late`, the states
of the candidates. A further request then costs a pass over its own tokens and one dot product per candidate.
"""

from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from corec import CorecError
from corec.reranker.fused import fuse
from corec.reranker.model import Reranker
from corec.reranker.prompt import Row, collate
from corec.reranker.readout import Parts


@dataclass(frozen=True)
class Prefix:
    """Cached prefix of one window."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values [1, key heads, length, head width] of each layer
    length: int  # number of tokens
    candidates: Tensor | None  # pooled states [1, K, hidden] of the candidates for the read-out `late`, otherwise None
    k: int  # number of candidates


def merge(reranker: Reranker) -> Reranker:
    """Merge the adapter, if there is one, into the weights of the backbone, in place, and fuse its layers, for scoring only.

    Merging removes two small products and an addition from each of the seven projections of a layer. In bfloat16 the merged
    weights are rounded, which changes the scores slightly.

    Returns
    -------
    A re-ranker with the merged model, or `reranker` itself if there is nothing to merge or to fuse.
    """
    adapted = isinstance(reranker.model, PeftModel)
    if not adapted and reranker.fused is not None:
        return reranker
    if adapted:
        reranker.fused = None  # it would add the adapter to the merged weights
    model = reranker.model.merge_and_unload() if adapted else reranker.model
    model.eval()
    fused = fuse(model) if reranker.packs else None
    return replace(reranker, model=model, fused=fused) if adapted or fused is not None else reranker


@torch.inference_mode()
def prefill(reranker: Reranker, row: Row) -> Prefix:
    """Compute and cache the prefix of a window.

    Parameters
    ----------
    reranker
        The model, with or without a merged adapter.
    row
        Row of the window; its suffixes are ignored.

    Raises
    ------
    CorecError
        If the request precedes the candidates, or the architecture cannot share a prefix.
    """
    if reranker.params.request_position == "before" or not reranker.packs:
        raise CorecError(
            "No prefix can be cached between requests: set reranker.request_position to 'after', and reranker.backbone to a "
            "model whose attention takes a mask (Llama, Qwen, GPT-NeoX and most others)."
        )
    reranker.model.eval()
    batch = collate([row._replace(suffixes=[])], reranker.tokenizer.pad_token_id, reranker.params.pooling, reranker.device)
    cache = DynamicCache()
    states = reranker.states(reranker.inputs(batch), batch.positions, batch.mask, cache)
    candidates = reranker.head.pool(batch.candidates, states) if reranker.params.readout == "late" else None
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return Prefix(layers, len(row.prefix), candidates, len(row.spans))


def answer(reranker: Reranker, prefix: Prefix, row: Row, strength: float = 1.0) -> Tensor:
    """Scores [R, K] of the candidates of a cached prefix under R requests (see :func:`answer_parts`).

    `strength` is the weight of the control term (1: as trained).
    """
    parts, prior = answer_parts(reranker, prefix, row)
    return parts.scores(prior, strength)[0]


@torch.inference_mode()
def answer_parts(reranker: Reranker, prefix: Prefix, row: Row) -> tuple[Parts, Tensor | None]:
    """Parts of the scores of the candidates of a cached prefix under R requests.

    All requests are computed in one row; each attends to the prefix and to itself only.

    Parameters
    ----------
    reranker
        The model that computed the prefix.
    prefix
        Result of :func:`prefill`.
    row
        A row of the window; only its suffixes, their constraints and its prior are used.

    Returns
    -------
    The parts, of a batch of one row, and the prior [1, K] if the model has one.

    Raises
    ------
    CorecError
        If a request exceeds the maximum number of positions of the backbone.
    """
    reranker.model.eval()
    limit, longest = reranker.prompter.limit, max(map(len, row.suffixes))
    if limit and prefix.length + longest > limit:
        raise CorecError(f"A request of {longest} tokens behind {prefix.length} exceeds the backbone's {limit}: shorten it.")
    asked = row._replace(prefix=[], spans=[], soft=None)
    batch = collate([asked], reranker.tokenizer.pad_token_id, reranker.params.pooling, reranker.device)
    prefix_mask = torch.ones(1, 1, batch.ids.shape[1], prefix.length, dtype=torch.bool, device=reranker.device)
    mask = torch.cat([prefix_mask, batch.mask], dim=-1)
    cache = prefix.layers if reranker.fused else DynamicCache(prefix.layers)
    states = reranker.states(reranker.inputs(batch), batch.positions + prefix.length, mask, cache)
    if prefix.candidates is None:
        parts = reranker.index_parts(reranker.index_logits(states[-1][0, batch.answers[0]], prefix.k)[None])
    else:
        parts = reranker.head_parts(batch, states, prefix.candidates)
    return parts, batch.prior if reranker.params.prior else None
