"""Means over users, their bootstrap intervals, and paired comparisons of rankers."""

import numpy as np
import pandas as pd
from scipy import stats

from corec.params import EvaluationParams, Params


def by_user(values: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Mean of each column of `values` [windows, columns] over the windows of each user [users, columns]."""
    _, place = np.unique(users, return_inverse=True)
    sums = np.zeros((place.max() + 1, values.shape[1]))
    np.add.at(sums, place, values)
    return sums / np.bincount(place)[:, None]


def resamples(n: int, params: EvaluationParams, seed: int) -> np.ndarray:
    """Weights of `n` users in each resample of the bootstrap [resamples, users]; each row sums to 1."""
    return np.random.default_rng([seed, 5]).multinomial(n, np.full(n, 1 / n), size=params.bootstrap) / n


def intervals(values: np.ndarray, params: EvaluationParams, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidence interval of each column's mean, by a percentile bootstrap over users.

    Parameters
    ----------
    values
        One row per user [users, columns]. All columns use the same resamples, so differences are paired.
    params
        Number of resamples and confidence level.
    seed
        Seed of the resamples.

    Returns
    -------
    Lower and upper ends [columns].
    """
    means = resamples(len(values), params, seed) @ values  # [resamples, columns]
    tail = (1 - params.confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high


def holm(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values of several tests [tests] (Holm, *A simple sequentially rejective multiple test procedure*, 1979)."""
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted


def compare(table: pd.DataFrame, params: Params, model: str = "corec") -> pd.DataFrame:
    """Compare a model with all others, user by user: CP@k (tau = n) and NDCG@k, by number of constraints.

    The p-value is that of a paired randomisation test: the sign of each user's difference is drawn at random 9,999 times. Holm's
    correction is over all rows.

    Parameters
    ----------
    table
        Every metric of every window (``per_window.parquet`` of stage 05).
    params
        Cut-off ``figures.k``, bootstrap and seed.
    model
        The model that the others are compared with.

    Returns
    -------
    Columns ``metric k n_tokens model other difference low high p p_holm n_users users_for_001``. The last is the number of users
    with which a difference of 0.01 is found with probability 0.8 by a two-sided test at 0.05.
    """
    k = params.figures.k
    wanted = (table["metric"] == "cp") & (table["tau"] == table["n_tokens"]) | (table["metric"] == "ndcg")
    rows = table[wanted.fillna(False).astype(bool) & (table["k"] == k)]
    wide = rows.pivot_table(index="user", columns=["metric", "n_tokens", "model"], values="value", observed=True)
    found: list[tuple[str, int, str]] = [tuple(key) for key in wide.columns.to_flat_index()]  # type: ignore[misc]
    keys = [key for key in found if key[2] != model and (key[0], key[1], model) in found]
    gains = np.stack([wide[key[0], key[1], model] - wide[key] for key in keys], axis=1)  # [users, comparisons]
    low, high = intervals(gains, params.evaluation, params.seed)
    rng = np.random.default_rng([params.seed, 6])
    test = stats.permutation_test(
        (gains,),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        n_resamples=9999,
        batch=50,
        axis=0,
        rng=rng,
    )
    spread = gains.std(axis=0, ddof=1)
    needed = np.ceil(((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * spread / 0.01) ** 2).astype(int)
    frame = pd.DataFrame(keys, columns=["metric", "n_tokens", "other"]).assign(
        k=k, model=model, difference=gains.mean(axis=0), low=low, high=high, p=test.pvalue, p_holm=holm(test.pvalue)
    )
    frame = frame.assign(n_users=len(gains), users_for_001=needed)
    return frame[
        ["metric", "k", "n_tokens", "model", "other", "difference", "low", "high", "p", "p_holm", "n_users", "users_for_001"]
    ]
