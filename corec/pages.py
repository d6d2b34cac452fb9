"""Result pages (Markdown) from the CSV files of a folder in ``figures/``, and their tables in the documentation.

``results.md`` in the folder of the CSV files has one section for each table (:mod:`corec.sections`). A page of the documentation
marks the place of a table with two comments, of which the first names the section; :func:`embed` inserts the table.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from corec import CorecError, files
from corec.figures import results_page
from corec.sections import KINDS

MARK = re.compile(r"<!-- table: (?P<file>[^|]+?) \| (?P<heading>[^>]+?) -->\n.*?<!-- /table -->", re.DOTALL)


def is_run(folder: Path) -> bool:
    """Whether a folder holds the figures of a run."""
    return (folder / "metrics.csv").exists() and (folder / "fig7.csv").exists()


def run_page(folder: Path) -> str | None:
    """Render ``results.md`` of a run (``metrics.csv``); None if the folder holds no run.

    The introduction and the section *Other measurements*, which are in no CSV file, are copied from the existing page.
    """
    if not is_run(folder):
        return None
    old = (folder / "results.md").read_text()
    table = pd.read_csv(folder / "metrics.csv", dtype={"tau": "Int64", "k": "Int64"})
    introduction = old.split("\n## ")[0].partition("\n\n")[2].strip()
    new = results_page(table, int(pd.read_csv(folder / "fig7.csv")["k"].iloc[0]), introduction, folder=folder)
    return new + "".join(f"\n## {part}" for part in old.split("\n## ")[1:] if part.startswith("Other measurements"))


def study_page(folder: Path) -> str | None:
    """Render the page of the studies and benches of a folder from their CSV files; None if it has no known CSV file."""
    sections = [section for name, make in KINDS.items() if (folder / name).exists() for section in make(folder)]
    if not sections:
        return None
    lines = [f"# Results: {folder.name}", ""]
    for heading, body in sections:
        lines += [f"## {heading}", "", *body, ""]
    return "\n".join(lines).replace("<", "&lt;")  # text of the data is no HTML


def pages_of(folder: Path) -> dict[Path, str]:
    """All pages of a folder: ``results.md`` of a run, and that of studies, which is ``studies.md`` beside a run's."""
    run, studies = run_page(folder), study_page(folder)
    found = {folder / "results.md": run} if run is not None else {}
    if studies is not None:
        found[folder / ("results.md" if run is None else "studies.md")] = studies
    return found


def write_study(folder: Path) -> None:
    """Write the page of a folder's studies. Several studies share it, so it is no output of one stage."""
    text = study_page(folder)
    if text is not None:
        files.write_text(folder / ("studies.md" if is_run(folder) else "results.md"), text)


def clear(folder: Path, names: Iterable[str]) -> None:
    """Remove the tables and pictures of an earlier study in a folder, by the stem of their names."""
    for name in names:
        for kind in ("csv", "png"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)


def section_table(path: Path, heading: str) -> str:
    """Return the table in a section of a page.

    Raises
    ------
    CorecError
        If there is no such page or section.
    """
    text = path.read_text() if path.exists() else ""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise CorecError(f"{path} has no section {heading!r}: make it with docs/build.py, or correct the comment that names it.")
    return "\n".join(line for line in found[1].splitlines() if line.startswith("|"))


def embed(text: str, root: Path) -> str:
    """Insert the tables that the comments of a page name; their paths are relative to ``root``."""

    def fill(match: re.Match[str]) -> str:
        table = section_table(root / match["file"], match["heading"])
        return f"<!-- table: {match['file']} | {match['heading']} -->\n{table}\n<!-- /table -->"

    return MARK.sub(fill, text)
