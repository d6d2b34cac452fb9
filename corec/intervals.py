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


def randomisation_test(gains: np.ndarray, seed: int, times: int = 99_999, block: int = 1000) -> np.ndarray:
    """P-values [comparisons] of two-sided paired randomisation tests: the sign of each user's difference is drawn at random.

    ``scipy.stats.permutation_test`` draws signs for each comparison, and would need an hour for thousands of users; here all
    comparisons have the same signs, so that a block of draws is one product.

    Parameters
    ----------
    gains
        Differences [users, comparisons].
    seed
        Seed of the signs.
    times, block
        Number of draws, and draws at a time. The smallest p-value is 1 / (1 + `times`).
    """
    rng, count = np.random.default_rng([seed, 6]), np.zeros(gains.shape[1])
    observed = np.abs(gains.sum(axis=0)) - 1e-9
    for start in range(0, times, block):
        signs = 2.0 * rng.integers(0, 2, (min(block, times - start), len(gains))) - 1
        count += (np.abs(signs @ gains) >= observed).sum(axis=0)
    return (1 + count) / (1 + times)


def distinct(wide: pd.DataFrame, keys: list[tuple[str, int, str]], model: str) -> list[tuple[str, int, str]]:
    """Select the columns of `wide` that differ from each other and from those of `model`, by metric and number of tokens."""
    lengths = {key[:2] for key in keys}
    seen = {(*length, wide[(*length, model)].to_numpy().tobytes()) for length in lengths}
    kept = []
    for key in keys:
        values = (*key[:2], wide[key].to_numpy().tobytes())
        if values not in seen:
            kept.append(key)
            seen.add(values)
    return kept


def compare(table: pd.DataFrame, params: Params, model: str = "corec") -> pd.DataFrame:
    """Compare a model with all others, user by user: CP@k (tau = n) and NDCG@k, by number of constraints.

    Rankers whose values equal those of another one or of the model for all users, such as the rule without constraints, are
    omitted. Holm's correction of the p-values (see :func:`randomisation_test`) is over all rows.

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
    keys = distinct(wide, [key for key in found if key[2] != model and (key[0], key[1], model) in found], model)
    gains = np.stack([wide[key[0], key[1], model] - wide[key] for key in keys], axis=1)  # [users, comparisons]
    low, high = intervals(gains, params.evaluation, params.seed)
    p = randomisation_test(gains, params.seed)
    spread = gains.std(axis=0, ddof=1)
    needed = np.ceil(((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * spread / 0.01) ** 2).astype(int)
    frame = pd.DataFrame(keys, columns=["metric", "n_tokens", "other"]).assign(
        k=k, model=model, difference=gains.mean(axis=0), low=low, high=high, p=p, p_holm=holm(p)
    )
    frame = frame.assign(n_users=len(gains), users_for_001=needed)
    return frame[
        ["metric", "k", "n_tokens", "model", "other", "difference", "low", "high", "p", "p_holm", "n_users", "users_for_001"]
    ]


def with_differences(values: np.ndarray, differences: np.ndarray, params: EvaluationParams, seed: int) -> pd.DataFrame:
    """Tabulate means over users and paired differences, both with intervals from the same resamples of users.

    Parameters
    ----------
    values, differences
        [users, rows].
    params, seed
        As for :func:`intervals`.

    Returns
    -------
    Columns ``value low high ahead ahead_low ahead_high``, one row for each column of the arrays.
    """
    both = np.concatenate([values, differences], axis=1)
    ends = np.stack([both.mean(axis=0), *intervals(both, params, seed)], axis=1)
    return pd.DataFrame(np.hstack(np.split(ends, 2)), columns="value low high ahead ahead_low ahead_high".split())
