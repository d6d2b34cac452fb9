"""The claims of the paper on control, judged by the tables of one run."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from corec import evaluation

YES = {True: "yes", False: "no"}


def interval(row: Mapping[Any, Any]) -> str:
    """Format a difference with its interval."""
    return f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def by_tokens(rows: pd.DataFrame) -> str:
    """Format the differences of :func:`difference`, each with its interval."""
    return "; ".join(f"{row['n_tokens']} token{'s' * (row['n_tokens'] > 1)}: {interval(row)}" for row in rows.to_dict("records"))


def difference(comparisons: pd.DataFrame, metric: str, other: str, k: int) -> pd.DataFrame:
    """Rows of ``comparisons.csv``: `metric` at `k` of COREC minus that of `other`, by number of tokens, at least one."""
    rows = evaluation.pick(comparisons, metric=metric, other=other, k=k)
    return rows[rows["n_tokens"] > 0].sort_values("n_tokens")


def judge(results: pd.DataFrame, comparisons: pd.DataFrame, coverage: pd.DataFrame, k: int) -> pd.DataFrame:
    """Judge each claim by the results of one protocol.

    Parameters
    ----------
    results
        Rows of ``metrics.csv`` of one protocol.
    comparisons
        ``comparisons.csv`` of the run: paired differences on the same users, at strength 1.
    coverage
        Coverage of the requests (:func:`corec.controls.pool_coverage`), one row per number of tokens.
    k
        Cut-off of the metrics.

    Returns
    -------
    Columns ``the paper says``, ``here``, ``holds`` (``yes``, ``no``, or the numbers of tokens for which it holds), ``why``.
    """
    return pd.DataFrame(each(results, comparisons, coverage, k), columns=["the paper says", "here", "holds", "why"])


def each(results: pd.DataFrame, comparisons: pd.DataFrame, coverage: pd.DataFrame, k: int) -> Iterator[tuple[str, str, str, str]]:
    """The rows of :func:`judge`. The function is long because each claim has its own evidence."""
    control = evaluation.pick(results, metric="cp", k=k)
    control = control[control["tau"].eq(control["n_tokens"])].pivot(index="n_tokens", columns="model", values="value")

    def by_n(model: str) -> str:
        return ", ".join(f"{value:.3f}" for value in control[model])

    def holds(rows: pd.DataFrame) -> str:
        good = rows[rows["low"] > 0]["n_tokens"].tolist()
        return (
            YES[bool(good)]
            if len(good) in (0, len(rows))
            else f"with {', '.join(map(str, good))} token{'s' if good != [1] else ''}"
        )

    gain = difference(comparisons, "cp", "sasrec", k)
    yield (
        f"COREC follows the request: CP@{k} above that of SASRec",
        by_tokens(gain),
        holds(gain),
        f"`rule`, without a language model, has the highest CP that the candidates allow: {by_n('rule')}; COREC: {by_n('corec')}",
    )
    if len(control) > 1:
        decreasing = control.diff().iloc[1:] < 0
        yield (
            f"Figure 6: more tokens, lower CP@{k}",
            f"COREC by number of tokens: {by_n('corec')}",
            YES[bool(decreasing["corec"].all())],
            f"fewer candidates meet a longer request, so it also holds for `rule`: {YES[bool(decreasing['rule'].all())]}",
        )
        most = evaluation.pick(results, metric="cp", k=k, model="corec", n_tokens=int(results["n_tokens"].max())).sort_values(
            "tau"
        )
        yield (
            f"Figure 7: lower threshold τ, higher CP@{k}",
            "by τ: " + ", ".join(f"{value:.3f}" for value in most["value"]),
            YES[bool((most["value"].diff().iloc[1:] <= 0).all())],
            "by definition: an item that meets τ constraints also meets τ - 1",
        )
    yield (
        f"Figure 8: hard filtering has the highest CP@{k}",
        f"filter: {by_n('hard-filter')}; COREC: {by_n('corec')}",
        YES[bool((control["hard-filter"] >= control.drop(columns="hard-filter").max(axis=1) - 1e-9).all())],
        "it puts every candidate that meets the request first",
    )
    relevance = difference(comparisons, "ndcg", "hard-filter", k)
    share = coverage.set_index("n_tokens")["truth_violates"]
    yield (
        f"Figure 8: hard filtering has a lower NDCG@{k} than COREC",
        by_tokens(relevance),
        holds(relevance),
        "a ranker that follows the request lowers targets that violate it; their share: "
        + ", ".join(f"{share[n]:.0%}" for n in relevance["n_tokens"])
        + "; the frontier shows lower strengths",
    )
    plain = evaluation.pick(results, metric="ndcg", k=k, n_tokens=0).set_index("model")["value"]
    # Without tokens the hard filter keeps SASRec's order; of rankers with equal values, the comparisons list one.
    gain = evaluation.pick(comparisons, metric="ndcg", k=k, n_tokens=0, other=["sasrec", "hard-filter"])
    rows = gain.to_dict("records")
    yield (
        f"COREC recommends better than its retriever: NDCG@{k}",
        f"without tokens {plain['corec']:.3f}, SASRec {plain['sasrec']:.3f}" + "".join(f": {interval(row)}" for row in rows),
        YES[bool(len(gain) and (gain["low"] > 0).all())],  # no row: the two are the same for all users
        f"the combiner, which needs no language model, has {plain['combiner']:.3f}"
        if "combiner" in plain
        else "there is no combiner to compare with",
    )
