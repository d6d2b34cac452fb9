"""The project's own rules: pins, notebooks, the command line, and stages in order."""

import ast
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

from corec import CorecError, params, paths, reproduce

ROOT = Path(__file__).parents[1]
RUN = params.Params(run="r")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_environment_and_project_have_the_same_packages_and_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [pin for group in project["optional-dependencies"].values() for pin in group]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pins = next(entry["pip"] for entry in environment if isinstance(entry, dict))
    assert sorted(pins[:-1]) == sorted(wanted)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][^ ]*", pin) for pin in wanted)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_style(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    checked = [cell for cell in code if "nbval-check-output" in cell.metadata.get("tags", [])]
    assert checked and all(cell.outputs for cell in checked), "a checked cell has an output to compare with"
    assert not any(cell.outputs for cell in code if cell not in checked), "other outputs are stripped"
    for cell in code:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 25
        tree = ast.parse(cell.source)
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree))
    assert sum(len(cell.source.splitlines()) for cell in code) <= 130
    assert path.stat().st_size < 200_000
    headings = [line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    assert "## Settings" in headings and "## What to try" in headings and "## References" in headings


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_defaults_are_the_tiny_profile(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    namespace: dict[str, object] = {}
    exec(cell.source, namespace)
    assert params.from_notebook(namespace) == params.load(ROOT / "params" / "tiny.yaml")


def test_there_is_a_notebook_for_every_stage() -> None:
    assert [path.stem for path in NOTEBOOKS] == list(paths.NOTEBOOKS.values())


def test_a_stage_before_its_input_and_a_stale_one() -> None:
    with pytest.raises(CorecError, match=r"no finished stage 'data': run notebooks/01_data.ipynb"):
        paths.start(RUN, "sasrec", ["data"])
    paths.start(RUN, "data").finish()
    paths.start(RUN, "sasrec", ["data"]).finish()
    paths.start(RUN, "controls", ["sasrec"])
    (paths.root() / "output").write_text("another result")
    paths.start(RUN, "data").finish([paths.root() / "output"])
    with pytest.raises(CorecError, match=r"older than its input 'data': run notebooks/02_sasrec.ipynb again"):
        paths.start(RUN, "controls", ["sasrec"])


def test_a_stage_made_with_other_parameters() -> None:
    paths.start(RUN, "data").finish()
    paths.start(RUN, "sasrec", ["data"]).finish()
    for changes in ({"data": params.DataParams(window=4)}, {"seed": 3}, {"sasrec": params.SasrecParams(hidden=8)}):
        with pytest.raises(CorecError, match="was made with other parameters: run notebooks/0[12]"):
            paths.start(RUN.model_copy(update=changes), "controls", ["sasrec"])


def test_an_interrupted_stage_is_not_taken_for_whole() -> None:
    paths.start(RUN, "data").finish()
    paths.start(RUN, "data")
    with pytest.raises(CorecError, match="no finished stage 'data'"):
        paths.require("r", "data")


def test_the_command_ends_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("run: mine\nsasrec: {epoch: 3}\n")
    assert reproduce.main([str(path)]) == 1
    assert capsys.readouterr().err.strip().endswith("there is no parameter 'sasrec.epoch': did you mean 'epochs'?")


def test_a_notebook_that_stops_ends_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    (tmp_path / "mine.yaml").write_text("run: mine\ndata: {source: ml-100m}\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert reproduce.main([str(tmp_path / "mine.yaml"), "--only", "data"]) == 1
    assert "01_data stopped: Parameter data.source: there is no data set 'ml-100m'" in capsys.readouterr().err
    assert reproduce.main([str(tmp_path / "mine.yaml"), "--only", "sasrec"]) == 1
    assert "run notebooks/01_data.ipynb" in capsys.readouterr().err
