"""The frontier of control and relevance: CP and NDCG of COREC and of the additive boost, as the strength varies.

A point is the mean over users of CP@k (tau = n) and of NDCG@k at one strength. The boost has the score
prior + c * strength * (constraints met), with c = ``reranker.control_logits``, so both have the same scale.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from corec import evaluation, rankers, style
from corec.evaluation import Judged, order_by
from corec.intervals import by_user, intervals, resamples
from corec.params import Params
from corec.rankers import Ranked
from corec.scores import Scores

COLUMNS = "protocol K n_tokens model strength seed cp cp_low cp_high ndcg ndcg_low ndcg_high n_users".split()
POINTS = ("sasrec", "combiner", "hard-filter", "hard-filter+combiner", "rule", "rule+combiner")
NONE = -1.0  # strength of rankers without one
Points = dict[tuple[int, str, float, int], np.ndarray]  # n, ranker, strength (-1: none), place of the seed -> [users, 2]


def point(order: np.ndarray, judged: Judged, users: np.ndarray, k: int) -> np.ndarray:
    """CP@k at tau = n and NDCG@k of each user [users, 2]."""
    found = evaluation.by_window(order, judged, [k])
    return by_user(np.stack([found["cp", k, judged.met.shape[2]], found["ndcg", k, 0]], axis=1), users)


def sweep(ranked: Ranked, scores: Sequence[Scores], prior: np.ndarray, users: np.ndarray, params: Params) -> Points:
    """Compute CP and NDCG of each user: of COREC and the boost by strength, and of all other rankers.

    Parameters
    ----------
    ranked
        Result of :func:`corec.rankers.rank`.
    scores
        Scores of COREC on the test windows, one entry per seed.
    prior
        Scores of the combiner on the test windows [windows, K].
    users
        User of each window [windows].
    params
        Strengths, cut-off, and score of a constraint.
    """
    k, found = params.figures.k, Points()
    for place, n in enumerate(params.controls.n_tokens):
        judged = ranked.judged[n]
        for strength in params.evaluation.strengths if n else []:
            logits = params.reranker.control_logits * strength
            found[n, "boost", strength, 0] = point(order_by(rankers.boost(prior, judged.met, logits)), judged, users, k)
            for number, part in enumerate(scores):
                found[n, "corec", strength, number] = point(order_by(part.total(strength)[:, place]), judged, users, k)
        for model, orders in ranked.orders[n].items() if n else ():
            if model not in ("boost", "corec"):
                own = evaluation.strict(judged) if model == "hard-filter-strict" else judged
                each = [point(order, own, users, k) for order in evaluation.by_seed(orders)]
                found[n, model, NONE, 0] = np.mean(each, axis=0)
    return found


def over_seeds(points: Points) -> dict[tuple[int, str, float], np.ndarray]:
    """Points averaged over the seeds, user by user."""
    grouped: dict[tuple[int, str, float], list[np.ndarray]] = {}
    for (n, model, strength, _), values in points.items():
        grouped.setdefault((n, model, strength), []).append(values)
    return {key: np.mean(values, axis=0) for key, values in grouped.items()}


def table(points: Points, params: Params) -> pd.DataFrame:
    """Points with their intervals, in the columns of :data:`COLUMNS`.

    ``strength`` is empty for rankers without one. With several seeds, the rows without a ``seed`` are the means over the seeds.
    """
    several = {key[3] for key in points if key[1] == "corec"} != {0}
    keyed: list[tuple[int, str, float, int | None, np.ndarray]] = [
        (n, model, strength, params.seed + number, values) for (n, model, strength, number), values in points.items()
    ]
    if several:
        keyed += [(n, model, s, None, values) for (n, model, s), values in over_seeds(points).items() if model == "corec"]
    whole = np.concatenate([values for *_, values in keyed], axis=1)  # [users, 2 * points]
    low, high = intervals(whole, params.evaluation, params.seed)
    numbers = np.stack([whole.mean(axis=0), low, high], axis=1).reshape(len(keyed), 6)  # CP, its interval, NDCG, its interval
    about = (params.controls.protocol, params.controls.k)
    rows = [
        (*about, n, model, strength, seed, *each, len(whole))
        for (n, model, strength, seed, _), each in zip(keyed, numbers, strict=True)
    ]
    made = pd.DataFrame(rows, columns=COLUMNS).astype({"seed": "Int64"})
    return made.assign(strength=made["strength"].mask(made["strength"] == NONE))


def resampled_gaps(points: Points, params: Params) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """NDCG of COREC minus that of the boost at the same CP, by number of constraints.

    Between its points, the boost is interpolated linearly; beyond its ends, it is that of the nearest end. The bootstrap over
    users resamples both curves together.

    Returns
    -------
    By n: the CP of COREC [strengths], and the differences [1 + resamples, strengths], those of the sample itself first.
    """
    means, made = over_seeds(points), {}
    weights = resamples(len(next(iter(points.values()))), params.evaluation, params.seed)
    for n in (n for n in params.controls.n_tokens if n):
        curves = {}
        for model in ("boost", "corec"):
            values = np.stack([means[n, model, strength] for strength in params.evaluation.strengths], axis=1)
            drawn = np.einsum("bu,usm->bsm", weights, values)  # [resamples, strengths, 2]
            curves[model] = np.concatenate([values.mean(axis=0)[None], drawn])
        found = np.stack([difference(ours, boost) for ours, boost in zip(curves["corec"], curves["boost"], strict=True)])
        made[n] = curves["corec"][0, :, 0], found
    return made


def gaps(points: Points, params: Params) -> pd.DataFrame:
    """Tabulate :func:`resampled_gaps` with intervals, in columns ``n_tokens strength cp gap low high``."""
    tail, rows = (1 - params.evaluation.confidence) / 2, []
    for n, (cp, found) in resampled_gaps(points, params).items():
        low, high = np.quantile(found[1:], [tail, 1 - tail], axis=0)
        rows += [(n, *row) for row in zip(params.evaluation.strengths, cp, found[0], low, high, strict=True)]
    return pd.DataFrame(rows, columns="n_tokens strength cp gap low high".split())


def mean_gap(points: Points, params: Params) -> tuple[float, float, float]:
    """Mean of :func:`resampled_gaps` over all strengths and numbers of constraints, and the ends of its interval."""
    means = np.mean([found.mean(axis=1) for _, found in resampled_gaps(points, params).values()], axis=0)
    tail = (1 - params.evaluation.confidence) / 2
    low, high = np.quantile(means[1:], [tail, 1 - tail])
    return float(means[0]), float(low), float(high)


def difference(ours: np.ndarray, boost: np.ndarray) -> np.ndarray:
    """NDCG of `ours` minus that of `boost` at the same CP [points]; both are CP and NDCG [points, 2].

    Where another point of the boost has at least the CP of a point and more NDCG, it counts instead, since it is better.
    """
    order = np.lexsort((boost[:, 1], boost[:, 0]))
    best = np.maximum.accumulate(boost[order[::-1], 1])[::-1]
    # Of points with one CP, the first counts, which has been raised to the best of them.
    cp, first = np.unique(boost[order, 0], return_index=True)
    return ours[:, 1] - np.interp(ours[:, 0], cp, best[first])


def claims(points: Points, plain: Mapping[str, np.ndarray], params: Params) -> pd.DataFrame:
    """Measure what the paper claims of its method, each as a difference with its paired interval.

    Parameters
    ----------
    points
        Result of :func:`sweep`.
    plain
        NDCG@k of each user [users] without control tokens, of ``sasrec``, ``combiner`` and ``corec``.
    params
        Parameters of the run.

    Returns
    -------
    Columns ``claim n_tokens strength value low high holds``. ``holds`` is true if the whole interval is on the claimed side.
    """
    means, rows = over_seeds(points), []

    def add(claim: str, n: int, strength: float, gain: np.ndarray, least: float, whole: bool = True) -> None:
        """Add a row for the mean of `gain` [users]: it holds if its interval is above `least`, or (not `whole`) reaches it."""
        low, high = (float(end[0]) for end in intervals(gain[:, None], params.evaluation, params.seed))
        rows.append((claim, n, strength, gain.mean(), low, high, low > least if whole else high >= least))

    add("NDCG without tokens: COREC - SASRec", 0, NONE, plain["corec"] - plain["sasrec"], 0)
    add("NDCG without tokens: COREC - combiner, not below", 0, NONE, plain["corec"] - plain["combiner"], 0, whole=False)
    for n in (n for n in params.controls.n_tokens if n):
        rule, filtered = (means[key] for key in ((n, "rule", NONE), (n, "hard-filter", NONE)))
        strongest = params.evaluation.strengths[-1]
        ours = means[n, "corec", strongest]
        add("CP at full strength: COREC - 98 % of the rule's", n, strongest, ours[:, 0] - 0.98 * rule[:, 0], 0)
        add("NDCG at full strength: COREC - rule, not below", n, strongest, ours[:, 1] - rule[:, 1], 0, whole=False)
        curve = np.stack([means[n, "corec", strength] for strength in params.evaluation.strengths], axis=1)  # [users, S, 2]
        rows.append(
            ("NDCG where CP reaches 85 % of the filter's: COREC - hard filter", n, *above_filter(curve, filtered, params))
        )
    made = pd.DataFrame(rows, columns="claim n_tokens strength value low high holds".split())
    return made.assign(strength=made["strength"].mask(made["strength"] == NONE))


def above_filter(curve: np.ndarray, filtered: np.ndarray, params: Params) -> tuple[float, float, float, float, bool]:
    """NDCG of COREC minus that of the hard filter, at the weakest strength with at least 85 % of the filter's CP.

    The strength is selected again in each resample, so that the interval includes the selection.

    Parameters
    ----------
    curve
        CP and NDCG of COREC for each user and strength [users, strengths, 2].
    filtered
        CP and NDCG of the hard filter for each user [users, 2].
    params
        Strengths and bootstrap.

    Returns
    -------
    The strength, the difference, the ends of its interval, and whether the interval is above 0. If no strength is enough, the
    first four are not numbers.
    """
    weights = resamples(len(curve), params.evaluation, params.seed)
    drawn = np.concatenate([np.full((1, len(curve)), 1 / len(curve)), weights])  # the sample itself, then its resamples
    ours, theirs = np.einsum("bu,usm->bsm", drawn, curve), drawn @ filtered
    enough = ours[..., 0] >= 0.85 * theirs[:, :1]
    first = enough.argmax(axis=1)
    gain = np.where(enough.any(axis=1), ours[np.arange(len(ours)), first, 1] - theirs[:, 1], np.nan)
    if not enough[0].any():
        return (np.nan,) * 4 + (False,)
    tail = (1 - params.evaluation.confidence) / 2
    low, high = np.nanquantile(gain[1:], [tail, 1 - tail])
    return params.evaluation.strengths[first[0]], float(gain[0]), float(low), float(high), bool(low > 0)


def without_tokens(ranked: Ranked, users: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """NDCG@k of each user [users] without control tokens, of ``sasrec``, ``combiner`` and ``corec``."""
    found = {}
    for model in ("sasrec", "combiner", "corec"):
        orders = evaluation.by_seed(ranked.orders[0][model])
        values = [evaluation.by_window(order, ranked.judged[0], [k])["ndcg", k, 0] for order in orders]
        found[model] = by_user(np.mean(values, axis=0)[:, None], users)[:, 0]
    return found


class Report(NamedTuple):
    """Frontier, gaps and claims under one protocol (see :func:`table`, :func:`gaps` and :func:`claims`)."""

    frontier: pd.DataFrame
    gaps: pd.DataFrame
    claims: pd.DataFrame


def report(ranked: Ranked, scores: Sequence[Scores], prior: np.ndarray, users: np.ndarray, params: Params) -> Report:
    """Compute all tables of the frontier; each has a column ``protocol``. The parameters are those of :func:`sweep`."""
    points = sweep(ranked, scores, prior, users, params)
    found = claims(points, without_tokens(ranked, users, params.figures.k), params)
    protocol = params.controls.protocol
    return Report(table(points, params), gaps(points, params).assign(protocol=protocol), found.assign(protocol=protocol))


def whole_points(frame: pd.DataFrame) -> pd.Series:
    """Rows of a result of :func:`table` that are not of one of several trainings."""
    return frame["seed"].isna() | frame["model"].ne("corec") | (frame["seed"].nunique() == 1)


def draw(frame: pd.DataFrame, k: int, dataset: str) -> Figure:
    """Plot the result of :func:`table` of a data set: one panel per number of constraints, CP against NDCG, with intervals."""
    lengths = sorted(frame["n_tokens"].unique())
    columns = min(3, len(lengths))
    lines = -(-len(lengths) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.8 * lines), layout="constrained", squeeze=False)
    whole = frame[whole_points(frame)]
    for axis in axes.flat[len(lengths) :]:
        axis.axis("off")
    for axis, n in zip(axes.flat[: len(lengths)], lengths, strict=True):
        rows = whole[whole["n_tokens"] == n]
        for model in ("boost", "corec"):
            curve, mark = rows[rows["model"] == model].sort_values("strength"), style.mark(model)
            axis.plot(
                curve["cp"], curve["ndcg"], color=mark.color, marker=mark.marker, markersize=4, linewidth=mark.width,
                linestyle=mark.line, label=style.label(model),
            )  # fmt: skip
            axis.fill_between(curve["cp"], curve["ndcg_low"], curve["ndcg_high"], color=mark.color, alpha=0.15, linewidth=0)
        for model in POINTS:
            one, mark = rows[rows["model"] == model], style.mark(model)
            errors = evaluation.error_bars(one.rename(columns={"ndcg": "value", "ndcg_low": "low", "ndcg_high": "high"}))
            axis.errorbar(
                one["cp"],
                one["ndcg"],
                errors,
                fmt=mark.marker,
                color=mark.color,
                markersize=6,
                capsize=2,
                label=style.label(model),
            )
        axis.set(xlabel=f"CP@{k}, τ = n", ylabel=f"NDCG@{k}", title=f"{n} control token{'s' if n > 1 else ''}")
    figure.suptitle(style.title(frame.assign(dataset=dataset), "Frontier"), fontsize=10)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure
