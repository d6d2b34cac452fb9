"""Simulated users who steer a list until they find the item that they want: rounds and items examined, by ranker.

The model of the user is stated in :class:`Assumptions`; nothing in it is estimated from people.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from corec import evaluation, style
from corec.controls import Pools, Vocabulary, matches
from corec.data import Tables
from corec.evaluation import error_bars, order_by, pick
from corec.evidence.features import pairs
from corec.intervals import by_user, with_differences
from corec.params import Params
from corec.rankers import boost, by_combiner
from corec.sasrec.baselines import similarities
from corec.scores import Scores
from corec.studies import keep_study

BASE = "rule+combiner"  # the ranker that the others are compared with
METRICS = ("found", "rounds", "examined", "substitute")
COLUMNS = "assumption level model metric value low high ahead ahead_low ahead_high K dataset n_users sessions seeds".split()


class Assumptions(NamedTuple):
    """Model of a user who wants one item of the candidates and can name constraints on its attributes.

    The user begins without a constraint, examines the list from the top, and continues after each item with the probability
    `patience`. Items that were examined in an earlier round are skipped and cost nothing. The user recognises the wanted item
    with the probability `recognition` when it is examined, and ends the session. Another item is taken instead with the
    probability `substitution` times its cosine similarity to the wanted item (by the users of the training interactions) times
    the share of the user's constraints that it meets. If the user stops examining, the next constraint is added, up to `rounds`
    lists in all.
    """

    patience: float = 0.85
    recognition: float = 0.95
    substitution: float = 0.2
    rounds: int = 6
    wrong: float = 0.0  # probability that a constraint has a wrong value of its attribute
    order: str = "random"  # of the constraints: `random`, or `rarest` value first


VARIED: dict[str, tuple[Any, ...]] = {
    "patience": (0.6, 0.75, 0.95),
    "recognition": (0.5, 1.0),
    "substitution": (0.0, 0.5),
    "rounds": (2, 4),
    "wrong": (0.1, 0.3),
    "order": ("rarest",),
}


def conditions() -> Iterator[tuple[str, str, Assumptions]]:
    """Name of the varied assumption, its level, and all assumptions: first the defaults, then one change at a time."""
    yield "default", "", Assumptions()
    for name, levels in VARIED.items():
        for level in levels:
            yield name, str(level), Assumptions()._replace(**{name: level})


def needs(items: np.ndarray, vocabulary: Vocabulary, wrong: float, order: str, rng: np.random.Generator) -> np.ndarray:
    """The constraints that the users name, one for each known attribute of the wanted item.

    Parameters
    ----------
    items
        Wanted item of each window [windows].
    vocabulary
        Attributes and values.
    wrong, order
        As in :class:`Assumptions`.
    rng
        Random generator. The same generator gives the same attributes and values for every `wrong`, up to the wrong ones.

    Returns
    -------
    Value numbers [windows, attributes] in the order in which they are named; -1 after the last.
    """
    total, frequency = len(vocabulary.attributes), vocabulary.frequency()
    requests = np.full((len(items), total), -1)
    for row, item in enumerate(items):
        chosen = []
        keys, slips, draws = rng.random(total), rng.random(total), rng.random((total, 2))
        for number in range(total):
            own = [value for value in vocabulary.values_of[item] if value >= 0 and vocabulary.attribute_of[value] == number]
            if not own:
                continue
            value = own[int(draws[number, 0] * len(own))]
            others = np.setdiff1d(np.flatnonzero(vocabulary.attribute_of == number), own)
            if slips[number] < wrong and len(others):
                value = others[int(draws[number, 1] * len(others))]
            chosen.append((frequency[value] if order == "rarest" else keys[number], value))
        named = [value for _, value in sorted(chosen)]
        requests[row, : len(named)] = named
    return requests


class Session(NamedTuple):
    """Result of :func:`simulate`, each [windows, sessions]."""

    found: np.ndarray  # the wanted item was found
    rounds: np.ndarray  # lists shown
    examined: np.ndarray  # items examined
    substitute: np.ndarray  # another item was taken


def simulate(
    orders: Sequence[np.ndarray], truth: np.ndarray, appeal: np.ndarray, given: Assumptions, sessions: int, seed: int
) -> Session:
    """Simulate sessions of every window (see :class:`Assumptions`).

    The random numbers depend on `seed`, window, session, round and item only, so that rankers meet the same users.

    Parameters
    ----------
    orders
        Rankings [windows, K] of the rounds, from no constraint to all of them; the last one is used for all further rounds.
    truth
        Index of the wanted item in the pool [windows].
    appeal
        Similarity of each candidate to the wanted item times the share of the constraints that it meets [windows, K].
    given
        The assumptions.
    sessions
        Sessions of each window.
    seed
        Seed of the random numbers.
    """
    windows, k = appeal.shape
    rng = np.random.default_rng([seed, 16])
    shape = (windows, sessions, k)
    wanted = (np.arange(k) == truth[:, None])[:, None]  # [windows, 1, K]
    threshold = np.where(wanted, given.recognition, given.substitution * appeal[:, None])
    takes = rng.random(shape) < threshold  # the user would end the session at this item
    examined = np.zeros(shape, dtype=bool)
    ended, found = np.zeros(shape[:2], dtype=bool), np.zeros(shape[:2], dtype=bool)
    rounds, count = np.zeros(shape[:2], dtype=int), np.zeros(shape[:2], dtype=int)
    for number in range(given.rounds):
        length = rng.geometric(1 - given.patience, shape[:2])  # items that the user is ready to examine
        order = np.broadcast_to(orders[min(number, len(orders) - 1)][:, None], shape)
        new = ~np.take_along_axis(examined, order, axis=2)  # in ranked order
        visited = new & (np.cumsum(new, axis=2) <= length[..., None]) & ~ended[..., None]
        stops = visited & np.take_along_axis(takes, order, axis=2)
        visited &= (np.cumsum(stops, axis=2) - stops) == 0  # nothing after the item that ends the session
        stops &= visited
        rounds += ~ended
        count += visited.sum(axis=2)
        found |= (stops & np.take_along_axis(np.broadcast_to(wanted, shape), order, axis=2)).any(axis=2)
        ended |= stops.any(axis=2)
        marks = np.zeros(shape, dtype=bool)
        np.put_along_axis(marks, order, visited, axis=2)
        examined |= marks
    return Session(found, rounds, count, ended & ~found)


class Asked(NamedTuple):
    """The requests of the users by order and share of wrong constraints, and their places among the scored ones."""

    needs: dict[tuple[str, float], np.ndarray]  # [windows, attributes]
    scored: list[np.ndarray]  # R requests [windows, n], the empty one first
    places: dict[tuple[str, float], list[int]]  # of 0, 1, … constraints


def ask(pools: Pools, vocabulary: Vocabulary, seed: int) -> Asked:
    """Draw the requests of all :func:`conditions` for windows whose wanted item is among the candidates."""
    wanted = pools.candidates[np.arange(len(pools.window)), pools.truth]
    kinds = dict.fromkeys((given.order, given.wrong) for *_, given in conditions())
    named, places = {}, {}
    scored = [np.empty((len(wanted), 0), dtype=int)]
    for order, wrong in kinds:
        named[order, wrong] = needs(wanted, vocabulary, wrong, order, np.random.default_rng([seed, 17]))
        places[order, wrong] = [0, *range(len(scored), len(scored) + named[order, wrong].shape[1])]
        scored += [named[order, wrong][:, : n + 1] for n in range(named[order, wrong].shape[1])]
    return Asked(named, scored, places)


def rankings(
    request: np.ndarray, places: Sequence[int], scores: Sequence[Scores], pools: Pools, prior: np.ndarray, vocabulary: Vocabulary,
    params: Params,
) -> dict[str, list[list[np.ndarray]]]:  # fmt: skip
    """Rankings [windows, K] of the rounds by ranker; one list for each seed.

    Parameters
    ----------
    request, places
        The constraints in the order in which they are named [windows, attributes], and the places of the requests in `scores`.
    scores
        Scores of the requests, one entry per seed.
    pools, prior, vocabulary, params
        The windows, the combiner's scores [windows, K], the values of the items, and the settings of the run.
    """
    combined = by_combiner(pools, prior)
    plain = evaluation.retriever_order(combined)
    orders: dict[str, list[list[np.ndarray]]] = {
        "no control": [[plain]], "hard-filter+combiner": [[plain]], BASE: [[plain]], "boost": [[plain]]
    }  # fmt: skip
    for n in range(1, request.shape[1] + 1):
        met = matches(pools.candidates, request[:, :n], vocabulary.values_of)
        strict = met | (request[:, None, :n] < 0)  # a constraint that is not named is met
        orders["hard-filter+combiner"][0].append(evaluation.hard_filter_order(combined, strict))
        orders[BASE][0].append(evaluation.rule_order(combined, met))
        orders["boost"][0].append(order_by(boost(prior, met, params.evaluation.boost)))
    for name, strength in (("corec", 1.0), ("corec, strength 0.2", 0.2)):
        orders[name] = [[order_by(part.total(strength)[:, place]) for place in places] for part in scores]
    return orders


def measure(
    asked: Asked, scores: Sequence[Scores], pools: Pools, prior: np.ndarray, users: np.ndarray, tables: Tables,
    vocabulary: Vocabulary, params: Params,
) -> pd.DataFrame:  # fmt: skip
    """Simulate the users of all :func:`conditions` with all rankers.

    Parameters
    ----------
    asked
        Result of :func:`ask`.
    scores
        Scores of ``asked.scored``, one entry per seed.
    pools, prior, users
        Windows whose wanted item is among the candidates, with the combiner's scores [windows, K] and the users [windows].
    tables, vocabulary
        Tables of the run, for the similarity of items, and the values of the items.
    params
        Settings of the run; `study.sessions` sessions of each window are simulated.

    Returns
    -------
    Columns of :data:`COLUMNS`: mean over the users of the share of sessions in which the wanted item is ``found``, of the
    ``rounds`` and the items ``examined`` until the session ends, and of the share that ends with a ``substitute``; ``ahead`` is
    the paired difference from :data:`BASE`. Intervals are over users.
    """
    wanted = pools.candidates[np.arange(len(pools.window)), pools.truth]
    likeness = np.asarray(pairs(similarities(tables), wanted[:, None], pools.candidates), dtype=float)
    sessions, parts = params.study.sessions, []
    orders_of = {
        key: rankings(request, asked.places[key], scores, pools, prior, vocabulary, params)
        for key, request in asked.needs.items()
    }
    for name, level, given in conditions():
        true_needs = asked.needs[given.order, 0.0]
        count = np.maximum((true_needs >= 0).sum(axis=1), 1)[:, None]
        appeal = likeness * matches(pools.candidates, true_needs, vocabulary.values_of).sum(axis=2) / count
        keys, columns = [], []
        for model, of_seeds in orders_of[given.order, given.wrong].items():
            each = [simulate(orders, pools.truth, appeal, given, sessions, params.seed) for orders in of_seeds]
            for metric in METRICS:
                keys.append((name, level, model, metric))
                columns.append(np.mean([getattr(session, metric).mean(axis=1) for session in each], axis=0))
        values = by_user(np.stack(columns, axis=1), users)
        base = [keys.index((name, level, BASE, metric)) for *_, metric in keys]
        numbers = with_differences(values, values - values[:, base], params.evaluation, params.seed)
        parts.append(pd.DataFrame(keys, columns=COLUMNS[:4]).join(numbers).assign(n_users=len(values)))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(K=params.controls.k, dataset=params.data.dataset, sessions=sessions, seeds=len(scores))[COLUMNS]


def keep(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the table of :func:`measure`, its plot and the results page; returns the files."""
    with style.figure_style():
        return keep_study(table, draw(table), folder / "simulated", "%.5g")


def draw(table: pd.DataFrame) -> Figure:
    """Plot the share of sessions that find the wanted item and the items examined, by ranker, and by assumption."""
    models, first = list(table["model"].unique()), table.iloc[0]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained", width_ratios=[1, 1, 1.5])
    default = pick(table, assumption="default")
    for axis, metric, title in (
        (axes[0], "found", "share of sessions that\nfind the wanted item"),
        (axes[1], "examined", "items examined\nper session"),
    ):
        rows = pick(default, metric=metric).set_index("model").loc[models]
        colors = [style.mark(model).color for model in models]
        axis.barh(models, rows["value"], xerr=error_bars(rows), color=colors)
        axis.invert_yaxis()
        axis.set(title=title)
    axes[1].set(yticklabels=[])
    for model, color in (("no control", "0.5"), ("corec", style.BLUE)):
        rows = pick(table, metric="found", model=model)
        names = [" = ".join(filter(None, pair)) for pair in rows[["assumption", "level"]].astype(str).itertuples(index=False)]
        ends = error_bars(rows, "ahead", ("ahead_low", "ahead_high"))
        axes[2].errorbar(rows["ahead"], names, xerr=ends, fmt="o", markersize=4, color=color, label=style.label(model))
    axes[2].axvline(0, color="0.3", linewidth=0.8)
    axes[2].invert_yaxis()
    axes[2].set(title=f"found, minus {BASE},\nby assumption")
    axes[2].legend(frameon=False, fontsize="small")
    figure.suptitle(f"simulated users: {first['dataset']}, K = {first['K']}, {first['n_users']} users, seeds: {first['seeds']}")
    return figure
