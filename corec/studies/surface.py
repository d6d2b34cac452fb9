"""Control precision and relevance by the number of candidates and of control tokens, of one trained re-ranker."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from corec import controls, evaluation, evidence, rankers
from corec.data import Tables
from corec.evaluation import order_by
from corec.intervals import by_user, with_differences
from corec.params import Params
from corec.reranker import Reranker, load_examples, score_parts
from corec.studies import keep_study

MODELS = ("sasrec", "combiner", "hard-filter", "hard-filter+combiner", "rule", "corec")


def measure(model: Reranker, tables: Tables, candidates: pd.DataFrame, params: Params) -> pd.DataFrame:
    """Score the test windows with each number of candidates of `study.surface`.

    The re-ranker is not trained again. The pools, requests, evidence and combiner are made anew for each number of candidates.

    Parameters
    ----------
    model
        Trained re-ranker.
    tables, candidates
        Results of stages 01 and 02.
    params
        Settings of the run.

    Returns
    -------
    Columns ``K n_tokens model metric value low high ahead ahead_low ahead_high k n_users dataset protocol``; k is ``figures.k``,
    and ``cp`` is at tau = n. ``ahead`` is the paired difference of COREC from the model.
    """
    tables_of, similar, cut = [], None, params.figures.k
    for k in params.study.surface:
        own = params.controls.model_copy(update={"k": k})
        prepared = controls.prepare(tables.windows, candidates, tables.items, own, params.seed)
        pools, priors = prepared.pools["test"], {}
        if params.evidence.combiner != "none":
            similar = similar or evidence.similarities_of(tables, prepared.vocabulary, params)
            priors = evidence.make(tables, prepared, similar, params)[1].priors
        examples = load_examples(tables.windows, prepared, priors)
        requests = [prepared.requests["test", n] for n in own.n_tokens]
        scores = score_parts(model, examples, pools, requests, report=f"K = {k}").total()
        users = tables.windows.set_index("window").loc[pools.window, "user"].to_numpy()
        keys, columns = [], []
        for place, n in enumerate(own.n_tokens):
            judged = evaluation.judge(pools, requests[place], prepared.vocabulary.values_of)
            given = rankers.Inputs(np.zeros(pools.candidates.shape), priors.get("test"))
            orders = rankers.without_model(pools, judged, given, params.evaluation.boost) | {"corec": order_by(scores[:, place])}
            for name in (name for name in MODELS if name in orders):
                found = evaluation.by_window(orders[name], judged, [cut])
                for metric, key in evaluation.control_and_relevance(cut, n).items():
                    keys.append((k, n, name, metric))
                    columns.append(found[key])
        values = by_user(np.stack(columns, axis=1).astype(float), users)
        ours = [keys.index((k, n, "corec", metric)) for _, n, _, metric in keys]
        numbers = with_differences(values, values[:, ours] - values, params.evaluation, params.seed)
        table = pd.DataFrame(keys, columns=["K", "n_tokens", "model", "metric"]).join(numbers)
        tables_of.append(table.assign(k=cut, n_users=len(values)))
    return pd.concat(tables_of, ignore_index=True).assign(dataset=params.data.dataset, protocol=params.controls.protocol)


def keep(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the table of :func:`measure`, its plot and the results page; returns the files."""
    return keep_study(table, draw(table), folder / "surface", "%.5g")


def draw(table: pd.DataFrame) -> Figure:
    """Plot CP@k and NDCG@k of COREC, and its NDCG@k minus that of the hard filter, by K and number of tokens.

    With a prior, the hard filter has the order of the combiner. An asterisk marks differences whose interval excludes 0.
    """
    ours, k = table[table["model"] == "corec"], table["k"].iloc[0]
    other = "hard-filter+combiner" if "hard-filter+combiner" in set(table["model"]) else "hard-filter"
    above = table[(table["model"] == other) & (table["metric"] == "ndcg") & (table["n_tokens"] > 0)]
    panels = {
        f"CP@{k}, all constraints met": (ours[ours["metric"] == "cp"], "value"),
        f"NDCG@{k}": (ours[ours["metric"] == "ndcg"], "value"),
        f"NDCG@{k} minus {other}": (above, "ahead"),
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, (title, (rows, column)) in zip(axes, panels.items(), strict=True):
        wide = rows.pivot(index="n_tokens", columns="K", values=column)
        signs = rows.assign(text=[f"{value:.3f}" for value in rows[column]])
        if column == "ahead":
            sure = (rows["ahead_low"] > 0) | (rows["ahead_high"] < 0)
            signs["text"] += np.where(sure, " *", "")
        texts = signs.pivot(index="n_tokens", columns="K", values="text")
        look = {"center": 0, "cmap": "vlag"} if column == "ahead" else {"cmap": "crest"}
        sns.heatmap(wide, annot=texts, fmt="", cbar=False, ax=axis, **look)
        axis.set(title=title, xlabel="candidates K", ylabel="control tokens")
    return figure
