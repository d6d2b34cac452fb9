"""Embedding rows of tokens, and how far training moved them."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch

from corec.reranker.model import Reranker


@torch.inference_mode()
def token_rows(reranker: Reranker, tokens: Iterable[str]) -> pd.DataFrame:
    """Current input embeddings of `tokens`, one row per token [tokens, hidden]."""
    tokens = list(tokens)
    ids = torch.tensor(reranker.tokenizer.convert_tokens_to_ids(tokens), device=reranker.device)
    return pd.DataFrame(reranker.model.get_input_embeddings()(ids).float().cpu().numpy(), index=tokens)


def row_drift(before: pd.DataFrame, after: pd.DataFrame) -> pd.Series:
    """Distance of each row `before` and `after`, relative to its norm before; if some rows have moved, the others are omitted."""
    drift = pd.Series(np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1), index=before.index)
    return drift[drift > 0] if drift.any() else drift
