"""Stage 05: rankings, metrics and intervals.

A *ranking* [windows, K] holds, for each window, the indices of its K candidates in the pool, best first. Metrics are averaged
over the windows of each user, then over users; intervals are percentiles of a bootstrap over users.

==============  ==========================================================================================
``ndcg``        binary: 1 / log2(1 + rank of the true next item), 0 if it is not among the top k
``hr``          1 if the true next item is among the top k
``cp``          control precision: share of the top k that meets at least tau constraints
``cd``          control depth: rank of the first item that does, K + 1 if none does; lower is better
``cp_bonus``    the paper's ``cp``: r >= tau, where r counts one more for the true next item
``cd_bonus``    the paper's ``cd``, likewise
``ndcg_graded`` the paper's nDCG: linear gain r (with the bonus), ideal = the best order of the pool
``chp``         items in the top k that meet all constraints, divided by k
``csr``         mean over constraints of the share of the top k that meets it
==============  ==========================================================================================
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from corec import CorecError, controls, paths, stages
from corec.controls import Pools, standardise
from corec.intervals import by_user, intervals
from corec.params import Params

COLUMNS = "dataset protocol K n_tokens tau model seed metric k value low high n_users".split()
MODELS = (
    "popularity text sasrec combiner hard-filter hard-filter-strict hard-filter+combiner rule rule+combiner boost zero-shot "
    "no-token corec"
).split()
ALONE = "no-prior no-token-alone corec-alone".split()  # scores of the language model without a prior, or without the retriever's
METRICS = "ndcg hr cp cp_bonus cd cd_bonus ndcg_graded chp csr".split()
MEANING = {
    "ndcg": "relevance: is the target near the top?",
    "hr": "relevance: is the target among the first k?",
    "cp": "control: share of the first k that meet at least τ constraints",
    "cp_bonus": "the same, as in the paper: the target counts as one more constraint met",
    "cd": "control: rank of the first item that meets at least τ constraints (lower is better)",
    "cd_bonus": "the same, as in the paper, with the bonus of the target",
    "ndcg_graded": "the NDCG of the paper: gain = constraints met, with the bonus of the target",
    "chp": "control: share of the first k that meet all constraints",
    "csr": "control: share of the first k that meet a constraint, mean over the constraints",
}
ALPHAS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, np.inf)


class Judged(NamedTuple):
    """Truth and constraints met of each candidate of each window, in the order of the pool."""

    truth: np.ndarray  # [windows, K] candidate is the true next item
    met: np.ndarray  # [windows, K, n] candidate meets the constraint


def judge(pools: Pools, requests: np.ndarray, values_of: np.ndarray) -> Judged:
    """Compare the candidates of `pools` with the true next items and with `requests` [windows, n]."""
    return Judged(pools.is_truth(), controls.matches(pools.candidates, requests, values_of))


def order_by(scores: np.ndarray) -> np.ndarray:
    """Ranking by descending `scores` [..., K]; ties keep the random order of the pool, so that they favour no model."""
    return np.argsort(-scores, axis=-1, kind="stable")


def retriever_order(pools: Pools) -> np.ndarray:
    """Ranking of the retriever [windows, K]."""
    return pools.retriever_rank.argsort(axis=1)


def rule_order(pools: Pools, met: np.ndarray) -> np.ndarray:
    """Rule ranker: descending number of constraints met, ties in the retriever's order.

    This is the highest control precision that the pool allows. `met` is [windows, K, n].
    """
    k = pools.candidates.shape[1]
    return order_by(met.sum(axis=2) * k - pools.retriever_rank)


def hard_filter_order(pools: Pools, met: np.ndarray) -> np.ndarray:
    """Hard filter: the candidates that meet all constraints, then the rest, both in the retriever's order."""
    k = pools.candidates.shape[1]
    return order_by(met.all(axis=2) * k - pools.retriever_rank)


def blend(scores: np.ndarray, pools: Pools, alpha: float) -> np.ndarray:
    """Scores plus `alpha` times the retriever's scores, both standardised within each window [windows, K].

    ``alpha = inf`` gives the order of the retriever alone.

    Parameters
    ----------
    scores
        Scores of the language model [windows, K].
    pools
        The candidates and the retriever's scores.
    alpha
        Weight of the retriever.
    """
    retriever = standardise(pools.retriever_score) - 1e-6 * pools.retriever_rank
    return retriever if np.isinf(alpha) else standardise(scores) + alpha * retriever


def by_window(order: np.ndarray, judged: Judged, ks: Sequence[int]) -> dict[tuple[str, int, int], np.ndarray]:
    """Compute every metric of every window.

    Parameters
    ----------
    order
        Ranking [windows, K].
    judged
        The same windows, with n constraints.
    ks
        Cut-offs; those not below K are omitted.

    Returns
    -------
    Values [windows] by (metric, k, tau). k is 0 for ``cd``; tau is 0 for metrics without a threshold. Without constraints, only
    ``ndcg``, ``hr`` and ``ndcg_graded`` are computed.
    """
    size, n = order.shape[1], judged.met.shape[2]
    truth = np.take_along_axis(judged.truth, order, axis=1)  # [windows, K], in ranked order
    met = np.take_along_axis(judged.met, order[:, :, None], axis=1)  # [windows, K, n]
    count = met.sum(axis=2)
    scores = controls.control_scores(met, truth)
    ideal = -np.sort(-scores, axis=1)
    discount = 1 / np.log2(np.arange(2, size + 2))
    places = np.arange(1, size + 1)
    result: dict[tuple[str, int, int], np.ndarray] = {}
    for tau in range(1, n + 1):
        for name, enough in (("", count >= tau), ("_bonus", scores >= tau)):
            result[f"cd{name}", 0, tau] = np.where(enough, places, size + 1).min(axis=1)
            for k in (k for k in ks if k < size):
                result[f"cp{name}", k, tau] = enough[:, :k].mean(axis=1)
    for k in (k for k in ks if k < size):
        result["ndcg", k, 0] = truth[:, :k] @ discount[:k]
        result["hr", k, 0] = truth[:, :k].any(axis=1).astype(float)
        best = ideal[:, :k] @ discount[:k]
        result["ndcg_graded", k, 0] = np.where(best > 0, scores[:, :k] @ discount[:k] / np.maximum(best, 1e-9), 0.0)
        if n:
            result["chp", k, 0] = met[:, :k].all(axis=2).mean(axis=1)
            result["csr", k, 0] = met[:, :k].mean(axis=(1, 2))
    return result


def control_by_attribute(
    orders: Mapping[str, np.ndarray], judged: Judged, requests: np.ndarray, attribute_of: np.ndarray, names: Sequence[str], k: int
) -> pd.DataFrame:
    """Share of the top k that meets a constraint, by attribute of the constraint: CSR@k of each attribute.

    Parameters
    ----------
    orders
        Rankings [windows, K] by ranker.
    judged, requests
        The same windows, and their requests [windows, n]; -1 for no constraint.
    attribute_of, names
        Attribute of each value, and names of the attributes.
    k
        Cut-off.

    Returns
    -------
    One row per attribute: ``constraints``, their number, and one column per ranker.
    """
    attribute = np.where(requests >= 0, attribute_of[requests], -1)
    rows = {}
    for number, name in enumerate(names):
        chosen = attribute == number  # [windows, n]
        if chosen.any():
            met = {
                model: np.take_along_axis(judged.met, order[:, :k, None], axis=1).mean(axis=1) for model, order in orders.items()
            }
            rows[name] = {"constraints": int(chosen.sum())} | {model: share[chosen].mean() for model, share in met.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def control_and_relevance(k: int, n: int) -> dict[str, tuple[str, int, int]]:
    """Keys in :func:`by_window` of CP@k at tau = n and of NDCG@k, as ``cp`` and ``ndcg``; without constraints only the latter."""
    keys = {"cp": ("cp", k, n), "ndcg": ("ndcg", k, 0)}
    return keys if n else {"ndcg": keys["ndcg"]}


def choose_alpha(scores: np.ndarray, pools: Pools, judged: Judged, k: int = 5) -> pd.DataFrame:
    """Select the weight of the retriever's score on validation windows, by graded NDCG@k.

    Selected is the largest weight whose mean is within one standard error (of the paired difference) of the best mean, so the
    retriever's order is kept unless the model is clearly better.

    Parameters
    ----------
    scores
        Scores of the language model [windows, K].
    pools, judged
        The validation windows.
    k
        Cut-off, at most K - 1.

    Returns
    -------
    Columns ``alpha value chosen``; one row per weight in :data:`ALPHAS`.
    """
    k = min(k, scores.shape[1] - 1)
    values = np.stack(
        [by_window(order_by(blend(scores, pools, alpha)), judged, [k])["ndcg_graded", k, 0] for alpha in ALPHAS]
    )  # [alphas, windows]
    best = values[values.mean(axis=1).argmax()]
    shortfall = best - values
    error = shortfall.std(axis=1) / np.sqrt(values.shape[1])
    chosen = np.flatnonzero(shortfall.mean(axis=1) <= error).max()
    return pd.DataFrame({"alpha": ALPHAS, "value": values.mean(axis=1), "chosen": np.arange(len(ALPHAS)) == chosen})


def strict(judged: Judged) -> Judged:
    """Truth and constraints met if only the candidates that meet the whole request are returned; the others count as misses."""
    returned = np.all(judged.met, axis=2)
    return Judged(judged.truth & returned, judged.met & returned[..., None])


def by_seed(orders: np.ndarray) -> np.ndarray:
    """Rankings [seeds, windows, K] of a model with one ranking [windows, K], or with one for each seed."""
    return orders if orders.ndim == 3 else orders[np.newaxis]


class Values(NamedTuple):
    """Every metric of every window, for all numbers of tokens and all models."""

    keys: list[tuple[int, str, str, int, int]]  # n_tokens, model, metric, k, tau
    values: np.ndarray  # [windows, keys]


def measure(
    orders: Mapping[int, Mapping[str, np.ndarray]],
    judged: Mapping[int, Judged],
    params: Params,
    models: Sequence[str] | None = None,
) -> Values:
    """Compute all metrics of all rankings, window by window (see :func:`by_window`).

    Parameters
    ----------
    orders
        Ranking [windows, K] by number of tokens and model; [seeds, windows, K] for several trainings, whose metrics are averaged.
    judged
        The windows with their requests, by number of tokens.
    params
        Parameters of the run; its cut-offs are used.
    models
        Restrict the models to these.
    """
    keys, columns = [], []
    for n, rankings_of in orders.items():
        for model, order in rankings_of.items():
            if models is None or model in models:
                own = strict(judged[n]) if model == "hard-filter-strict" else judged[n]
                each = [by_window(part, own, params.evaluation.ks) for part in by_seed(order)]
                for metric, k, tau in each[0]:
                    keys.append((n, model, metric, k, tau))
                    columns.append(np.mean([values[metric, k, tau] for values in each], axis=0))
    return Values(keys, np.stack(columns, axis=1).astype(float))


def per_window(measured: Values, pools: Pools, interactions: pd.DataFrame, windows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Tabulate every metric of every window, so that a user can be traced from the raw file to a point of a figure.

    Parameters
    ----------
    measured
        Result of :func:`measure`.
    pools
        The candidates of the windows.
    interactions, windows
        Tables of stage 01.
    seed
        Seed of the run.

    Returns
    -------
    Columns ``user user_id window model n_tokens seed metric k tau value``; `k` is empty for ``cd``, `tau` for metrics without a
    threshold.
    """
    users = windows.set_index("window").loc[pools.window, "user"].to_numpy()
    ids = interactions.drop_duplicates("user").set_index("user")["user_id"]
    keys = pd.DataFrame(measured.keys, columns=["n_tokens", "model", "metric", "k", "tau"])
    keys = keys.assign(k=keys["k"].replace(0, pd.NA).astype("Int64"), tau=keys["tau"].replace(0, pd.NA).astype("Int64"))
    count = len(pools.window)
    table = keys.loc[np.repeat(np.arange(len(keys)), count)].reset_index(drop=True)
    for name in ("model", "metric"):
        table[name] = table[name].astype("category")
    each = {"user": users, "user_id": ids[users].to_numpy(), "window": pools.window}
    table = table.assign(
        **{name: np.tile(values, len(keys)) for name, values in each.items()}, seed=seed, value=measured.values.T.ravel()
    )
    return table[["user", "user_id", "window", "model", "n_tokens", "seed", "metric", "k", "tau", "value"]]


def tidy(measured: Values, users: np.ndarray, params: Params) -> pd.DataFrame:
    """Average the metrics over users; returns the results table.

    Parameters
    ----------
    measured
        Result of :func:`measure`.
    users
        User of each window [windows].
    params
        Parameters of the run.

    Returns
    -------
    Columns of :data:`COLUMNS`, one row per number of tokens, model, metric, k and tau. `k` is empty for ``cd``, `tau` for metrics
    without a threshold.
    """
    values = by_user(measured.values, users)
    low, high = intervals(values, params.evaluation, params.seed)
    table = pd.DataFrame(
        [(n, tau or None, model, metric, k or None) for n, model, metric, k, tau in measured.keys],
        columns=["n_tokens", "tau", "model", "metric", "k"],
    ).astype({"tau": "Int64", "k": "Int64"})
    table = table.assign(
        dataset=params.data.dataset,
        protocol=params.controls.protocol,
        K=params.controls.k,
        seed=params.seed,
        value=values.mean(axis=0),
        low=low,
        high=high,
        n_users=len(values),
    )
    return table[COLUMNS]


def pick(table: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """Select rows of a table by column values, e.g. ``pick(table, metric="cp", k=5)``; a list matches any of its values."""
    keep = pd.Series(True, index=table.index)
    for name, value in wanted.items():
        keep &= table[name].isin(value if isinstance(value, list) else [value])
    return table[keep]


def error_bars(rows: pd.DataFrame, name: str = "value", ends: tuple[str, str] = ("low", "high")) -> list[pd.Series]:
    """Lengths of the error bars below and above each value of the column `name`, in the format of matplotlib.

    Negative lengths are set to 0: the percentile interval of a very skewed sample may exclude its mean.
    """
    return [(rows[name] - rows[ends[0]]).clip(lower=0), (rows[ends[1]] - rows[name]).clip(lower=0)]


def per_user(table: pd.DataFrame, k: int) -> pd.DataFrame:
    """CP@k (tau = n) and NDCG@k of each user, means over windows and seeds: what paired comparisons of two runs need.

    Parameters
    ----------
    table
        Every metric of every window (``per_window.parquet``).
    k
        Cut-off.

    Returns
    -------
    Columns ``metric n_tokens model user_id value``, of which all but the last are categories.
    """
    strict = (table["metric"] == "cp") & (table["tau"] == table["n_tokens"])
    rows = table[(table["k"] == k) & (strict.fillna(False) | (table["metric"] == "ndcg"))]
    names = ["metric", "n_tokens", "model", "user_id"]
    means = rows.groupby(names, observed=True, sort=True)["value"].mean().reset_index()
    return means.astype(dict.fromkeys(names, "category") | {"value": "float32"})


def load(run: str) -> pd.DataFrame:
    """Load the results table of a run.

    Raises
    ------
    CorecError
        If stage 05 has not finished.
    """
    stages.require(run, "evaluation")
    return read(paths.stage_dir(run, "evaluation") / "metrics.csv")


def read(path: Path) -> pd.DataFrame:
    """Read a results table from a CSV file.

    Raises
    ------
    CorecError
        If the file lacks one of :data:`COLUMNS`.
    """
    table = pd.read_csv(path, dtype={"tau": "Int64", "k": "Int64"})
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise CorecError(f"{path} has no column {missing[0]!r}: make it with notebooks/05_evaluation.ipynb.")
    return table
