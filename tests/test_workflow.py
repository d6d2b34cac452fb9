"""Runs and grids through Snakemake: what is shared, what is run again, what is submitted to Slurm."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml

from corec import CorecError, code, evaluation, files, grid, params, paths, stages, store, verify, workflow
from corec.__main__ import main as corec_main

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "run": "small",
    "data": {"core": 1, "held_back": 4},
    "sasrec": {"hidden": 8, "max_length": 10, "epochs": 2, "top_k": 20},
    "controls": {"k": 16, "n_tokens": [0, 1], "train_truth": "any", "max_windows": {"train": 200, "valid": 40, "test": 30}},
    "reranker": {"backbone": "tiny", "steps": 2, "curriculum_steps": 1, "batch_size": 2, "requests_per_window": 4},
    "evaluation": {"bootstrap": 20, "ks": [1, 5]},
}


STRANGE = "Tom & <b>bold</b> <genre: Comedy> $x_{$ \\frac *a* `b` &lt;script&gt;alert(1)&lt;/script&gt;"


def rendered(notebook: Path) -> str:
    """What a browser renders of the outputs of an executed notebook."""
    cells = json.loads(notebook.read_text())["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(data.get(kind, "")) for data in outputs for kind in ("text/html", "text/markdown"))


@pytest.fixture
def small(project: Path, atomic: Path) -> Path:
    """A profile with the made-up data set."""
    names = atomic / "ml-100k.item"
    names.write_text(names.read_text().replace("Film number 7\t", f"{STRANGE}\t"))
    path = project / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"data": SMALL["data"] | {"path": str(atomic)}}))
    return path


def change(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_keys_are_shared_until_the_first_difference_and_defaults_do_not_count() -> None:
    one = params.Params(run="a")
    two = params.Params(run="b", controls=params.ControlsParams(protocol="oracle"))
    assert stages.key(one, "data") == stages.key(two, "data") and stages.key(one, "sasrec") == stages.key(two, "sasrec")
    assert stages.key(one, "controls") != stages.key(two, "controls") and stages.key(one, "figures") != stages.key(two, "figures")
    assert stages.key(one, "controls") == stages.key(one.model_copy(update={"run": "c"}), "controls")
    explicit = params.Params(run="a", data=params.DataParams(window=6), sasrec=params.SasrecParams(hidden=64))
    assert stages.key(explicit, "evaluation") == stages.key(one, "evaluation")
    assert stages.key(params.Params(seed=1), "data") == stages.key(one, "data")
    assert stages.key(params.Params(seed=1), "sasrec") != stages.key(one, "sasrec")


def test_runs_share_the_folder_of_a_stage_and_gc_removes_what_no_run_names(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = params.Params(run="a"), params.Params(run="b")
    stages.start(one, "data").finish()
    stages.start(two, "sasrec").finish()  # data is there already
    assert paths.stage_dir("a", "data").resolve() == paths.stage_dir("b", "data").resolve()
    assert stages.check(two, "sasrec") and stages.read_record("a", "sasrec") is None
    stages.start(params.Params(run="a", data=params.DataParams(window=4)), "data").finish([])
    assert corec_main(["gc"]) == 0 and "removed 0 stages" in capsys.readouterr().out
    for link in (paths.root() / "runs" / "b").iterdir():
        link.unlink()
    assert [folder.name.split("-")[0] for folder in store.unused()] == ["data", "sasrec"]
    assert corec_main(["gc", "--dry-run"]) == 0 and len(store.unused()) == 2
    assert corec_main(["gc"]) == 0 and "removed 2 stages" in capsys.readouterr().out
    assert not store.unused() and stages.read_record("a", "data") is not None


def test_a_folder_of_an_earlier_version_is_moved_and_nothing_of_it_lost() -> None:
    settings = params.Params(run="old")
    place = paths.stage_dir("old", "data")
    stages.start(settings, "data").finish()
    folder = place.resolve()
    place.unlink()
    folder.rename(place)
    (place / "mine.txt").write_text("kept")
    assert stages.attach(settings, "data").is_symlink() and (folder / "mine.txt").read_text() == "kept"
    place.unlink()
    folder.rename(place)
    stages.attach(params.Params(run="old", data=params.DataParams(window=4)), "data")
    assert (place.with_name("data.old") / "mine.txt").read_text() == "kept"


def test_two_processes_do_not_work_in_one_folder() -> None:
    settings = params.Params(run="r")
    script = (
        "import sys; from corec import params, stages; stages.start(params.Params(run='r'), 'data'); print('started', flush=True);"
        " sys.stdin.read()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdout and other.stdin and other.stdout.readline() == "started\n"
        with pytest.raises(CorecError, match="Another process is working in .*: wait until it has ended"):
            stages.start(settings, "data")
        other.kill()
    stages.start(settings, "data")  # the lock of a killed process is free
    stages.start(settings, "data").finish()


def test_the_digest_of_the_code_ignores_comments_and_sees_every_module_below(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {path.stem for path in code.closure([ROOT / "corec" / "frontier.py"])}
    assert {"frontier", "evaluation", "stages", "files", "params"} <= found and "sasrec" not in found
    plain = code.without_docstrings(code.ast.parse('def f():\n    """Text."""\n    return 1\n'))
    assert plain == code.without_docstrings(code.ast.parse("def f():\n    # another comment\n    return 1\n"))
    assert plain != code.without_docstrings(code.ast.parse("def f():\n    return 2\n"))
    before = code.of_notebook("06_figures")
    (project / "notebooks").unlink()
    with pytest.raises(CorecError, match="is no notebook: run in the project's folder, or set COREC_ROOT"):
        code.of_notebook("06_figures")
    (project / "notebooks").mkdir()
    notebook = json.loads((ROOT / "notebooks" / "06_figures.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = ["other words"]
        elif "parameters" in cell["metadata"].get("tags", []):
            cell["source"] = ["profile = 'params/ml-1m.yaml'"]
        else:
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["another output"]}]
    (project / "notebooks" / "06_figures.ipynb").write_text(json.dumps(notebook))
    assert code.of_notebook("06_figures") == before
    notebook["cells"].append({"cell_type": "code", "source": ["print(1)"], "metadata": {}, "outputs": []})
    (project / "notebooks" / "06_figures.ipynb").write_text(json.dumps(notebook))
    assert (changed := code.of_notebook("06_figures")) != before
    notebook["cells"].append({"cell_type": "code", "source": ["%matplotlib inline"], "metadata": {}, "outputs": []})
    (project / "notebooks" / "06_figures.ipynb").write_text(json.dumps(notebook))
    assert code.of_notebook("06_figures") not in (before, changed), "a magic is no Python, and counts as text"


def test_faults_of_a_command_are_one_sentence(project: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = project / "other.yaml"
    other.write_text(small.read_text())
    change(other, seed=1)
    for arguments, message in (
        (["run", str(small), str(other)], "another run of this command is also named 'small': change its `run`"),
        (["run", str(small), "--profile", "profiles/none"], "There is no profile of Snakemake in 'profiles/none'"),
        (["grid", str(small)], "small.yaml: parameter 'grid' is missing: add it"),
        (["compare", "figures/a", "figures/b"], "figures/a/manifest.json is missing: make it with notebooks/06_figures.ipynb"),
    ):
        assert corec_main(arguments) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(CorecError, match="Snakemake needs a run: give --config params="):
        workflow.read_config({})


def test_a_grid_shares_stages_and_runs_only_what_is_outdated(
    project: Path, small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Is long because each step needs the files of the ones before it."""
    table = project / "grid.yaml"
    table.write_text(yaml.safe_dump({"grid": "both", "runs": ["small.yaml"], "protocols": ["random-candidate", "oracle"]}))
    assert corec_main(["grid", str(table)]) == 0
    said = capfd.readouterr().out
    assert said.count("01_data: ") == said.count("02_sasrec: ") == 1 and said.count("05_evaluation: ") == 2
    assert "10 stages ran, 0 were up to date" in said
    names = ["both-small-random-candidate", "both-small-oracle"]
    assert {point.run for point in grid.points(table)} == set(names)
    for name in names:
        assert {"data", "sasrec", "evaluation", "notebooks"} <= {place.name for place in (project / "runs" / name).iterdir()}
        assert (project / "runs" / name / "notebooks" / "01_data.ipynb").exists()
        assert evaluation.read(project / "figures" / name / "metrics.csv")["run"].unique().tolist() == [name]
    merged = pd.read_csv(project / "figures" / "both" / "metrics.csv")
    assert set(merged["run"]) == set(names) and {"base", "variant", "backbone", "readout", "attributes"} <= set(merged)
    whole = pd.concat([pd.read_csv(project / "figures" / name / "metrics.csv") for name in names])
    assert len(merged) == len(whole)
    assert "## CP@5" in (project / "figures" / "both" / "results.md").read_text()

    shown = "".join(rendered(path) for name in names for path in (project / "runs" / name / "notebooks").iterdir())
    assert "<table" in shown and "<b>bold" not in shown and "<script>alert" not in shown, "text of the data is not rendered"

    assert corec_main(["grid", str(table)]) == 0 and "0 stages ran, 10 were up to date" in capfd.readouterr().out
    assert corec_main(["compare", *(f"{project}/figures/{name}" for name in names)]) == 0
    made = pd.read_csv(project / "figures" / f"{names[0]}-vs-{names[1]}" / "comparison.csv")
    plain = made[(made["model"] == "sasrec") & (made["metric"] == "ndcg")]
    assert made["paired"].all() and (plain["difference"] == 0).all() and (made["users_a"] == 30).all()

    folder = project / "figures" / names[0]
    assert corec_main(["verify", names[0]]) == 0 and corec_main(["verify", str(folder)]) == 0
    numbers = verify.numbers(folder, folder)
    assert (numbers["difference"] == 0).all() and len(numbers) == len(pd.read_csv(folder / "metrics.csv"))
    (folder / "fig8.csv").write_text((folder / "fig8.csv").read_text().replace("0.", "0.1", 1))
    assert corec_main(["verify", str(folder)]) == 1
    assert "fig8.csv has another digest than in the manifest" in capfd.readouterr().err
    digest = files.sha256(folder / "metrics.csv")
    events = paths.stage_dir(names[0], "data") / "interactions.parquet"
    events.write_bytes(events.read_bytes()[:-7])
    (project / "figures" / names[1] / "fig6.png").unlink()
    assert corec_main(["grid", str(table)]) == 0
    said = capfd.readouterr().out
    assert "interactions.parquet has changed since stage 'data' wrote it: stage 'data' is run again" in said
    assert said.count("01_data: ") == said.count("02_sasrec: ") == 1 and "10 stages ran, 0 were up to date" in said
    assert files.sha256(project / "figures" / names[0] / "metrics.csv") == digest, "the same numbers, bit for bit"
    assert (project / "figures" / names[1] / "fig6.png").exists()


def test_slurm_gets_the_resources_the_command_and_the_log(
    project: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The executor of Slurm against programs that stand in for sbatch, sacct, and srun; the jobs run on this machine."""
    programs = project / "bin"
    programs.mkdir()
    for program in ("sbatch", "sacct", "squeue", "srun", "sinfo", "scancel", "scontrol"):
        target = programs / program
        target.write_text(f"#!{sys.executable}\n" + (ROOT / "tests" / "slurm_stub.py").read_text())
        target.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STUB_FOLDER", str(project / "slurm"))
    settings = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    fast = {"slurm-init-seconds-before-status-checks": 1, "seconds-between-status-checks": 1, "latency-wait": 5}
    own = project / "profile"
    own.mkdir()
    (own / "config.yaml").write_text(yaml.safe_dump(settings | fast | {"slurm-no-account": True}))
    assert corec_main(["run", str(small), "--only", "sasrec", "--profile", str(own)]) == 0
    capfd.readouterr()
    submitted = [json.loads(line) for line in (project / "slurm" / "submitted.jsonl").read_text().splitlines()]
    assert len(submitted) == 2
    for line, stage, memory, minutes in zip(submitted, ("data", "sasrec"), ("16000", "32000"), ("120", "360"), strict=True):
        said = " ".join(line)
        assert f"--mem {memory}" in said and f"-t {minutes}" in said and "--cpus-per-task" in said and "gpu" not in said
        assert f"runs/.slurm/rule_{stage}/" in said and stage in line[-1] and "slurm-jobstep" in line[-1]
    assert stages.read_record("small", "sasrec") is not None
    dry = workflow.command([workflow.Target(str(small))], str(ROOT / "profiles" / "slurm"), more=["--dry-run"])
    said = subprocess.run(dry, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "gres=gpu:1" in said.stdout + said.stderr and "mem_mb=64000" in said.stdout + said.stderr


def test_slurm_and_kubernetes_ask_for_a_gpu_where_there_is_a_language_model() -> None:
    with_model = {"reranker", "prompt_study", "efficiency", "missing_metadata", "transfer", "saturation", "conflicts"}
    with_model |= {"language", "sessions", "simulated_users"}
    for name in ("slurm", "kubernetes"):
        settings = yaml.safe_load((ROOT / "profiles" / name / "config.yaml").read_text())
        asked = {stage for stage, resources in settings["set-resources"].items() if {"gres", "gpu"} & set(resources)}
        assert asked == with_model and set(settings["set-resources"]) <= set(stages.NOTEBOOKS)


def test_an_interrupted_run_goes_on(project: Path, small: Path) -> None:
    change(small, sasrec=SMALL["sasrec"] | {"epochs": 400, "patience": 400})
    command = [sys.executable, "-m", "corec", "run", str(small), "--only", "sasrec"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True) as ran:
        assert ran.stdout
        while "epoch" not in ran.stdout.readline():
            assert ran.poll() is None
        whole = psutil.Process(ran.pid)
        for each in [*whole.children(recursive=True), whole]:
            each.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if "Another process is working" not in again.stderr:
            break
        time.sleep(1)
    assert again.returncode == 0, again.stderr
    assert "01_data" not in again.stdout and "1 stages ran, 1 were up to date" in again.stdout


def test_a_second_run_is_reported_number_by_number() -> None:
    row = {
        "dataset": "d",
        "protocol": "oracle",
        "K": 20,
        "n_tokens": 1,
        "tau": 1,
        "seed": 0,
        "metric": "cp",
        "k": 5,
        "low": 0.4,
        "high": 0.6,
    }
    first = pd.DataFrame([row | {"model": model, "value": 0.5} for model in ("corec", "rule", "boost")]).assign(n_users=9)
    again = first[first["model"] != "boost"].assign(value=[0.55, 0.5])
    for name, table in (("first", first), ("again", again)):
        files.write_csv(paths.figures_dir(name) / "metrics.csv", table)
    lines = verify.report(verify.numbers(paths.figures_dir("first"), paths.figures_dir("again")))
    assert lines[0] == "1 of 3 numbers are equal; 1 are outside the interval of the first run"
    assert "cp@5 of boost, 1 tokens, oracle: 0.5000 (0.4000 to 0.6000), again nan" in lines
    assert "cp@5 of corec, 1 tokens, oracle: 0.5000 (0.4000 to 0.6000), again 0.5500" in lines
