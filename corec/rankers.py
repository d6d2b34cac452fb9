"""All rankers of stage 05, by name, from the pools, the requests, the scores of the combiner and those of the language model."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from corec import evaluation
from corec.controls import Pools, Prepared, standardise
from corec.evaluation import Judged, order_by
from corec.params import Params
from corec.scores import Scores


class Inputs(NamedTuple):
    """Scores [windows, K] of the test windows that need no language model; None where the run has no evidence."""

    popularity: np.ndarray
    prior: np.ndarray | None = None  # of the combiner
    text: np.ndarray | None = None  # similarity of the titles


def inputs(items: pd.DataFrame, pools: Pools, prior: np.ndarray | None, text: np.ndarray | None) -> Inputs:
    """Collect the scores that need no language model.

    Parameters
    ----------
    items
        Items table of stage 01.
    pools
        Windows and their candidates.
    prior, text
        Columns ``prior`` and ``text_recent`` of the evidence [windows, K], if the run has them.
    """
    return Inputs(np.array([0, *items["train_count"]])[pools.candidates], prior, text)


def boost(prior: np.ndarray, met: np.ndarray, logits: float) -> np.ndarray:
    """Scores [windows, K] of the additive boost: prior + `logits` times the number of constraints met, `met` [windows, K, n]."""
    return prior + logits * met.sum(axis=2)


def by_combiner(pools: Pools, prior: np.ndarray) -> Pools:
    """The pools with the ranks of the combiner in place of the retriever's; `prior` are its scores [windows, K]."""
    return pools._replace(retriever_rank=order_by(prior).argsort(axis=1))


def without_model(pools: Pools, judged: Judged, given: Inputs, logits: float) -> dict[str, np.ndarray]:
    """Rankings [windows, K] of all rankers that need no language model, by name.

    ``hard-filter-strict`` has the ranking of ``hard-filter``; it differs in what counts (see :func:`corec.evaluation.strict`).
    Without a combiner, ``boost`` adds to the standardised scores of the retriever.

    Parameters
    ----------
    pools, judged
        The windows under requests of n constraints.
    given
        Scores that need no language model.
    logits
        Weight of a constraint in ``boost``.
    """
    filtered = evaluation.hard_filter_order(pools, judged.met)
    orders = {
        "popularity": order_by(given.popularity),
        "sasrec": evaluation.retriever_order(pools),
        "hard-filter": filtered,
        "hard-filter-strict": filtered,
        "rule": evaluation.rule_order(pools, judged.met),
    }
    if given.text is not None:
        orders["text"] = order_by(given.text)
    prior = standardise(pools.retriever_score) if given.prior is None else given.prior
    orders["boost"] = order_by(boost(prior, judged.met, logits))
    if given.prior is not None:
        combined = by_combiner(pools, given.prior)
        orders["combiner"] = evaluation.retriever_order(combined)
        orders["hard-filter+combiner"] = evaluation.hard_filter_order(combined, judged.met)
        orders["rule+combiner"] = evaluation.rule_order(combined, judged.met)
    return orders


def with_prior(scores: Sequence[Scores], place: int, empty: int) -> dict[str, np.ndarray]:
    """Rankings of a model with a prior [seeds, windows, K], by name, at strength 1.

    Parameters
    ----------
    scores
        Scores of the test windows, one entry per seed.
    place, empty
        Places of the request and of the empty request among the R requests.
    """
    return {
        "no-prior": np.stack([order_by((part.relevance + part.control)[:, place]) for part in scores]),
        "no-token": np.stack([order_by(part.total()[:, empty]) for part in scores]),
        "corec": np.stack([order_by(part.total()[:, place]) for part in scores]),
    }


def blended(
    scores: Sequence[Scores], place: int, empty: int, pools: Pools, alphas: Mapping[int, float], n: int
) -> dict[str, np.ndarray]:
    """Rankings of a model without a prior [seeds, windows, K], by name: blended with the retriever's scores, and alone.

    Parameters
    ----------
    scores, place, empty
        As for :func:`with_prior`.
    pools
        The test windows.
    alphas
        Weight of the retriever by number of constraints (see :func:`choose_alphas`).
    n
        Number of constraints of the request.
    """
    own = [(part.total()[:, place], part.total()[:, empty]) for part in scores]
    return {
        "no-token": np.stack([order_by(evaluation.blend(bare, pools, alphas[0])) for _, bare in own]),
        "corec": np.stack([order_by(evaluation.blend(asked, pools, alphas[n])) for asked, _ in own]),
        "no-token-alone": np.stack([order_by(bare) for _, bare in own]),
        "corec-alone": np.stack([order_by(asked) for asked, _ in own]),
    }


def choose_alphas(scores: Scores, prepared: Prepared, lengths: Sequence[int]) -> tuple[dict[int, float], pd.DataFrame]:
    """Select the weight of the retriever for each number of constraints on validation (see :func:`evaluation.choose_alpha`).

    Parameters
    ----------
    scores
        Scores of the validation windows.
    prepared
        Result of stage 03.
    lengths
        Numbers of constraints, in the order of the requests.

    Returns
    -------
    The weights by number of constraints, and the graded NDCG of all weights (``alpha value chosen tokens``).
    """
    alphas, curves, valid = {}, [], prepared.pools["valid"]
    for place, n in enumerate(lengths):
        judged = evaluation.judge(valid, prepared.requests["valid", n], prepared.vocabulary.values_of)
        choice = evaluation.choose_alpha(scores.total()[:, place], valid, judged)
        alphas[n] = float(choice.loc[choice["chosen"], "alpha"].iloc[0])
        curves.append(choice.assign(tokens=n))
    return alphas, pd.concat(curves)


class Ranked(NamedTuple):
    """Rankings by number of constraints and ranker, each [windows, K] or [seeds, windows, K], and what they are judged by."""

    orders: dict[int, dict[str, np.ndarray]]
    judged: dict[int, Judged]


def rank(
    prepared: Prepared, given: Inputs, scores: Mapping[str, Sequence[Scores]], params: Params, alphas: Mapping[int, float]
) -> Ranked:
    """Rank the test windows by all rankers, under one request of each length.

    Parameters
    ----------
    prepared
        Result of stage 03.
    given
        Scores that need no language model.
    scores
        Scores of the test windows by model (``corec``, ``zero-shot``), one entry per seed.
    params
        Parameters of the run.
    alphas
        Weights of the retriever for a model without a prior; not used with one.
    """
    pools, lengths = prepared.pools["test"], params.controls.n_tokens
    ranked, empty = Ranked({}, {}), lengths.index(0)
    for place, n in enumerate(lengths):
        judged = evaluation.judge(pools, prepared.requests["test", n], prepared.vocabulary.values_of)
        orders = without_model(pools, judged, given, params.evaluation.boost)
        for part in scores.get("zero-shot", ()):
            orders["zero-shot"] = order_by(part.total()[:, place])
        own = scores["corec"]
        orders |= with_prior(own, place, empty) if params.reranker.prior else blended(own, place, empty, pools, alphas, n)
        ranked.orders[n], ranked.judged[n] = orders, judged
    return ranked
