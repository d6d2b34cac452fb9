"""Properties of a backbone that are tried on a few tokens rather than looked up by its name."""

import math
from typing import Any

import torch

from corec.reranker.prompt import Row, collate


def positions(config: Any, packs: bool) -> int | None:
    """Positions that a prompt may take; a packed one must fit into a sliding window, which its mask knows nothing of."""
    bounds = [getattr(config, "max_position_embeddings", None), getattr(config, "sliding_window", None) if packs else None]
    return min((bound for bound in bounds if bound), default=None)


@torch.inference_mode()
def can_pack(model: Any) -> bool:
    """Whether two requests behind one prefix get, in one row of `model`, the states that each gets alone.

    It takes an architecture whose attention obeys a mask of rows by columns and counts positions as it is told: not one
    with recurrent layers, with a sliding window, or with positions of its own (ALiBi). Tried on a dozen tokens.
    """
    if set(getattr(model.config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return False
    row = Row([5, 6, 7, 8, 9], [(0, 5)], [[10, 11, 12], [13, 14]])
    batch = collate([row], 0, "end", next(model.parameters()).device)
    alone = torch.tensor([row.prefix + row.suffixes[1]], device=batch.ids.device)
    try:
        packed = model.base_model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False)
    except (TypeError, ValueError, RuntimeError):
        return False
    one = model.base_model(input_ids=alone, use_cache=False).last_hidden_state[0, -2:].float()
    return bool((packed.last_hidden_state[0, -2:].float() - one).norm() < 0.02 * one.norm())


@torch.inference_mode()
def logit_scale(model: Any) -> float:
    """What a causal LM multiplies its output product by, as Cohere's and Granite's do; measured on three tokens."""
    layer, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    ids = torch.tensor([[5, 6, 7]], device=layer.weight.device)
    plain = layer(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)[0, -1].float()
    given = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    if cap:  # undone where rounding does not grow by it
        few = given.abs() < cap / 2
        given, plain = cap * torch.atanh(given[few] / cap), plain[few]
    factor = float((given @ plain) / (plain @ plain))
    return factor if abs(factor - 1) >= 0.01 and math.isfinite(factor) else 1.0
