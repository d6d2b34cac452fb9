"""The site: it builds, its links and pictures exist, and its pages work in a browser without any other host."""

import importlib.util
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from corec import steering
from tests.test_notebooks import browser  # noqa: F401  a fixture

ROOT = Path(__file__).parents[1]
EXECUTED = sorted((ROOT / "docs" / "executed").glob("*.ipynb"))


class Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        self.links += [(tag, value) for name in ("href", "src") if (value := values.get(name)) is not None]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("sphinx_book_theme", reason="the packages of the site are not installed")
    specification = importlib.util.spec_from_file_location("site_build", ROOT / "docs" / "site" / "build.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("site")
    assert module.build(folder / "work", folder / "html") == 0
    return folder / "html"


def test_all_links_anchors_and_pictures_exist(site: Path) -> None:
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 80
    faults = []
    for path, page in pages.items():
        for tag, link in page.links:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                assert tag == "a" or parts.scheme == "data", f"{path.name} loads {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                faults.append(f"{path.relative_to(site)}: {link}")
    assert not faults, faults


def test_every_notebook_and_document_is_a_page(site: Path) -> None:
    wanted = [*(ROOT / "notebooks").rglob("*.ipynb"), *(ROOT / "docs").glob("*.md"), *(ROOT / "figures").glob("*/results.md")]
    for path in wanted:
        assert (site / path.relative_to(ROOT)).with_suffix(".html").exists(), path
    text = (site / "figures-page.html").read_text()
    assert text.count(".svg") >= 4 and "fig8.csv" in text
    assert re.search(r"<math", (site / "notebooks" / "04_reranker.html").read_text()), "formulas need no script"


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_work_in_a_browser(site: Path, browser: Any, width: int, scheme: str) -> None:  # noqa: F811
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    names = ["index.html", "figures-page.html", "notebooks/05_evaluation.html", "docs/relevance.html", "api/corec.reranker.html"]
    for name in [*names, *(["steering.html"] if (site / "steering.html").exists() else [])]:
        page.goto((site / name).as_uri())
        page.wait_for_load_state("load")
        broken = page.eval_on_selector_all("img", "images => images.filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
        assert not broken, broken
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than the window"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(c => c < 90)")
        assert dark == (scheme == "dark"), name
    assert not faults and all(url.startswith(("file:", "data:")) for url in asked), (faults, asked)


@pytest.mark.skipif(not EXECUTED, reason="there are no executed notebooks in docs/executed")
def test_executed_notebooks_are_those_of_the_repository() -> None:
    for path in EXECUTED:
        executed, source = nbformat.read(path, 4), nbformat.read(ROOT / "notebooks" / path.name, 4)
        cells = [cell.source for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
        assert cells == [cell.source for cell in source.cells], f"{path.name} is outdated: run docs/site/execute.py"
        assert path.stat().st_size < 2_000_000
        for output in outputs(executed):
            assert output.output_type != "error"
            assert all(len(str(value)) <= 200_000 for value in output.get("data", {}).values())
    text = "".join(path.read_text() for path in (ROOT / "docs" / "executed").iterdir())
    assert "/home/" not in text and str(ROOT) + "/" not in text


def test_the_steering_page_is_that_of_the_present_widget() -> None:
    page = (ROOT / "docs" / "executed" / "steering.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert data is not None
    assert steering.html(json.loads(data[1])) == page, "the page is outdated: run docs/site/execute.py"


def outputs(notebook: Any) -> Iterator[Any]:
    """All outputs of a notebook."""
    for cell in notebook.cells:
        yield from cell.get("outputs", [])
