"""The project's own rules: pins, notebooks, the command line, and stages in order."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

from corec import CorecError, files, manifest, params, paths, stages, workflow
from corec.__main__ import main as corec_main

ROOT = Path(__file__).parents[1]
RUN = params.Params(run="r")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_all_packages_are_pinned_and_conda_takes_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [pin for group in project["optional-dependencies"].values() for pin in group]
    wanted.remove("corec[site]")  # another group of this project
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][^ ]*", pin) for pin in wanted)
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert environment[-1] == {"pip": ["-e .[test]"]}


def test_what_is_imported_is_declared_and_the_reverse() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = importlib.metadata.packages_distributions()
    sources = [*(ROOT / "corec").rglob("*.py"), *(ROOT / "tests").glob("*.py"), *(ROOT / "docs" / "site").glob("*.py")]
    texts = [path.read_text() for path in sources]
    texts += [cell.source for path in NOTEBOOKS for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    found = {
        name.split(".")[0]
        for text in texts
        for node in ast.walk(ast.parse(text))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else [])
    }  # fmt: skip
    local = {"corec", "tests", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    third = {name for name in found - local if name not in sys.stdlib_module_names and name}
    groups = (project["dependencies"], *project["optional-dependencies"].values())
    declared = {canonical(pin.split("==")[0]) for group in groups for pin in group}
    for name in third:
        assert {canonical(dist) for dist in names[name]} & declared, f"{name} is imported and not declared"
    used = {canonical(dist) for name in third for dist in names[name]}
    tools = {
        "jupyterlab",
        "pip",
        "mypy",
        "nbstripout",
        "nbval",
        "pytest",
        "pytest-xdist",
        "ruff",
        "ipykernel",
        "ipywidgets",
        "snakemake",
        "snakemake-executor-plugin-slurm",
        "snakemake-executor-plugin-kubernetes",
        "voila",
        "myst-nb",
        "sphinx-book-theme",
        "sphinx-design",
        "playwright",
        "corec[site]",
    }  # run, not imported
    stubs = {name for name in declared if name.startswith("types-") or name.endswith("-stubs")}
    assert declared - used - tools - stubs == set(), "declared and never imported"


def canonical(name: str) -> str:
    """A distribution's name as the package index writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


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
    assert "## Settings" in headings and "## Exercises" in headings and "## References" in headings


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_parameters_cell_has_two_lines_and_names_the_tiny_profile(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert len(cell.source.splitlines()) == 2
    namespace: dict[str, object] = {}
    exec(cell.source, namespace)
    assert namespace["profile"] == "params/tiny.yaml" and namespace["changes"] == {}
    assert namespace.keys() - {"__builtins__", "__annotations__"} == {"profile", "changes"}, "no name that nothing reads"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_modules_are_imported_under_their_own_names(path: Path) -> None:
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "corec":
                    assert not [alias.asname for alias in node.names if alias.asname]


def test_there_is_a_notebook_for_every_stage() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["00_steering", *stages.NOTEBOOKS.values()]
    assert set(stages.NEEDS) == set(stages.NOTEBOOKS)
    order = list(stages.NOTEBOOKS)
    assert all(order.index(need) < order.index(name) for name, needs in stages.NEEDS.items() for need in needs)


def finish(settings: params.Params, *names: str) -> None:
    for name in names:
        stages.start(settings, name).finish()


def test_a_stage_before_its_input_and_a_stale_one() -> None:
    with pytest.raises(CorecError, match=r"no finished stage 'data': run notebooks/01_data.ipynb"):
        stages.start(RUN, "sasrec")
    finish(RUN, "data", "sasrec")
    stages.start(RUN, "controls")
    (paths.stage_dir("r", "data") / "output").write_text("another result")
    stages.start(RUN, "data").finish([paths.stage_dir("r", "data") / "output"])
    with pytest.raises(CorecError, match=r"older than its input 'data': run notebooks/02_sasrec.ipynb again"):
        stages.start(RUN, "controls")


def test_all_missing_stages_are_named_at_once() -> None:
    with pytest.raises(CorecError) as error:
        stages.start(RUN, "figures")
    for name in ("data", "sasrec", "controls", "reranker", "evaluation"):
        assert repr(name) in str(error.value) and f"notebooks/{stages.NOTEBOOKS[name]}.ipynb" in str(error.value)
    finish(RUN, "data", "sasrec")
    with pytest.raises(
        CorecError, match="no finished stages 'controls', 'reranker': run notebooks/03_control_tokens.ipynb, notebooks/04"
    ):
        stages.start(RUN, "evaluation")


def test_a_stage_made_with_other_parameters_says_which() -> None:
    finish(RUN, "data", "sasrec")
    for changes, which in (
        ({"data": params.DataParams(window=4)}, r"data.window is 4, was 6"),
        ({"seed": 3}, r"seed is 3, was 0"),
        ({"sasrec": params.SasrecParams(hidden=8)}, r"sasrec.hidden is 8, was 64"),
    ):
        with pytest.raises(CorecError, match=rf"was made with other parameters \({which}\): run notebooks/0[12]"):
            stages.start(RUN.model_copy(update=changes), "controls")


def test_a_parameter_that_a_later_version_added_counts_with_its_default() -> None:
    finish(RUN, "data")
    record = stages.read_record("r", "data") or {}
    assert record["params"]["data"].pop("repeats") is False
    files.write_json(paths.stage_dir("r", "data") / "stage.json", record)
    stages.check(RUN, "data")
    with pytest.raises(CorecError, match=r"\(data.repeats is True, was False\)"):
        stages.check(RUN.model_copy(update={"data": RUN.data.model_copy(update={"repeats": True})}), "data")


def test_a_missing_source_of_a_transfer_is_named_before_the_first_notebook(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workflow, "call", lambda *_: pytest.fail("no notebook runs"))
    assert corec_main(["run", "params/transfer-gift-cards.yaml"]) == 1
    assert "Run 'complete-journey' has no finished stages" in capsys.readouterr().err
    assert corec_main(["run", "params/ml-100k-ranknet.yaml", "--only", "missing_metadata"]) == 1
    assert "ml-100k-ranknet.yaml: stage 'missing_metadata' needs the probability" in capsys.readouterr().err


def test_an_interrupted_stage_is_not_taken_for_whole() -> None:
    finish(RUN, "data")
    stages.start(RUN, "data")
    with pytest.raises(CorecError, match="no finished stage 'data'"):
        stages.require("r", "data")


def test_a_file_that_has_changed_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    stage = stages.start(RUN, "data")
    output = stage.folder / "table.csv"
    output.write_text("a,b")
    stage.finish([output])
    stages.require("r", "data")
    text = output.read_text()
    output.write_text(text)  # the same content at another time
    stages.require("r", "data")
    assert corec_main(["verify", "r"]) == 0 and "all files are as recorded" in capsys.readouterr().out
    output.write_text("a,c")
    with pytest.raises(CorecError, match=r"table.csv has changed since stage 'data' wrote it: run notebooks/01_data.ipynb again"):
        stages.require("r", "data")
    status = output.stat()
    record = stages.read_record("r", "data") or {}
    record["outputs"]["table.csv"]["modified_ns"] = status.st_mtime_ns  # size and time alike: the digest alone tells
    files.write_json(stage.folder / "stage.json", record)
    stages.require("r", "data")
    assert corec_main(["verify", "r"]) == 1 and "table.csv has changed" in capsys.readouterr().err
    output.unlink()
    with pytest.raises(CorecError, match="table.csv is missing"):
        stages.require("r", "data")
    assert corec_main(["verify", "none"]) == 1 and "no finished stage of a run 'none'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ['{"stage": "data"', '{"identity": "x", "made_from": {}, "params": {}, "outputs": {"a": "0f"}}', "[]"]
)
def test_a_record_that_is_damaged_or_of_an_earlier_version_is_none(text: str) -> None:
    finish(RUN, "data")
    (paths.stage_dir("r", "data") / "stage.json").write_text(text)
    with pytest.raises(CorecError, match="no finished stage 'data'"):
        stages.require("r", "data")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CorecError, match=r"out.json could not be written \(No space left on device\): free disk space"):
        files.write_text(tmp_path / "out.json", "x")
    assert not list(tmp_path.glob("out*"))


def test_the_machine_of_a_record_is_the_processor() -> None:
    finish(RUN, "data")
    assert "cores" in (stages.read_record("r", "data") or {})["machine"] and manifest.git_state()["dirty"] in (True, False, None)


def test_an_error_in_jupyter_is_one_sentence() -> None:
    from IPython.core.interactiveshell import InteractiveShell

    assert CorecError("Do this.")._render_traceback_() == ["CorecError: Do this."]
    shell = InteractiveShell()
    shown: list[str] = []
    shell._showtraceback = lambda kind, value, lines: shown.extend(lines)  # type: ignore[method-assign]
    shell.run_cell("from corec import CorecError\nraise CorecError('Do this.')")
    assert shown == ["CorecError: Do this."]


def test_control_c_ends_in_one_sentence(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "call", interrupt)
    assert corec_main(["run", "params/tiny.yaml"]) == 130
    assert (
        capsys.readouterr().err
        == "corec: interrupted; the same command goes on from the last checkpoint of the stage that was running.\n"
    )


def test_the_stages_of_a_run_are_a_field_of_its_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "require", lambda *_: {})  # the source of the transfer
    for name, wanted in (
        ("efficiency", "01 02 03 04 05 06 09"),
        ("ml-100k", "01 02 03 04 05 06"),
        ("orders", "01 02 03 08"),
        ("retriever-ml-1m", "01 02 07"),
        ("missing-metadata-ml-100k", "01 02 03 10"),
        ("transfer-gift-cards", "01 02 03 04 11"),
    ):
        jobs = workflow.plan([workflow.Target(f"params/{name}.yaml")])
        assert [stages.NOTEBOOKS[job.stage][:2] for job in jobs.values()] == wanted.split()


@pytest.mark.parametrize(
    ("arguments", "seed", "k"),
    [
        (["-p", "profile", "{file}"], 5, 11),
        (["-f", "{file}"], 5, 11),
        (["-p", "profile", "{file}", "-y", "{{seed: 3}}"], 3, 11),
        (["-p", "profile", "{file}", "-y", "{{controls: {{k: 10}}}}"], 5, 10),
    ],
    ids=["-p", "-f", "-y", "-y of a part of a section"],
)
def test_papermill_sets_parameters_by_file_by_name_and_by_yaml(tmp_path: Path, arguments: list[str], seed: int, k: int) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("run: mine\nseed: 5\ncontrols: {k: 11, max_windows: {train: 40, valid: 7}}\nsasrec: {top_k: 12}\n")
    lines = [
        "import json",
        "from corec import profiles",
        "settings = profiles.from_notebook(globals())",
        "print(settings.model_dump_json())",
    ]
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}})
    tagged = nbformat.v4.new_code_cell('profile: str = "params/tiny.yaml"\nchanges: dict = {}', metadata={"tags": ["parameters"]})
    notebook.cells = [tagged, nbformat.v4.new_code_cell("\n".join(lines))]
    nbformat.write(notebook, tmp_path / "in.ipynb")
    command = [sys.executable, "-m", "papermill", str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb")]
    ran = subprocess.run(command + [part.format(file=file) for part in arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    cell = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1]
    found = params.Params.model_validate_json(json.loads(json.dumps(cell.outputs[0]["text"])))
    assert (found.run, found.seed, found.controls.k) == ("mine", seed, k)
    assert found.controls.max_windows.train == 40 and found.controls.max_windows.valid == 7


def test_the_command_ends_in_one_sentence(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("run: mine\nsasrec: {epoch: 3}\n")
    assert corec_main(["run", str(path)]) == 1
    assert capsys.readouterr().err.strip().endswith("there is no parameter 'sasrec.epoch': did you mean 'epochs'?")


def test_a_notebook_that_stops_ends_in_one_sentence(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "mine.yaml").write_text("run: mine\ndata: {source: ml-100m}\n")
    assert corec_main(["run", str(project / "mine.yaml"), "--only", "data"]) == 1
    found = capfd.readouterr()
    assert "corec: 01_data stopped: Parameter data.source: there is no data set 'ml-100m'" in found.err
    assert "Traceback" not in found.err and "Error in rule" not in found.err + found.out
    assert found.err.splitlines()[-1].startswith("corec: the run stopped: correct the fault named above")
