"""All notebooks in one kernel, each twice, as somebody works who runs them again, and the demonstration of their run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from nbclient import NotebookClient

from corec import CorecError, evaluation, params, paths, profiles, stages, steering
from corec.reranker import engine
from tests.conftest import write_atomic

ROOT = Path(__file__).parents[1]
SMALL = {
    "run": "twice",
    "data": {"core": 1},
    "sasrec": {"hidden": 8, "max_length": 10, "epochs": 2, "top_k": 20},
    "controls": {"k": 16, "n_tokens": [0, 1, 2], "train_truth": "any", "max_windows": {"train": 200, "valid": 40, "test": 8}},
    "reranker": {"steps": 2, "curriculum_steps": 1, "batch_size": 2, "requests_per_window": 4},
    "evaluation": {"bootstrap": 20, "ks": [1, 5]},
    "study": {
        "seeds": 1,
        "loss_seconds": 0.01,
        "readout_steps": 1,
        "order_minutes": 0.001,
        "ablations": ["soft tokens"],
        "surface": [16],
        "missing": [0.5],
        "wrong": [],
        "nearest_title": False,
        "transfer_steps": [1],
        "unseen": 0.25,
        "contrast": [0.1],
        "parsers": ["grammar"],
        "sentences": 20,
        "sentence_plain_steps": 0,
        "sentence_steps": 1,
        "sessions": 3,
    },
    "efficiency": {"candidates": [5, 8], "repeats": 2, "users": 3},
}


AGAIN = "import os; os.environ['COREC_AGAIN'] = '1'"
ONCE = "del os.environ['COREC_AGAIN']"


class Ran(NamedTuple):
    """A project's folder in which all notebooks ran, its parameters, and what they printed."""

    folder: Path
    settings: params.Params
    said: str


def sources_of(name: str, changes: dict[str, Any]) -> list[str]:
    """Sources of the code cells of a notebook, with parameters."""
    cells = [cell for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]
    tagged = f'profile = "params/tiny.yaml"\nchanges = {changes!r}'
    return [tagged if "parameters" in cell.metadata.get("tags", []) else cell.source for cell in cells]


def run_cells(sources: list[str], folder: Path) -> str:
    """Run cells in one kernel in a folder; returns what they printed."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    whole = nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(whole, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return "".join(output.get("text", "") for cell in whole.cells for output in cell.get("outputs", []))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """Run all notebooks in one kernel, each twice, and look at each once."""
    folder = tmp_path_factory.mktemp("project")
    write_atomic(folder / "raw", title="<b>Film</b> number")
    (folder / "params").symlink_to(ROOT / "params")
    (folder / "notebooks").symlink_to(ROOT / "notebooks")
    changes = SMALL | {"data": {"core": 1, "path": "raw"}}
    cells = []
    for name in stages.NOTEBOOKS.values():
        sources = sources_of(name, changes)
        cells += [*sources, AGAIN, *sources, ONCE, *sources]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COREC_ROOT", str(folder))
        patch.setenv("COREC_CACHE", str(folder / "cache"))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.delenv("COREC_AGAIN", raising=False)
        said = run_cells(cells, folder)
        yield Ran(folder, profiles.load(ROOT / "params" / "tiny.yaml", changes), said)


@pytest.fixture
def opened(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> Ran:
    """The same; the folder is that of the test."""
    monkeypatch.setenv("COREC_ROOT", str(ran.folder))
    return ran


def test_every_notebook_runs_twice_in_one_kernel(opened: Ran) -> None:
    for name in stages.NOTEBOOKS:
        stages.check(opened.settings, name)
    folder = opened.folder / "figures" / "twice"
    record = json.loads((folder / "manifest.json").read_text())
    assert params.Params.model_validate(record["params"]) == opened.settings
    assert set(record["stages"]) == set(stages.ancestors("figures"))
    expected = (
        "ablations.png conflicts.png efficiency.png fig6-oracle.png fig6.png fig7-oracle.png fig7.png fig8-oracle.png fig8.png "
        "frontier.png language.png loss_curves.png missing.png orders.png readouts.png saturation.png seed_curves.png sessions.png simulated.png surface.png texts.png "
        "transfer.png unseen.png"
    )
    assert sorted(path.name for path in folder.glob("*.png")) == expected.split()
    said = opened.said
    assert "Warning" not in said, "no notebook prints a warning"
    for stage in stages.NOTEBOOKS:
        assert said.count(f"look: stage {stage!r} of run 'twice' has finished; its results are shown") == 1
        assert said.count(f"run: stage {stage!r} of run 'twice' is computed") == 2


def test_a_finished_stage_is_looked_at_unless_it_is_asked_for_again(opened: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    folder = paths.stage_dir("twice", "evaluation")
    before = (folder / "stage.json").read_bytes()
    stage = stages.look_or_start(opened.settings, "evaluation")
    assert stage.look and stage.record is not None and (folder / "stage.json").read_bytes() == before
    other = opened.settings.model_copy(update={"seed": 5})
    with pytest.raises(CorecError, match="was made with other parameters"):
        stages.look_or_start(other, "evaluation")
    assert "run: stage 'evaluation'" in capsys.readouterr().out
    file = opened.folder / "raw" / "ml-100k.item"
    status = file.stat()
    assert stages.finished(opened.settings, "figures") is not None
    os.utime(file, (status.st_atime, status.st_mtime + 5))  # the user's file of an earlier stage has changed
    assert stages.finished(opened.settings, "figures") is None
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_without_a_transfer_only_the_values_kept_back_are_compared(opened: Ran) -> None:
    trainings = ["tokens, all values", "tokens, never seen"]
    study = SMALL["study"] | {"transfer_steps": [], "unseen_trainings": trainings}
    changes = SMALL | {"run": "alone", "data": {"core": 1, "path": "raw"}, "study": study}
    settings = profiles.load(ROOT / "params" / "tiny.yaml", changes)
    for stage in ("data", "sasrec", "controls", "reranker"):
        stages.attach(settings, stage)
    said = run_cells(sources_of("11_transfer", changes) * 2, opened.folder)
    assert said.count("study.source is not set and study.transfer_steps is empty: nothing is transferred") == 2
    assert said.count("look: stage 'transfer' of run 'alone'") == 1 and "the scores are the same" not in said
    folder = opened.folder / "figures" / "alone"
    made = ["manifest-transfer.json", "results.md", "unseen.csv", "unseen.png"]
    assert sorted(path.name for path in folder.iterdir()) == made
    assert "## Transfer" not in (folder / "results.md").read_text()
    models = set(pd.read_csv(folder / "unseen.csv")["model"])
    assert models == {"sasrec", "combiner", "rule", "rule+combiner", "corec", *trainings}
    changes |= {"run": "without-re-ranker", "stages": ["data", "sasrec", "controls", "transfer"]}
    said = run_cells(sources_of("11_transfer", changes) * 2, opened.folder)
    assert said.count("look: stage 'transfer' of run 'without-re-ranker'") == 1
    folder = folder.with_name("without-re-ranker")
    assert set(pd.read_csv(folder / "unseen.csv")["model"]) == models - {"corec"}
    of = json.loads((folder / "manifest-transfer.json").read_text())["stages"]
    assert list(of) == ["data", "sasrec", "controls", "transfer"]


def test_the_steering_demonstration_scores_as_the_engine_does(opened: Ran) -> None:
    session = steering.Session(opened.settings, most=3)
    users = session.users()
    assert len(users) == 3 and session.pools.truth[session.places[0]] >= 0, "users whose next item was retrieved come first"
    state = session.open(session.places[0])
    assert len(state["candidates"]) == 16 and [candidate["rank"] for candidate in state["candidates"]] != list(range(16))
    assert sum(candidate["truth"] for candidate in state["candidates"]) == 1
    counts = Counter(value for candidate in state["candidates"] for value in candidate["values"])
    assert {value["id"]: value["count"] for value in state["values"] if value["count"]} == dict(counts)
    asked = steering.requests_of(state)
    for request in asked:  # a constraint can be removed in the static page
        assert all(part in asked for size in range(len(request)) for part in combinations(request, size))
    for request in ((), *asked[-3:]):
        answer = session.answer(session.places[0], request)
        assert session.opened is not None
        scores = engine.answer(session.model, session.opened[1], session.row(session.places[0], request), strength=0.5)[0]
        control = sum((np.array(part["values"]) for part in answer["control"]), np.zeros(16))
        mine = np.array(answer["prior"]) + np.array(answer["relevance"]) + 0.5 * control
        np.testing.assert_allclose(mine, scores.numpy(), atol=1e-4)
        assert [part["name"] for part in answer["control"]] == [session.vocabulary.name(value) for value in request]
    with pytest.raises(CorecError, match="There is no value 999"):
        session.answer(session.places[0], [999])


def test_the_widget_answers_its_browser_and_nobody_else(opened: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    widget, sent = steering.Steering(opened.settings, most=2), []
    monkeypatch.setattr(steering.Steering, "send", lambda _, message: sent.append(message))
    user = widget.users[0]["id"]
    widget.reply(widget, {"number": 1, "kind": "open", "user": user, "request": []}, None)
    widget.reply(widget, {"number": 2, "kind": "answer", "user": user, "request": [0]}, None)
    assert [message["number"] for message in sent] == [1, 2] and sent[1]["result"]["request"] == [0]
    for wrong in ({"number": 3, "kind": "answer"}, {"number": 3, "kind": "__init__", "user": user, "request": []}):
        with pytest.raises(CorecError, match="The message"):
            widget.reply(widget, wrong, None)


def test_a_run_that_cannot_be_steered_says_so(opened: Ran, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from corec.steering import server

    copy = server.prepare(save_profile(opened))
    cell = next(cell for cell in nbformat.read(copy, 4).cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert "mine.yaml" in cell.source
    monkeypatch.setenv("COREC_ROOT", str(project))
    with pytest.raises(CorecError, match="corec run .* --only reranker"):
        server.prepare(ROOT / "params" / "tiny.yaml")


def save_profile(opened: Ran) -> Path:
    """A parameter file of the run."""
    path = opened.folder / "mine.yaml"
    path.write_text(yaml.safe_dump(opened.settings.model_dump(mode="json")))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=program, args=[*flags, "--disable-component-update", "--disable-sync"])
        yield running
        running.close()


def test_a_click_in_the_static_page_changes_the_list(opened: Ran, tmp_path: Path, browser: Any) -> None:
    session = steering.Session(opened.settings, most=2)
    data = steering.collect(session, session.places)
    text = steering.html(data)
    assert "<b>" not in text, "titles are escaped"
    (tmp_path / "page.html").write_text(text)
    page = browser.new_page(viewport={"width": 360, "height": 800})
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto((tmp_path / "page.html").as_uri())
    titles = page.locator("[data-model=corec] li .title")
    titles.first.wait_for()
    before = titles.all_inner_texts()
    assert before[0].startswith("<b>Film</b> number"), "a title is text, not markup"
    state = data["states"][data["users"][0]["id"]]
    # One constraint that some candidates meet: the browser's ranking and CP@5 are those of Python.
    value = next(value for value in state["values"] if 2 <= value["count"] <= 8 and str(value["id"]) in state["answers"])
    page.select_option(f"select[name='{value['attribute']}']", str(value["id"]))
    page.wait_for_function("document.querySelector('[data-model=corec] .metrics').textContent.includes('=')")
    answer = state["answers"][str(value["id"])]
    scores = np.sum([answer["prior"], answer["relevance"], *(part["values"] for part in answer["control"])], axis=0)
    order = evaluation.order_by(scores)
    met = np.array([value["id"] in candidate["values"] for candidate in state["candidates"]])
    after = [text.removesuffix(" ★") for text in titles.all_inner_texts()]
    assert after == [state["candidates"][i]["title"] for i in order] and titles.all_inner_texts() != before
    assert page.locator("[data-model=corec] .metrics").inner_text() == f"CP@5 = {met[order[:5]].mean():.2f}"
    ranks = np.array([candidate["rank"] for candidate in state["candidates"]])
    best = np.lexsort((ranks, ~met))
    assert page.locator("[data-model=rule] .metrics").inner_text() == f"CP@5 = {met[best[:5]].mean():.2f}"
    page.locator("[name=predict]").check()  # the list is hidden until the group has guessed
    assert titles.count() == 0
    page.locator("[name=show]").press("Enter")
    assert titles.count() == 16 and "Your guess has rank" in page.locator("[role=status]").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360 and not faults
    assert all(url.startswith("file:") or url.startswith("data:") for url in asked)


def test_control_c_prints_no_traceback(atomic: Path, project: Path, own_folder: Path) -> None:
    values = SMALL | {
        "data": {"core": 1, "path": str(atomic)},
        "sasrec": SMALL["sasrec"] | {"epochs": 100_000, "patience": 100_000},
    }  # type: ignore[operator]
    (own_folder / "mine.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "corec", "run", str(own_folder / "mine.yaml")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as ran:
        assert ran.stdout is not None
        said = ""
        while "epoch" not in (line := ran.stdout.readline()):  # SASRec is being trained
            assert line, said
            said += line
        ran.send_signal(signal.SIGINT)
        said += ran.stdout.read()
        assert ran.wait(60) == 130
    assert "Traceback" not in said and "WARNING" not in said
    assert said.splitlines()[-1].startswith("corec: interrupted; the same command goes on from the last checkpoint")
