"""Two simple rankers to compare SASRec with, and the comparison: full ranking, paired intervals over users."""

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

NEIGHBOURS = (500, 200, 100, 50, 20, 10)  # tried by :func:`best_knn`


def windows_of(tables: Tables, split: str) -> pd.DataFrame:
    """The windows of a split."""
    return tables.windows[tables.windows["split"] == split]


def ranks_by(scores: Callable[[Queries], Tensor], wanted: Queries, batch: int = 1024) -> np.ndarray:
    """Rank of each target [queries] by `scores`, which makes [queries, n_items + 1] of some queries."""
    starts = range(0, len(wanted.targets), batch)
    return np.concatenate([rank_scores(scores(part), part) for part in (wanted.part(start, batch) for start in starts)])


def popularity_ranks(tables: Tables, wanted: Queries) -> np.ndarray:
    """Rank of each target [queries] when everybody gets the most popular items that they have not seen."""
    counts = torch.tensor([0, *tables.items["train_count"]], dtype=torch.float32)
    return ranks_by(lambda part: counts.expand(len(part.targets), -1).clone(), wanted)


def similarities(tables: Tables) -> sparse.csr_array:
    """Cosine similarity of the items' training columns (users by items, 0 or 1) [n_items + 1, n_items + 1], 0 to itself."""
    train = tables.interactions[tables.interactions["split"] == "train"].drop_duplicates(["user", "item"])
    shape = (int(tables.interactions["user"].max()) + 1, len(tables.items) + 1)
    seen = sparse.csr_array((np.ones(len(train), dtype=np.float32), (train["user"], train["item"])), shape=shape)
    seen.data /= np.sqrt(seen.sum(axis=0))[seen.indices]
    similar = (seen.T @ seen).tocsr()
    similar.setdiag(0)
    return similar


def nearest(similar: sparse.csr_array, neighbours: int) -> sparse.csr_array:
    """`similar` with only the `neighbours` largest entries of each row (and those equal to the last of them)."""
    similar = similar.copy()
    for start, end in zip(similar.indptr[:-1], similar.indptr[1:], strict=True):
        row = similar.data[start:end]
        if len(row) > neighbours:
            row[row < (1 - 1e-6) * np.partition(row, -neighbours)[-neighbours]] = 0
    similar.eliminate_zeros()
    return similar


def knn_ranks(similar: sparse.csr_array, wanted: Queries) -> np.ndarray:
    """Rank of each target [queries] by item-kNN: the summed similarity to all that the user has seen.

    Deshpande and Karypis, *Item-based top-N recommendation algorithms*, ACM TOIS 22(1), 2004.
    """

    def scores(part: Queries) -> Tensor:
        users = np.repeat(np.arange(len(part.seen)), [len(items) for items in part.seen])
        cells = (users, np.concatenate(part.seen))
        history = sparse.csr_array((np.ones(len(users), np.float32), cells), shape=(len(part.seen), similar.shape[0]))
        return torch.from_numpy((history @ similar).toarray())

    return ranks_by(scores, wanted)


def best_knn(tables: Tables, max_length: int) -> tuple[int, sparse.csr_array]:
    """The number of neighbours with the best validation NDCG@10, and the similarities to so many."""
    wanted = queries(tables.interactions, windows_of(tables, "valid"), max_length)
    similar, best = similarities(tables), (-1.0, 0, sparse.csr_array((1, 1)))
    for neighbours in NEIGHBOURS:  # ever fewer, so each is cut out of the one before
        similar = nearest(similar, neighbours)
        value = ranking_metrics(knn_ranks(similar, wanted))["NDCG@10"]
        best = max(best, (value, neighbours, similar), key=lambda entry: entry[0])
    return best[1], best[2]


def judge(ranks: Mapping[str, np.ndarray], users: np.ndarray, settings: Params) -> pd.DataFrame:
    """HR@10 and NDCG@10 of rankers, and how far each is behind the last one in NDCG@10, with intervals.

    Parameters
    ----------
    ranks
        By ranker: rank of each target [windows].
    users
        Whose window it is [windows]. Windows are averaged within a user; intervals are a bootstrap over users,
        the same resamples for all, so that differences are paired.

    Returns
    -------
    One row a ranker; every figure has two more columns, `low` and `high`.
    """
    columns = [[hit, hit / np.log2(rank + 1)] for rank in ranks.values() for hit in [rank <= 10]]
    values = by_user(np.stack([value for pair in columns for value in pair], axis=1).astype(float), users)
    values = np.concatenate([values, values[:, -1:] - values[:, 1::2]], axis=1)  # [users, 3 rankers]
    low, high = intervals(values, settings.evaluation, settings.seed)
    rows = {}
    for place, name in enumerate(ranks):
        cells = {"HR@10": 2 * place, "NDCG@10": 2 * place + 1, "behind": 2 * len(ranks) + place}
        rows[name] = {
            f"{figure}{end}": of[column]
            for figure, column in cells.items()
            for end, of in (("", values.mean(0)), (" low", low), (" high", high))
        }
    return pd.DataFrame(rows).T


def sampled_ranks(ranks: np.ndarray, wanted: Queries, n_items: int, negatives: int, seed: int) -> np.ndarray:
    """What `ranks` [queries] become when the target competes with so many random unseen items, not with all.

    Of the n - 1 other unseen items, rank - 1 beat the target; how many of those are among `negatives` drawn without
    replacement is hypergeometric. (Krichene and Rendle, *On Sampled Metrics for Item Recommendation*, KDD 2020.)
    """
    others = n_items - np.array([len(np.unique(items)) for items in wanted.seen]) - 1
    return 1 + np.random.default_rng(seed).hypergeometric(ranks - 1, others - (ranks - 1), np.minimum(negatives, others))
