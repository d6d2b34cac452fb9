"""Stage 03: attributes as control values, candidate pools, requests and control scores.

Everything rests on one table of numbers, ``values_of`` [items + 1, slots]: which values each item has, of any
attribute, padded with -1. A request is a row of value numbers, padded likewise; it matches item i in constraint c_j
where c_j is in ``values_of[i]`` (method: r_i = sum_j 1[item i has c_j] + 1[i is the true next item]). With a few slots
an item, a catalogue with thousands of brands costs no more than one with ten.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd

from corec import CorecError, files, paths, schemes, stages
from corec.params import ControlsParams
from corec.schemes import Attribute


@dataclass(frozen=True)
class Vocabulary:
    """The attributes under control and all their values.

    Attributes
    ----------
    attributes
        In the scheme's order.
    labels
        The text of each value [values]; values of one attribute lie together.
    attribute_of
        Number of each value's attribute [values].
    values_of
        [items + 1, slots], numbers of the item's values, rising, then -1; row 0 (padding) has none.
    """

    attributes: tuple[Attribute, ...]
    labels: tuple[str, ...]
    attribute_of: np.ndarray
    values_of: np.ndarray

    def name(self, value: int) -> str:
        """A value as a reader sees it: ``genre: Comedy``; -1 is a constraint that could not be drawn."""
        if value < 0:
            return "(nothing)"
        return f"{self.attributes[self.attribute_of[value]].name}: {self.labels[value]}"

    def kind(self, values: np.ndarray) -> np.ndarray:
        """Number of each value's attribute, -1 for -1 (any shape)."""
        return np.where(values >= 0, self.attribute_of[values], -1)

    def known(self) -> np.ndarray:
        """Which item has any value of which attribute [items + 1, attributes]."""
        kinds = self.kind(self.values_of)
        return np.stack([(kinds == number).any(axis=1) for number in range(len(self.attributes))], axis=1)

    def frequency(self) -> np.ndarray:
        """How many items have each value [values]."""
        return np.bincount(self.values_of[self.values_of >= 0], minlength=len(self.labels))


def vocabulary(items: pd.DataFrame, params: ControlsParams) -> Vocabulary:
    """Bucket the items' attributes by the scheme.

    Parameters
    ----------
    items
        The items table of :mod:`corec.data`, items 1 … n in order.

    Raises
    ------
    CorecError
        When the items lack a column of the scheme, or `params.attributes` names one that the scheme has not.
    """
    attributes = schemes.choose(params.scheme, params.attributes)
    labels: list[str] = []
    attribute_of: list[int] = []
    rows: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for number, attribute in enumerate(attributes):
        if attribute.column not in items:
            raise CorecError(
                f"Scheme {params.scheme!r} wants the column {attribute.column!r}, which this data set lacks: "
                "name a scheme that fits the data in controls.scheme."
            )
        lists = attribute.values(items[attribute.column])
        found = lists.set_axis(items["item"]).explode().dropna()
        ordered = attribute.labels or sorted(found.unique())
        rows.append(found.index.to_numpy())
        values.append(len(labels) + pd.Index(ordered).get_indexer(pd.Index(found)))
        labels += ordered
        attribute_of += [number] * len(ordered)
    pairs = np.unique(np.stack([np.concatenate(rows), np.concatenate(values)], axis=1), axis=0)  # item, value; sorted
    slot = np.arange(len(pairs)) - np.searchsorted(pairs[:, 0], pairs[:, 0])
    values_of = np.full((len(items) + 1, slot.max(initial=0) + 1), -1)
    values_of[pairs[:, 0], slot] = pairs[:, 1]
    return Vocabulary(attributes, tuple(labels), np.array(attribute_of), values_of)


class Pools(NamedTuple):
    """The candidates to be re-ranked, in a shuffled order that tells nothing.

    All arrays but `window` and `truth` are [windows, K].
    """

    window: np.ndarray  # [windows]
    candidates: np.ndarray  # items
    retriever_rank: np.ndarray  # 0 = the retriever's best; a truth that was put in has that of whom it replaced
    retriever_score: np.ndarray
    truth: np.ndarray  # [windows] place of the true next item, -1 where it is not among the candidates

    def is_truth(self) -> np.ndarray:
        """True where the candidate is the true next item [windows, K]."""
        return np.arange(self.candidates.shape[1]) == self.truth[:, None]

    def take(self, rows: np.ndarray) -> "Pools":
        """Some of the windows."""
        return Pools(*(values[rows] for values in self))


def make_pools(windows: pd.DataFrame, candidates: pd.DataFrame, k: int, seed: int, insert_truth: bool = False) -> Pools:
    """Take each window's K best candidates and shuffle them.

    Parameters
    ----------
    windows, candidates
        Tables of stages 01 and 02.
    insert_truth
        Put a true next item that was not retrieved in the place of the last candidate (training only).
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
    hit = items == target[:, None]
    truth = np.where(hit.any(axis=1), hit.argmax(axis=1), -1)
    return Pools(table["window"].to_numpy(), items, ranks, scores, truth)


def _draw(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One index along the last axis with probability in proportion to `weights`; -1 where all are zero."""
    total = weights.cumsum(axis=-1)
    point = rng.random((*weights.shape[:-1], 1)) * total[..., -1:]
    return np.where(total[..., -1] > 0, (total > point).argmax(axis=-1), -1)


def _value_of(items: np.ndarray, attributes: np.ndarray, table: Vocabulary, rng: np.random.Generator) -> np.ndarray:
    """For each item and attribute (same shape), one value that the item has; -1 where it has none."""
    owned = table.values_of[items]
    slot = _draw((table.kind(owned) == attributes[..., None]).astype(float), rng)
    return np.where(slot >= 0, np.take_along_axis(owned, slot[..., None].clip(0), axis=-1)[..., 0], -1)


def draw_requests(pools: Pools, n: int, protocol: str, table: Vocabulary, rng: np.random.Generator) -> np.ndarray:
    """One request of `n` constraints on `n` different attributes for every window [windows, n].

    ``oracle`` (the paper's): all values are the true next item's where it is among the candidates; elsewhere
    each is that of a candidate drawn for it alone. ``random-candidate``: all are those of one random candidate
    that is not the true item. ``catalogue``: each is drawn by its frequency among all items.

    A constraint that cannot be drawn, for want of a known attribute, is -1: no item meets it.

    Raises
    ------
    CorecError
        When `n` is larger than the number of attributes.
    """
    if n > len(table.attributes):
        raise CorecError(
            f"Parameter controls.n_tokens asks for {n} constraints, but only {len(table.attributes)} attributes are "
            "under control: lower it."
        )
    n_windows, k = pools.candidates.shape
    if n == 0:
        return np.empty((n_windows, 0), dtype=int)
    known = table.known()
    keys = rng.random((n_windows, len(table.attributes)))
    rows = np.arange(n_windows)
    if protocol == "catalogue":
        attributes = keys.argsort(axis=1)[:, :n]
        total, chosen = table.frequency().cumsum(), rng.random(attributes.shape)
        bounds = np.searchsorted(table.attribute_of, np.arange(len(table.attributes) + 1))  # values of one lie together
        before, upto = (np.concatenate([[0], total])[bounds[attributes + end]] for end in (0, 1))
        return np.where(upto > before, np.searchsorted(total, before + chosen * (upto - before), side="right"), -1)
    if protocol == "oracle":
        attributes = keys.argsort(axis=1)[:, :n]
        drawn = np.take_along_axis(pools.candidates, rng.integers(0, k, (n_windows, n)), axis=1)
        truth = pools.candidates[rows, pools.truth][:, None]
        return _value_of(np.where(pools.truth[:, None] >= 0, truth, drawn), attributes, table, rng)
    rich = known[pools.candidates].sum(axis=2)  # attributes known of each candidate
    eligible = ~pools.is_truth()
    enough = eligible & (rich >= np.minimum(n, (rich * eligible).max(axis=1, keepdims=True)))
    item = pools.candidates[rows, _draw(enough.astype(float), rng)]
    attributes = (keys + ~known[item]).argsort(axis=1)[:, :n]  # those that the item has come first
    return _value_of(item[:, None], attributes, table, rng)


def matches(candidates: np.ndarray, requests: np.ndarray, values_of: np.ndarray) -> np.ndarray:
    """Which candidate meets which constraint [..., K, n] (-1 in a request is met by none).

    Parameters
    ----------
    candidates
        Items [..., K].
    requests
        Value numbers [..., n].
    values_of
        Of the vocabulary.
    """
    owned = values_of[candidates]  # [..., K, slots]
    met = (owned[..., None, :] == requests[..., None, :, None]).any(axis=-1)
    return met & (requests >= 0)[..., None, :]


def control_scores(met: np.ndarray, is_truth: np.ndarray | None = None) -> np.ndarray:
    """Control score r [..., K] of `met` [..., K, n]: constraints met, plus one for the true next item if given."""
    scores = met.sum(axis=-1)
    return scores if is_truth is None else scores + is_truth


def standardise(scores: np.ndarray) -> np.ndarray:
    """Scores [..., K] with zero mean and unit variance within each pool (a constant row becomes zeros)."""
    centred = scores - scores.mean(axis=-1, keepdims=True)
    return centred / np.maximum(scores.std(axis=-1, keepdims=True), 1e-9)


class Prepared(NamedTuple):
    """What stage 03 leaves for the others: the vocabulary, pools by split, requests by split and length."""

    table: Vocabulary
    pools: dict[str, Pools]
    requests: dict[tuple[str, int], np.ndarray]


def prepare(windows: pd.DataFrame, candidates: pd.DataFrame, items: pd.DataFrame, params: ControlsParams, seed: int) -> Prepared:
    """Pools of every split, and a request of every length in `params.n_tokens` for every window.

    Where a split has more windows than `params.max_windows` allows, a random sample of them is kept; of the training
    windows then only those that `params.train_truth` wants.
    """
    table = vocabulary(items, params)
    pools, requests = {}, {}
    for number, split in enumerate(("train", "valid", "test")):
        rows = windows[windows["split"] == split]
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
            requests[split, n] = draw_requests(pools[split], n, params.protocol, table, rng)
    return Prepared(table, pools, requests)


def pool_coverage(prepared: Prepared, split: str = "test") -> pd.DataFrame:
    """How well the pools can serve the requests, a row for each number of constraints.

    ``matching``: mean number of candidates that meet all constraints; ``empty``: share of windows where none
    does; ``truth_violates``: share of windows whose true next item, when retrieved, misses a constraint; ``meet_t``: mean
    number of candidates that meet at least t of the constraints.
    """
    pools, rows = prepared.pools[split], []
    longest = max(n for _, n in prepared.requests)
    for (part, n), request in prepared.requests.items():
        if part == split and n > 0:
            met = matches(pools.candidates, request, prepared.table.values_of)
            count, all_met = met.sum(axis=2), np.all(met, axis=2)
            hit = pools.truth >= 0
            violates = ~all_met[np.flatnonzero(hit), pools.truth[hit]]
            meet = [(count >= least).sum(axis=1).mean() if least <= n else np.nan for least in range(1, longest + 1)]
            rows.append((n, all_met.sum(axis=1).mean(), 1 - all_met.any(axis=1).mean(), violates.mean(), *meet))
    return pd.DataFrame(
        rows, columns=["n_tokens", "matching", "empty", "truth_violates", *(f"meet_{least}" for least in range(1, longest + 1))]
    )


CARD = """# Windows, pools, requests and control scores of a run of COREC

Made by notebook 3 from {windows:,} windows; K = {k} candidates, requests of {lengths} constraints, protocol `{protocol}`.

| column | |
|---|---|
| `window`, `user`, `target`, `history` | numbers; the true next item, and the items before it, oldest first |
| `candidates` | K items that the retriever found, in a shuffled order that tells nothing |
| `retriever_rank`, `retriever_score` | of each candidate; rank 0 is the retriever's best |
| `truth` | the place of the true next item among the candidates, -1 where it is not there |
| `requests` | for each length the numbers of the requested values (`vocabulary.json` names them; -1 is met by no item) |
| `control` | for each length the control score of each candidate: constraints met, plus one for the true next item |

Items count from 1; their titles are in `../data/items.parquet`.
"""


def to_dataset(prepared: Prepared, windows: pd.DataFrame) -> datasets.DatasetDict:
    """Windows, pools, requests and control scores of all splits with typed features (columns: see :data:`CARD`).

    Parameters
    ----------
    prepared
        Of :func:`prepare`.
    windows
        The windows table of stage 01.
    """
    whole, items = datasets.Value("int64"), datasets.List(datasets.Value("int64"))
    features = datasets.Features(
        {
            **dict.fromkeys(("window", "user", "target"), whole),
            **dict.fromkeys(("history", "candidates", "retriever_rank"), items),
            "retriever_score": datasets.List(datasets.Value("float32")),
            "truth": whole,
            **dict.fromkeys(("requests", "control"), datasets.List(items)),
        }
    )
    table, splits = windows.set_index("window"), {}
    for split, pools in prepared.pools.items():
        rows = table.loc[pools.window]
        requests = [request for (part, _), request in prepared.requests.items() if part == split]
        met = [matches(pools.candidates, request, prepared.table.values_of) for request in requests]
        control = [control_scores(each, pools.is_truth()) for each in met]
        columns = {name: list(rows[name]) for name in ("user", "target", "history")}
        columns |= {name: list(values) for name, values in pools._asdict().items()}
        columns |= {name: list(zip(*of, strict=True)) for name, of in (("requests", requests), ("control", control))}
        splits[split] = datasets.Dataset.from_dict({name: columns[name] for name in features}, features=features)
    return datasets.DatasetDict(splits)


def save(prepared: Prepared, windows: pd.DataFrame, folder: Path, protocol: str = "") -> list[Path]:
    """Write the vocabulary, and all else as a ``datasets.DatasetDict`` (see :func:`to_dataset`); returns the files."""
    table = prepared.table
    lengths = list(dict.fromkeys(n for _, n in prepared.requests))
    described = {
        "attributes": [attribute.model_dump() for attribute in table.attributes],
        "labels": table.labels,
        "attribute_of": table.attribute_of.tolist(),
        "names": [table.name(value) for value in range(len(table.labels))],
        "n_tokens": lengths,
    }
    files.write_text(folder / "vocabulary.json", json.dumps(described))
    np.save(folder / "values_of.npy", table.values_of)
    made = to_dataset(prepared, windows)
    part, target = folder / "dataset.part", folder / "dataset"
    shutil.rmtree(part, ignore_errors=True)
    datasets.disable_progress_bars()
    try:
        made.save_to_disk(part)
    finally:
        datasets.enable_progress_bars()
    count, k = sum(map(len, made.values())), prepared.pools["train"].candidates.shape[1]
    card = CARD.format(windows=count, k=k, lengths=", ".join(map(str, lengths)), protocol=protocol)
    (part / "README.md").write_text(card)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return [folder / "vocabulary.json", folder / "values_of.npy", *sorted(target.glob("*/*.arrow"))]


def load(run: str) -> Prepared:
    """What stage 03 of a run has left (raises CorecError when it has not finished)."""
    stages.require(run, "controls")
    folder = paths.stage_dir(run, "controls")
    described = json.loads((folder / "vocabulary.json").read_text())
    attributes = tuple(Attribute.model_validate(entry) for entry in described["attributes"])
    attribute_of = np.array(described["attribute_of"])
    table = Vocabulary(attributes, tuple(described["labels"]), attribute_of, np.load(folder / "values_of.npy"))
    pools, requests = {}, {}
    for name, part in datasets.load_from_disk(folder / "dataset").items():
        split = str(name)
        pools[split] = Pools(*(np.array(part[column][:]) for column in Pools._fields))
        pools[split] = pools[split]._replace(retriever_score=pools[split].retriever_score.astype(np.float32))
        asked = part["requests"][:]
        for place, n in enumerate(described["n_tokens"]):
            requests[split, n] = np.array([row[place] for row in asked], dtype=int).reshape(len(asked), n)
    return Prepared(table, pools, requests)
