"""Stage 03: attributes as control values, candidate pools, requests and control scores.

The table ``values_of`` [items + 1, slots] lists the values of each item, of all attributes, padded with -1. A request is a list
of value numbers c_1 … c_n, padded with -1 too. Item i meets constraint c_j if c_j is in ``values_of[i]``. Control score of the
method: r_i = sum_j 1[item i has c_j] + 1[i is the true next item]. The cost depends on the number of slots, a few per item, not
on the number of values, so thousands of brands cost no more than ten.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from corec import CorecError, schemes
from corec.params import ControlsParams
from corec.schemes import Attribute


@dataclass(frozen=True)
class Vocabulary:
    """The attributes under control and all their values.

    Attributes
    ----------
    attributes
        In the order of the scheme.
    labels
        Text of each value [values]; the values of an attribute are consecutive.
    attribute_of
        Number of the attribute of each value [values].
    values_of
        Value numbers of each item [items + 1, slots], ascending, padded with -1; row 0 (padding) has none.
    """

    attributes: tuple[Attribute, ...]
    labels: tuple[str, ...]
    attribute_of: np.ndarray
    values_of: np.ndarray

    def name(self, value: int) -> str:
        """Readable name of a value, such as ``genre: Comedy``; -1 (a constraint that could not be drawn) is ``(nothing)``."""
        if value < 0:
            return "(nothing)"
        return f"{self.attributes[self.attribute_of[value]].name}: {self.labels[value]}"

    def kind(self, values: np.ndarray) -> np.ndarray:
        """Number of the attribute of each value (any shape); -1 for -1."""
        return np.where(values >= 0, self.attribute_of[values], -1)

    def known(self, items: np.ndarray | None = None) -> np.ndarray:
        """Whether `items` (any shape; None: all items and the padding) have any value of each attribute [..., attributes]."""
        kinds = self.kind(self.values_of if items is None else self.values_of[items])
        return np.stack([(kinds == number).any(axis=-1) for number in range(len(self.attributes))], axis=-1)

    def frequency(self) -> np.ndarray:
        """Number of items that have each value [values]."""
        return np.bincount(self.values_of[self.values_of >= 0], minlength=len(self.labels))


def build_vocabulary(items: pd.DataFrame, params: ControlsParams) -> Vocabulary:
    """Map the attributes of all items to values, by the buckets of the scheme.

    Parameters
    ----------
    items
        Items table of :mod:`corec.data`, items 1 … n in order.
    params
        Parameters of stage 03: the scheme and the attributes under control.

    Raises
    ------
    CorecError
        If the items lack a column of the scheme, or the scheme lacks one of `params.attributes`.
    """
    attributes = schemes.choose(params.scheme, params.attributes)
    labels: list[str] = []
    attribute_of: list[int] = []
    rows: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for number, attribute in enumerate(attributes):
        if attribute.column not in items:
            raise CorecError(
                f"Scheme {params.scheme!r} needs the column {attribute.column!r}, which this data set lacks: "
                "name a scheme that fits the data in controls.scheme."
            )
        lists = attribute.values(items[attribute.column])
        item_labels = lists.set_axis(items["item"]).explode().dropna()
        ordered = attribute.labels or sorted(item_labels.unique())
        rows.append(item_labels.index.to_numpy())
        values.append(len(labels) + pd.Index(ordered).get_indexer(pd.Index(item_labels)))
        labels += ordered
        attribute_of += [number] * len(ordered)
    pairs = np.unique(np.stack([np.concatenate(rows), np.concatenate(values)], axis=1), axis=0)  # item, value; sorted
    slot = np.arange(len(pairs)) - np.searchsorted(pairs[:, 0], pairs[:, 0])
    values_of = np.full((len(items) + 1, slot.max(initial=0) + 1), -1)
    values_of[pairs[:, 0], slot] = pairs[:, 1]
    return Vocabulary(attributes, tuple(labels), np.array(attribute_of), values_of)


class Pools(NamedTuple):
    """Candidates to be re-ranked, in a random order that is independent of rank and truth.

    All arrays but `window` and `truth` are [windows, K].
    """

    window: np.ndarray  # [windows]
    candidates: np.ndarray  # items
    retriever_rank: np.ndarray  # 0 is the retriever's best; an inserted truth has the rank of the candidate it replaced
    retriever_score: np.ndarray
    truth: np.ndarray  # [windows] index of the true next item among the candidates, -1 if it is not there

    def is_truth(self) -> np.ndarray:
        """True at the true next item [windows, K]."""
        return np.arange(self.candidates.shape[1]) == self.truth[:, None]

    def take(self, rows: np.ndarray | slice) -> "Pools":
        """Select windows."""
        return Pools(*(values[rows] for values in self))

    def narrow(self, k: int, rng: np.random.Generator) -> "Pools":
        """Keep `k` random candidates of each window, the true next item among them if it is there, in their order."""
        keys = rng.random(self.candidates.shape) - self.is_truth()
        places = np.sort(keys.argsort(axis=1)[:, :k], axis=1)
        kept = places == self.truth[:, None]
        truth = np.where(kept.any(axis=1), kept.argmax(axis=1), -1)
        items, ranks, scores = (np.take_along_axis(values, places, axis=1) for values in self[1:4])
        return Pools(self.window, items, ranks, scores, truth)


def place_of(target: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Place of the target of each window [windows] among its `items` [windows, K]; -1 if it is not there."""
    hit = items == target[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1), -1)


def make_pools(windows: pd.DataFrame, candidates: pd.DataFrame, k: int, seed: int, insert_truth: bool = False) -> Pools:
    """Take the `k` best candidates of each window and shuffle them.

    Parameters
    ----------
    windows, candidates
        Tables of stages 01 and 02.
    k, seed
        Number of candidates K, and the seed of the shuffle.
    insert_truth
        Replace the last candidate by the true next item if it was not retrieved (training only).
    """
    table = windows[["window", "target"]].merge(candidates, on="window", validate="one_to_one")
    items = np.stack(list(table["candidates"]))[:, :k].copy()
    scores = np.stack(list(table["scores"]))[:, :k].astype(np.float32)
    ranks = np.tile(np.arange(k), (len(items), 1))
    target = table["target"].to_numpy()
    if insert_truth:
        missing = ~(items == target[:, None]).any(axis=1)
        items[missing, -1] = target[missing]
    order = np.random.default_rng([seed, 3]).random(items.shape).argsort(axis=1)
    items, scores, ranks = (np.take_along_axis(values, order, axis=1) for values in (items, scores, ranks))
    return Pools(table["window"].to_numpy(), items, ranks, scores, place_of(target, items))


def _draw(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one index along the last axis with probability proportional to `weights`; -1 if all weights are zero."""
    total = weights.cumsum(axis=-1)
    point = rng.random((*weights.shape[:-1], 1)) * total[..., -1:]
    return np.where(total[..., -1] > 0, (total > point).argmax(axis=-1), -1)


def _value_of(items: np.ndarray, attributes: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
    """Draw one value that each item has of each attribute (same shape); -1 if it has none."""
    item_values = vocabulary.values_of[items]
    slot = _draw((vocabulary.kind(item_values) == attributes[..., None]).astype(float), rng)
    return np.where(slot >= 0, np.take_along_axis(item_values, slot[..., None].clip(0), axis=-1)[..., 0], -1)


def draw_requests(pools: Pools, n: int, protocol: str, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
    """Draw one request of `n` constraints on `n` different attributes for every window.

    ``oracle`` (the paper's): all values are those of the true next item if it is among the candidates; otherwise each value is
    that of a random candidate, drawn separately for each attribute. ``random-candidate``: all values are those of one random
    candidate that is not the true next item and, if possible, has `n` known attributes. ``catalogue``: each value is drawn by its
    frequency among all items.

    Returns
    -------
    Value numbers [windows, n]; -1 if a constraint cannot be drawn because the attribute is unknown. No item meets it.

    Raises
    ------
    CorecError
        If `n` is larger than the number of attributes.
    """
    if n > len(vocabulary.attributes):
        raise CorecError(
            f"Parameter controls.n_tokens asks for {n} constraints, but only {len(vocabulary.attributes)} attributes are "
            "under control: lower it."
        )
    n_windows, k = pools.candidates.shape
    if n == 0:
        return np.empty((n_windows, 0), dtype=int)
    keys = rng.random((n_windows, len(vocabulary.attributes)))
    rows = np.arange(n_windows)
    if protocol == "catalogue":
        attributes = keys.argsort(axis=1)[:, :n]
        total, chosen = vocabulary.frequency().cumsum(), rng.random(attributes.shape)
        # The values of an attribute are consecutive: bounds of each attribute.
        bounds = np.searchsorted(vocabulary.attribute_of, np.arange(len(vocabulary.attributes) + 1))
        before, upto = (np.concatenate([[0], total])[bounds[attributes + end]] for end in (0, 1))
        return np.where(upto > before, np.searchsorted(total, before + chosen * (upto - before), side="right"), -1)
    if protocol == "oracle":
        attributes = keys.argsort(axis=1)[:, :n]
        drawn = np.take_along_axis(pools.candidates, rng.integers(0, k, (n_windows, n)), axis=1)
        truth = pools.candidates[rows, pools.truth][:, None]
        return _value_of(np.where(pools.truth[:, None] >= 0, truth, drawn), attributes, vocabulary, rng)
    n_known = vocabulary.known(pools.candidates).sum(axis=2)  # known attributes of each candidate
    eligible = ~pools.is_truth()
    enough = eligible & (n_known >= np.minimum(n, (n_known * eligible).max(axis=1, keepdims=True)))
    item = pools.candidates[rows, _draw(enough.astype(float), rng)]
    attributes = (keys + ~vocabulary.known(item)).argsort(axis=1)[:, :n]  # attributes that the item has come first
    return _value_of(item[:, None], attributes, vocabulary, rng)


def matches(candidates: np.ndarray, requests: np.ndarray, values_of: np.ndarray) -> np.ndarray:
    """Whether each candidate meets each constraint [..., K, n]; no candidate meets -1.

    Parameters
    ----------
    candidates, requests
        Items [..., K], and value numbers [..., n].
    values_of
        Table of the vocabulary.
    """
    item_values = values_of[candidates]  # [..., K, slots]
    met = (item_values[..., None, :] == requests[..., None, :, None]).any(axis=-1)
    return met & (requests >= 0)[..., None, :]


def control_scores(met: np.ndarray, is_truth: np.ndarray | None = None) -> np.ndarray:
    """Control score r [..., K] of `met` [..., K, n]: constraints met, plus one for the true next item if `is_truth` is given."""
    scores = met.sum(axis=-1)
    return scores if is_truth is None else scores + is_truth


def wanted(met: np.ndarray, target: str) -> np.ndarray:
    """What a request asks of each candidate [..., K], from `met` [..., K, n], by ``reranker.control_target``.

    A constraint that could not be drawn is met by no candidate, so with ``all`` such a request asks for nothing.
    """
    graded, everything = met.sum(axis=-1).astype(np.float32), met.all(axis=-1) * np.float32(met.shape[-1])
    return {"graded": graded, "all": everything, "mixture": (graded + everything) / 2, "none": np.zeros_like(graded)}[target]


def standardise(scores: np.ndarray) -> np.ndarray:
    """Scale scores [..., K] to zero mean and unit variance within each pool; constant scores become zeros."""
    centred = scores - scores.mean(axis=-1, keepdims=True)
    return centred / np.maximum(scores.std(axis=-1, keepdims=True), 1e-9)


class Prepared(NamedTuple):
    """Result of stage 03: the vocabulary, the pools by split, and the requests by split and length."""

    vocabulary: Vocabulary
    pools: dict[str, Pools]
    requests: dict[tuple[str, int], np.ndarray]
    others: Mapping[tuple[str, int], np.ndarray] = {}  # test requests of ``other_protocols``, by protocol and length

    def under(self, protocol: str) -> "Prepared":
        """The same with the test requests of another protocol; unchanged for one that is not in `others`."""
        requests = {("test", n): request for (name, n), request in self.others.items() if name == protocol}
        return self._replace(requests=self.requests | requests)


def prepare(windows: pd.DataFrame, candidates: pd.DataFrame, items: pd.DataFrame, params: ControlsParams, seed: int) -> Prepared:
    """Make the pools of every split, and for every window one request of each length in `params.n_tokens`.

    A split with more windows than `params.max_windows` is sampled at random. Training windows are then filtered by
    `params.train_truth`. The test windows also get requests of `params.other_protocols`. `seed` sets samples, shuffles and
    requests.

    Raises
    ------
    CorecError
        If no training window is left, or the scheme or a length does not fit the items.
    """
    vocabulary = build_vocabulary(items, params)
    pools, requests = {}, {}
    for number, split in enumerate(("train", "valid", "test")):
        rows = windows[windows["split"] == split]
        if rows.empty:
            raise CorecError(
                f"There is no window in split {split!r}: no user has enough interactions before a target; lower data.window, or "
                "lower data.core or data.min_interactions to keep more users."
            )
        limit = getattr(params.max_windows, split)
        rows = rows.sample(n=min(limit, len(rows)), random_state=seed).sort_values("window")
        chosen = params.train_truth if split == "train" else "any"
        pools[split] = make_pools(rows, candidates, params.k, seed, insert_truth=chosen == "inserted")
        if chosen == "retrieved":
            pools[split] = pools[split].take(pools[split].truth >= 0)
            if not len(pools[split].window):
                raise CorecError(
                    "Parameter controls.train_truth is 'retrieved', but SASRec found no training window's next item: "
                    "raise controls.k or sasrec.epochs, or set it to 'any'."
                )
        for n in params.n_tokens:
            rng = np.random.default_rng([seed, number, n])
            requests[split, n] = draw_requests(pools[split], n, params.protocol, vocabulary, rng)
    others: dict[tuple[str, int], np.ndarray] = {
        (protocol, n): draw_requests(pools["test"], n, protocol, vocabulary, np.random.default_rng([seed, 2, n]))
        for protocol in params.other_protocols
        for n in params.n_tokens
    }
    return Prepared(vocabulary, pools, requests, others)


def pool_coverage(prepared: Prepared, split: str = "test") -> pd.DataFrame:
    """Measure how well the pools can serve the requests; one row per number of constraints.

    ``matching``: mean number of candidates that meet all constraints; ``empty``: share of windows without such a candidate;
    ``truth_violates``: share of windows whose true next item, if retrieved, violates a constraint; ``meet_t``: mean number of
    candidates that meet at least t constraints.
    """
    pools, rows = prepared.pools[split], []
    longest = max(n for _, n in prepared.requests)
    for (part, n), request in prepared.requests.items():
        if part == split and n > 0:
            met = matches(pools.candidates, request, prepared.vocabulary.values_of)
            count, all_met = met.sum(axis=2), np.all(met, axis=2)
            hit = pools.truth >= 0
            violates = ~all_met[np.flatnonzero(hit), pools.truth[hit]]
            meet = [(count >= least).sum(axis=1).mean() if least <= n else np.nan for least in range(1, longest + 1)]
            rows.append((n, all_met.sum(axis=1).mean(), 1 - all_met.any(axis=1).mean(), violates.mean(), *meet))
    return pd.DataFrame(
        rows, columns=["n_tokens", "matching", "empty", "truth_violates", *(f"meet_{least}" for least in range(1, longest + 1))]
    )
