"""Stage 04: the language model that re-ranks K candidates under a request in one forward pass.

The prompt and its batches are in :mod:`corec.reranker.prompt`, the read-outs and the loss in :mod:`corec.reranker.readout`,
requests behind a kept prefix in :mod:`corec.reranker.engine`.
"""

from corec.reranker.model import (
    Reranker,
    adapt,
    build,
    load,
    save,
    saved_dtype,
    token_layers,
    trained_tokens,
    zero_shot,
)
from corec.reranker.probes import row_distance
from corec.reranker.prompt import MAX_K, Batch, Prompter, Row, collate, encode, index_token, letters, new_tokens, value_token
from corec.reranker.readout import Head, Parts, listwise, match_loss, ranknet
from corec.reranker.rows import row_drift, token_rows
from corec.reranker.scoring import (
    Examples,
    fingerprint,
    load_examples,
    make_rows,
    order_bias,
    score,
    score_parts,
    score_split,
)
from corec.reranker.training import Targets, TrainingBatch, backward, repeat, train, training_batch
from corec.scores import score_gap

__all__ = [
    "MAX_K",
    "Batch",
    "Examples",
    "Head",
    "Parts",
    "Prompter",
    "Reranker",
    "Row",
    "Targets",
    "TrainingBatch",
    "adapt",
    "backward",
    "build",
    "collate",
    "encode",
    "fingerprint",
    "index_token",
    "letters",
    "listwise",
    "load",
    "load_examples",
    "make_rows",
    "match_loss",
    "new_tokens",
    "order_bias",
    "ranknet",
    "repeat",
    "row_distance",
    "row_drift",
    "save",
    "saved_dtype",
    "score",
    "score_gap",
    "score_parts",
    "score_split",
    "token_layers",
    "token_rows",
    "train",
    "trained_tokens",
    "training_batch",
    "value_token",
    "zero_shot",
]
