"""One user's interactions in order of time."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from corec import style
from corec.data import Tables
from corec.pictures import short

SPLITS = {"train": "0.75", "held-back": "#E69F00", "valid": style.SKY, "test": style.PURPLE}


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
