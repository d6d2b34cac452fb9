"""Control precision and relevance by the number of candidates and of control tokens, of one trained re-ranker."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from corec import controls, evaluation, evidence, files, pages, rankers
from corec.data import Tables
from corec.evaluation import order_by
from corec.intervals import by_user, intervals
from corec.params import Params
from corec.reranker import Reranker, load_examples, score_parts

MODELS = ("sasrec", "combiner", "hard-filter", "rule", "corec")
K = 5  # cut-off of the metrics, if there are more candidates


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
    Columns ``K n_tokens model metric value low high n_users dataset protocol``; ``cp`` is CP@5 at tau = n.
    """
    rows = []
    similar = None
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
        keys, columns, cut = [], [], min(K, k - 1)
        for place, n in enumerate(own.n_tokens):
            judged = evaluation.judge(pools, requests[place], prepared.vocabulary.values_of)
            given = rankers.Inputs(np.zeros(pools.candidates.shape), priors.get("test"))
            orders = rankers.without_model(pools, judged, given, params.evaluation.boost) | {"corec": order_by(scores[:, place])}
            for name in (name for name in MODELS if name in orders):
                found = evaluation.by_window(orders[name], judged, [cut])
                for metric, key in (("cp", ("cp", cut, n)), ("ndcg", ("ndcg", cut, 0)))[not n :]:
                    keys.append((k, n, name, metric))
                    columns.append(found[key])
        values = by_user(np.stack(columns, axis=1).astype(float), users)
        low, high = intervals(values, params.evaluation, params.seed)
        rows += [(*key, *numbers, len(values)) for key, *numbers in zip(keys, values.mean(axis=0), low, high, strict=True)]
    table = pd.DataFrame(rows, columns="K n_tokens model metric value low high n_users".split())
    return table.assign(dataset=params.data.dataset, protocol=params.controls.protocol)


def keep(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the table of :func:`measure`, its plot and the results page; returns the files."""
    written = [folder / "surface.csv", folder / "surface.png"]
    files.write_text(written[0], table.to_csv(index=False, float_format="%.5g"))
    draw(table).savefig(written[1], dpi=130)
    plt.close()
    pages.write_study(folder)
    return written


def draw(table: pd.DataFrame) -> Figure:
    """Plot CP@5 and NDCG@5 of COREC, and its NDCG@5 minus that of the hard filter, by K and number of tokens."""
    ours = table[table["model"] == "corec"]
    filtered = table[(table["model"] == "hard-filter") & (table["metric"] == "ndcg")]
    wide = [
        rows.pivot(index="n_tokens", columns="K", values="value")
        for rows in (ours[ours["metric"] == "cp"], ours[ours["metric"] == "ndcg"], filtered)
    ]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    panels = {
        "CP@5, all constraints met": wide[0],
        "NDCG@5": wide[1],
        "NDCG@5 minus the hard filter's": (wide[1] - wide[2]).drop(0),
    }
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        centred = {"center": 0, "cmap": "vlag"} if "minus" in title else {"cmap": "crest"}
        sns.heatmap(values, annot=True, fmt=".3f", cbar=False, ax=axis, **centred)
        axis.set(title=title, xlabel="candidates K", ylabel="control tokens")
    return figure
