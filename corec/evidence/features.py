"""Evidence of relevance for every candidate, from training interactions, attributes and titles.

With i a candidate, h_1 … h_n the items before the target, the latest first, R the number of recent items and H the number of
items of the whole history (``evidence.recent``, ``evidence.history``):

==================  =====================================================================================================
``score``           the retriever's score, standardised within the pool
``rank``            -log2(1 + rank); the retriever's best has rank 1
``popularity``      log(1 + training interactions of i)
``rating``          mean training rating of i; the mean of all items if it has none
``cosine_last``     root of c(h_1, i), c the cosine of two items' training users (0 or 1)
``cosine_recent``   root of the mean of c(h, i) over the R latest items
``cosine_history``  root of the mean of c(h, i) over the H latest items
``next_last``       root of t(h_1, i), t(j, i) = times that i occurs within `steps` steps after j / sqrt(n_j n_i)
``next_recent``     root of the mean of t(h, i) over the R latest items, weighted by 1, 1/2, 1/3 …
``next_soon``       ``next_last`` times the standardised log of the time since the latest interaction
``values_recent``   mean of v(h, i) over the R latest items, v the cosine of two items' attribute values, weighted by their
                    inverse document frequency
``values_history``  mean of v(h, i) over the H latest items
``text_last``       e(h_1, i), e the cosine of two titles' embeddings (see :mod:`corec.evidence.text`)
``text_recent``     mean of e(h, i) over the R latest items
==================  =====================================================================================================

Counts, similarities and ratings come from the interactions of the split ``train`` only. With ``data.held_back``, these end
before the windows that train the combiner and the re-ranker.
"""

from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from scipy import sparse

from corec.controls import Pools, Vocabulary, standardise
from corec.data import Tables
from corec.params import EvidenceParams
from corec.sasrec import items_by_user
from corec.sasrec.baselines import similarities

NAMES = (
    "score rank popularity rating cosine_last cosine_recent cosine_history next_last next_recent next_soon values_recent "
    "values_history text_last text_recent"
).split()
DENSE = 12_000  # up to this number of items, similarities are dense tables, whose entries are found faster
Matrix: TypeAlias = np.ndarray | sparse.csr_array


class Evidence(NamedTuple):
    """Evidence for the candidates of the windows of one split."""

    names: list[str]  # subset of :data:`NAMES`
    values: np.ndarray  # [windows, K, names], float32


class Similarities(NamedTuple):
    """Tables from which the similarity of any two items is found; those of item 0 (padding) are 0."""

    cosine: Matrix  # [items + 1, items + 1]
    next: Matrix  # [items + 1, items + 1], how often the column's item follows the row's
    values: sparse.csr_array  # attribute values [items + 1, values] (see :func:`weighted_values`)
    text: np.ndarray | None  # embeddings of the titles [items + 1, width], of length 1; None without text


def transitions(tables: Tables, steps: int) -> sparse.csr_array:
    """How often each item follows another one within `steps` steps in training, over the root of both counts."""
    train = tables.interactions[tables.interactions["split"] == "train"]
    items, users = train["item"].to_numpy(), train["user"].to_numpy()
    pairs = [(items[:-step], items[step:], users[:-step] == users[step:]) for step in range(1, min(steps, len(items) - 1) + 1)]
    rows, columns = (np.concatenate([pair[side][pair[2]] for pair in pairs]) for side in (0, 1))
    size = len(tables.items) + 1
    times = sparse.coo_array((np.ones(len(rows), np.float32), (rows, columns)), shape=(size, size)).tocsr()
    scale = 1 / np.sqrt(np.maximum(np.bincount(items, minlength=size), 1)).astype(np.float32)
    return (sparse.diags_array(scale) @ times @ sparse.diags_array(scale)).tocsr()


def weighted_values(vocabulary: Vocabulary) -> sparse.csr_array:
    """Attribute values of the items [items + 1, values], weighted by inverse document frequency; rows have length 1, or 0."""
    rows, slots = np.nonzero(vocabulary.values_of >= 0)
    values = vocabulary.values_of[rows, slots]
    weight = np.log(len(vocabulary.values_of) / np.maximum(vocabulary.frequency(), 1)).astype(np.float32)
    shape = (len(vocabulary.values_of), len(vocabulary.labels))
    table = sparse.csr_array((weight[values], (rows, values)), shape=shape)
    length = np.sqrt(np.asarray(table.multiply(table).sum(axis=1))).ravel()
    return (sparse.diags_array(1 / np.maximum(length, 1e-9)) @ table).tocsr().astype(np.float32)


def counted(history: np.ndarray, size: int, weights: np.ndarray | float = 1.0) -> sparse.csr_array:
    """Weight of each item in each history [windows, size]; `history` [windows, H] is padded with 0, `weights` is [H] or one."""
    rows = np.repeat(np.arange(len(history)), history.shape[1])
    real = (np.broadcast_to(weights, history.shape) * (history > 0)).astype(np.float32)
    return sparse.csr_array((real.ravel(), (rows, history.ravel())), shape=(len(history), size))


def profile_similarity(history: np.ndarray, candidates: np.ndarray, values: sparse.csr_array) -> np.ndarray:
    """Sum over the items of `history` [windows, H] of the cosine of their values and those of each candidate [windows, K]."""
    windows, k = candidates.shape
    profiles = (counted(history, values.shape[0]) @ values).tocsr()
    products = values[candidates.ravel()].multiply(profiles[np.repeat(np.arange(windows), k)])
    return np.asarray(products.sum(axis=1)).reshape(windows, k)


def similarity_tables(
    tables: Tables, vocabulary: Vocabulary, params: EvidenceParams, titles: np.ndarray | None = None
) -> Similarities:
    """Compute the tables of similarities.

    Parameters
    ----------
    tables
        Tables of stage 01.
    vocabulary
        Attributes under control, of stage 03.
    params
        Number of steps of a transition.
    titles
        Embeddings of the titles [items + 1, width] of length 1, row 0 zero; None for no evidence from text.
    """
    parts = [similarities(tables), transitions(tables, params.steps)]
    cosine, following = (part.toarray() if len(tables.items) <= DENSE else part for part in parts)
    return Similarities(cosine, following, weighted_values(vocabulary), titles)


def pairs(matrix: Matrix, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Entries of `matrix` at `rows` and `columns`, which are broadcast to one shape."""
    if isinstance(matrix, np.ndarray):
        return matrix[rows, columns]
    rows, columns = np.broadcast_arrays(rows, columns)
    return np.asarray(matrix[rows.ravel(), columns.ravel()]).reshape(rows.shape)


def latest_items(tables: Tables, windows: pd.DataFrame, count: int) -> np.ndarray:
    """The `count` items before the target of each window [windows, count], the latest first, padded with 0."""
    items = items_by_user(tables.interactions)
    found = np.zeros((len(windows), count), dtype=int)
    for row, (user, position) in enumerate(zip(windows["user"], windows["position"], strict=True)):
        latest = items[user][max(0, position - count) : position][::-1]
        found[row, : len(latest)] = latest
    return found


def waiting_time(tables: Tables, windows: pd.DataFrame) -> np.ndarray:
    """Log of 1 + seconds between the latest interaction and the target of each window, roughly standardised [windows]."""
    table = tables.interactions[["user", "position", "timestamp"]]
    seconds = table["timestamp"].groupby(table["user"]).diff().clip(lower=0)
    at = pd.MultiIndex.from_frame(table[["user", "position"]])
    wanted = pd.MultiIndex.from_frame(windows[["user", "position"]])
    logs = np.log1p(pd.Series(seconds.to_numpy(), index=at).reindex(wanted).fillna(0).to_numpy(dtype=float))
    return (logs - 6) / 4  # seconds to months are about -1.5 to 2.3; a fixed scale, so that no other window is used


def gather(tables: Tables, pools: Pools, similar: Similarities, params: EvidenceParams, batch: int = 2000) -> Evidence:
    """Compute the evidence of all candidates of `pools`.

    Parameters
    ----------
    tables
        Tables of stage 01.
    pools
        Windows and their candidates.
    similar
        Result of :func:`similarity_tables`.
    params
        Numbers of recent and of all items of a history.
    batch
        Windows at a time.
    """
    windows = tables.windows.set_index("window").loc[pools.window]
    history, waited = latest_items(tables, windows, params.history), waiting_time(tables, windows)
    counts = np.log1p(np.array([0, *tables.items["train_count"]], dtype=np.float32))
    known = tables.items["mean_rating"].astype(float)
    ratings = np.array([0, *known.fillna(known.mean()).fillna(0)], dtype=np.float32)
    names = NAMES if similar.text is not None else [name for name in NAMES if not name.startswith("text")]
    values = np.empty((*pools.candidates.shape, len(names)), dtype=np.float32)
    columns = {name: values[..., place] for place, name in enumerate(names)}
    columns["score"][:] = standardise(pools.retriever_score)
    columns["rank"][:] = -np.log2(2 + pools.retriever_rank)
    columns["popularity"][:], columns["rating"][:] = counts[pools.candidates], ratings[pools.candidates]
    for start in range(0, len(history), batch):
        part = slice(start, start + batch)
        of_part = from_history(history[part], pools.candidates[part], similar, params.recent)
        of_part["next_soon"] = of_part["next_last"] * waited[part, None]
        for name, found in of_part.items():
            columns[name][part] = found
    return Evidence(list(names), values)


def from_history(history: np.ndarray, candidates: np.ndarray, similar: Similarities, recent: int) -> dict[str, np.ndarray]:
    """Evidence from the items before the target, by name [windows, K].

    Parameters
    ----------
    history
        Items before the target [windows, H], the latest first, padded with 0.
    candidates
        Items [windows, K].
    similar
        Similarities of all pairs of items.
    recent
        Number of recent items.
    """
    rows, columns = history[:, :, None], candidates[:, None, :]
    few = slice(0, recent)
    # Real items of the whole history and of its recent part; at least 1, so that a mean over nothing is 0.
    count, count_recent = (np.maximum((part > 0).sum(axis=1), 1)[:, None] for part in (history, history[:, few]))
    cosine = pairs(similar.cosine, rows, columns)  # [windows, H, K]
    following = pairs(similar.next, rows[:, few], columns)
    weight = 1 / np.arange(1, following.shape[1] + 1) * (history[:, few] > 0)  # [windows, R]
    found = {
        "cosine_last": np.sqrt(cosine[:, 0]),
        "cosine_recent": np.sqrt(cosine[:, few].sum(axis=1) / count_recent),
        "cosine_history": np.sqrt(cosine.sum(axis=1) / count),
        "next_last": np.sqrt(following[:, 0]),
        "next_recent": np.sqrt((following * weight[..., None]).sum(axis=1) / np.maximum(weight.sum(axis=1), 1e-9)[:, None]),
        "values_recent": profile_similarity(history[:, few], candidates, similar.values) / count_recent,
        "values_history": profile_similarity(history, candidates, similar.values) / count,
    }
    if similar.text is not None:
        text = np.einsum("whd,wkd->whk", similar.text[history[:, few]], similar.text[candidates])
        found |= {"text_last": text[:, 0], "text_recent": text.sum(axis=1) / count_recent}
    return found
