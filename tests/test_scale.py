"""Training on two processes (gloo) by ``accelerate launch``: the loss curve and the parameters of one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_reranker import World

from corec import CorecError, controls, data, paths, profiles, reranker, stages
from corec.params import Params
from corec.reranker import devices, shards
from corec.scale import launch as scale_launch
from corec.scale import shards as scale_shards

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
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def train_alone(world: World, settings: Params, folder: Path, stop_after: int | None = None) -> reranker.Reranker:
    model = world.build(settings)
    reranker.train(model, world.examples, settings, folder, stop_after=stop_after)
    return model


def saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize(("how", "readout"), [("ddp", "late"), ("ddp", "index"), ("fsdp", "index"), ("fsdp", "late")])
def test_two_processes_learn_what_one_learns(world: World, atomic: Path, tmp_path: Path, how: str, readout: str) -> None:
    settings, file = prepare(world, atomic, readout=readout)
    train_alone(world, settings, tmp_path / "alone")
    ran = launch(how, file)
    assert ran.returncode == 0, ran.stderr[-6000:]
    assert ran.stdout.count("8 steps on 2 processes are saved in") == 1, "the first process alone speaks"
    kept = paths.stage_dir("several", "reranker")
    one, two = saved(tmp_path / "alone"), saved(kept)
    assert len(two["rows"]) == 8
    np.testing.assert_allclose([row[2] for row in two["rows"]], [row[2] for row in one["rows"]], atol=1e-4)
    assert [row[4] for row in two["rows"]] == [row[4] for row in one["rows"]], "tokens of all windows are counted"
    states = one["optimizer"]["state"], two["optimizer"]["state"]
    assert states[0].keys() == states[1].keys()
    for name, state in states[0].items():
        assert state.keys() == states[1][name].keys() == {"step", "master", "exp_avg", "exp_avg_sq"}
        torch.testing.assert_close(states[1][name]["master"], state["master"], atol=1e-3, rtol=1e-3)
    model = world.build(settings)  # and notebook 4 continues from there: nothing is left to train
    curve = reranker.train(model, world.examples, settings, kept)
    assert len(curve) == 8
    for name, value in model.trainable().items():
        torch.testing.assert_close(value.detach(), states[1][name]["master"])


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_launch_of_one_process_learns_the_same(world: World, atomic: Path, tmp_path: Path, how: str) -> None:
    settings, file = prepare(world, atomic)
    train_alone(world, settings, tmp_path / "alone")
    ran = launch(how, file, processes=1)
    assert ran.returncode == 0, ran.stderr[-6000:]
    one, other = saved(tmp_path / "alone"), saved(paths.stage_dir("several", "reranker"))
    np.testing.assert_allclose([row[2] for row in other["rows"]], [row[2] for row in one["rows"]], atol=1e-4)


GROUPED = """
import os
import sys
from pathlib import Path
import torch
from test_reranker import World
from torch.distributed.tensor import DTensor
from corec.reranker import devices
from corec.scale import launch
world = World(Path(sys.argv[1]))
model = world.build(world.params(readout="late"))
os.environ |= {"ACCELERATE_USE_FSDP": "true", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # as on a GPU
devices.prepare(model, launch.join())
assert all(isinstance(value, DTensor) for value in model.causal.base_model.layers.parameters())
"""


def test_one_process_with_a_group_has_one_shard_of_each_layer(atomic: Path, tmp_path: Path) -> None:
    script = tmp_path / "grouped.py"
    script.write_text(GROUPED)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, str(script), str(atomic)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_what_one_process_began_two_go_on_with(world: World, atomic: Path, tmp_path: Path, how: str) -> None:
    settings, file = prepare(world, atomic)
    train_alone(world, settings, tmp_path / "alone")
    folder = paths.stage_dir("several", "reranker")
    train_alone(world, settings, folder, stop_after=4)
    ran = launch(how, file)
    assert ran.returncode == 0, ran.stderr[-6000:]
    assert ran.stdout.count("resumed after step 4") == 1
    one, two = saved(tmp_path / "alone"), saved(folder)
    np.testing.assert_allclose([row[2] for row in two["rows"]], [row[2] for row in one["rows"]], atol=1e-4)


def test_windows_that_cannot_be_shared_end_in_a_sentence() -> None:
    assert [devices.share(6, rank, 3) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert devices.share(5, 0, 1) == slice(0, 5) and devices.gather(2.5) == [2.5] and devices.agree(2.5) == 2.5
    with pytest.raises(
        CorecError, match="4 windows a step cannot be shared equally by 3 processes: set reranker.batch_size to a"
    ):
        devices.share(4, 0, 3)


def test_a_launch_with_deepspeed_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(CorecError, match="asks for DeepSpeed, .*: launch with params/launch/ddp.yaml"):
        scale_launch.join()


def test_a_launch_before_the_notebooks_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale_launch.main(["--params", str(PROJECT / "params" / "tiny.yaml")]) == 1
    said = capsys.readouterr().err
    assert "has no finished stages 'data', 'sasrec', 'controls'" in said and "notebooks/03_control_tokens.ipynb" in said


SHARDED = """
import torch
from test_reranker import World
from pathlib import Path
import sys
from torch.distributed.tensor import DTensor
from corec import reranker
from corec.reranker import devices
from corec.scale import launch
world = World(Path(sys.argv[1]))
model = world.build(world.params(readout="late"))
accelerator = launch.join()
module = devices.prepare(model, accelerator)
layers = model.causal.base_model.layers
assert len(layers) == 2 and all(isinstance(value, DTensor) for value in layers.parameters())
rows = reranker.make_rows(model, world.examples, world.pools, world.requests)
parts, _ = module(rows)
assert all(isinstance(value, DTensor) for value in layers.parameters()), "none is left whole by the forward pass"
(parts.relevance.sum() + parts.control.sum()).backward()
assert all(isinstance(value, DTensor) for value in layers.parameters())
launch.leave(accelerator)
"""


def test_layers_are_shards_again_once_they_have_computed(atomic: Path, tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(PROJECT / "params" / "launch" / "fsdp.yaml"), "--num_processes", "2"]
    command += ["--main_process_port", "0", str(script), str(atomic)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_an_architecture_without_named_layers_cannot_be_sharded() -> None:
    with pytest.raises(CorecError, match="cannot be sharded: launch with params/launch/ddp.yaml"):
        devices.layer_names(torch.nn.Linear(2, 2))


def test_every_launch_names_its_command() -> None:
    files = sorted((PROJECT / "params" / "launch").iterdir())
    assert [file.stem for file in files] == ["ddp", "fsdp"]
    for file in files:
        assert (
            f"--config_file params/launch/{file.name} -m corec.scale.launch --params params/amazon-electronics.yaml"
            in file.read_text()
        )
        assert yaml.safe_load(file.read_text())["num_processes"] == 4
    assert profiles.load(PROJECT / "params" / "amazon-electronics.yaml").reranker.batch_size == 4


def test_shards_together_give_the_same_scores_bit_for_bit(project: Path, atomic: Path, tmp_path: Path) -> None:
    world = World(atomic)
    model = world.build(world.params(eval_batch_size=3))
    whole = reranker.score_split(model, world.examples, "test", world.controls)
    kept = tmp_path / "shards"
    for number in (2, 0):
        part = reranker.score_split(model, world.examples, "test", world.controls, kept, (number, 3))["random-candidate"]
        assert np.isnan(part.control).any() and not np.isnan(part.control).all()
    (folder,) = kept.iterdir()
    windows = len(world.prepared.pools["test"].window)
    assert shards.gather(folder, windows) is None, "one is missing"
    reranker.score_split(model, world.examples, "test", world.controls, kept, (1, 3))
    joined = reranker.score_split(model, world.examples, "test", world.controls, kept)
    for protocol, scores in whole.items():
        for one, other in zip(scores, joined[protocol], strict=True):
            assert one.tobytes() == other.tobytes()
    path = folder / "1-of-3.npz"
    path.write_bytes(path.read_bytes()[:-9])
    assert shards.gather(folder, windows) is None, "a damaged file"
    other = world.build(world.params(eval_batch_size=2))
    assert shards.identity(other, world.prepared.pools["test"], []) != shards.identity(model, world.prepared.pools["test"], [])


def test_faults_of_a_shard_are_one_sentence(
    project: Path, start_stages: Callable[[Params, str], stages.Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--params", "params/tiny.yaml", "--of", "4", "--shard"]
    assert scale_shards.main([*arguments, "4"]) == 1
    assert "--shard is 4: give a number from 0 to 3" in capsys.readouterr().err
    start_stages(profiles.load("params/tiny.yaml"), "reranker")
    assert scale_shards.main([*arguments, "0"]) == 1
    assert "checkpoint.pt is missing: fine-tune the re-ranker first" in capsys.readouterr().err
