"""Pictures that explain one example: a window, a prompt, the attention mask, a ranking before and after a request."""

import html
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from corec import evaluation, style
from corec.data import Tables
from corec.reranker import Batch, Prompter, Reranker, Row

SPLITS = {"train": "0.75", "held-back": "#E69F00", "valid": style.SKY, "test": style.PURPLE}
PARTS = {
    "instruction": "#e8e8e8",
    "history": "#cfe8f7",
    "candidates": "#d8f0e4",
    "request": "#fbe3cf",
    "control tokens": "#f5b98a",
}


def short(title: str, length: int = 24) -> str:
    """A title of at most `length` characters."""
    return title if len(title) <= length else title[: length - 1].rstrip() + "…"


def window(tables: Tables, window: pd.Series, before: int = 14) -> Figure:
    """Draw a user's interactions in order of time, coloured by split, with the history and the target of a window.

    Parameters
    ----------
    tables
        Tables of stage 01.
    window
        Row of the windows table.
    before
        Number of interactions shown before the history.
    """
    path = tables.interactions[tables.interactions["user"] == window["user"]].reset_index(drop=True)
    first = len(path) - 1 - path["item"][::-1].tolist().index(window["target"])
    start = max(0, first - len(window["history"]) - before)
    path = path.iloc[start:]
    places = np.arange(start + 1, start + 1 + len(path))
    figure, axis = plt.subplots(figsize=(9, 2.9), layout="constrained")
    for split, color in SPLITS.items():
        own = (path["split"] == split).to_numpy()
        if own.any():
            axis.scatter(places[own], np.zeros(own.sum()), s=130, marker="s", color=color, label=split)
    titles = tables.items.set_index("item")["title"]
    spans = ((first - len(window["history"]) + 1, first, "history", style.GREEN), (first + 1, first + 1, "target", style.ORANGE))
    for low, high, name, color in spans:
        axis.plot([low - 0.45, high + 0.45], [-0.35, -0.35], color=color, linewidth=4, solid_capstyle="butt")
        axis.annotate(name, ((low + high) / 2, -0.5), ha="center", va="top", color=color, weight="bold")
    for place in range(first - len(window["history"]) + 1, first + 2):
        name = short(titles[path["item"].iloc[place - 1 - start]])
        axis.annotate(name, (place, 0.3), rotation=38, ha="left", va="bottom", fontsize=8)
    axis.set(
        ylim=(-0.9, 2.6),
        yticks=[],
        xlabel=f"interactions of user {window['user']}, in order of time",
        xlim=(start, places[-1] + 3),
    )
    axis.grid(visible=False)
    axis.legend(ncols=4, loc="upper left", frameon=False)
    return figure


def mask(batch: Batch, row: Row, last: int = 60) -> Figure:
    """Draw the attention mask of a row: the whole mask, and the part of the requests with the last tokens of the prefix.

    Parameters
    ----------
    batch
        A batch whose first row is `row`.
    row
        The row.
    last
        Number of the last positions that the second panel shows.
    """
    allowed = batch.mask[0, 0].cpu().numpy()
    size, end = len(row.prefix) + sum(map(len, row.suffixes)), len(row.prefix)
    begin = max(0, min(end - 8, size - last))
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    for axis, low, name in ((axes[0], 0, "whole mask"), (axes[1], begin, "the requests (enlarged)")):
        axis.imshow(
            allowed[low:size, low:size], cmap="Greens", vmin=0, vmax=1.3, interpolation="nearest",
            extent=(low - 0.5, size - 0.5, size - 0.5, low - 0.5),
        )  # fmt: skip
        axis.set(xlabel="key: position attended to", ylabel="query: position that is computed", title=name)
        edges = np.cumsum([end, *map(len, row.suffixes)])[:-1]
        for edge in edges:
            axis.axhline(edge - 0.5, color="k", linewidth=0.6)
            axis.axvline(edge - 0.5, color="k", linewidth=0.6)
        axis.grid(visible=False)
    for number, (edge, suffix) in enumerate(zip(edges, row.suffixes, strict=True), start=1):
        axes[1].annotate(f"request {number}", (begin, edge + len(suffix) / 2), fontsize=8, va="center")
    return figure


def tokens(prompter: Prompter, row: Row, tokenizer: Any, request: int = 0) -> HTML:
    """Show the tokens of a prompt, coloured by part; the text is escaped.

    Parameters
    ----------
    prompter
        Prompter of the row; control tokens are those of its values.
    row
        The row.
    tokenizer
        Tokenizer of the re-ranker.
    request
        Place of the request among those of the row.
    """
    added = set(tokenizer.get_added_vocab().values())
    first, last = row.spans[0][0], row.spans[-1][1]
    headings = [prompter.heading_history, prompter.heading_candidates]

    def part(place: int) -> str:
        token = row.prefix[place]
        if token in added:
            return "control tokens"
        in_heading = place < len(headings[0]) or first - len(headings[1]) <= place < first
        return "instruction" if in_heading else "candidates" if first <= place < last else "history"

    named = [(token, part(place)) for place, token in enumerate(row.prefix)]
    named += [(token, "control tokens" if token in added else "request") for token in row.suffixes[request]]
    spans = []
    for token, name in named:
        text = html.escape(tokenizer.decode([token])).replace("\n", "↵<br>")
        spans.append(f'<span style="background:{PARTS[name]};color:#111;border-radius:3px;margin:0 1px">{text}</span>')
    counts = pd.Series([name for _, name in named]).value_counts()
    key = " ".join(
        f'<span style="background:{color};color:#111;padding:1px 6px">{name}: {counts.get(name, 0)}</span>'
        for name, color in PARTS.items()
    )
    return HTML(
        f'<p>Tokens by part: {key}</p><div style="line-height:1.7;font-family:monospace;font-size:85%">{"".join(spans)}</div>'
    )


def bump(
    axis: Axes,
    titles: Sequence[str],
    before: np.ndarray,
    after: np.ndarray,
    met: np.ndarray,
    truth: np.ndarray,
    names: tuple[str, str],
) -> None:
    """Draw how the ranks of candidates change between two rankings of them.

    Candidates that meet the whole request are blue, the true next item is orange, others are grey.

    Parameters
    ----------
    axis
        Axes to draw on.
    titles
        Titles of the K candidates.
    before, after
        Two rankings: indices of the candidates, best first, each [K].
    met
        Constraints met [K, n].
    truth
        Whether a candidate is the true next item [K].
    names
        Names of the rankings.
    """
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
    axis.set_xticklabels(names)
    axis.grid(visible=False)


def positions(retained: int, computed: int, k: int) -> Figure:
    """Draw which tokens of a prompt are computed with and without a cached prefix.

    Parameters
    ----------
    retained, computed
        Number of tokens of the prefix and of the request.
    k
        Number of candidates.
    """
    figure, axis = plt.subplots(figsize=(7, 1.9), layout="constrained")
    rows = (("re-ranking, whole prompt", style.ORANGE), ("re-ranking, cached prefix", "0.85"))
    for place, (name, color) in enumerate(rows):
        axis.barh(place, retained, color=color, edgecolor="w")
        axis.barh(place, computed, left=retained, color=style.ORANGE, edgecolor="w")
        axis.annotate(name, (5, place), va="center", fontsize=9)
    axis.annotate(f"{computed} of the request", (retained + computed, 0.5), ha="right", va="center", fontsize=9)
    axis.set(xlabel=f"tokens of one prompt (K = {k}): orange is computed, grey is cached", yticks=[], ylim=(1.5, -0.5))
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


def adapted(model: Reranker) -> pd.DataFrame:
    """Shapes, numbers of values and norms of the first adapted matrix W of a re-ranker and of its adapter, A and B."""
    part = next(part for part in model.model.modules() if hasattr(part, "lora_A"))
    matrices = {"W": part.base_layer.weight, "A": part.lora_A["default"].weight, "B": part.lora_B["default"].weight}
    rows = {
        name: {
            "shape": tuple(matrix.shape),
            "values": matrix.numel(),
            "trained": name != "W",
            "norm": matrix.float().norm().item(),
        }
        for name, matrix in matrices.items()
    }
    return pd.DataFrame(rows).T


def use_style() -> None:
    """Draw all further figures of a notebook with the look of this package."""
    style.use()


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
