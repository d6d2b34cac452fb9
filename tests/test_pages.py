"""README and documentation agree with the CSV files of figures/."""

import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from corec import CorecError, pages

ROOT = Path(__file__).parents[1]
CHANGED = subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", "figures"], check=False).returncode
committed = pytest.mark.skipif(
    CHANGED != 0, reason="a run has changed figures/: `python docs/build.py` brings the documents up to date"
)
BUILD = runpy.run_path(str(ROOT / "docs" / "build.py"))


@committed
def test_result_pages_agree_with_their_csv_files() -> None:
    found = BUILD["pages_of_figures"]()
    assert {path.parent.name for path in found} >= {"ml-100k", "orders", "retriever-ml-1m", "efficiency", "bench", "readouts"}
    for path, text in found.items():
        assert path.read_text() == text, f"{path}: run `python docs/build.py`"


@committed
def test_documents_hold_the_tables_of_the_result_pages() -> None:
    found = BUILD["documents"]()
    for path, text in found.items():
        assert path.read_text() == text, f"{path}: run `python docs/build.py`"
    assert (ROOT / "README.md") in found and "| **COREC** |" in (ROOT / "README.md").read_text()
    assert sum(text.count("<!-- table:") for text in found.values()) >= 15


def anchor(heading: str) -> str:
    """Anchor of a heading, as code hosting sites make it."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")


def text_of(path: Path) -> str:
    """Markdown of a page or of a notebook, without code blocks."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text())["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    else:
        text = path.read_text()
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def test_the_readme_is_short_and_no_link_is_broken() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    found = 0
    for path in (
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("notebooks/*.ipynb"),
        *ROOT.glob("notebooks/solutions/*.ipynb"),
    ):
        for target, place in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text_of(path)):
            if "://" in target or not (target or place):
                continue
            found += 1
            other = (path.parent / target) if target else path
            assert other.exists(), f"{path.name} links to {target}"
            if place and other.suffix in (".md", ".ipynb"):
                headings = {anchor(line) for line in re.findall(r"^#+ (.*)$", text_of(other), re.MULTILINE)}
                assert place in headings, f"{path.name} links to {target}#{place}"
    assert found > 80


def test_a_table_is_embedded_between_its_comments(tmp_path: Path) -> None:
    (tmp_path / "results.md").write_text("# R\n\n## One\n\nwords\n\n| a |\n|---|\n| 1 |\n\n## Two\n\n| b |\n")
    text = "before\n<!-- table: results.md | One -->\nold\n<!-- /table -->\nafter"
    filled = pages.embed(text, tmp_path)
    assert filled == "before\n<!-- table: results.md | One -->\n| a |\n|---|\n| 1 |\n<!-- /table -->\nafter"
    assert pages.embed(filled, tmp_path) == filled
    with pytest.raises(CorecError, match="results.md has no section 'Three'"):
        pages.embed(text.replace("One", "Three"), tmp_path)
