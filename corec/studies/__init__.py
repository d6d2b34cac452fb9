"""Comparison studies of notebooks 07 to 09. A study writes into the folders of its own run."""

from typing import Any

from corec.params import Params


def with_reranker(params: Params, **changes: Any) -> Params:
    """Copy of `params` with `changes` in its section `reranker`."""
    return params.model_copy(update={"reranker": params.reranker.model_copy(update=changes)})
