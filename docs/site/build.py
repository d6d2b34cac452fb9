"""Build the site from the documentation, the executed notebooks and the results: ``make site`` writes ``docs/_build/html``.

Nothing is executed: the notebooks are the executed copies in ``docs/executed``. The built pages request nothing from other hosts.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import nbformat
import pandas as pd

from corec import files, verify

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent
BUILD = ROOT / "docs" / "_build"
RUN = "ml-100k"
NO_PAGES = ("_build", "executed", "site")
STEERING = (
    "<p>The live demonstration needs Python (<code>make demo</code>). "
    '<a href="../steering.html">A page with answers that were computed before</a> needs none.</p>'
)


def mirror(source: Path) -> None:
    """Copy what the pages consist of or link to, so that relative links between files stay as they are in the repository."""
    shutil.copytree(ROOT / "docs", source / "docs", ignore=shutil.ignore_patterns(*NO_PAGES))
    shutil.copytree(ROOT / "figures", source / "figures", ignore=shutil.ignore_patterns("tiny*", "grid-tiny*"))
    for name in ("params", "profiles", "corec"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    single = (
        "README.md CONTRIBUTING.md CHANGELOG.md CITATION.cff LICENSE Snakefile pyproject.toml Makefile .pre-commit-config.yaml"
    )
    for name in single.split():
        shutil.copy(ROOT / name, source / name)
    (source / "tests").mkdir()
    for path in (ROOT / "tests").glob("*.py"):
        shutil.copy(path, source / "tests" / path.name)


def notebooks(source: Path) -> list[str]:
    """Write the notebooks, executed copies where there are any, without widgets, which need Python; returns their pages."""
    written = []
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        name = path.relative_to(ROOT / "notebooks")
        kept = ROOT / "docs" / "executed" / name
        notebook = nbformat.read(kept if kept.exists() else path, 4)
        notebook.metadata.pop("widgets", None)
        for cell in notebook.cells:
            outputs = cell.get("outputs", [])
            static = [output for output in outputs if "application/vnd.jupyter.widget-view+json" not in output.get("data", {})]
            if len(static) < len(outputs):
                static.append(nbformat.v4.new_output("display_data", {"text/html": STEERING}))
            if "outputs" in cell:
                cell.outputs = static
        target = source / "notebooks" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        written.append(f"notebooks/{name.with_suffix('')}")
    return written


def figures_page(source: Path, run: str) -> None:
    """Write the page of Figures 6 to 8 and of the frontier: each as SVG, with its CSV file and its table."""
    folder = ROOT / "figures" / run
    lines = ["# Figures 6 to 8, and the frontier", ""]
    values = verify.manifest(folder)["params"]
    data, controls = values["data"], values["controls"]
    lines += [
        f"Run `{run}`: {data['source']}, protocol `{controls['protocol']}`, K = {controls['k']}. Each figure is drawn from "
        "the table below it. Bars and bands are 95 % intervals over users.",
        "",
    ]
    about = {
        "fig6": "Control precision and relevance by number of control tokens",
        "fig7": "Control precision by threshold",
        "fig8": "Hard filtering",
        "frontier": "Relevance against control, by strength",
    }
    for path, figure in verify.redrawn(folder):
        if path.stem not in about:
            continue
        picture = source / "figures" / run / f"{path.stem}.svg"
        figure.savefig(picture, format="svg", metadata={"Date": None})
        table = pd.read_csv(path.with_suffix(".csv")).dropna(axis=1, how="all")
        shown = table.loc[:, table.nunique() > 1].round(3)
        lines += [f"## {about[path.stem]}", "", f"![{about[path.stem]}](figures/{run}/{picture.name})", ""]
        lines += [f"Data: [{path.stem}.csv](figures/{run}/{path.stem}.csv)", "", ":::{dropdown} The table of this figure", ""]
        lines += [shown.to_html(index=False, border=0, classes="table table-sm data"), "", ":::", ""]
    lines += [f"All tables of the run: [results](figures/{run}/results.md)."]
    (source / "figures-page.md").write_text("\n".join(lines) + "\n")


def modules() -> Iterator[tuple[str, list[str]]]:
    """Names of the packages and modules of the first level, each with those below it."""
    for path in sorted((ROOT / "corec").iterdir()):
        if path.suffix == ".py" and not path.stem.startswith("__"):
            yield f"corec.{path.stem}", []
        elif (path / "__init__.py").exists():
            inner = sorted(file.relative_to(ROOT / "corec").with_suffix("") for file in path.rglob("*.py"))
            names = [".".join(("corec", *file.parts)) for file in inner if file.name not in ("__init__", "__main__")]
            yield f"corec.{path.name}", names


def api_pages(source: Path) -> list[str]:
    """Write one page of the reference for each module of the first level; returns the pages."""
    (source / "api").mkdir()
    written = []
    for name, inner in modules():
        lines = [f"# {name}", "", "```{eval-rst}", f".. automodule:: {name}", *([] if inner else ["   :members:"]), "```", ""]
        for module in inner:
            lines += [f"## {module}", "", "```{eval-rst}", f".. automodule:: {module}", "   :members:", "```", ""]
        (source / "api" / f"{name}.md").write_text("\n".join(lines))
        written.append(f"api/{name}")
    return written


def toctree(pages: list[str], caption: str) -> list[str]:
    """Lines of a table of contents."""
    return ["```{toctree}", ":hidden:", ":maxdepth: 1", f":caption: {caption}", "", *pages, "```", ""]


def index_page(source: Path, books: list[str], api: list[str]) -> None:
    """Write the first page: the picture of the pipeline, the claims, the frontier, and where to go on."""
    readme = (ROOT / "README.md").read_text()
    start = readme.index("| Claim of the paper |")
    claims = readme[start : readme.index("\n\n", start)]
    introduction = readme.split("\n\n")[1]
    documents = sorted(f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md"))
    results = sorted(f"figures/{path.parent.name}/{path.stem}" for path in (source / "figures").glob("*/*.md"))
    (source / "pipeline.md").write_text(
        (SITE / "pipeline.md").read_text().replace("PIPELINE", (SITE / "pipeline.svg").read_text())
    )
    text = (SITE / "index.md").read_text()
    text = text.replace("INTRODUCTION", introduction).replace("CLAIMS", claims)
    text = text.replace("PIPELINE", (SITE / "pipeline.svg").read_text()).replace("RUN", RUN)
    plain = [page for page in books if "solutions" not in page]
    lines = [text, ""]
    lines += toctree(["figures-page", "pipeline", "README"], "Start")
    lines += toctree(plain, "Notebooks")
    lines += toctree([page for page in books if "solutions" in page], "Solutions")
    lines += toctree([*documents, "CONTRIBUTING", "CHANGELOG"], "Documentation")
    lines += toctree(results, "Results")
    lines += toctree(api, "Reference")
    (source / "index.md").write_text("\n".join(lines))


def gather(source: Path) -> None:
    """Write all sources of the site into an empty folder."""
    files.discard(source)
    source.mkdir(parents=True)
    mirror(source)
    books = notebooks(source)
    figures_page(source, RUN)
    index_page(source, books, api_pages(source))
    shutil.copy(SITE / "conf.py", source / "conf.py")
    shutil.copytree(SITE / "static", source / "static")
    extra = source / "extra"
    extra.mkdir()
    if (steering := ROOT / "docs" / "executed" / "steering.html").exists():
        shutil.copy(steering, extra / "steering.html")


def build(work: Path, output: Path) -> int:
    """Write the sources of the site to `work`, and its pages to `output`; returns the exit status of Sphinx."""
    from sphinx.cmd.build import build_main

    matplotlib.use("Agg")
    gather(work / "source")
    files.discard(output)
    jobs = str(min(4, os.cpu_count() or 1))
    status = build_main(["-b", "html", "-q", "-j", jobs, "-d", str(work / "doctrees"), str(work / "source"), str(output)])
    for name in ("webpack-macros.html", "sbt-webpack-macros.html"):  # templates of the themes, not pages
        (output / "_static" / name).unlink(missing_ok=True)
    return status


def main() -> int:
    """Build the site; returns the exit status of Sphinx."""
    parser = argparse.ArgumentParser(description="Build the site into docs/_build/html.")
    parser.add_argument("--output", type=Path, default=BUILD / "html", help="folder of the pages")
    output = parser.parse_args().output
    status = build(BUILD, output)
    if status == 0:
        print(f"the site is in {output}: open {output / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
