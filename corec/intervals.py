"""Means over users and their bootstrap intervals."""

import numpy as np

from corec.params import EvaluationParams


def by_user(values: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Mean of each column of `values` [windows, columns] over the windows of each user [users, columns]."""
    _, place = np.unique(users, return_inverse=True)
    sums = np.zeros((place.max() + 1, values.shape[1]))
    np.add.at(sums, place, values)
    return sums / np.bincount(place)[:, None]


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
    n = len(values)
    weights = np.random.default_rng([seed, 5]).multinomial(n, np.full(n, 1 / n), size=params.bootstrap) / n
    means = weights @ values  # [resamples, columns]
    tail = (1 - params.confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high
