"""Stage 02: the retriever SASRec (Kang and McAuley, 2018) and its candidates for every window."""

from corec.sasrec.losses import FullSoftmax, loss
from corec.sasrec.model import Noise, SASRec
from corec.sasrec.ranking import (
    Queries,
    candidates,
    chosen_again,
    encode,
    items_by_user,
    pad,
    queries,
    rank_scores,
    rank_states,
    rank_targets,
    ranking_metrics,
    retrieve,
    soft_states,
    window_states,
)
from corec.sasrec.training import Trained, batches, load, load_candidates, padding_share, pieces, save, train, train_epoch

__all__ = [
    "FullSoftmax",
    "Noise",
    "Queries",
    "SASRec",
    "Trained",
    "batches",
    "candidates",
    "chosen_again",
    "encode",
    "items_by_user",
    "load",
    "load_candidates",
    "loss",
    "pad",
    "padding_share",
    "pieces",
    "queries",
    "rank_scores",
    "rank_states",
    "rank_targets",
    "ranking_metrics",
    "retrieve",
    "save",
    "soft_states",
    "train",
    "train_epoch",
    "window_states",
]
