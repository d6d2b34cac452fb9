"""Training on two processes (gloo) by ``accelerate launch``: the loss curve and the parameters of one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_reranker import World

from corec import CorecError, controls, data, paths, profiles, reranker, stages
from corec.params import Params
from corec.reranker import devices as parallel
from corec.reranker.devices import ALONE, Devices
from corec.scale import launch as scale_launch

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def world(atomic: Path) -> World:
    return World(atomic)


def prepare(world: World, atomic: Path, **changes: Any) -> tuple[Params, Path]:
    """Stages 01 to 03 of a run as the notebooks leave them, and its parameter file."""
    settings = world.params(batch_size=4, micro_batch=1, **changes).model_copy(update={"run": "several"})
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"path": str(atomic), "core": 1})})
    stage = stages.start(settings, "data")
    stage.finish(data.save(world.tables, stage.folder))
    stages.start(settings, "sasrec").finish()
    stage = stages.start(settings, "controls")
    stage.finish(controls.save(world.prepared, world.tables.windows, stage.folder))
    file = paths.root() / "several.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return settings, file


def launch(how: str, file: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Start ``accelerate launch -m corec.scale.launch`` without a GPU."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(PROJECT / "params" / "launch" / f"{how}.yaml"), "--num_processes", str(processes)]
    command += ["--main_process_port", "0", "-m", "corec.scale.launch", "--params", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def train_alone(world: World, settings: Params, folder: Path, stop_after: int | None = None) -> reranker.Reranker:
    folder.mkdir(parents=True, exist_ok=True)
    model = world.build(settings)
    reranker.train(model, world.examples, settings, folder, stop_after=stop_after)
    return model


installed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
zero2 = pytest.param("zero2", "late", marks=installed)


@pytest.mark.parametrize(("how", "readout"), [("ddp", "late"), ("fsdp", "index"), zero2])
def test_two_processes_learn_what_one_learns(world: World, atomic: Path, tmp_path: Path, how: str, readout: str) -> None:
    settings, file = prepare(world, atomic, readout=readout)
    train_alone(world, settings, tmp_path / "alone")
    ran = launch(how, file)
    assert ran.returncode == 0, ran.stderr[-6000:]
    assert ran.stdout.count("8 steps on 2 processes are kept in") == 1, "the first process alone speaks"
    kept = paths.stage_dir("several", "reranker") / "checkpoint.pt"
    one, two = (torch.load(path, weights_only=True) for path in (tmp_path / "alone" / "checkpoint.pt", kept))
    assert len(two["rows"]) == 8
    np.testing.assert_allclose([row[2] for row in two["rows"]], [row[2] for row in one["rows"]], atol=1e-4)
    assert [row[4] for row in two["rows"]] == [row[4] for row in one["rows"]], "tokens of all windows are counted"
    assert one["copies"].keys() == two["copies"].keys()
    for name, value in one["copies"].items():
        torch.testing.assert_close(two["copies"][name], value, atol=1e-3, rtol=1e-3)
    assert one["optimizer"]["state"].keys() == two["optimizer"]["state"].keys()
    model = world.build(settings)  # and notebook 4 goes on from there: nothing is left to train
    curve = reranker.train(model, world.examples, settings, kept.parent)
    assert len(curve) == 8
    for name, value in model.trainable().items():
        torch.testing.assert_close(value.detach(), two["copies"][name])


@pytest.mark.parametrize("how", ["fsdp", pytest.param("zero2", marks=installed)])
def test_what_one_process_began_two_go_on_with(world: World, atomic: Path, tmp_path: Path, how: str) -> None:
    settings, file = prepare(world, atomic)
    train_alone(world, settings, tmp_path / "alone")
    folder = paths.stage_dir("several", "reranker")
    train_alone(world, settings, folder, stop_after=4)
    ran = launch(how, file)
    assert ran.returncode == 0, ran.stderr[-6000:]
    assert ran.stdout.count("resumed after step 4") == 1
    one, two = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (tmp_path / "alone", folder))
    np.testing.assert_allclose([row[2] for row in two["rows"]], [row[2] for row in one["rows"]], atol=1e-4)


def test_windows_that_cannot_be_shared_end_in_a_sentence(world: World, atomic: Path) -> None:
    assert [Devices(rank, 3).share(6) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert ALONE.share(5) == slice(0, 5) and ALONE.total(2.5) == 2.5 and ALONE.first
    with pytest.raises(
        CorecError, match="4 windows a step cannot be shared equally by 3 processes: set reranker.batch_size to a"
    ):
        Devices(0, 3).share(4)


def test_deepspeed_missing_or_of_another_stage_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(parallel.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CorecError, match="DeepSpeed, which is not installed: pip install deepspeed"):
        parallel.join()
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setattr(parallel.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(CorecError, match="zero_stage is 3, of DeepSpeed's stages 2 alone is built"):
        parallel.join()


def test_a_launch_before_the_notebooks_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale_launch.main(["--params", str(PROJECT / "params" / "tiny.yaml")]) == 1
    assert "has no finished stage 'controls': run notebooks/03_control_tokens.ipynb" in capsys.readouterr().err


SHARDED = """
from dataclasses import replace
import torch
from corec import backbones
from corec.reranker import devices as parallel
devices = replace(parallel.join(), sharded=True)
model, _ = backbones.tiny_model()
parallel.shard(model, devices)
made = model.base_model(inputs_embeds=torch.ones(1, 5, 64, requires_grad=True), output_hidden_states=True)
assert len(made.hidden_states) == 3
assert all(map(parallel.is_sharded, model.base_model.layers.parameters())), "none is left whole by the forward pass"
made.last_hidden_state.sum().backward()
assert all(map(parallel.is_sharded, model.base_model.layers.parameters()))
parallel.leave(devices)
"""


def test_layers_are_shards_again_once_they_have_computed(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_an_architecture_without_named_layers_cannot_be_sharded() -> None:
    with pytest.raises(CorecError, match="cannot be sharded: launch with params/launch/ddp.yaml"):
        parallel.shard(torch.nn.Linear(2, 2), Devices(0, 2, True))


def test_every_launch_names_its_command() -> None:
    for file in (PROJECT / "params" / "launch").iterdir():
        assert (
            f"--config_file params/launch/{file.name} -m corec.scale.launch --params params/amazon-electronics.yaml"
            in file.read_text()
        )
        assert yaml.safe_load(file.read_text())["num_processes"] == 4
    assert profiles.load(PROJECT / "params" / "amazon-electronics.yaml").reranker.batch_size == 4
