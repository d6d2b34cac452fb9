"""Compare two runs from their folders in ``figures/``: ``corec compare figures/ml-100k figures/ml-100k-ranknet``.

The folders hold ``per_user.parquet``, CP@k and NDCG@k of each user. Runs of the same data set are compared user by user; runs of
different data sets by independent resamples.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from corec import CorecError, evaluation, figures, paths, style
from corec.checked import exit_status
from corec.intervals import intervals, resamples
from corec.params import Params
from corec.studies import keep_study

NAMES = "metric n_tokens model a a_low a_high b b_low b_high difference low high paired users_a users_b run_a run_b k".split()


class Run(NamedTuple):
    """A run in ``figures/``."""

    params: Params
    users: pd.DataFrame  # [users, metric x n_tokens x model], index user_id


def read(folder: Path) -> Run:
    """Read a run.

    Raises
    ------
    CorecError
        If one of its files is missing or of an earlier version.
    """
    for name in ("manifest.json", "per_user.parquet"):
        if not (folder / name).exists():
            raise CorecError(f"{folder / name} is missing: make it with notebooks/06_figures.ipynb of that run.")
    try:
        values = json.loads((folder / "manifest.json").read_text())["params"]
        table = pd.read_parquet(folder / "per_user.parquet")
        table = table.astype({"n_tokens": int, "metric": str, "model": str, "user_id": str})
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"manifest.json or per_user.parquet in {folder} cannot be read ({str(error).splitlines()[0]})"
        raise CorecError(f"{reason}: make them with notebooks/06_figures.ipynb of that run.") from None
    wide = table.pivot_table(index="user_id", columns=["metric", "n_tokens", "model"], values="value")
    return Run(Params.checked(values, str(folder)), wide)


def compare(a: Run, b: Run) -> pd.DataFrame:
    """CP@k (tau = n) and NDCG@k of all rankers that both runs have, and the differences b - a, with intervals.

    Returns
    -------
    Columns ``metric n_tokens model a a_low a_high b b_low b_high difference low high paired users_a users_b run_a run_b k``.
    If `paired`, all numbers are of the users whom both runs have.

    Raises
    ------
    CorecError
        If the cut-offs k differ, or the runs share no ranker.
    """
    params, k = a.params.evaluation, a.params.figures.k
    if k != b.params.figures.k:
        raise CorecError(f"The runs have different cut-offs figures.k, {k} and {b.params.figures.k}: make them with the same.")
    keys = [key for key in a.users.columns if key in b.users.columns]
    if not keys:
        raise CorecError("The runs share no ranker and number of control tokens: compare runs with the same controls.n_tokens.")
    first, second = a.users[keys].dropna(), b.users[keys].dropna()
    common = first.index.intersection(second.index)
    paired = a.params.data.dataset == b.params.data.dataset and len(common) > 0
    if paired:
        first, second = first.loc[common], second.loc[common]
        low, high = intervals(second.to_numpy() - first.to_numpy(), params, 0)
    else:
        means = [resamples(len(each), params, seed) @ each.to_numpy() for seed, each in enumerate((first, second))]
        tail = (1 - params.confidence) / 2
        low, high = np.quantile(means[1] - means[0], [tail, 1 - tail], axis=0)
    rows = pd.DataFrame(keys, columns=NAMES[:3])
    for name, each in (("a", first), ("b", second)):
        ends = intervals(each.to_numpy(), params, 0)
        rows = rows.assign(**{name: each.mean().to_numpy(), f"{name}_low": ends[0], f"{name}_high": ends[1]})
    rows = rows.assign(difference=rows["b"] - rows["a"], low=low, high=high, paired=paired, users_a=len(first))
    rows = rows.assign(users_b=len(second), run_a=a.params.run, run_b=b.params.run, k=k)
    place = rows["model"].map({model: number for number, model in enumerate([*evaluation.MODELS, *evaluation.ALONE])})
    return rows.assign(place=place).sort_values(["metric", "n_tokens", "place"], kind="stable")[NAMES]


def draw(table: pd.DataFrame) -> Figure:
    """Plot both runs and their differences side by side, CP above NDCG, for the rankers of Figures 6 and 7.

    Parameters
    ----------
    table
        Result of :func:`compare`.
    """
    shown = evaluation.pick(table, model=figures.SHOWN)
    k, paired, names = table["k"].iloc[0], table["paired"].iloc[0], (table["run_a"].iloc[0], table["run_b"].iloc[0])
    grid, axes = plt.subplots(2, 3, figsize=(11, 6.4), sharex=True, layout="constrained")
    for row, metric in zip(axes, ("cp", "ndcg"), strict=True):
        row[1].sharey(row[0])
        rows = evaluation.pick(shown, metric=metric)
        columns = (("a", "a_low", "a_high"), ("b", "b_low", "b_high"), ("difference", "low", "high"))
        for axis, ends in zip(row, columns, strict=True):
            values = rows[list(ends)].set_axis(["value", "low", "high"], axis=1)
            figures.draw(axis, rows[["model", "n_tokens"]].join(values), "n_tokens")
        row[0].set(ylabel=f"{figures.NAMES[metric]}@{k}")
        row[2].axhline(0, color="0.3", linewidth=0.8)
    kind = "paired by user" if paired else "independent"
    for axis, title in zip(axes[0], (*names, f"{names[1]} - {names[0]}, {kind}"), strict=True):
        axis.set_title(title, fontsize="medium")
    for axis in axes[1]:
        axis.set(xlabel="control tokens")
    figures.legend(grid)
    return grid


def make(first: Path, second: Path, folder: Path | None = None) -> list[Path]:
    """Compare two folders of ``figures/``; returns the files written.

    Parameters
    ----------
    first, second
        Folders of the runs.
    folder
        Folder of ``comparison.csv``, ``comparison.png`` and ``results.md``; None: ``figures/<first>-vs-<second>``.
    """
    a, b = read(first), read(second)
    table = compare(a, b)
    folder = folder or paths.figures_dir(f"{a.params.run}-vs-{b.params.run}")
    with style.figure_style():
        return keep_study(table, draw(table), folder / "comparison", "%.5g")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument("first", type=Path, help="folder of a run, e.g. figures/ml-100k")
    parser.add_argument("second", type=Path, help="folder of another run")
    parser.add_argument("--out", type=Path, help="folder of the result (default: figures/<first>-vs-<second>)")


def show(given: argparse.Namespace) -> int:
    """``corec compare``."""
    print(*make(given.first, given.second, given.out), sep="\n")
    return 0


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m corec.compare", description="Compare two runs.")
    arguments(parser)
    chosen = parser.parse_args(given)
    return exit_status(lambda: show(chosen))


if __name__ == "__main__":
    sys.exit(main())
