"""Comparison studies of notebooks 07 to 09. A study writes into the folders of its own run."""

from typing import Any

from corec.params import Params

PAPER = {"loss": "ranknet", "control": "request", "prior": False}  # the loss of the paper, which all read-outs have


def with_reranker(params: Params, **changes: Any) -> Params:
    """Copy of `params` with the loss of the paper and `changes` in its section `reranker`."""
    return params.model_copy(update={"reranker": params.reranker.model_copy(update=PAPER | changes)})
