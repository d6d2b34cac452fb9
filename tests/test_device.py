"""Where no GPU is: the computations on torch's device `meta`, whose tensors have no values, with a look at every operation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_reranker import READOUTS, World
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corec import reranker
from corec.reranker import engine, fused


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices (scalars aside), as a GPU would; `meta` itself lets a product pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        devices = {each.device for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.ndim}
        assert len(devices) < 2, f"{func} meets {devices}"
        return func(*args, **kwargs or {})


@pytest.fixture
def world(atomic: Path) -> World:
    return World(atomic)


def moved(world: World, **changes: object) -> reranker.Reranker:
    model = world.build(world.params(**changes))
    for module in (model.model, model.head):
        module.to("meta")
    return replace(model, fused=None)  # as built on a GPU


def test_two_devices_are_refused() -> None:
    with OneDevice(), pytest.raises(AssertionError, match="aten.mm"):
        torch.ones(2, 2) @ torch.ones(2, 2, device="meta")


@pytest.mark.parametrize("fused_too", [False, True])
@pytest.mark.parametrize("changes", [*READOUTS, {"gradient_checkpointing": True}], ids=str)
def test_training_and_scoring_keep_to_one_device(
    world: World, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], fused_too: bool
) -> None:
    model = moved(world, **changes)
    rows = reranker.make_rows(model, world.examples, world.pools, world.requests)
    monkeypatch.setattr(Tensor, "item", lambda loss: 0.0 if loss.is_meta else pytest.fail("a loss of the CPU"))
    model.model.train()
    if fused_too:
        model.fused = fused.Fused(model.causal)
    with OneDevice():
        reranker.backward(model, rows, reranker.Targets.of_control(np.ones((8, 3, 6))))
        assert all(value.grad is not None and value.grad.is_meta for value in model.trainable().values())
        with torch.no_grad():
            assert model.forward(rows[:2]).is_meta


@pytest.mark.parametrize("readout", ["late", "index"])
@pytest.mark.parametrize("merged", [False, True])
def test_kept_prefixes_stay_on_their_device(world: World, readout: str, merged: bool) -> None:
    model = moved(world, readout=readout)
    row = reranker.make_rows(model, world.examples, world.pools, world.requests)[0]
    if merged:
        model.model = model.model.merge_and_unload()
        model.fused = fused.Fused(model.model)
    with OneDevice():
        prefix = engine.prefill(model, row)
        scores = engine.answer(model, prefix, row)
    assert scores.is_meta and scores.shape == (len(row.suffixes), 6)
