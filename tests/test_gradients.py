"""The fused layers in training: gradients against finite differences and against the layers of transformers and peft."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_engine import folder
from test_reranker import World, unlike_start
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig

from corec import reranker
from corec.reranker import engine, gradients
from corec.reranker.gradients import Lora


@pytest.fixture
def world(atomic: Path) -> World:
    return World(atomic)


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_a_projection_with_lora_has_the_gradients_of_its_formula() -> None:
    x, weight, bias = some(2, 3, 5), some(7, 5).detach(), some(7).detach()
    down, up = [some(2, 5), some(2, 5)], [some(4, 2), some(3, 2)]

    def work(x: Tensor, *matrices: Tensor) -> Tensor:
        return gradients.adapted(x, weight, bias, Lora(list(matrices[:2]), list(matrices[2:]), 0.5))

    parts = [F.linear(F.linear(x, a), b) for a, b in zip(down, up, strict=True)]
    torch.testing.assert_close(work(x, *down, *up), F.linear(x, weight, bias) + 0.5 * torch.cat(parts, dim=-1))
    assert torch.autograd.gradcheck(work, (x, *down, *up))


def test_norm_and_gated_activation_have_the_gradients_of_their_formulas() -> None:
    x, weight = some(2, 3, 6), some(6).detach()
    torch.testing.assert_close(gradients.norm(x, weight, 1e-5), F.rms_norm(x, (6,), weight, 1e-5))
    torch.testing.assert_close(gradients.gated(x), F.silu(x[..., :3]) * x[..., 3:])
    assert torch.autograd.gradcheck(lambda x: gradients.norm(x, weight, 1e-5).double(), (x,), atol=1e-4)
    assert torch.autograd.gradcheck(gradients.gated, (x,))


@pytest.mark.parametrize("cached", [0, 3])
@pytest.mark.parametrize("size", [2, 3, 100])
def test_attention_in_blocks_gives_the_output_of_torchs_kernel_and_the_gradients_of_its_formula(cached: int, size: int) -> None:
    query, key, value = some(2, 4, 5, 3), some(2, 2, cached + 5, 3), some(2, 2, cached + 5, 3)
    mask = torch.ones(2, 1, 5, cached + 5, dtype=torch.bool).tril(cached)
    mask[1, :, 3, cached + 1] = False
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill_(~mask, -torch.inf)
    blocks = gradients.blocks_of(bias, 2, size)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(gradients.attention(query, key, value, blocks, 0.3), expected)
    assert torch.autograd.gradcheck(lambda *parts: gradients.attention(*parts, blocks, 0.3), (query, key, value))


def both_ways(world: World, model: reranker.Reranker) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of a training step by the fused layers, then by those of transformers and peft."""
    rows = reranker.make_rows(model, world.examples, world.pools, world.requests)
    wanted = reranker.Targets.of_control(np.random.default_rng(0).integers(0, 3, (8, 3, 6)).astype(np.float32))
    found = []
    for layers in (model.fused, None):
        model.fused = layers
        loss = reranker.backward(model, rows, wanted)
        found.append((loss, {name: value.grad.clone() for name, value in model.trainable().items() if value.grad is not None}))
        for value in model.trainable().values():
            value.grad = None
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("spelled", [False, True])
def test_a_training_step_has_the_loss_and_the_gradients_of_the_library(
    world: World, tmp_path: Path, kind: str, spelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = world.build(world.params(backbone=folder(kind, tmp_path)))
    unlike_start(model)
    assert model.fused is not None
    monkeypatch.setattr(model.fused, "spelled", (spelled, spelled))
    monkeypatch.setattr(gradients, "BLOCK", 16)
    (fused_loss, fused_gradients), (loss, expected) = both_ways(world, model)
    assert fused_loss == pytest.approx(loss, abs=1e-5)
    assert fused_gradients.keys() == expected.keys() == model.trainable().keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(fused_gradients[name], gradient, atol=2e-5, rtol=1e-3, msg=name)


def test_a_training_step_in_bfloat16_is_that_of_the_library_up_to_rounding(world: World) -> None:
    model = world.build(world.params(dtype="bfloat16"))
    unlike_start(model)
    assert model.fused.spelled is True, "the same on every machine, so that training is resumed with the same numbers"
    (fused_loss, fused_gradients), (loss, expected) = both_ways(world, model)
    fused_gradient, gradient = (
        torch.cat([part.flatten().float() for part in parts.values()]) for parts in (fused_gradients, expected)
    )
    assert fused_loss == pytest.approx(loss, rel=0.02)
    assert torch.cosine_similarity(fused_gradient, gradient, dim=0) > 0.99


def test_layers_that_were_left_behind_on_another_device_are_not_used(world: World) -> None:
    model = world.build(world.params())
    for module in (model.model, model.head):
        module.to("meta")
    rows = reranker.make_rows(model, world.examples, world.pools, world.requests)
    with torch.no_grad():
        assert model.fused is not None and model.forward(rows[:2]).is_meta


def test_a_merged_adapter_counts_once_in_the_model_it_was_merged_in(world: World) -> None:
    model = world.build(world.params())
    unlike_start(model)
    wanted = reranker.score(model, world.examples, world.pools, world.requests)
    merged = engine.merge(model)
    for each in (model, merged):
        np.testing.assert_allclose(reranker.score(each, world.examples, world.pools, world.requests), wanted, atol=1e-4)


def test_dropout_of_the_backbone_is_left_to_the_library(world: World, tmp_path: Path) -> None:
    path = folder("llama", tmp_path)
    config = AutoConfig.from_pretrained(path)
    config.attention_dropout = 0.5
    config.save_pretrained(path)
    assert world.build(world.params(backbone=path)).fused is None


def test_an_adapter_of_another_kind_is_left_to_the_library(world: World) -> None:
    assert world.build(world.params()).fused is not None
    for changes in ({"lora_dropout": 0.1}, {"gradient_checkpointing": True}):
        model = world.build(world.params(**changes))
        assert model.fused is None
        rows = reranker.make_rows(model, world.examples, world.pools, world.requests)
        assert np.isfinite(reranker.backward(model, rows, reranker.Targets.of_control(np.ones((8, 3, 6), np.float32))))


def test_a_loaded_adapter_is_fused_again(world: World, tmp_path: Path) -> None:
    settings = world.params()
    model = world.build(settings)
    unlike_start(model)
    reranker.save(model, pd.DataFrame({"step": [0]}), tmp_path)
    loaded = reranker.load(tmp_path, world.tables.items, world.prepared.vocabulary, settings.reranker)
    assert loaded.fused is not None
    scores = [reranker.score(each, world.examples, world.pools, world.requests) for each in (model, loaded)]
    np.testing.assert_array_equal(*scores)
