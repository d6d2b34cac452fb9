"""Table, figure and summary of the study of missing metadata (:mod:`corec.studies.missing`)."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from corec import files, pages
from corec.evaluation import error_bars
from corec.studies import keep_study

FOLDER = "missing-metadata"  # of all data sets; the folders of the runs begin with this name
ALL = "all"
BEST = ("rule", "best imputer")
NAMES = {
    ("rule", "truth"): "rule, all values known",
    ("rule", "none"): "rule, known values only",
    BEST: "rule, best imputer",
    ("corec", "none"): "COREC",
    ("corec-dropout", "none"): "COREC, attribute dropout",
    ("rule", "corec-dropout"): "rule, COREC for unknown values",
}


def with_best(table: pd.DataFrame) -> pd.DataFrame:
    """Append the rule with the best imputer of each condition as one more imputer, ``best imputer``."""
    own = (table["model"] == "rule") & (table["imputer"] == table["best"])
    return pd.concat([table, table[own].assign(imputer=BEST[1])], ignore_index=True)


def draw(table: pd.DataFrame) -> Figure:
    """Plot CP by share of missing values, the differences from the best imputer, and CP by share of wrong values.

    Parameters
    ----------
    table
        Result of :func:`corec.studies.missing.tabulate`, of one or several data sets, each of which has a row of panels.
    """
    datasets, cut = list(table["dataset"].unique()), table["k"].iloc[0]
    noisy = bool((table["wrong"] > 0).any())
    size = (5 * (3 + noisy), 0.8 + 3.4 * len(datasets))
    figure, axes = plt.subplots(len(datasets), 3 + noisy, figsize=size, squeeze=False, layout="constrained")
    for row, dataset in zip(axes, datasets, strict=True):
        part = with_best(table[(table["dataset"] == dataset) & (table["metric"] == "cp")])
        whole, single = part[part["wrong"] == 0], part[(part["n_tokens"] == 1) & (part["attribute"] == ALL)]
        lines(row[0], ((label, single[of(single, key) & (single["wrong"] == 0)]) for key, label in NAMES.items()), "missing")
        row[0].set(title=f"{dataset}: CP@{cut}, one token", xlabel="share of values that are unknown", ylabel=f"CP@{cut}")
        both = whole[of(whole, ("rule", "corec-dropout"))]
        tokens = ((f"{n} token{'s' * (n != 1)}", rows) for n, rows in both[both["attribute"] == ALL].groupby("n_tokens"))
        lines(row[1], tokens, "missing", "ahead")
        attributes = ((str(name), rows) for name, rows in both[both["attribute"] != ALL].groupby("attribute", sort=False))
        lines(row[2], attributes, "missing", "ahead")
        for axis, title in zip(row[1:3], ("", ", one token, by attribute"), strict=True):
            axis.axhline(0, color="0.3", linewidth=0.8)
            axis.set(title=f"rule with COREC minus best imputer{title}", xlabel="share of values that are unknown", ylabel="")
        if noisy:
            few = single[(single["missing"] == 0)]
            lines(row[3], ((label, few[of(few, key)]) for key, label in list(NAMES.items())[:5]), "wrong")
            row[3].set(title=f"CP@{cut}, one token", xlabel="share of values that are wrong", ylabel="")
    return figure


def of(table: pd.DataFrame, key: tuple[str, str]) -> pd.Series:
    """Select the rows of a model and an imputer."""
    return (table["model"] == key[0]) & (table["imputer"] == key[1])


def lines(axis: Axes, parts: Iterable[tuple[str, pd.DataFrame]], x: str, y: str = "value") -> None:
    """Draw one line with intervals for each labelled part; `y` is ``value`` or ``ahead``."""
    for (label, rows), color in zip(parts, sns.color_palette("colorblind"), strict=False):
        if len(rows):
            rows = rows.sort_values(x)
            shown = rows.assign(value=rows[y], **({"low": rows[f"{y}_low"], "high": rows[f"{y}_high"]} if y == "ahead" else {}))
            axis.errorbar(shown[x], shown["value"], yerr=error_bars(shown), fmt="o-", markersize=3, color=color, label=label)
    axis.legend(fontsize="small", frameon=False)


def thresholds(table: pd.DataFrame, model: str = "rule", imputer: str = "corec-dropout") -> pd.DataFrame:
    """Share of missing values from which a ranker has a higher CP than the rule with the best imputer.

    Parameters
    ----------
    table
        Result of :func:`corec.studies.missing.tabulate`.
    model, imputer
        The ranker.

    Returns
    -------
    Columns ``dataset attribute n_tokens from difference low high best``. `from` is the smallest share such that the interval of
    the difference is above 0 at this share and all larger ones. If it is empty, there is none, and the numbers are those of the
    largest share.
    """
    rows = table[of(table, (model, imputer)) & (table["metric"] == "cp") & (table["wrong"] == 0)]
    found = []
    for (dataset, attribute, n), part in rows.groupby(["dataset", "attribute", "n_tokens"], sort=False):
        part = part.sort_values("missing", ascending=False)
        above = part[(part["ahead_low"] > 0).cummin()]
        row = above.iloc[-1] if len(above) else part.iloc[0]
        share = row["missing"] if len(above) else None
        found.append((dataset, attribute, n, share, row["ahead"], row["ahead_low"], row["ahead_high"], row["best"]))
    return pd.DataFrame(found, columns="dataset attribute n_tokens from difference low high best".split())


def keep(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the table and the figure of a run; returns the files.

    If the name of the folder begins with :data:`FOLDER`, the tables of all such folders are also joined in the folder of that
    name (``metrics.csv``, ``missing.png``), which is no output of one run.
    """
    with sns.axes_style("whitegrid"):
        written = keep_study(table, draw(table), folder / "missing", "%.5g")
        if folder.name.startswith(f"{FOLDER}-"):
            paths = sorted(folder.parent.glob(f"{FOLDER}-*/missing.csv"))
            joined = pd.concat([pd.read_csv(path) for path in paths], ignore_index=True)
            whole = folder.parent / FOLDER
            files.write_text(whole / "metrics.csv", joined.to_csv(index=False))
            figure = draw(joined)
            figure.savefig(whole / "missing.png", dpi=130)
            plt.close(figure)
            pages.write_study(whole)
    return written
