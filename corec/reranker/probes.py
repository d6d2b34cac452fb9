"""Properties of a backbone, measured on a few tokens instead of looked up by its name."""

import math
from typing import Any

import pandas as pd
import torch

from corec.reranker.prompt import Row, collate


def positions(config: Any, packs: bool) -> int | None:
    """Maximum number of positions of a prompt, or None if the configuration states none.

    With packed requests (`packs`), a prompt must also fit into the sliding window, because the mask of a packed row does
    not implement it.
    """
    bounds = [getattr(config, "max_position_embeddings", None), getattr(config, "sliding_window", None) if packs else None]
    return min((bound for bound in bounds if bound), default=None)


@torch.inference_mode()
def can_pack(model: Any) -> bool:
    """Check whether the requests of a window can share a prefix in one row of `model`.

    Run a packed row of ten tokens, and its second request alone behind the prefix; the states of the request must agree to
    2 % in norm. This requires an architecture whose attention follows the given mask (rows by columns) and position ids. It
    excludes recurrent layers, sliding windows and built-in positions (ALiBi).
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
    reference = model.base_model(input_ids=alone, use_cache=False).last_hidden_state[0, -2:].float()
    return bool((packed.last_hidden_state[0, -2:].float() - reference).norm() < 0.02 * reference.norm())


@torch.inference_mode()
def logit_scale(model: Any) -> float:
    """Factor by which a causal LM multiplies its logits, as the Cohere and Granite models do.

    Least-squares factor between the logits of the model and the product of its last hidden state with the output layer, at
    the last of three tokens. Return 1.0 if the factor is within 1 % of 1 or not finite.
    """
    layer, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    ids = torch.tensor([[5, 6, 7]], device=layer.weight.device)
    unscaled = layer(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)[0, -1].float()
    logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    if cap:  # invert the soft cap, only for logits where this does not amplify rounding errors
        small = logits.abs() < cap / 2
        logits, unscaled = cap * torch.atanh(logits[small] / cap), unscaled[small]
    factor = float((logits @ unscaled) / (unscaled @ unscaled))
    return factor if abs(factor - 1) >= 0.01 and math.isfinite(factor) else 1.0


def row_distance(rows: pd.DataFrame) -> float:
    """Median distance of two of the `rows` [tokens, hidden], relative to the median norm of a row.

    It is the yardstick for the change of the rows in training: two different tokens are this far apart.
    """
    values = torch.tensor(rows.to_numpy())
    return float(torch.nn.functional.pdist(values).median() / values.norm(dim=1).median())
