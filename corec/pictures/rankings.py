"""Rankings and their metrics."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from corec import evaluation, style
from corec.pictures import short


def bump(titles: Sequence[str], before: np.ndarray, after: np.ndarray, met: np.ndarray, truth: np.ndarray, about: str) -> Figure:
    """Draw how the ranks of candidates change between two rankings of them.

    Candidates that meet the whole request are blue, the true next item is orange, others are grey.

    Parameters
    ----------
    titles
        Titles of the K candidates.
    before, after
        Rankings of SASRec and of COREC: indices of the candidates, best first, each [K].
    met
        Constraints met [K, n].
    truth
        Whether a candidate is the true next item [K].
    about
        Title of the figure.
    """
    figure, axis = plt.subplots(figsize=(9, 5.6), layout="constrained")
    k = len(titles)
    ranks = np.empty((2, k), dtype=int)
    ranks[0, before], ranks[1, after] = np.arange(1, k + 1), np.arange(1, k + 1)
    whole = met.all(axis=1) & (met.shape[1] > 0)
    for place in range(k):
        color = style.ORANGE if truth[place] else style.BLUE if whole[place] else "0.7"
        axis.plot([0, 1], ranks[:, place], color=color, marker="o", markersize=4, linewidth=2.2 if color != "0.7" else 1)
        dots = f" {'●' * met[place].sum()}{'○' * (~met[place]).sum()}" if met.shape[1] else ""
        star = " ★" if truth[place] else ""
        axis.annotate(short(titles[place]) + star, (-0.04, ranks[0, place]), ha="right", va="center", fontsize=8, color="0.15")
        axis.annotate(short(titles[place]) + dots + star, (1.04, ranks[1, place]), va="center", fontsize=8, color="0.15")
    axis.axhline(5.5, color="0.6", linestyle=":", linewidth=1)
    axis.set(xlim=(-1.15, 2.35), ylim=(k + 0.7, 0.2), xticks=[0, 1], yticks=[1, 5, 10, k], ylabel="rank")
    axis.set_xticklabels(["SASRec", "COREC"])
    axis.set_title(about)
    axis.grid(visible=False)
    return figure


def toy(ranking: np.ndarray, met: np.ndarray, target: int, k: int) -> Figure:
    """Draw a small ranking: a row per rank, a column per constraint, a filled cell if it is met, and a line at the cut-off `k`.

    Parameters
    ----------
    ranking
        Indices of the candidates, best first [K].
    met
        Constraints met [K, n].
    target
        Index of the true next item.
    k
        Cut-off.
    """
    figure, axis = plt.subplots(figsize=(3.6, 2.6), layout="constrained")
    names = [f"{place}. {chr(65 + i)}{' (target)' if i == target else ''}" for place, i in enumerate(ranking, start=1)]
    columns = [f"constraint {number}" for number in range(1, met.shape[1] + 1)]
    view = pd.DataFrame(met[ranking].astype(int), index=names, columns=columns)
    sns.heatmap(view, cbar=False, linewidths=1, cmap="Greens", vmax=1.5, ax=axis)
    axis.axhline(k, color="k", linewidth=2)
    axis.tick_params(axis="y", rotation=0)
    axis.set_title(f"the line is the cut-off k = {k}")
    return figure


def forest(table: pd.DataFrame, label: str, title: str) -> Figure:
    """Draw one interval per ranker, in the order of the rows.

    Parameters
    ----------
    table
        Columns ``value low high``, with the rankers as index.
    label, title
        Label of the axis, and title.
    """
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    colors = [style.mark(str(model)).color for model in table.index]
    axis.hlines(table.index, table["low"], table["high"], color=colors)
    axis.scatter(table["value"], table.index, color=colors, zorder=3)
    axis.invert_yaxis()
    axis.set(xlabel=label, title=title)
    return figure


def leak(table: pd.DataFrame, label: str, title: str) -> Figure:
    """Draw the rows of a table as bars with intervals, and its last row, the reference, as a line.

    Parameters
    ----------
    table
        Columns ``value low high``, with the names of the bars as index.
    label, title
        Label of the axis, and title.
    """
    figure, axis = plt.subplots(figsize=style.HALF, layout="constrained")
    bars = table.iloc[:-1]
    axis.bar(bars.index, bars["value"], color=[style.ORANGE, style.BLUE, "0.6"], width=0.6)
    axis.errorbar(bars.index, bars["value"], evaluation.error_bars(bars), fmt="none", color="0.1", capsize=4)
    axis.axhline(table["value"].iloc[-1], color="0.3", linestyle="--", label=str(table.index[-1]))
    axis.set(ylabel=label, title=title)
    axis.legend()
    return figure


def alphas(curves: pd.DataFrame) -> Figure:
    """Draw the graded NDCG of each weight of the retriever, with a cross at each selected weight.

    Parameters
    ----------
    curves
        Columns ``alpha value chosen tokens`` (:func:`corec.rankers.choose_alphas`).
    """
    view = curves.astype({"alpha": str, "tokens": "category"})
    figure, axis = plt.subplots(figsize=(6.5, 3), layout="constrained")
    sns.lineplot(view, x="alpha", y="value", hue="tokens", marker="o", ax=axis).set(ylabel="graded NDCG@5, validation")
    sns.scatterplot(view[view["chosen"]], x="alpha", y="value", color="k", s=90, marker="x", ax=axis, zorder=5)
    return figure
