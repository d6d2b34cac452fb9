"""Verify the results of a run in ``figures/``: digests, pictures redrawn from their data, and numbers of a second run.

``corec verify figures/ml-100k`` needs no more than the files of that folder. ``--rerun`` runs the stages again, in a folder of
their own, and compares each number with the first one.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure

from corec import CorecError, evaluation, figures, files, frontier, pages, paths, style
from corec.params import Params

KEYS = "dataset protocol K n_tokens tau model seed metric k".split()
PATHS = (("data", "path"), ("data", "tagger"), ("controls", "scheme"), ("evidence", "text"), ("reranker", "backbone"))
SAME = 2.0  # root mean square of the difference of the pixels, of 255, up to which two pictures are the same


def manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a run.

    Raises
    ------
    CorecError
        If there is none.
    """
    try:
        found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        whole = {"run", "params", "outputs"} <= found.keys()
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise CorecError(f"{folder} has no readable manifest.json: name a folder in figures/ that stage 06 has written.")
    return found


def digests(folder: Path) -> Iterator[str]:
    """Compare the files of a run with the digests in its manifest; yields a sentence per fault."""
    for name, digest in manifest(folder)["outputs"].items():
        if name.endswith(".md"):
            continue  # see :func:`outdated_pages`
        if not (folder / name).exists():
            yield f"{folder / name} is missing"
        elif files.sha256(folder / name) != digest:
            yield f"{folder / name} has another digest than in the manifest"


def outdated_pages(folder: Path) -> Iterator[str]:
    """Compare the result pages of a folder with its CSV files; yields a sentence per page that differs."""
    with readable(folder):
        if not (folder / "results.md").exists():
            yield f"{folder / 'results.md'} is missing"
            return
        for path, text in pages.pages_of(folder).items():
            if not path.exists() or path.read_text() != text:
                yield f"{path} does not agree with the CSV files"


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Re-raise errors of reading the files of a folder as a CorecError."""
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, TypeError, SyntaxError) as error:
        reason = f"a file in {folder} cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        raise CorecError(f"{reason}: take it from the repository, or make the run again.") from None


def faults(folder: Path) -> list[str]:
    """All differences of a folder of results from its manifest and its data, a sentence each.

    Pages and pictures are compared only if the files have the digests of the manifest.

    Raises
    ------
    CorecError
        If there is no manifest, or a file cannot be read.
    """
    return list(digests(folder)) or [*outdated_pages(folder), *pictures(folder)]


def redrawn(folder: Path) -> Iterator[tuple[Path, Figure]]:
    """Draw the pictures of a run from its CSV files: Figures 6 to 8 of every protocol, and the frontier."""
    values = manifest(folder)["params"]  # not checked: those of an earlier version may have other names
    k = values["figures"]["k"]
    with style.figure_style():
        for number, draw in (("6", figures.figure6), ("7", figures.figure7), ("8", figures.figure8)):
            for path in sorted(folder.glob(f"fig{number}*.csv")):
                yield path.with_suffix(".png"), draw(evaluation.read(path), k)
        if (folder / "frontier.csv").exists():
            points = pd.read_csv(folder / "frontier.csv")
            dataset = evaluation.read(folder / "fig6.csv")["dataset"].iloc[0]
            yield folder / "frontier.png", frontier.draw(points[points["protocol"] == values["controls"]["protocol"]], k, dataset)


def pictures(folder: Path) -> Iterator[str]:
    """Compare the pictures of a run with those drawn from its CSV files; yields a sentence per picture that differs."""
    with tempfile.TemporaryDirectory() as scratch, readable(folder):
        for path, figure in redrawn(folder):
            again = Path(scratch) / path.name
            files.write_picture(again, figure)
            plt.close(figure)
            if not path.exists():
                yield f"{path} is missing"
            elif (difference := pixel_difference(path, again)) > SAME:
                yield f"{path} differs from the picture of its CSV file (by {difference:.1f} of 255, root mean square)"


def pixel_difference(first: Path, second: Path) -> float:
    """Root mean square difference of the pixels of two PNG files, 0 to 255; 255 if their sizes differ."""
    images = [plt.imread(path)[..., :3] for path in (first, second)]
    if images[0].shape != images[1].shape:
        return 255.0
    return float(255 * np.sqrt(np.mean((images[0] - images[1]) ** 2)))


def rerun(folder: Path) -> pd.DataFrame:
    """Run the stages of a run again, from the beginning, and compare all numbers of ``metrics.csv``.

    The second run has a project folder of its own, ``runs/.verify/<run>``, where it stays. It uses the code of this checkout, and
    its cache of downloads.

    Returns
    -------
    Columns :data:`KEYS`, ``value low high again difference``. `again` is empty for a number that the second run does not have.

    Raises
    ------
    CorecError
        If the manifest is that of an earlier version whose parameters have changed, or the second run stops.
    """
    found = manifest(folder)
    values = found["params"]
    run = Params.checked(values, str(folder / "manifest.json")).run
    root = paths.root() / "runs" / ".verify" / run
    files.discard(root)
    root.mkdir(parents=True)
    for name in ("notebooks", "params"):
        (root / name).symlink_to(paths.root() / name)
    for part, name in PATHS:
        place = paths.from_root(values[part].get(name) or "")
        if values[part].get(name) and place.exists():
            values[part][name] = str(place)
    files.write_text(root / "run.yaml", yaml.safe_dump(values, sort_keys=False))
    command = [sys.executable, "-m", "corec", "run", str(root / "run.yaml"), "--only", "figures"]
    search = os.pathsep.join(filter(None, [str(paths.checkout()), os.environ.get("PYTHONPATH")]))
    environment = {"COREC_ROOT": str(root), "COREC_CACHE": str(paths.cache_dir()), "PYTHONPATH": search}
    if subprocess.run(command, env=os.environ | environment, check=False).returncode:
        raise CorecError(f"the second run of {run!r} stopped: correct the fault named above; its files are in {root}.")
    return numbers(folder, root / "figures" / run)


def numbers(first: Path, second: Path) -> pd.DataFrame:
    """Compare the numbers of two folders with ``metrics.csv``; see :func:`rerun`."""
    tables = [evaluation.read(folder / "metrics.csv")[[*KEYS, "value", "low", "high"]] for folder in (first, second)]
    table = tables[0].merge(tables[1].rename(columns={"value": "again"})[[*KEYS, "again"]], on=KEYS, how="left")
    return table.assign(difference=table["again"] - table["value"])


def report(table: pd.DataFrame, shown: int = 12) -> list[str]:
    """Lines that describe the result of :func:`numbers`: how many numbers are equal, and those that differ most."""
    differing = table[table["difference"] != 0]
    outside = (differing["again"] < differing["low"]) | (differing["again"] > differing["high"]) | differing["again"].isna()
    lines = [
        f"{len(table) - len(differing)} of {len(table)} numbers are equal; {int(outside.sum())} are outside the interval of the "
        "first run"
    ]
    order = differing["difference"].abs().fillna(np.inf).sort_values(ascending=False).index[:shown]
    for row in differing.loc[order].to_dict("records"):
        name = f"{row['metric']}@{row['k']} of {row['model']}, {row['n_tokens']} tokens, {row['protocol']}"
        lines.append(f"{name}: {row['value']:.4f} ({row['low']:.4f} to {row['high']:.4f}), again {row['again']:.4f}")
    return lines
