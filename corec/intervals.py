"""Means over users, and how sure they are."""

import numpy as np

from corec.params import EvaluationParams


def by_user(values: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Mean of each column of `values` [windows, columns] within each user [users, columns]."""
    _, place = np.unique(users, return_inverse=True)
    sums = np.zeros((place.max() + 1, values.shape[1]))
    np.add.at(sums, place, values)
    return sums / np.bincount(place)[:, None]


def intervals(values: np.ndarray, params: EvaluationParams, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap over users: low and high of each column's mean.

    Parameters
    ----------
    values
        One row a user [users, columns]. The same resamples serve all columns, so differences are paired.
    """
    n = len(values)
    weights = np.random.default_rng([seed, 5]).multinomial(n, np.full(n, 1 / n), size=params.bootstrap) / n
    means = weights @ values  # [resamples, columns]
    tail = (1 - params.confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high
