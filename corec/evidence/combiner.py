"""The combiner: one score per candidate from its evidence, fitted on training windows by a library.

``linear`` is a pairwise logistic regression, P(i before j) = sigmoid(w · (x_i - x_j)), fitted to the pairs of the true next item
with each other candidate. ``lambdarank`` is LightGBM's gradient-boosted trees with that objective (Burges, *From RankNet to
LambdaRank to LambdaMART*, 2010). The scores are scaled so that the sigmoid of a difference is the probability of that order; they
are then log-odds, and their softmax over a pool estimates which candidate is the true next item.

The scores of training windows are out of fold: each comes from a model fitted on other users.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from corec import CorecError, files
from corec.controls import Pools
from corec.evidence.features import Evidence
from corec.params import EvidenceParams

Scorer = Callable[[np.ndarray], np.ndarray]  # from evidence [windows, K, names] to scores [windows, K]


class Combined(NamedTuple):
    """Scores of the selected combiner, and how it was selected."""

    priors: dict[str, np.ndarray]  # [windows, K] by split; log-odds, of mean 0 in each pool; out of fold in training
    table: pd.DataFrame  # columns ``ranker ndcg difference error chosen``, on validation
    weights: pd.Series  # of the linear combiner, by name, for standardised evidence


def ndcg(scores: np.ndarray, truth: np.ndarray, k: int = 5) -> np.ndarray:
    """NDCG@k of each window [windows]; ties count against the true next item, whose place is `truth` (-1: not in the pool)."""
    own = scores[np.arange(len(scores)), truth][:, None]
    rank = (scores >= own).sum(axis=1)
    return np.where((truth >= 0) & (rank <= k), 1 / np.log2(1 + rank), 0.0)


def pair_differences(values: np.ndarray, truth: np.ndarray, real: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Differences of the evidence of the true item and of each other candidate, with alternating sign, and the signs.

    `values` is [windows, K, names]; `truth` is the place of the true item, which must be in the pool; `real` [windows, K] is
    false for padding.
    """
    rows = np.arange(len(values))
    others = np.arange(values.shape[1]) != truth[:, None]
    others = others if real is None else others & real
    differences = (values[rows, truth][:, None] - values)[others]  # [windows * (K - 1), names]
    signs = np.where(np.arange(len(differences)) % 2, 1, -1)
    return differences * signs[:, None], signs


def fit_linear(values: np.ndarray, truth: np.ndarray, seed: int, real: np.ndarray | None = None) -> tuple[Scorer, np.ndarray]:
    """Fit the pairwise logistic regression (see :func:`pair_differences`); returns the scorer and the standardised weights."""
    scaler = StandardScaler().fit(values.reshape(-1, values.shape[-1]))

    def scaled(part: np.ndarray) -> np.ndarray:
        return scaler.transform(part.reshape(-1, part.shape[-1])).clip(-6, 6).reshape(part.shape)

    model = LogisticRegression(fit_intercept=False, random_state=seed, max_iter=1000)
    weights = model.fit(*pair_differences(scaled(values), truth, real)).coef_[0]
    return (lambda part: scaled(part) @ weights), weights


def fit_lambdarank(
    values: np.ndarray, truth: np.ndarray, seed: int, valid: tuple[np.ndarray, np.ndarray] | None = None, trees: int = 500
) -> tuple[Scorer, int]:
    """Fit LightGBM's lambdarank; returns the scorer and the number of trees.

    Parameters
    ----------
    values, truth
        Evidence [windows, K, names], and places of the true items [windows].
    seed
        Seed of the library.
    valid
        Evidence and places of other windows, which end the training early; None for exactly `trees` trees.
    trees
        Largest number of trees.
    """
    import lightgbm  # needs the library libgomp, which the linear combiner does not

    k = values.shape[1]
    model = lightgbm.LGBMRanker(
        n_estimators=trees,
        learning_rate=0.05,
        num_leaves=15,
        min_child_samples=100,
        subsample=0.8,
        subsample_freq=1,
        colsample_bytree=0.8,
        reg_lambda=10.0,
        random_state=seed,
        n_jobs=os.cpu_count(),
        deterministic=True,
        force_row_wise=True,
        verbose=-1,
    )

    def flat(part: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
        labels = (np.arange(k) == places[:, None]).astype(int).ravel()
        return part.reshape(-1, part.shape[-1]), labels, [k] * len(part)

    table, labels, group = flat(values, truth)
    stop: dict[str, Any] = {}
    if valid is not None:
        held, held_labels, held_group = flat(*valid)
        stop = {"eval_X": held, "eval_y": held_labels, "eval_group": [held_group], "eval_at": [5]}
        stop["callbacks"] = [lightgbm.early_stopping(40, verbose=False)]
    model.fit(table, labels, group=group, **stop)
    used = int(model.best_iteration_ or trees)
    return (
        lambda part: model.booster_.predict(part.reshape(-1, part.shape[-1]), num_iteration=used).reshape(part.shape[:2])
    ), used


def calibrated(scores: np.ndarray, truth: np.ndarray, seed: int) -> float:
    """Factor that makes `scores` [windows, K] log-odds: the slope of a pairwise logistic regression on them."""
    differences, signs = pair_differences(scores[..., None], truth)
    return float(LogisticRegression(fit_intercept=False, C=1e6, random_state=seed).fit(differences, signs).coef_[0, 0])


def select(scorers: Mapping[str, Scorer], evidence: Evidence, pools: Pools, kind: str) -> pd.DataFrame:
    """Compare the combiners with the retriever on validation windows, and select one.

    Parameters
    ----------
    scorers
        Combiners by name.
    evidence, pools
        The validation windows.
    kind
        ``evidence.combiner``: a name, or ``best``.

    Returns
    -------
    Columns ``ranker ndcg difference error chosen``: NDCG@5, its difference to the retriever's, and the standard error of that.
    """
    values = {"sasrec": ndcg(-pools.retriever_rank.astype(float), pools.truth)}
    values |= {name: ndcg(score(evidence.values), pools.truth) for name, score in scorers.items()}
    if kind == "best":
        gain = values["lambdarank"] - values["linear"]
        kind = "lambdarank" if gain.mean() > gain.std() / np.sqrt(len(gain)) else "linear"
    rows = []
    for name, value in values.items():
        gain = value - values["sasrec"]
        rows.append((name, value.mean(), gain.mean(), gain.std() / np.sqrt(len(gain)), name == kind))
    return pd.DataFrame(rows, columns=["ranker", "ndcg", "difference", "error", "chosen"])


def combine(
    evidence: Mapping[str, Evidence], pools: Mapping[str, Pools], users: np.ndarray, params: EvidenceParams, seed: int
) -> Combined:
    """Fit the combiners, select one on validation, and score the candidates of every split.

    The number of trees of lambdarank is found on a part of the training users. With ``combiner: best``, lambdarank is selected if
    its NDCG@5 is more than one standard error (of the paired difference) above that of the linear combiner.

    Parameters
    ----------
    evidence, pools
        By split: ``train``, ``valid`` and ``test``.
    users
        User of each training window [windows], for the folds.
    params
        Kind of the combiner and number of folds.
    seed
        Seed of the libraries.

    Raises
    ------
    CorecError
        If fewer than 20 training windows, or no validation window, have their true next item in the pool.
    """
    hit = {split: pools[split].truth >= 0 for split in ("train", "valid")}
    if hit["train"].sum() < 20 or not hit["valid"].any() or len(set(users[hit["train"]])) < params.folds:
        raise CorecError(
            f"Parameter evidence.combiner: only {int(hit['train'].sum())} training and {int(hit['valid'].sum())} validation "
            "windows have their true next item among the candidates: raise controls.k or data.held_back, or set it to 'none'."
        )
    train, truth = evidence["train"].values[hit["train"]], pools["train"].truth[hit["train"]]
    linear, weights = fit_linear(train, truth, seed)
    scorers: dict[str, Scorer] = {"linear": linear}
    refits: dict[str, Callable[[np.ndarray, np.ndarray], Scorer]] = {"linear": lambda x, y: fit_linear(x, y, seed)[0]}
    if params.combiner != "linear":
        fitted, stopping = next(GroupKFold(params.folds).split(train, groups=users[hit["train"]]))
        _, trees = fit_lambdarank(train[fitted], truth[fitted], seed, (train[stopping], truth[stopping]))
        scorers["lambdarank"] = fit_lambdarank(train, truth, seed, trees=trees)[0]
        refits["lambdarank"] = lambda x, y: fit_lambdarank(x, y, seed, trees=trees)[0]
    table = select(scorers, evidence["valid"], pools["valid"], params.combiner)
    chosen = str(table.loc[table["chosen"], "ranker"].iloc[0])
    # Out-of-fold scores of the training windows; windows without the true item are scored by a model of other users too.
    raw = {split: scorers[chosen](part.values) for split, part in evidence.items() if split != "train"}
    raw["train"] = np.empty(pools["train"].candidates.shape)
    for fitted, scored in GroupKFold(params.folds).split(users, groups=users):
        fitted = fitted[hit["train"][fitted]]
        model = refits[chosen](evidence["train"].values[fitted], pools["train"].truth[fitted])
        raw["train"][scored] = model(evidence["train"].values[scored])
    slope = calibrated(raw["train"][hit["train"]], truth, seed)
    if slope <= 0:
        print(f"the scores of {chosen!r} do not predict the next item of other users: the prior is 0", flush=True)
        slope = 0.0
    priors = {split: (slope * (part - part.mean(axis=1, keepdims=True))).astype(np.float32) for split, part in raw.items()}
    return Combined(priors, table, pd.Series(weights, evidence["train"].names))


def save(evidence: Mapping[str, Evidence], pools: Mapping[str, Pools], priors: Mapping[str, np.ndarray], folder: Path) -> Path:
    """Write ``evidence.parquet``: ``split window prior`` and a column per kind of evidence, lists of K; returns the file."""
    parts = []
    for split, part in evidence.items():
        columns = {name: list(part.values[..., place]) for place, name in enumerate(part.names)}
        parts.append(pd.DataFrame({"split": split, "window": pools[split].window, "prior": list(priors[split]), **columns}))
    path = folder / "evidence.parquet"
    files.write_parquet(path, pd.concat(parts, ignore_index=True))
    return path
