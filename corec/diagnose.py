"""Signs that the results of a run do not mean what they seem to mean, each with a number, a threshold and a remedy."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from corec import controls, evaluation
from corec.controls import Prepared
from corec.intervals import by_user, intervals
from corec.params import Params
from corec.rankers import Ranked
from corec.scores import Scores, score_gap


class Sign(NamedTuple):
    """A sign: it is found if its number is above (or, with `below`, below) the threshold."""

    threshold: float
    below: bool
    meaning: str
    remedy: str


SIGNS = {
    "low pool coverage": Sign(
        1.5, True,
        "mean number of candidates that meet the longest request: few, so CP measures the candidates, not the ranker",
        "raise controls.k, lower the largest of controls.n_tokens, or use coarser buckets in the scheme",
    ),
    "empty pools": Sign(
        0.1, False,
        "share of windows in which no candidate meets the longest request",
        "raise controls.k, or use the protocol random-candidate",
    ),
    "target violates the request": Sign(
        0.5, False,
        "share of retrieved targets that violate the longest request: a ranker that follows it must lose NDCG",
        "read NDCG along the frontier, or with one token; compare with `rule`",
    ),
    "answer in the request": Sign(
        0.0, False,
        "lower end of the interval of NDCG of `rule` minus that of `sasrec`: following the request alone finds the target",
        "use the protocol random-candidate or catalogue",
    ),
    "tokens not learnt": Sign(
        0.5, True,
        "mean score of the candidates that meet the whole request minus that of the others, in standard deviations",
        "raise reranker.steps or reranker.max_minutes, and check that reranker.lr_rows is not too small",
    ),
    "order of the candidates matters": Sign(
        0.1, False,
        "share of the variance of a candidate's score that is due to the order of the candidates (8 shuffles)",
        "train longer: the candidates are shuffled anew in every window",
    ),
    "in-sample pools": Sign(
        1.15, False,
        "recall of the retriever on the windows that train the re-ranker, divided by that on validation",
        "set data.held_back to 4 or more, so that the retriever is not trained on these targets",
    ),
}  # fmt: skip


def token_gap(scores: Scores, prepared: Prepared, params: Params) -> float:
    """Standardised score of the candidates that meet the whole longest request, minus that of the others, on test windows."""
    n = max(params.controls.n_tokens)
    pools, request = prepared.pools["test"], prepared.requests["test", n]
    met = controls.matches(pools.candidates, request, prepared.vocabulary.values_of).all(axis=2)
    if met.all() or not met.any():
        return float("nan")
    total = scores.total()[:, [params.controls.n_tokens.index(n)]]
    return score_gap(total, pools, [request], prepared.vocabulary.values_of)[0]


def leak(ranked: Ranked, users: np.ndarray, params: Params) -> float:
    """Lower end of the interval of NDCG@k of ``rule`` minus that of ``sasrec``, under the longest request."""
    n, k = max(params.controls.n_tokens), params.figures.k
    judged, orders = ranked.judged[n], ranked.orders[n]
    rule, base = (evaluation.by_window(orders[name], judged, [k])["ndcg", k, 0] for name in ("rule", "sasrec"))
    low, _ = intervals(by_user((rule - base)[:, None], users), params.evaluation, params.seed)
    return float(low[0])


def diagnose(
    prepared: Prepared, ranked: Ranked, scores: Sequence[Scores], users: np.ndarray, params: Params, facts: Mapping[str, Any]
) -> pd.DataFrame:
    """Look for the signs :data:`SIGNS` in a run.

    Parameters
    ----------
    prepared
        Result of stage 03.
    ranked
        Result of :func:`corec.rankers.rank`.
    scores
        Scores of COREC on the test windows, one entry per seed; the first is used.
    users
        User of each test window [windows].
    params
        Parameters of the run.
    facts
        ``hit``: recall of the retriever by split (record of stage 02); ``order_bias`` (record of stage 04). Signs whose fact is
        missing are omitted.

    Returns
    -------
    Columns ``sign number threshold found meaning remedy``; `found` is true if the number is beyond the threshold.
    """
    coverage = controls.pool_coverage(prepared).sort_values("n_tokens").iloc[-1].astype(float)  # of the longest request
    hit = facts.get("hit", {})
    numbers = {
        "low pool coverage": float(coverage["matching"]),
        "empty pools": float(coverage["empty"]),
        "target violates the request": float(coverage["truth_violates"]),
        "answer in the request": leak(ranked, users, params),
        "tokens not learnt": token_gap(scores[0], prepared, params),
        "order of the candidates matters": facts.get("order_bias", float("nan")),
        "in-sample pools": hit["train"] / hit["valid"] if hit.get("valid") and "train" in hit else float("nan"),
    }
    rows = []
    for name, sign in SIGNS.items():
        if not np.isnan(number := numbers[name]):
            found = number < sign.threshold if sign.below else number > sign.threshold
            rows.append((name, number, sign.threshold, found, sign.meaning, sign.remedy))
    return pd.DataFrame(rows, columns="sign number threshold found meaning remedy".split())
