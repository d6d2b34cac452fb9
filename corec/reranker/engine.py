"""Requests that come one by one: a window's prefix is computed once and kept, a request costs its own tokens.

:meth:`corec.reranker.Reranker.forward` scores all requests of a window that are known beforehand in one row. Here the
keys and values of the prefix (instruction, history, candidates) are kept, and for `late` the candidates' states too, so
that a further request is a pass over its few tokens and one small product a candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from corec import CorecError
from corec.reranker.fused import fuse
from corec.reranker.model import Reranker
from corec.reranker.prompt import Row, collate


@dataclass(frozen=True)
class Prefix:
    """What is kept of one window."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values [1, key heads, length, head width] of every layer
    length: int  # tokens
    candidates: Tensor | None  # late: states [1, K, hidden]
    k: int


def merge(reranker: Reranker) -> Reranker:
    """The re-ranker with its adapter written into the backbone's weights, in place: for scoring alone.

    That spares two small products and an addition for each of a layer's seven projections, and lets the layers be computed in
    fewer operations where the architecture is Llama's or near it (see :mod:`corec.reranker.fused`). In bfloat16 the merged
    weights are rounded, which moves scores a little.
    """
    if not isinstance(reranker.model, PeftModel):
        return reranker
    model = reranker.model.merge_and_unload().eval()
    return replace(reranker, model=model, fused=fuse(model) if reranker.packs else None)


@torch.inference_mode()
def prefill(reranker: Reranker, row: Row) -> Prefix:
    """Compute the prefix of a window's `row` (its requests are not looked at).

    Raises
    ------
    CorecError
        When the request comes before the candidates, or the architecture cannot share a prefix.
    """
    if reranker.params.request_position == "before" or not reranker.packs:
        raise CorecError(
            "Nothing can be kept between requests: set reranker.request_position to 'after', and reranker.backbone to a "
            "model whose attention obeys a mask (Llama, Qwen, GPT-NeoX and most others)."
        )
    reranker.model.eval()
    batch = collate([row._replace(suffixes=[])], reranker.tokenizer.pad_token_id, reranker.params.pooling, reranker.device)
    cache = DynamicCache()
    states = reranker.states(batch.ids, batch.positions, batch.mask, cache)
    candidates = reranker.head.pool(batch.candidates, states) if reranker.params.readout == "late" else None
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    return Prefix(kept, len(row.prefix), candidates, len(row.spans))


@torch.inference_mode()
def answer(reranker: Reranker, prefix: Prefix, suffixes: Sequence[Sequence[int]]) -> Tensor:
    """Scores [R, K] of the prefix's candidates under R more requests, given as the tokens behind the prefix.

    All R go through in one row: each sees the prefix and itself only.

    Raises
    ------
    CorecError
        When a request reaches beyond the positions that the backbone has.
    """
    reranker.model.eval()
    limit, longest = reranker.prompter.limit, max(map(len, suffixes))
    if limit and prefix.length + longest > limit:
        raise CorecError(f"A request of {longest} tokens behind {prefix.length} exceeds the backbone's {limit}: shorten it.")
    row = Row([], [], [list(suffix) for suffix in suffixes])
    batch = collate([row], reranker.tokenizer.pad_token_id, reranker.params.pooling, reranker.device)
    seen = torch.ones(1, 1, batch.ids.shape[1], prefix.length, dtype=torch.bool, device=reranker.device)
    mask = torch.cat([seen, batch.mask], dim=-1)
    kept = prefix.layers if reranker.fused else DynamicCache(prefix.layers)
    states = reranker.states(batch.ids, batch.positions + prefix.length, mask, kept)
    if prefix.candidates is None:
        return reranker.index_logits(states[-1][0, batch.answers[0]], prefix.k)
    return reranker.head(prefix.candidates, reranker.head.pool(batch.requests, states))[0]
