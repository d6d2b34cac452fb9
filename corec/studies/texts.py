"""The combiner with titles embedded by different models: what text adds to relevance without a language model that re-ranks."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from corec import evaluation, evidence, files, style
from corec.controls import Prepared
from corec.data import Tables
from corec.evaluation import error_bars, order_by
from corec.evidence import Similarities
from corec.evidence.text import title_embeddings
from corec.intervals import by_user, with_differences
from corec.params import Params
from corec.studies import keep_study

NONE = "none"
RUNS = ("ml-100k", "ml-1m", "complete-journey", "amazon-office-products")  # of :func:`join`


def rankings(tables: Tables, prepared: Prepared, similar: Similarities, params: Params, text: str) -> dict[str, np.ndarray]:
    """Rankings [windows, K] of the test windows, by the combiner and by the similarity of the titles, by name.

    Parameters
    ----------
    tables, prepared
        Results of stages 01 and 03.
    similar
        Similarities of the items.
    params
        Settings of the run.
    text
        Model of the titles (see :func:`corec.evidence.text.title_embeddings`); ``none`` for a combiner without text.
    """
    vectors = None if text == NONE else title_embeddings(tables.items["title"].tolist(), text)
    found, combined = evidence.make(tables, prepared, similar._replace(text=vectors), params)
    orders = {f"combiner, {text}": order_by(combined.priors["test"])}
    if text != NONE:
        orders[f"text alone, {text}"] = order_by(found["test"].values[..., found["test"].names.index("text_recent")])
    return orders


def measure(tables: Tables, prepared: Prepared, users: np.ndarray, params: Params, others: dict[str, np.ndarray]) -> pd.DataFrame:
    """NDCG@k without tokens on the test windows, for every text of `study.texts`.

    The candidates are those of stage 03. Their order, ``sasrec``, is that of SASRec, or of the combiner that has merged several
    sources (`controls.pool`). The evidence and the combiner are made anew for each text.

    Parameters
    ----------
    tables, prepared
        Results of stages 01 and 03.
    users
        User of each test window [windows].
    params
        Settings of the run; k is ``figures.k``.
    others
        Scores [windows, K] of other rankers by name, such as those of a trained re-ranker without tokens.

    Returns
    -------
    Columns ``ranker value low high ahead ahead_low ahead_high over over_low over_high k n_users K recall dataset``. ``ahead`` is
    the paired difference from ``sasrec``, ``over`` that from the combiner of the run (`evidence.text`); ``recall`` is the share
    of the windows whose true next item is among the candidates.
    """
    pools, cut = prepared.pools["test"], params.figures.k
    orders = {"sasrec": evaluation.retriever_order(pools)}
    base = f"combiner, {params.evidence.text or NONE}"
    similar = evidence.similarity_tables(tables, prepared.vocabulary, params.evidence)
    for text in dict.fromkeys([params.evidence.text or NONE, *params.study.texts]):
        orders |= rankings(tables, prepared, similar, params, text)
    orders |= {name: order_by(scores) for name, scores in others.items()}
    judged = evaluation.judge(pools, np.empty((len(users), 0), dtype=int), prepared.vocabulary.values_of)
    columns = [evaluation.by_window(order, judged, [cut])["ndcg", cut, 0] for order in orders.values()]
    values, names = by_user(np.stack(columns, axis=1), users), list(orders)
    table = with_differences(values, values - values[:, [0]], params.evaluation, params.seed)
    over = with_differences(values, values - values[:, [names.index(base)]], params.evaluation, params.seed)
    for name in ("ahead", "ahead_low", "ahead_high"):
        table[name.replace("ahead", "over")] = over[name]
    about = {"k": cut, "n_users": len(values), "K": pools.candidates.shape[1], "recall": float((pools.truth >= 0).mean())}
    return pd.DataFrame({"ranker": names}).join(table).assign(**about, dataset=params.data.dataset)


def keep(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the table of :func:`measure`, its plot and the results page; returns the files."""
    with style.figure_style():
        return keep_study(table, draw(table), folder / "texts", "%.5g")


def draw(table: pd.DataFrame) -> Figure:
    """Plot the differences in NDCG@k from the order of the candidates, with intervals."""
    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.3 * len(table)), layout="constrained")
    intervals(axis, table.iloc[1:], "ahead")
    axis.set(
        title=f"{table['dataset'].iloc[0]}, no tokens", xlabel=f"NDCG@{table['k'].iloc[0]} minus the order of the candidates"
    )
    return figure


def join(figures: Path) -> list[Path]:
    """Write ``relevance.csv`` and ``relevance.png`` to ``figures/relevance``: COREC without tokens minus the combiner, by run.

    The rows come from ``comparisons.csv`` of a run, in which the boost without tokens is the combiner, or else from its
    ``texts.csv``. Runs of :data:`RUNS` that have neither are omitted.

    Parameters
    ----------
    figures
        Folder of the figures of all runs.

    Returns
    -------
    The files.
    """
    rows = []
    for run in RUNS:
        if (path := figures / run / "comparisons.csv").exists():
            table = pd.read_csv(path)
            found = table[(table["metric"] == "ndcg") & (table["n_tokens"] == 0) & (table["other"] == "boost")]
            rows += [(run, *row) for row in found[["difference", "low", "high", "n_users"]].itertuples(index=False)]
        elif (path := figures / run / "texts.csv").exists():
            table = pd.read_csv(path)
            found = table[table["ranker"] == "corec"]
            rows += [(run, *row) for row in found[["over", "over_low", "over_high", "n_users"]].itertuples(index=False)]
    table = pd.DataFrame(rows, columns=["ranker", "over", "over_low", "over_high", "n_users"])
    with style.figure_style():
        figure, axis = plt.subplots(figsize=(7.6, 0.9 + 0.35 * len(table)), layout="constrained")
        intervals(axis, table, "over")
        axis.set_ylim(len(table) - 0.5, -0.5)
        axis.set(xlabel="NDCG@5 of COREC without tokens, minus the combiner")
    written = [figures / "relevance" / name for name in ("relevance.csv", "relevance.png")]
    files.write_csv(written[0], table.rename(columns={"ranker": "run"}), "%.5g")
    files.write_picture(written[1], figure)
    plt.close(figure)
    return written


def intervals(axis: Axes, table: pd.DataFrame, name: str) -> None:
    """Draw the differences `name` of the rankers of `table` with their intervals, the first on top."""
    errors = error_bars(table, name, (f"{name}_low", f"{name}_high"))
    axis.errorbar(table[name], range(len(table)), xerr=errors, fmt="o", markersize=4, color=style.GREEN)
    axis.axvline(0, color="0.3", linewidth=0.8)
    axis.set(yticks=range(len(table)), yticklabels=list(table["ranker"]))
    axis.invert_yaxis()
