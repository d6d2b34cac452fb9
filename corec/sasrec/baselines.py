"""Baselines of SASRec, popularity and item-kNN, and their comparison: full ranking, paired intervals over users."""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from corec.data import Tables
from corec.intervals import by_user, intervals
from corec.params import Params
from corec.sasrec.ranking import Queries, queries, rank_scores, ranking_metrics

NEIGHBOURS = (500, 200, 100, 50, 20, 10)  # numbers of neighbours that :func:`best_knn` compares


def windows_of(tables: Tables, split: str) -> pd.DataFrame:
    """Select the windows of a split."""
    return tables.windows[tables.windows["split"] == split]


def ranks_by(scores: Callable[[Queries], Tensor], wanted: Queries, batch: int = 1024) -> np.ndarray:
    """Rank of each target [queries] under `scores`, a function from n queries to scores [n, n_items + 1]."""
    starts = range(0, len(wanted.targets), batch)
    return np.concatenate([rank_scores(scores(part), part) for part in (wanted.part(start, batch) for start in starts)])


def popularity_ranks(tables: Tables, wanted: Queries) -> np.ndarray:
    """Rank of each target [queries] if unseen items are ordered by their number of training interactions."""
    counts = torch.tensor([0, *tables.items["train_count"]], dtype=torch.float32)
    return ranks_by(lambda part: counts.expand(len(part.targets), -1).clone(), wanted)


def similarities(tables: Tables) -> sparse.csr_array:
    """Cosine similarity of the items by their training users (0 or 1) [n_items + 1, n_items + 1]; the diagonal is 0."""
    train = tables.interactions[tables.interactions["split"] == "train"].drop_duplicates(["user", "item"])
    shape = (int(tables.interactions["user"].max()) + 1, len(tables.items) + 1)
    seen = sparse.csr_array((np.ones(len(train), dtype=np.float32), (train["user"], train["item"])), shape=shape)
    seen.data /= np.sqrt(seen.sum(axis=0))[seen.indices]
    similar = (seen.T @ seen).tocsr()
    similar.setdiag(0)
    return similar


def nearest(similar: sparse.csr_array, neighbours: int) -> sparse.csr_array:
    """Keep only the `neighbours` largest entries of each row of `similar`, and those equal to the smallest of them."""
    similar = similar.copy()
    for start, end in zip(similar.indptr[:-1], similar.indptr[1:], strict=True):
        row = similar.data[start:end]
        if len(row) > neighbours:
            row[row < (1 - 1e-6) * np.partition(row, -neighbours)[-neighbours]] = 0
    similar.eliminate_zeros()
    return similar


def knn_ranks(similar: sparse.csr_array, wanted: Queries) -> np.ndarray:
    """Rank of each target [queries] by item-kNN: the score of an item is its summed similarity to all seen items.

    Deshpande and Karypis, *Item-based top-N recommendation algorithms*, ACM TOIS 22(1), 2004.

    Parameters
    ----------
    similar
        Similarities [n_items + 1, n_items + 1] (see :func:`similarities` and :func:`nearest`).
    wanted
        The queries.
    """

    def scores(part: Queries) -> Tensor:
        users = np.repeat(np.arange(len(part.seen)), [len(items) for items in part.seen])
        cells = (users, np.concatenate(part.seen))
        history = sparse.csr_array((np.ones(len(users), np.float32), cells), shape=(len(part.seen), similar.shape[0]))
        return torch.from_numpy((history @ similar).toarray())

    return ranks_by(scores, wanted)


def best_knn(tables: Tables, max_length: int) -> tuple[int, sparse.csr_array]:
    """Select the number of neighbours, out of :data:`NEIGHBOURS`, by validation NDCG@10.

    Parameters
    ----------
    tables
        Tables of stage 01.
    max_length
        Latest items in each query, as for SASRec.

    Returns
    -------
    The number of neighbours, and the similarities restricted to it.
    """
    wanted = queries(tables.interactions, windows_of(tables, "valid"), max_length)
    similar, best = similarities(tables), (-1.0, 0, sparse.csr_array((1, 1)))
    for neighbours in NEIGHBOURS:  # decreasing: each matrix is a subset of the previous one
        similar = nearest(similar, neighbours)
        value = ranking_metrics(knn_ranks(similar, wanted))["NDCG@10"]
        best = max(best, (value, neighbours, similar), key=lambda entry: entry[0])
    return best[1], best[2]


def judge(ranks: Mapping[str, np.ndarray], users: np.ndarray, settings: Params) -> pd.DataFrame:
    """HR@10 and NDCG@10 of several rankers, and the difference in NDCG@10 from each to the last one, with intervals.

    Parameters
    ----------
    ranks
        Rank of each target [windows], by ranker.
    users
        User of each window [windows]. Metrics are averaged within each user; intervals are a bootstrap over users with the
        same resamples for all rankers, so that differences are paired.
    settings
        Parameters of the run: bootstrap, confidence level and seed.

    Returns
    -------
    One row per ranker with the columns ``HR@10``, ``NDCG@10`` and ``behind`` (NDCG@10 of the last ranker minus its own), each
    with the ends of its interval (``HR@10 low``, ``HR@10 high``, and so on).
    """
    columns = [[hit, hit / np.log2(rank + 1)] for rank in ranks.values() for hit in [rank <= 10]]
    values = by_user(np.stack([value for pair in columns for value in pair], axis=1).astype(float), users)
    values = np.concatenate([values, values[:, -1:] - values[:, 1::2]], axis=1)  # [users, 3 * rankers]
    low, high = intervals(values, settings.evaluation, settings.seed)
    rows = {}
    for place, name in enumerate(ranks):
        cells = {"HR@10": 2 * place, "NDCG@10": 2 * place + 1, "behind": 2 * len(ranks) + place}
        rows[name] = {
            f"{figure}{end}": statistic[column]
            for figure, column in cells.items()
            for end, statistic in (("", values.mean(0)), (" low", low), (" high", high))
        }
    return pd.DataFrame(rows).T


def sampled_ranks(ranks: np.ndarray, wanted: Queries, n_items: int, negatives: int, seed: int) -> np.ndarray:
    """Ranks among `negatives` random unseen items, drawn from the distribution that the full `ranks` imply.

    Of the n - 1 other unseen items, rank - 1 score higher than the target. The number of these among `negatives` items drawn
    without replacement is hypergeometric (Krichene and Rendle, *On Sampled Metrics for Item Recommendation*, KDD 2020).

    Parameters
    ----------
    ranks
        Ranks of the targets among all unseen items [queries].
    wanted
        The queries.
    n_items
        Number of items of the catalogue.
    negatives, seed
        Sampled items per query, and the seed of the draw.
    """
    others = n_items - np.array([len(np.unique(items)) for items in wanted.seen]) - 1
    return 1 + np.random.default_rng(seed).hypergeometric(ranks - 1, others - (ranks - 1), np.minimum(negatives, others))
