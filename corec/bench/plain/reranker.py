"""Re-ranking as Hugging Face has it: a forward of its own for every request, logits of the whole vocabulary.

The oracle of :mod:`corec.reranker` and :mod:`corec.reranker.engine`, for the read-out `index` and for their speed.
"""

import torch
from torch import Tensor

from corec.reranker import Reranker, Row, index_token


def wanted_tokens(reranker: Reranker, row: Row) -> list[int]:
    """The index tokens of the row's candidates (any tokens at all where the read-out has none: for timing)."""
    if reranker.params.readout != "index":
        return list(range(len(row.spans)))
    return reranker.tokenizer.convert_tokens_to_ids([index_token(place) for place in range(len(row.spans))])


def scores(reranker: Reranker, row: Row, last_only: bool) -> Tensor:
    """Scores [R, K] of a row's requests, one forward each; full logits at every position, or at the last one only."""
    found = []
    for suffix in row.suffixes:
        ids = torch.tensor([row.prefix + suffix], device=reranker.device)
        logits = reranker.model(input_ids=ids, use_cache=False, logits_to_keep=1 if last_only else 0).logits
        found.append(logits[0, -1, wanted_tokens(reranker, row)].float())
    return torch.stack(found)
