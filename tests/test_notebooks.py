"""All notebooks in one kernel, each twice, as somebody works who runs them again; on a small made-up data set."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from corec import params, profiles, stages

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
    },
    "efficiency": {"candidates": [5, 8], "repeats": 2, "users": 3},
}


def test_every_notebook_runs_twice_in_one_kernel(atomic: Path, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_folder / "params").symlink_to(ROOT / "params")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    changes = SMALL | {"data": {"core": 1, "path": atomic.name}}
    whole = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}})
    for name in stages.NOTEBOOKS.values():
        for _ in range(2):
            for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells:
                if cell.cell_type == "code":
                    tagged = "parameters" in cell.metadata.get("tags", [])
                    source = f'profile = "params/tiny.yaml"\nchanges = {changes!r}' if tagged else cell.source
                    whole.cells.append(nbformat.v4.new_code_cell(source))
    NotebookClient(whole, timeout=300, resources={"metadata": {"path": str(own_folder)}}).execute()
    settings = profiles.load(ROOT / "params" / "tiny.yaml", changes)
    for name in stages.NOTEBOOKS:
        stages.check(settings, name)
    record = json.loads((own_folder / "figures" / "twice" / "manifest.json").read_text())
    assert params.Params.model_validate(record["params"]) == settings and set(record["stages"]) == set(
        stages.ancestors("figures")
    )
    pictures = sorted(path.name for path in (own_folder / "figures" / "twice").glob("*.png"))
    expected = (
        "ablations.png efficiency.png fig6-oracle.png fig6.png fig7-oracle.png fig7.png fig8-oracle.png fig8.png frontier.png "
        "loss_curves.png missing.png orders.png readouts.png seed_curves.png surface.png texts.png transfer.png"
    )
    assert pictures == expected.split()
    said = "".join(output.get("text", "") for cell in whole.cells for output in cell.get("outputs", []))
    assert "Warning" not in said, "no notebook prints a warning"


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
