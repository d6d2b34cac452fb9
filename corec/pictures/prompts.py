"""A prompt, its attention mask, its cached part, and an adapted matrix."""

import html
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure

from corec import style
from corec.reranker import Batch, Prompter, Reranker, Row

PARTS = {
    "instruction": "#e8e8e8",
    "history": "#cfe8f7",
    "candidates": "#d8f0e4",
    "request": "#fbe3cf",
    "control tokens": "#f5b98a",
}


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
    control = {token for ids in prompter.values for token in ids} & set(tokenizer.get_added_vocab().values())
    first, last = row.spans[0][0], row.spans[-1][1]
    heading = first - len(prompter.heading_candidates)
    start = heading  # of a request before the candidates
    if prompter.params.request_position == "before":
        wanted = prompter.heading_request
        start = next(place for place in range(heading) if row.prefix[place : place + len(wanted)] == wanted)

    def part(place: int) -> str:
        if row.prefix[place] in control:
            return "control tokens"
        if place < len(prompter.heading_history) or heading <= place < first:
            return "instruction"
        return "candidates" if first <= place < last else "request" if start <= place < heading else "history"

    named = [(token, part(place)) for place, token in enumerate(row.prefix)]
    named += [(token, "control tokens" if token in control else "request") for token in row.suffixes[request]]
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
