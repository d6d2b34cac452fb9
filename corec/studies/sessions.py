"""Sessions of five requests that add, change and drop constraints: control, stability of the list, and latency by turn."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from corec import evaluation, files, machine, rankers, reranker, style
from corec.controls import Pools, Prepared, Vocabulary
from corec.evaluation import Judged, error_bars, order_by, pick
from corec.intervals import by_user, intervals
from corec.params import Params
from corec.reranker import Examples, Reranker, engine
from corec.scores import Scores
from corec.studies import keep_study
from corec.studies.efficiency import answer, forward

EDITS = ("start", "add", "change", "add", "drop")  # of the turns
LENGTHS = (1, 2, 2, 3, 2)  # constraints of the turns
SIMPLE = ("combiner", "hard-filter+combiner", "rule+combiner", "boost")
COLUMNS = "turn edit n_tokens model metric value low high K k dataset n_users seeds".split()


def draw(pools: Pools, vocabulary: Vocabulary, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw the requests of the turns: :data:`EDITS` of the constraints of the turn before.

    Every constraint is a value of some candidate, of three different attributes in random order. The user starts with one
    constraint and adds a second one; changes the second one to another value of its attribute, which therefore is one with two
    values among the candidates; adds a third one; and drops the first one.

    Parameters
    ----------
    pools, vocabulary
        Windows with their candidates, and the values of all items.
    rng
        Random generator.

    Returns
    -------
    Value numbers [windows, n] of each turn; all are -1 in a window whose candidates do not allow such a session.
    """
    total = len(vocabulary.attributes)
    first, second, other, third = (np.full(len(pools.window), -1) for _ in range(4))
    for window, items in enumerate(pools.candidates):
        values = np.unique(vocabulary.values_of[items])
        present = [values[(values >= 0) & (vocabulary.kind(values) == number)] for number in rng.permutation(total)]
        known = [part for part in present if len(part)]
        changed = next((place for place, part in enumerate(known) if len(part) > 1), None)
        if changed is None or len(known) < 3:
            continue
        second[window], other[window] = rng.permutation(known.pop(changed))[:2]
        first[window], third[window] = rng.choice(known[0]), rng.choice(known[1])
    columns = [(first,), (first, second), (first, other), (first, other, third), (other, third)]
    return [np.stack(part, axis=1) for part in columns]


def kept_pairs(before: np.ndarray, after: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Share of the pairs of candidates that keep their order between two turns, of those that nothing should move.

    Parameters
    ----------
    before, after
        Rankings of the two turns [windows, K].
    change
        Constraints met after, minus those met before [windows, K]. Pairs with the same change count.

    Returns
    -------
    [windows]; 1 where no pair counts.
    """
    places = [order.argsort(axis=1) for order in (before, after)]
    signs = [np.sign(place[:, :, None] - place[:, None]) for place in places]
    same = (change[:, :, None] == change[:, None]) & np.triu(np.ones(change.shape[1:] * 2, dtype=bool), 1)
    return np.where(
        same.any(axis=(1, 2)), (same & (signs[0] == signs[1])).sum(axis=(1, 2)) / np.maximum(same.sum(axis=(1, 2)), 1), 1
    )


def rankings(
    pools: Pools, judged: Judged, prior: np.ndarray, totals: Sequence[np.ndarray], params: Params
) -> dict[str, list[np.ndarray]]:
    """Rankings [windows, K] of a turn by ranker, one for each training: of the scores `totals` of COREC, and without it."""
    simple = rankers.without_model(pools, judged, rankers.Inputs(np.zeros(prior.shape), prior), params.evaluation.boost)
    return {name: [simple[name]] for name in SIMPLE} | {"corec": [order_by(total) for total in totals]}


def measure(
    requests: Sequence[np.ndarray],
    scores: Sequence[Scores],
    prepared: Prepared,
    prior: np.ndarray,
    users: np.ndarray,
    params: Params,
) -> pd.DataFrame:
    """CP@k (all constraints met), NDCG@k and stability of every ranker by turn, with intervals over users.

    Windows without a session (see :func:`draw`) do not count.

    ``kept`` is :func:`kept_pairs` since the turn before, ``overlap`` the share of the first k items that were there before.

    Parameters
    ----------
    requests
        Result of :func:`draw`.
    scores
        Scores of the requests in this order, one entry per seed (:func:`corec.studies.trained.score_all`).
    prepared, prior
        Result of stage 03, and the scores of the combiner on the test windows [windows, K].
    users
        User of each test window [windows].
    params
        Settings of the run.

    Returns
    -------
    Columns of :data:`COLUMNS`.
    """
    rows = np.asarray((requests[0] >= 0).all(axis=1))
    pools, requests, prior, users = prepared.pools["test"].take(rows), [part[rows] for part in requests], prior[rows], users[rows]
    scores = [part.take(rows) for part in scores]
    cut, keys, columns = params.figures.k, [], []
    before: dict[str, list[np.ndarray]] = {}
    count = np.zeros(pools.candidates.shape, dtype=int)
    for turn, request in enumerate(requests):
        judged = evaluation.judge(pools, request, prepared.vocabulary.values_of)
        orders = rankings(pools, judged, prior, [part.total()[:, turn] for part in scores], params)
        met = judged.met.sum(axis=2)
        for model, of_seeds in orders.items():
            found = [evaluation.by_window(order, judged, [cut]) for order in of_seeds]
            names = evaluation.control_and_relevance(cut, request.shape[1])
            values = {metric: [each[name] for each in found] for metric, name in names.items()}
            if turn:
                pairs = list(zip(before[model], of_seeds, strict=True))
                values["kept"] = [kept_pairs(old, new, met - count) for old, new in pairs]
                values["overlap"] = [
                    (old[:, :cut, None] == new[:, None, :cut]).any(axis=2).mean(axis=1) for old, new in pairs
                ]  # fmt: skip
            for metric, each in values.items():
                keys.append((turn + 1, EDITS[turn], request.shape[1], model, metric))
                columns.append(np.mean(each, axis=0))
        before, count = orders, met
    whole = by_user(np.stack(columns, axis=1), users)
    low, high = intervals(whole, params.evaluation, params.seed)
    table = pd.DataFrame(keys, columns=COLUMNS[:5]).assign(value=whole.mean(axis=0), low=low, high=high, n_users=len(whole))
    return table.assign(K=params.controls.k, k=cut, dataset=params.data.dataset, seeds=len(scores))[COLUMNS]


def latency(model: Reranker, examples: Examples, pools: Pools, requests: Sequence[np.ndarray], params: Params) -> pd.DataFrame:
    """Time of each turn, for one user at a time: from the cached prefix, and of the whole prompt.

    Parameters
    ----------
    model
        Re-ranker with a merged adapter.
    examples, pools, requests
        Histories, test windows and their requests; `efficiency.users` windows are timed, `efficiency.repeats` times in turn.
    params
        Settings of the run.

    Returns
    -------
    Columns ``turn way p50_ms p95_ms largest_difference device``. ``prefix`` is the time to compute the prefix, once a session.
    The last but one is the largest difference of the scores of the two ways, on one window.

    Raises
    ------
    CorecError
        If no prefix can be cached (:func:`corec.reranker.engine.prefill`).
    """
    few = np.random.default_rng([params.seed, 15]).permutation(len(pools.window))[: params.efficiency.users]
    chosen = pools.take(few)
    rows = [reranker.make_rows(model, examples, chosen, [request[few]]) for request in requests]
    prefixes = [engine.prefill(model, row) for row in rows[0]]

    def from_prefix(turn: int, number: int) -> torch.Tensor:
        place = number % len(few)
        return answer(model, prefixes[place], [rows[turn][place]], 0)

    with torch.inference_mode():
        works = [partial(forward, model, of) for of in rows] + [partial(from_prefix, turn) for turn in range(len(rows))]
        times = machine.interleaved(
            [*works, lambda number: engine.prefill(model, rows[0][number % len(few)])], params.efficiency.repeats
        )
        differences = [float((works[turn](0) - works[len(rows) + turn](0)).abs().max()) for turn in range(len(rows))]
    names = [(turn + 1, way) for way in ("whole prompt", "cached prefix") for turn in range(len(rows))] + [(0, "prefix")]
    table = pd.DataFrame(names, columns=["turn", "way"])
    table["p50_ms"], table["p95_ms"] = [1e3 * middle for middle, _ in times], [1e3 * high for _, high in times]
    table["largest_difference"] = [*differences, *differences, 0.0]
    return table.assign(device=machine.name())


def keep(table: pd.DataFrame, times: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the tables of :func:`measure` and :func:`latency`, the plot and the results page; returns the files."""
    files.write_csv(folder / "session_latency.csv", times, "%.4g")
    with style.figure_style():
        return [*keep_study(table, plot(table, times), folder / "sessions", "%.5g"), folder / "session_latency.csv"]


def plot(table: pd.DataFrame, times: pd.DataFrame) -> Figure:
    """Plot CP, the pairs that keep their order, and the latency, by turn."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    first, labels = table.iloc[0], [f"{turn}: {edit}" for turn, edit in enumerate(EDITS, 1)]
    for axis, metric, title in (
        (axes[0], "cp", f"CP@{first['k']}, all constraints met"),
        (axes[1], "kept", "pairs that keep their order,\nof those that nothing should move"),
    ):
        for model, rows in pick(table, metric=metric).groupby("model", sort=False):
            mark = style.mark(str(model))
            look = {"color": mark.color, "marker": mark.marker, "linestyle": mark.line, "linewidth": mark.width}
            axis.errorbar(rows["turn"], rows["value"], yerr=error_bars(rows), markersize=5, label=style.label(str(model)), **look)
        axis.set(title=title, xticks=range(1, len(EDITS) + 1), xticklabels=labels)
        axis.tick_params(axis="x", rotation=30)
    axes[0].legend(frameon=False, fontsize="small")
    for (way, rows), color in zip(times[times["turn"] > 0].groupby("way", sort=False), ("0.5", style.BLUE), strict=True):
        axes[2].plot(rows["turn"], rows["p50_ms"], "o-", color=color, label=way)
    axes[2].set(title="median ms of a turn, one user", xticks=range(1, len(EDITS) + 1), xticklabels=labels, ylim=(0, None))
    axes[2].tick_params(axis="x", rotation=30)
    axes[2].legend(frameon=False, fontsize="small")
    figure.suptitle(
        f"sessions of five turns: {first['dataset']}, K = {first['K']}, {first['n_users']} users, seeds: {first['seeds']}"
    )
    return figure
