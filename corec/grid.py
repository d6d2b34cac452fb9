"""Grids of runs: ``corec grid params/grid/ml-100k.yaml`` makes all runs of a grid, and one table of them.

A grid is a YAML file: profiles, and optionally seeds, protocols of the requests, and named changes. Its runs are all
combinations. Runs share the stages that have the same parameters: another protocol, for example, does not train the retriever
again.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from pydantic import Field, NonNegativeInt

from corec import CorecError, evaluation, figures, files, paths, profiles, style
from corec.checked import Model, exit_status
from corec.params import RUN_NAME, Protocol
from corec.studies import keep_study
from corec.workflow import Target

SETTINGS = ["base", "variant", "protocol"]  # what the runs of a grid differ in, other than the seed


class Grid(Model):
    """A grid of runs."""

    grid: str = Field(pattern=RUN_NAME)  # its tables go to figures/<grid>/
    runs: list[str] = Field(min_length=1)  # profiles, relative to the file itself
    seeds: list[NonNegativeInt] = []  # empty: that of the profile
    protocols: list[Protocol] = []  # values of controls.protocol; empty: that of the profile
    variants: dict[str, dict[str, Any]] = {}  # changes of parameters by name, e.g. of the language model
    changes: dict[str, Any] = {}  # changes of parameters in all runs


class Point(Model):
    """A run of a grid."""

    base: str  # name of the profile's run
    variant: str
    seed: int
    protocol: str
    run: str  # name of the run
    profile: str
    changes: dict[str, Any]


def load(path: Path) -> Grid:
    """Read a grid (raises CorecError if it is not one)."""
    return Grid.checked(profiles.read(path), str(path))


def points(path: Path) -> list[Point]:
    """All runs of a grid.

    Raises
    ------
    CorecError
        If the grid or a parameter of a run is wrong, or a run does not have the stage `figures`.
    """
    grid, found = load(path), []
    seeds: Sequence[int | None] = grid.seeds or [None]
    protocols: Sequence[str | None] = grid.protocols or [None]
    for name, variant, seed, protocol in itertools.product(grid.runs, grid.variants or [""], seeds, protocols):
        profile = str((path.parent / name).resolve())
        plain = profiles.load(profile)
        parts = [grid.grid, plain.run, variant, "" if seed is None else f"s{seed}", protocol or ""]
        changes: dict[str, Any] = {"run": "-".join(part for part in parts if part)}
        changes |= {} if seed is None else {"seed": seed}
        general = profiles.merge(grid.changes, grid.variants.get(variant, {}))
        if protocol is not None:
            given = general.get("controls", {}).get("other_protocols", plain.controls.other_protocols)
            changes |= {"controls": {"protocol": protocol, "other_protocols": [each for each in given if each != protocol]}}
        changes = profiles.merge(general, changes)
        settings = profiles.load(profile, changes)
        if settings.run == grid.grid or (paths.figures_dir(grid.grid) / "manifest.json").exists():
            raise CorecError(f"{path}: the results of a run are in figures/{grid.grid}: change `grid`.")
        if "figures" not in settings.stages:
            raise CorecError(f"{path}: run {name!r} has no stage 'figures': a grid takes runs that have it.")
        found.append(
            Point(
                base=plain.run, variant=variant, seed=settings.seed, protocol=settings.controls.protocol, run=settings.run,
                profile=profile, changes=changes,
            )
        )  # fmt: skip
    return found


def targets(path: Path) -> list[Target]:
    """Runs of a grid as targets of the workflow."""
    return [Target(point.profile, point.changes) for point in points(path)]


def folder(path: Path) -> Path:
    """Folder of the tables of a grid."""
    return paths.figures_dir(load(path).grid)


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds of CP (tau = n) and NDCG, at the smallest k of Figures 6 to 8 of the runs.

    Parameters
    ----------
    table
        Rows of all runs under the protocol of the run, with the columns of :data:`SETTINGS` and ``k_figures``.

    Returns
    -------
    Columns of :data:`SETTINGS`, and ``metric k n_tokens model value sd seeds``.
    """
    strict = (table["metric"] == "ndcg") | ((table["metric"] == "cp") & (table["tau"] == table["n_tokens"])).fillna(False)
    rows = table[strict & (table["k"] == table["k_figures"]) & table["model"].isin([*evaluation.MODELS, *evaluation.ALONE])]
    keys = [*SETTINGS, "metric", "k", "n_tokens", "model"]
    by_run = rows.groupby([*keys, "run"], sort=False)["value"].mean().reset_index()
    return by_run.groupby(keys, sort=False)["value"].agg(value="mean", sd="std", seeds="size").reset_index()


def draw(table: pd.DataFrame) -> Figure:
    """Plot CP and NDCG by number of control tokens, one column for each setting; bars are standard deviations over seeds."""
    shown = evaluation.pick(table, model=figures.SHOWN)
    labels = pd.Series([", ".join(filter(None, row)) for row in shown[SETTINGS].to_numpy()], index=shown.index)
    settings = list(dict.fromkeys(labels))
    grid, axes = plt.subplots(
        2, len(settings), figsize=(2.4 + 3.2 * len(settings), 6.2), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for row, metric in zip(axes, ("cp", "ndcg"), strict=True):
        for axis, setting in zip(row, settings, strict=True):
            rows = evaluation.pick(shown[labels == setting], metric=metric)
            spread = rows["sd"].fillna(0)
            figures.draw(axis, rows.assign(low=rows["value"] - spread, high=rows["value"] + spread), "n_tokens")
            axis.set_title(setting if metric == "cp" else "", fontsize="medium")
        row[0].set(ylabel=f"{figures.NAMES[metric]}@{shown['k'].iloc[0]}")
    for axis in axes[1]:
        axis.set(xlabel="control tokens")
    figures.legend(grid)
    return grid


def merge(path: Path) -> list[Path]:
    """Join the tables of all runs of a grid; returns the files written.

    ``metrics.csv`` has all rows of the runs and the columns of :data:`SETTINGS`; ``grid.csv`` is :func:`over_seeds`, with a plot
    and a results page.

    Raises
    ------
    CorecError
        If a run has not been made.
    """
    parts = []
    for point in points(path):
        source = paths.figures_dir(point.run) / "metrics.csv"
        if not source.exists():
            raise CorecError(f"{source} is missing: `corec grid {path}` makes it.")
        k = profiles.load(point.profile, point.changes).figures.k
        rows = evaluation.read(source).assign(base=point.base, variant=point.variant, k_figures=k)
        parts.append(rows.assign(own=rows["protocol"] == point.protocol))
    table = pd.concat(parts, ignore_index=True)
    whole, summary = folder(path) / "metrics.csv", over_seeds(table[table["own"]])
    files.write_csv(whole, table.drop(columns=["k_figures", "own"]), "%.6g")
    with style.figure_style():
        return [whole, *keep_study(summary, draw(summary), folder(path) / "grid", "%.5g")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Join the tables of a grid: ``python -m corec.grid FILE``, as the rule of the Snakefile does; returns the exit status."""
    (path,) = arguments if arguments is not None else sys.argv[1:]
    return exit_status(lambda: print(*merge(Path(path)), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
