"""One look for all figures: colours, markers, sizes and titles.

COREC is drawn in blue and with a thick line, all other rankers in greys with a marker of their own, so that a figure can be read
without colours. The colours are those of Okabe and Ito, which people with a colour vision deficiency can tell apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.rcsetup import cycler

BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
CYCLE = [BLUE, ORANGE, GREEN, PURPLE, SKY, "#E69F00", "0.45"]
HALF = (5.4, 3.2)  # inches; a figure of one panel
WHOLE = (10.0, 3.6)  # a figure of two panels
SETTINGS: dict[str, Any] = {
    "figure.dpi": 100,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.edgecolor": "0.6",
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "corec",  # equal figures give equal files
    "axes.prop_cycle": cycler(color=CYCLE),
}


class Mark(NamedTuple):
    """How a ranker is drawn."""

    color: str
    marker: str
    line: str = "-"
    width: float = 1.2


MARKS = {
    "corec": Mark(BLUE, "o", "-", 2.6),
    "no-token": Mark(SKY, "o", "--"),
    "no-prior": Mark(SKY, "D", ":"),
    "rule": Mark("0.1", "^", "--"),
    "rule+combiner": Mark("0.1", "v", ":"),
    "hard-filter": Mark("0.35", "s"),
    "hard-filter-strict": Mark("0.35", "P", ":"),
    "hard-filter+combiner": Mark("0.35", "X", "--"),
    "boost": Mark("0.45", "d", "-."),
    "combiner": Mark("0.5", "v"),
    "sasrec": Mark("0.6", "D"),
    "zero-shot": Mark("0.7", "x"),
    "text": Mark("0.7", "*", ":"),
    "popularity": Mark("0.75", "+", ":"),
}
LABELS = {
    "corec": "COREC",
    "sasrec": "SASRec",
    "no-token": "COREC, no tokens",
    "no-prior": "COREC, no prior",
    "rule": "rule (best CP)",
}


def mark(model: str) -> Mark:
    """How the ranker `model` is drawn; grey if it has no mark of its own."""
    return MARKS.get(model, Mark("0.5", "."))


def label(model: str) -> str:
    """Name of a ranker in a legend; a variant such as ``corec, contrast`` keeps what follows the comma."""
    name, comma, variant = model.partition(",")
    return LABELS.get(model, LABELS.get(name, name) + comma + variant)


def title(table: pd.DataFrame, about: str = "") -> str:
    """Title of a figure of a results table: what it shows, then data set, protocol of the requests and K of its first row."""
    first = table.iloc[0]
    return f"{about}{': ' if about else ''}{first['dataset']}, requests: {first['protocol']}, K = {first['K']}"


def of_settings(settings: Any, about: str = "") -> str:
    """Title of a figure of a run: what it shows, then data set, protocol of the requests and K (`settings`: parameters)."""
    row = {"dataset": settings.data.dataset, "protocol": settings.controls.protocol, "K": settings.controls.k}
    return title(pd.DataFrame([row]), about)


def parameters() -> Any:
    """Parameters of matplotlib for this look."""
    return {**sns.axes_style("whitegrid"), **SETTINGS}


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw with this look inside a ``with`` statement."""
    with plt.rc_context(parameters()):
        yield


def use() -> None:
    """Draw all further figures of a notebook with this look."""
    plt.rcParams.update(parameters())
