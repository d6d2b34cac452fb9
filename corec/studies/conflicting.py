"""Requests that cannot be met, that oppose the user, or that exclude a value; and a signal that a request cannot be met."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict

from corec import conflicts, controls, evaluation, files, style
from corec.controls import Pools, Prepared, Vocabulary
from corec.evaluation import Judged, error_bars, order_by, pick
from corec.intervals import by_user, intervals, resamples
from corec.params import Params
from corec.rankers import boost, by_combiner
from corec.scores import Scores
from corec.studies import imputers, keep_study

PAIRS = ("compatible", "no candidate", "contradictory")  # kinds of requests of two constraints
SINGLE = ("familiar", "opposed", "excluded")  # kinds of requests of one constraint
NONE = -1.0  # strength of rankers without one
SIGNALS = ("corec", "corec, calibrated", "frequency")
DRAWS = 200  # resamples of users for the intervals of the signals
COLUMNS = "kind n_tokens model strength metric value low high K k dataset protocol n_users seeds".split()


def draw_pairs(pools: Pools, vocabulary: Vocabulary, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw requests of two constraints, each of which some candidate meets, for each window.

    ``compatible``: values of different attributes, and a candidate meets both. ``no candidate``: the same, but no candidate meets
    both. ``contradictory``: two values of an attribute of which no item has more than one.

    Parameters
    ----------
    pools, vocabulary
        Windows with their candidates, and the values of all items.
    rng
        Random generator.

    Returns
    -------
    By kind, value numbers [windows, 2] in random order; -1 where a window has no such pair.
    """
    attribute_of = vocabulary.attribute_of
    per_item = np.stack([(vocabulary.kind(vocabulary.values_of) == a).sum(axis=1) for a in range(len(vocabulary.attributes))])
    exclusive = (per_item.max(axis=1) <= 1)[attribute_of]  # [values]
    same = attribute_of[:, None] == attribute_of
    different = ~np.eye(len(attribute_of), dtype=bool)
    requests, of_item = {kind: np.full((len(pools.window), 2), -1) for kind in PAIRS}, imputers.table(vocabulary) > 0
    for window, items in enumerate(pools.candidates):
        has = of_item[items]  # [K, values]
        together, present = (has.T.astype(int) @ has) > 0, has.any(axis=0)
        both = present[:, None] & present & different
        allowed = {
            "compatible": both & ~same & together,
            "no candidate": both & ~same & ~together,
            "contradictory": both & same & exclusive[:, None],
        }
        for kind, table in allowed.items():
            pairs = np.argwhere(table)
            if len(pairs):
                requests[kind][window] = pairs[rng.integers(len(pairs))]
    return requests


def draw_single(
    pools: Pools, histories: Sequence[Sequence[int]], embeddings: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draw requests of one constraint, met by a candidate, that suit or oppose the user, and values to be excluded.

    A value has the mean embedding of its items, a user that of the history. ``familiar``: of the values in the history, the one
    with the highest cosine similarity to the user. ``opposed``: of the values that the history does not have, the one with the
    lowest. ``excluded``: a random value that some candidates have and others do not.

    Parameters
    ----------
    pools, vocabulary, rng
        As for :func:`draw_pairs`.
    histories
        Items of each window, in the order of `pools`.
    embeddings
        Item embeddings of the retriever [items + 1, width].

    Returns
    -------
    By kind, value numbers [windows, 1]; -1 where a window has no such value.
    """
    of_item = imputers.table(vocabulary) > 0  # [items + 1, values]
    of_value = of_item.T @ embeddings / np.maximum(of_item.sum(axis=0), 1)[:, None]
    requests = {kind: np.full((len(pools.window), 1), -1) for kind in SINGLE}
    for window, (items, history) in enumerate(zip(pools.candidates, histories, strict=True)):
        user, consumed, has = embeddings[list(history)].mean(axis=0), of_item[list(history)].any(axis=0), of_item[items]
        norms = np.linalg.norm(of_value, axis=1) * np.linalg.norm(user)
        likeness = of_value @ user / np.maximum(norms, 1e-9)
        some, count = has.any(axis=0), has.sum(axis=0)
        if (familiar := some & consumed).any():
            requests["familiar"][window] = np.where(familiar, likeness, -np.inf).argmax()
        if (opposed := some & ~consumed).any():
            requests["opposed"][window] = np.where(opposed, likeness, np.inf).argmin()
        if len(partly := np.flatnonzero((count > 0) & (count < len(items)))):
            requests["excluded"][window] = rng.choice(partly)
    return requests


class Requests(NamedTuple):
    """All requests of the study, and their places among the R scored ones."""

    by_kind: dict[str, np.ndarray]  # [windows, n]
    places: dict[tuple[str, bool], int]  # of a kind, and of the same request with its constraints in reverse order
    scored: list[np.ndarray]  # R requests [windows, n], the empty one first
    catalogue: dict[int, int]  # places of requests of the protocol `catalogue` by number of constraints


def collect(by_kind: Mapping[str, np.ndarray], prepared: Prepared, params: Params) -> Requests:
    """List the requests to score: the empty one, those of each kind, the pairs reversed, and those of ``catalogue``.

    Parameters
    ----------
    by_kind
        Results of :func:`draw_pairs` and :func:`draw_single`.
    prepared, params
        Result of stage 03 and settings of the run.

    Raises
    ------
    CorecError
        If the re-ranker does not have a probability for each constraint.
    """
    conflicts.require(params, "conflicts")
    scored, places, catalogue = [np.empty((len(prepared.pools["test"].window), 0), dtype=int)], {}, {}
    for kind, request in by_kind.items():
        for reverse in (False, True) if request.shape[1] > 1 else (False,):
            places[kind, reverse] = len(scored)
            scored.append(request[:, ::-1] if reverse else request)
    for n in (n for n in params.controls.n_tokens if n):
        rng = np.random.default_rng([params.seed, 13, n])
        catalogue[n] = len(scored)
        scored.append(controls.draw_requests(prepared.pools["test"], n, "catalogue", prepared.vocabulary, rng))
    return Requests(dict(by_kind), places, scored, catalogue)


def shares(order: np.ndarray, judged: Judged, k: int, excluded: bool) -> dict[str, np.ndarray]:
    """Metrics [windows] of a ranking [windows, K]: the shares of the top k that meet the constraints, and NDCG@k.

    Of a pair, ``first`` and ``second`` meet this constraint, ``any`` at least one, ``both`` both. ``met`` meets a single
    constraint, ``avoided`` does not have an excluded value.
    """
    met = np.take_along_axis(judged.met, order[:, :k, None], axis=1)  # [windows, k, n]
    values = {"ndcg": evaluation.by_window(order, judged, [k])["ndcg", k, 0]}
    if excluded:
        return values | {"avoided": 1 - met[..., 0].mean(axis=1)}
    if met.shape[2] == 1:
        return values | {"met": met[..., 0].mean(axis=1)}
    parts = {"first": met[..., 0], "second": met[..., 1], "any": met.any(axis=2), "both": met.all(axis=2)}
    return values | {name: part.mean(axis=1) for name, part in parts.items()}


def rankings(
    kind: str, requests: Requests, judged: Judged, scores: Sequence[Scores], pools: Pools, prior: np.ndarray, params: Params
) -> dict[tuple[str, float], np.ndarray]:
    """Rankings [seeds, windows, K] by ranker and strength. An excluded value has a negative weight, the others a positive one.

    ``corec, reversed`` reads the constraints of a pair in the other order. The parameters are those of :func:`measure`.
    """
    combined = by_combiner(pools, prior)
    sign, logits = -1 if kind == "excluded" else 1, params.reranker.control_logits
    wanted = ~judged.met if kind == "excluded" else judged.met
    orders = {
        ("sasrec", NONE): evaluation.retriever_order(pools)[None],
        ("combiner", NONE): evaluation.retriever_order(combined)[None],
        ("hard-filter+combiner", NONE): evaluation.hard_filter_order(combined, wanted)[None],
        ("rule+combiner", NONE): evaluation.rule_order(combined, wanted)[None],
    }
    for strength in params.evaluation.strengths:
        orders["boost", strength] = order_by(boost(prior, judged.met, sign * strength * logits))[None]
        for (name, reverse), place in requests.places.items():
            if name == kind:
                model = "corec, reversed" if reverse else "corec"
                orders[model, strength] = np.stack(
                    [order_by((part.prior + part.relevance)[:, 0] + sign * strength * part.control[:, place]) for part in scores]
                )
    return orders


def measure(
    requests: Requests, scores: Sequence[Scores], prepared: Prepared, prior: np.ndarray, users: np.ndarray, params: Params
) -> pd.DataFrame:
    """Metrics of every ranker under every kind of request (see :func:`shares`), by strength, with intervals over users.

    Of pairs, COREC also has the metric ``lead``: the share of the first k that meets the constraint that is read first, minus the
    share that meets the other one, mean over both orders of reading.

    Prior and relevance of COREC are those of the empty request, so that only the control term depends on the strength.

    Parameters
    ----------
    requests
        Result of :func:`collect`.
    scores
        Scores of ``requests.scored``, one entry per seed (:func:`corec.studies.trained.score_all`).
    prepared, prior
        Result of stage 03, and the scores of the combiner on the test windows [windows, K].
    users
        User of each test window [windows].
    params
        Settings of the run.

    Returns
    -------
    Columns of :data:`COLUMNS`; ``strength`` is empty for rankers without one. Windows without a request of the kind do not count.
    """
    cut, parts = params.figures.k, []
    for kind, request in requests.by_kind.items():
        rows = np.asarray((request >= 0).all(axis=1))
        if not rows.any():
            continue
        pools, asked = prepared.pools["test"].take(rows), request[rows]
        judged = evaluation.judge(pools, asked, prepared.vocabulary.values_of)
        chosen = [part.take(rows) for part in scores]
        keys, columns = [], []
        for (model, strength), orders in rankings(kind, requests, judged, chosen, pools, prior[rows], params).items():
            each = [shares(order, judged, cut, kind == "excluded") for order in orders]
            for metric in each[0]:
                keys.append((kind, asked.shape[1], model, strength, metric))
                columns.append(np.mean([values[metric] for values in each], axis=0))
        column = dict(zip(keys, columns, strict=True))
        for strength in params.evaluation.strengths if asked.shape[1] > 1 else ():
            one, other = ((kind, 2, model, strength) for model in ("corec", "corec, reversed"))
            lead = column[*one, "first"] - column[*one, "second"] + column[*other, "second"] - column[*other, "first"]
            keys.append((*one, "lead"))
            columns.append(lead / 2)
        values = by_user(np.stack(columns, axis=1), users[rows])
        low, high = intervals(values, params.evaluation, params.seed)
        table = pd.DataFrame(keys, columns=COLUMNS[:5]).assign(value=values.mean(axis=0), low=low, high=high)
        parts.append(table.assign(n_users=len(values)))
    whole = pd.concat(parts, ignore_index=True)
    whole["strength"] = whole["strength"].mask(whole["strength"] == NONE)
    whole = whole.assign(K=params.controls.k, k=cut, dataset=params.data.dataset, protocol="conflicts", seeds=len(scores))
    return whole[COLUMNS]


def unmet_probability(control: np.ndarray, n: int, logits: float) -> np.ndarray:
    """Probability [windows] that no candidate meets all n constraints, from the control terms [windows, K].

    The control term is `logits` times the sum of the probabilities of the single constraints. A candidate meets all of them with
    at least the probability sum - (n - 1) (Fréchet's lower bound); the candidate with the largest one decides.
    """
    return 1 - np.clip(control.max(axis=1) / logits - (n - 1), 0, 1)


def signals_of(requests: Requests, part: Scores, prepared: Prepared, users: np.ndarray, params: Params) -> pd.DataFrame:
    """Signals of one training that no candidate meets a request of the protocol ``catalogue`` (see :func:`unmet`).

    Returns
    -------
    Columns ``n_tokens user truth corec``, and ``corec, calibrated`` and ``frequency`` if every fold has requests of both kinds.
    """
    pools, vocabulary, logits = prepared.pools["test"], prepared.vocabulary, params.reranker.control_logits
    parts: list[pd.DataFrame] = []
    frequency = vocabulary.frequency() / max(1, len(vocabulary.values_of) - 1)
    for n, place in requests.catalogue.items():
        request = requests.scored[place]
        met = np.all(controls.matches(pools.candidates, request, vocabulary.values_of), axis=2)
        expected = np.log(np.maximum(pools.candidates.shape[1] * frequency[request].prod(axis=1), 1e-9))
        raw = unmet_probability(part.control[:, place], n, logits)
        frame = pd.DataFrame({"n_tokens": n, "user": users, "truth": ~met.any(axis=1), "expected": expected, "corec": raw})
        parts.append(frame[np.asarray((request >= 0).all(axis=1))])
    table: pd.DataFrame = pd.concat(parts, ignore_index=True)
    clipped = table["corec"].clip(1e-4, 1 - 1e-4)
    inputs = {
        SIGNALS[1]: np.stack([np.log(clipped / (1 - clipped)), table["n_tokens"]], axis=1),
        SIGNALS[2]: np.stack([table["expected"], table["n_tokens"]], axis=1),
    }
    folds = list(GroupKFold(min(5, table["user"].nunique())).split(table, groups=table["user"]))
    if all(table["truth"].iloc[rows].nunique() == 2 for rows, _ in folds):
        for name, values in inputs.items():
            chances = cross_val_predict(LogisticRegression(), values, table["truth"], cv=folds, method="predict_proba")
            table[name] = chances[:, 1]
    return table.drop(columns="expected")


def unmet(
    requests: Requests, scores: Sequence[Scores], prepared: Prepared, users: np.ndarray, params: Params
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predict that no candidate meets a request of the protocol ``catalogue``, and compare with the truth.

    ``corec``: :func:`unmet_probability`. ``corec, calibrated``: logistic regression on its log-odds and n. ``frequency``:
    logistic regression on the logarithm of the expected number of candidates that meet the request, from the frequencies of the
    values in the catalogue. Both regressions predict users that they were not fitted to (five folds).

    Parameters
    ----------
    requests, scores, prepared, users, params
        As for :func:`measure`.

    Returns
    -------
    Quality, with columns ``n_tokens signal auc auc_low auc_high brier brier_low brier_high share n``: area under the ROC curve
    and Brier score, means over the trainings with intervals over users (:data:`DRAWS` resamples), share of requests that cannot
    be met, and number of requests, for each number of constraints and for all (``n_tokens`` 0). And the reliability diagram of
    all trainings together, with columns ``signal bin predicted observed n``.
    """
    tables = [signals_of(requests, part, prepared, users, params) for part in scores]
    first, tail = tables[0], (1 - params.evaluation.confidence) / 2
    names = [name for name in SIGNALS if all(name in table for table in tables)]
    everyone = np.unique(first["user"])
    weights = resamples(len(everyone), params.evaluation.model_copy(update={"bootstrap": DRAWS}), params.seed)
    rows = []
    for n in (0, *requests.catalogue):
        chosen = np.full(len(first), True) if n == 0 else (first["n_tokens"] == n).to_numpy()
        truth, place = first["truth"].to_numpy()[chosen], np.searchsorted(everyone, first["user"].to_numpy()[chosen])
        if len(set(truth.tolist())) < 2:
            continue
        for name in names:
            values = [table[name].to_numpy()[chosen] for table in tables]
            found = [quality(truth, values, None)]
            found += [quality(truth, values, draw[place]) for draw in weights if len(set(truth[draw[place] > 0].tolist())) == 2]
            low, high = np.quantile(found[1:], [tail, 1 - tail], axis=0)
            (auc, brier), (auc_low, brier_low), (auc_high, brier_high) = found[0], low, high
            rows.append((n, name, auc, auc_low, auc_high, brier, brier_low, brier_high, truth.mean(), len(truth)))
    columns = "n_tokens signal auc auc_low auc_high brier brier_low brier_high share n".split()
    whole = pd.concat(tables, ignore_index=True)
    diagram = [
        (name, number, part[name].mean(), part["truth"].mean(), len(part))
        for name in names
        for number, part in whole.groupby(np.clip(np.digitize(whole[name], np.linspace(0, 1, 11)) - 1, 0, 9))
    ]
    return pd.DataFrame(rows, columns=columns), pd.DataFrame(diagram, columns="signal bin predicted observed n".split())


def quality(truth: np.ndarray, values: Sequence[np.ndarray], weights: np.ndarray | None) -> tuple[float, float]:
    """Area under the ROC curve and Brier score, means over the trainings; `weights` of the requests."""
    areas = [roc_auc_score(truth, part, sample_weight=weights) for part in values]
    errors = [brier_score_loss(truth, part, sample_weight=weights) for part in values]
    return float(np.mean(areas)), float(np.mean(errors))


def keep(table: pd.DataFrame, quality: pd.DataFrame, diagram: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the tables of :func:`measure` and :func:`unmet`, the plot and the results page; returns the files."""
    written = [folder / "unmet.csv", folder / "reliability.csv"]
    files.write_csv(written[0], quality, "%.5g")
    files.write_csv(written[1], diagram, "%.5g")
    with style.figure_style():
        return [*keep_study(table, draw(table, diagram), folder / "conflicts", "%.5g"), *written]


def draw(table: pd.DataFrame, diagram: pd.DataFrame) -> Figure:
    """Plot what the first items meet by strength, of COREC and the boost, and the reliability diagram."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    first = table.iloc[0]
    shown = [("any", PAIRS), ("met", SINGLE[:2])]
    for axis, (metric, kinds) in zip(axes, shown, strict=False):
        for kind, color in zip(kinds, style.CYCLE, strict=False):
            for model, line in (("corec", "o-"), ("boost", "d:")):
                rows = pick(table, kind=kind, metric=metric, model=model).sort_values("strength")
                label = f"{kind}, {style.label(model)}"
                axis.errorbar(
                    rows["strength"], rows["value"], yerr=error_bars(rows), fmt=line, markersize=3, color=color, label=label
                )
        axis.set(xlabel="strength of control", ylim=(0, 1.02))
        axis.legend(frameon=False, fontsize="small")
    axes[0].set(title=f"two constraints: share of the first {first['k']}\nthat meets at least one of them")
    axes[1].set(title=f"one constraint: share of the first {first['k']}\nthat meets it")
    axes[2].plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for (name, rows), color in zip(diagram.groupby("signal", sort=False), style.CYCLE, strict=False):
        axes[2].plot(rows["predicted"], rows["observed"], "o-", markersize=4, color=color, label=name)
    axes[2].set(
        xlabel="predicted probability", ylabel="observed share", title="no candidate meets the request\n(protocol catalogue)"
    )
    axes[2].legend(frameon=False, fontsize="small")
    figure.suptitle(f"{first['dataset']}, K = {first['K']}, seeds: {first['seeds']}")
    return figure
