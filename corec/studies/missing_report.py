"""Table, figure and summary of the study of missing metadata (:mod:`corec.studies.missing`)."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from corec import files, style
from corec.evaluation import error_bars, pick
from corec.studies import keep_study

FOLDER = "missing-metadata"  # of :func:`join`; the names of the runs begin with it
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
        Result of :func:`corec.studies.missing.tabulate`, of one or several runs, each of which has a block of panels.
    """
    runs, cut = list(table["run"].unique()), table["k"].iloc[0]
    figure = plt.figure(figsize=(10, 7 * len(runs)), layout="constrained")
    for block, run in zip(figure.subfigures(len(runs), 1, squeeze=False)[:, 0], runs, strict=True):
        row = block.subplots(2, 2).ravel()
        noisy = bool((pick(table, run=run)["wrong"] > 0).any())
        row[3].set_visible(noisy)
        part = with_best(pick(table, run=run, metric="cp"))
        single, whole = pick(part, n_tokens=1, attribute="all"), pick(part, wrong=0)
        about = f"{part['dataset'].iloc[0]}, K = {part['K'].iloc[0]}, {part['protocol'].iloc[0]}"
        rankers = {label: (key, pick(single, model=key[0], imputer=key[1])) for key, label in NAMES.items()}
        lines(row[0], ((label, pick(rows, wrong=0)) for label, (_, rows) in rankers.items()), "missing")
        row[0].set(title=f"{about}\none token", xlabel="share of values that are unknown", ylabel=f"CP@{cut}")
        both = pick(whole, model="rule", imputer="corec-dropout")
        tokens = ((f"{n} token{'s' * (n != 1)}", rows) for n, rows in pick(both, attribute="all").groupby("n_tokens"))
        lines(row[1], tokens, "missing", "ahead")
        attributes = ((str(name), rows) for name, rows in both[both["attribute"] != "all"].groupby("attribute", sort=False))
        lines(row[2], attributes, "missing", "ahead")
        for axis, title in zip(row[1:3], ("", " (one token, by attribute)"), strict=True):
            axis.axhline(0, color="0.3", linewidth=0.8)
            axis.set(title=f"rule with COREC's guesses minus\nbest imputer{title}", xlabel="share of values that are unknown")
        if noisy:
            shown = [(label, pick(rows, missing=0)) for label, (_, rows) in rankers.items()]
            lines(row[3], ((label.replace("for unknown values", "and table"), rows) for label, rows in shown), "wrong")
            row[3].set(title=f"{about}\none token", xlabel="share of values that are wrong", ylabel=f"CP@{cut}")
    return figure


def lines(axis: Axes, parts: Iterable[tuple[str, pd.DataFrame]], x: str, y: str = "value") -> None:
    """Draw one line with intervals for each labelled part; `y` is ``value`` or ``ahead``.

    If all points have one share, they are drawn side by side around it, with the legend outside.
    """
    shown = [(label, rows.sort_values(x), color) for (label, rows), color in zip(parts, style.CYCLE, strict=False) if len(rows)]
    shares = sorted({share for _, rows, _ in shown for share in rows[x]})
    step = 0.01 if len(shares) == 1 else 0
    for place, (label, rows, color) in enumerate(shown):
        errors = error_bars(rows, y, ("ahead_low", "ahead_high") if y == "ahead" else ("low", "high"))
        places = rows[x] + step * (place - (len(shown) - 1) / 2)
        axis.errorbar(places, rows[y], yerr=errors, fmt="o-", markersize=3, color=color, label=label)
    if step:
        axis.set(xticks=shares, xlim=(shares[0] - 0.04, shares[0] + 0.04))
        axis.legend(fontsize="small", frameon=False, bbox_to_anchor=(1, 0.5), loc="center left")
    else:
        axis.legend(fontsize="small", frameon=False)


def thresholds(table: pd.DataFrame, model: str = "rule", imputer: str = "corec-dropout") -> pd.DataFrame:
    """Shares of missing values at which a ranker has a higher CP than the rule with the best imputer.

    Parameters
    ----------
    table
        Result of :func:`corec.studies.missing.tabulate`.
    model, imputer
        The ranker.

    Returns
    -------
    Columns ``run attribute n_tokens above from difference low high best``. `above` lists the shares at which the interval of the
    difference is above 0. `from` is the smallest share such that it is above 0 at this share and all larger ones. If `from` is
    empty, there is none, and the numbers are those of the largest share.
    """
    rows = pick(table, model=model, imputer=imputer, metric="cp", wrong=0)
    found = []
    for (run, attribute, n), part in rows.groupby(["run", "attribute", "n_tokens"], sort=False):
        part = part.sort_values("missing", ascending=False)
        better = part["ahead_low"] > 0
        above = part[better.cummin()]
        row = above.iloc[-1] if len(above) else part.iloc[0]
        share = row["missing"] if len(above) else None
        places = ", ".join(f"{value:.0%}" for value in part.loc[better, "missing"][::-1])
        found.append((run, attribute, n, places, share, row["ahead"], row["ahead_low"], row["ahead_high"], row["best"]))
    return pd.DataFrame(found, columns="run attribute n_tokens above from difference low high best".split())


def keep(table: pd.DataFrame, guesses: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the table of a run, its plot, the table of the guesses (`guesses.csv`) and the results page; returns the files."""
    path = folder / "guesses.csv"
    files.write_csv(path, guesses, "%.5g")
    with style.figure_style():
        return [*keep_study(table, draw(table), folder / "missing", "%.5g"), path]


def join(figures: Path) -> list[Path]:
    """Join the tables of all runs whose name begins with ``missing-metadata-`` (``metrics.csv`` and ``missing.png``).

    Parameters
    ----------
    figures
        Folder of the figures of all runs; the files are written to its folder ``missing-metadata``.

    Returns
    -------
    The files; empty if there is no such run.
    """
    tables = [pd.read_csv(path) for path in sorted(figures.glob(f"{FOLDER}-*/missing.csv"))]
    if not tables:
        return []
    written = [figures / FOLDER / name for name in ("metrics.csv", "missing.png")]
    joined = pd.concat(tables, ignore_index=True)
    files.write_csv(written[0], joined)
    with style.figure_style():
        figure = draw(joined)
    files.write_picture(written[1], figure)
    plt.close(figure)
    return written
