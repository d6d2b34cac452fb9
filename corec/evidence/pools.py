"""Candidates from several retrievers, merged by a combiner.

Where SASRec finds few of the next items, other retrievers find others. Each source proposes its best unseen items, and a linear
combiner, fitted on training windows, selects K of their union:

==============  ======================================================================
``sasrec``      the candidates of stage 02
``next``        items that often followed the recent items, weighted by 1, 1/2, 1/3 …
``cosine``      items whose users are those of the history (item-kNN)
``text``        items with titles like those of the recent items
``popularity``  training interactions
==============  ======================================================================
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from corec import CorecError
from corec.controls import Pools, place_of
from corec.data import Tables
from corec.evidence.combiner import fit_linear
from corec.evidence.features import Evidence, Matrix, Similarities, counted, gather, latest_items
from corec.params import Params
from corec.sasrec import chosen_again, items_by_user


class Wide(NamedTuple):
    """Merged candidates, and the recall of their sources."""

    candidates: pd.DataFrame  # columns ``window candidates scores`` as of stage 02; the scores are those of the combiner
    recall: pd.DataFrame  # share of the targets found, by source and split; columns ``source K train valid test``


def weighted(history: np.ndarray, weights: np.ndarray, table: Matrix | np.ndarray) -> np.ndarray:
    """Weighted sum of the rows of `table` of the items in `history` [windows, H], with `weights` [H] -> [windows, columns]."""
    product = counted(history, table.shape[0], weights) @ table
    return product if isinstance(product, np.ndarray) else product.toarray()


def scores_of(source: str, history: np.ndarray, similar: Similarities, counts: np.ndarray, recent: int) -> np.ndarray:
    """Scores of all items [windows, items + 1] by a source other than ``sasrec``.

    Parameters
    ----------
    source
        Name of the source.
    history
        Items before the target [windows, H], the latest first, padded with 0.
    similar
        Similarities of the items.
    counts
        Training interactions [items + 1].
    recent
        Number of recent items.
    """
    if source == "popularity":
        return np.tile(counts.astype(np.float32), (len(history), 1))
    if source == "cosine":
        return weighted(history, np.ones(history.shape[1]), similar.cosine)
    if source == "next":
        return weighted(history[:, :recent], 1 / np.arange(1, recent + 1), similar.next)
    assert similar.text is not None
    return weighted(history[:, :recent], np.ones(recent), similar.text) @ similar.text.T


def best_unseen(scores: np.ndarray, seen: list[np.ndarray], k: int) -> np.ndarray:
    """The `k` best items of each window that are not among the `seen` ones [windows, k], best first; scores are changed."""
    rows = np.repeat(np.arange(len(seen)), [len(items) for items in seen])
    scores[rows, np.concatenate(seen)] = -np.inf
    scores[:, 0] = -np.inf
    found = np.argpartition(-scores, k, axis=1)[:, :k] if k < scores.shape[1] else np.argsort(-scores, axis=1)
    order = np.take_along_axis(-scores, found, axis=1).argsort(axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


def union(lists: list[np.ndarray]) -> np.ndarray:
    """Items of several lists [windows, k each], each once, ascending, padded with 0 in front [windows, width]."""
    items = np.sort(np.concatenate(lists, axis=1), axis=1)
    items[:, 1:][items[:, 1:] == items[:, :-1]] = 0
    return np.sort(items, axis=1)


def propose(
    tables: Tables, windows: pd.DataFrame, retrieved: np.ndarray, similar: Similarities, params: Params, batch: int = 1000
) -> Iterator[dict[str, np.ndarray]]:
    """The best unseen items of every source for all windows, `batch` windows at a time.

    Parameters
    ----------
    tables
        Tables of stage 01.
    windows
        Windows.
    retrieved
        Candidates of SASRec [windows, top_k], best first.
    similar
        Similarities of the items.
    params
        Parameters of the run: ``controls.pool`` and ``controls.k``.
    batch
        Windows at a time.
    """
    k, items, again = params.controls.k, items_by_user(tables.interactions), chosen_again(tables.interactions)
    history = latest_items(tables, windows, params.evidence.history)
    counts = np.array([0, *tables.items["train_count"]])
    owners, positions = windows["user"].to_numpy(), windows["position"].to_numpy()
    for start in range(0, len(windows), batch):
        part = slice(start, start + batch)
        seen = [items[user][: 0 if again else position] for user, position in zip(owners[part], positions[part], strict=True)]
        found: dict[str, np.ndarray] = {}
        for source in params.controls.pool:
            if source == "sasrec":
                found[source] = retrieved[part, :k]
            else:
                found[source] = best_unseen(scores_of(source, history[part], similar, counts, params.evidence.recent), seen, k)
        yield found


def widen(tables: Tables, candidates: pd.DataFrame, similar: Similarities, params: Params) -> Wide:
    """Merge the candidates of the sources ``controls.pool`` for every training, validation and test window.

    The evidence of an item that SASRec did not retrieve has the score and rank of its last candidate.

    Parameters
    ----------
    tables
        Tables of stage 01.
    candidates
        Table of stage 02.
    similar
        Similarities of the items (see :func:`corec.evidence.similarity_tables`).
    params
        Parameters of the run.

    Raises
    ------
    CorecError
        If fewer than 20 training windows have their target in the union.
    """
    k = params.controls.k
    windows = tables.windows[tables.windows["split"].isin(["train", "valid", "test"])].merge(candidates, on="window")
    retrieved, scores = np.stack(list(windows["candidates"])), np.stack(list(windows["scores"]))
    parts = list(propose(tables, windows, retrieved, similar, params))
    lists = {source: np.concatenate([part[source] for part in parts]) for source in params.controls.pool}
    items, target = union(list(lists.values())), windows["target"].to_numpy()
    place = (items[:, :, None] == retrieved[:, None, :]).argmax(axis=2)  # 0 also if SASRec did not retrieve the item
    known = np.take_along_axis(retrieved, place, axis=1) == items
    place = np.where(known, place, retrieved.shape[1] - 1)
    found_scores = np.take_along_axis(scores, place, axis=1)
    pools = Pools(windows["window"].to_numpy(), items, place, found_scores, place_of(target, items))
    found = gather(tables, pools, similar, params.evidence)
    merged = merge_scores(found, pools, (windows["split"] == "train").to_numpy(), params.seed)
    order = np.argsort(-merged, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(items, order, axis=1)
    table = pd.DataFrame(
        {"window": windows["window"], "candidates": list(best), "scores": list(np.take_along_axis(merged, order, axis=1))}
    )
    return Wide(table, recall(lists | {"union": items, "merged": best}, target, windows["split"].to_numpy(dtype=str)))


def merge_scores(found: Evidence, pools: Pools, train: np.ndarray, seed: int) -> np.ndarray:
    """Scores [windows, width] of a linear combiner fitted on the windows `train`; -inf for padding."""
    usable = train & (pools.truth >= 0)
    if usable.sum() < 20:
        raise CorecError(
            f"Parameter controls.pool: only {int(usable.sum())} training windows have their next item in the union of the "
            "sources: raise controls.k, data.held_back or controls.max_windows."
        )
    score, _ = fit_linear(found.values[usable], pools.truth[usable], seed, pools.candidates[usable] > 0)
    return np.where(pools.candidates > 0, score(found.values), -np.inf)


def recall(lists: Mapping[str, np.ndarray], target: np.ndarray, splits: np.ndarray) -> pd.DataFrame:
    """Share of the windows of each split whose target is in each list [windows, width]; `K` is the mean number of items."""
    rows = []
    for source, items in lists.items():
        hit = (items == target[:, None]).any(axis=1)
        shares = [hit[splits == split].mean() for split in ("train", "valid", "test")]
        rows.append((source, (items > 0).sum(axis=1).mean(), *shares))
    return pd.DataFrame(rows, columns=["source", "K", "train", "valid", "test"])
