"""Re-ranking with the forward of Hugging Face: one pass per request, logits of the whole vocabulary.

Reference for :mod:`corec.reranker` and :mod:`corec.reranker.engine`: for the scores of the read-out `index`, and for speed.
"""

import torch
from torch import Tensor

from corec.reranker import Reranker, Row, index_token


def wanted_tokens(reranker: Reranker, row: Row) -> list[int]:
    """Ids of the index tokens of the row's candidates. For other read-outs, arbitrary token ids, for timings only."""
    if reranker.params.readout != "index":
        return list(range(len(row.spans)))
    return reranker.tokenizer.convert_tokens_to_ids([index_token(place) for place in range(len(row.spans))])


def scores(reranker: Reranker, row: Row, last_only: bool) -> Tensor:
    """Scores [R, K] of a row, one forward pass per request.

    Parameters
    ----------
    reranker
        The model.
    row
        Prefix and R requests.
    last_only
        Compute the logits at the last position only, instead of at every position.
    """
    result = []
    for suffix in row.suffixes:
        ids = torch.tensor([row.prefix + suffix], device=reranker.device)
        logits = reranker.model(input_ids=ids, use_cache=False, logits_to_keep=1 if last_only else 0).logits
        result.append(logits[0, -1, wanted_tokens(reranker, row)].float())
    return torch.stack(result)
