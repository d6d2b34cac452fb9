"""Requests that share a prefix, packed or kept, on several architectures: the scores that each request gets alone."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_reranker import World, textbook_scores, unlike_start
from transformers import AutoConfig, AutoModelForCausalLM

from corec import CorecError, backbones, machine, reranker
from corec.bench import engine as bench_engine
from corec.bench import large as bench_large
from corec.bench import neighbour
from corec.bench.plain import reranker as plain_reranker
from corec.reranker import engine, fused

LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"tie_word_embeddings": False},
    "qwen2": dict(LLAMA),
    "qwen3": LLAMA | {"head_dim": 16, "tie_word_embeddings": True},
    "mistral": dict(LLAMA),
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "granite": LLAMA | {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": LLAMA | {"logit_scale": 0.25},
}
OTHERS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "gemma2": LLAMA | {"head_dim": 16, "sliding_window": 8},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


@pytest.fixture
def world(atomic: Path) -> World:
    return World(atomic)


def folder(kind: str, where: Path) -> str:
    """A model of this architecture with small random weights and the tiny tokenizer, saved."""
    _, tokenizer = backbones.tiny_model()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SHAPES | OTHERS)[kind], vocab_size=len(tokenizer))
    backbones.save_whole(where / kind, AutoModelForCausalLM.from_config(config), tokenizer)
    return str(where / kind)


def alone(model: reranker.Reranker, world: World, window: int) -> np.ndarray:
    """Scores [R, K] of a window's requests, each by an ordinary forward of its own."""
    rows = [
        reranker.make_rows(model, world.examples, world.pools.take(np.array([window])), [request[[window]]])[0]
        for request in world.requests
    ]
    with torch.no_grad():
        return torch.stack([textbook_scores(model, row) for row in rows]).numpy()


@pytest.mark.parametrize("readout", ["late", "index"])
@pytest.mark.parametrize("kind", SHAPES)
def test_packed_and_kept_give_the_scores_of_one_request_alone(world: World, tmp_path: Path, kind: str, readout: str) -> None:
    model = world.build(world.params(backbone=folder(kind, tmp_path), readout=readout))
    assert model.packs
    unlike_start(model)
    packed = reranker.score(model, world.examples, world.pools, world.requests)
    for window in (0, 5):
        wanted = alone(model, world, window)
        np.testing.assert_allclose(packed[window], wanted, atol=1e-4)
        row = reranker.make_rows(
            model, world.examples, world.pools.take(np.array([window])), [r[[window]] for r in world.requests]
        )[0]
        prefix = engine.prefill(model, row)
        np.testing.assert_allclose(engine.answer(model, prefix, row).numpy(), wanted, atol=1e-4)
        one_by_one = [engine.answer(model, prefix, row.only(number))[0].numpy() for number in range(len(row.suffixes))]
        np.testing.assert_allclose(one_by_one, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("readout", ["late", "index"])
def test_merged_it_scores_alike_and_single_requests_too(
    world: World, tmp_path: Path, kind: str, readout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = world.build(world.params(backbone=folder(kind, tmp_path), readout=readout))
    unlike_start(model)
    wanted = reranker.score(model, world.examples, world.pools, world.requests)
    merged = engine.merge(model)
    assert (merged.fused is not None) == (kind in ("llama", "qwen2", "qwen3", "mistral"))
    np.testing.assert_allclose(reranker.score(merged, world.examples, world.pools, world.requests), wanted, atol=1e-4)
    row = reranker.make_rows(merged, world.examples, world.pools.take(np.array([3])), [r[[3]] for r in world.requests])[0]
    prefix = engine.prefill(merged, row)
    np.testing.assert_allclose(engine.answer(merged, prefix, row).numpy(), wanted[3], atol=1e-4)
    assert engine.merge(merged) is merged, "nothing to merge"
    if merged.fused:
        monkeypatch.setattr(fused, "FEW", 10_000)
        for turned, spelled in ((False, False), (True, False), (False, True)):  # all that depends on the machine
            monkeypatch.setattr(merged.fused, "turned", turned)
            monkeypatch.setattr(merged.fused, "spelled", (spelled, spelled))
            again = reranker.score(merged, world.examples, world.pools, world.requests)
            np.testing.assert_allclose(again, wanted, atol=1e-4)
            prefix = engine.prefill(merged, row)
            np.testing.assert_allclose(engine.answer(merged, prefix, row).numpy(), wanted[3], atol=1e-4)
    merged.prompter.limit = prefix.length + 1
    with pytest.raises(CorecError, match="exceeds the backbone's"):
        engine.answer(merged, prefix, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_are_tried_before_they_are_trusted(tmp_path: Path, dtype: torch.dtype) -> None:
    model, _ = backbones.load(folder("llama", tmp_path), dtype)
    assert fused.fuse(model) is not None
    model.base_model.layers[1].mlp.act_fn = torch.nn.ReLU()
    assert fused.fuse(model) is None, "one layer computes something else"
    for multiplier in ("residual_multiplier", "embedding_multiplier"):
        config = AutoConfig.for_model("granite", **LLAMA, vocab_size=64, **{multiplier: 0.5})
        other = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        assert fused.fuse(other) is None, "alike in its modules, not in what it does"


class OtherForSomeTokens(torch.nn.SiLU):
    """An activation that differs for the last four tokens only."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        made = super().forward(states)
        made[..., 8:, :] *= 1.5
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_at_few_tokens_is_enough_to_refuse(tmp_path: Path, dtype: torch.dtype) -> None:
    model, _ = backbones.load(folder("llama", tmp_path), dtype)
    model.base_model.layers[1].mlp.act_fn = OtherForSomeTokens()
    assert fused.fuse(model) is None


def test_fused_layers_share_the_models_weights(tmp_path: Path) -> None:
    model, _ = backbones.load(folder("qwen2", tmp_path), torch.float32)
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
    made = fused.fuse(model)
    assert made is not None
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert made.layers[0].qkv.weight.data_ptr() == model.base_model.layers[0].self_attn.q_proj.weight.data_ptr()


def test_the_plain_oracle_of_the_bench_gives_the_same_scores(world: World) -> None:
    model = world.build(world.params(readout="index"))
    unlike_start(model)
    packed = reranker.score(model, world.examples, world.pools, world.requests)
    row = reranker.make_rows(model, world.examples, world.pools.take(np.array([2])), [r[[2]] for r in world.requests])[0]
    for last_only in (True, False):
        with torch.no_grad():
            np.testing.assert_allclose(plain_reranker.scores(model, row, last_only).numpy(), packed[2], atol=1e-4)


def test_a_packed_prompt_stays_within_a_sliding_window(world: World, tmp_path: Path) -> None:
    SHAPES["mistral"]["sliding_window"] = 120
    model = world.build(world.params(backbone=folder("mistral", tmp_path)))
    del SHAPES["mistral"]["sliding_window"]
    unlike_start(model)
    scores = reranker.score(model, world.examples, world.pools, world.requests)
    np.testing.assert_allclose(scores[1], alone(model, world, 1), atol=1e-4)


@pytest.mark.parametrize("readout", ["late", "index"])
def test_ranking_order_in_bfloat16(world: World, readout: str) -> None:
    model = world.build(world.params(dtype="bfloat16", readout=readout))
    unlike_start(model)
    packed = reranker.score(model, world.examples, world.pools, world.requests)
    for window in range(8):
        row = reranker.make_rows(
            model, world.examples, world.pools.take(np.array([window])), [r[[window]] for r in world.requests]
        )[0]
        kept = engine.answer(model, engine.prefill(model, row), row).numpy()
        for ours in (packed[window], kept):
            wanted = alone(model, world, window)
            gap = np.abs(wanted[:, :, None] - wanted[:, None, :])
            swapped = (np.sign(ours[:, :, None] - ours[:, None, :]) != np.sign(wanted[:, :, None] - wanted[:, None, :])) & (
                gap > 0
            )
            assert gap[swapped].max(initial=0) < 0.02 * np.ptp(wanted), "only candidates of almost equal scores change places"


@pytest.mark.parametrize("kind", OTHERS)
def test_an_architecture_that_cannot_share_falls_back_with_one_warning(world: World, tmp_path: Path, kind: str) -> None:
    params = world.params(backbone=folder(kind, tmp_path))
    with pytest.warns(UserWarning, match="cannot share a prefix among requests: each request is computed separately"):
        model = world.build(params, adapted=kind != "mamba")  # peft has no LoRA for all of Mamba's layers
    assert not model.packs
    unlike_start(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scores = reranker.score(model, world.examples, world.pools, world.requests)
    np.testing.assert_allclose(scores[3], alone(model, world, 3), atol=1e-4)
    row = reranker.make_rows(model, world.examples, world.pools.take(np.array([0])), [world.requests[1][:1]])[0]
    with pytest.raises(CorecError, match="No prefix can be cached between requests: set reranker.request_position"):
        engine.prefill(model, row)


def test_an_architecture_that_takes_no_adapter(world: World, tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="cannot share"),
        pytest.raises(CorecError, match="reranker.backbone: MambaForCausalLM does not support LoRA"),
    ):
        world.build(world.params(backbone=folder("mamba", tmp_path)))


@pytest.mark.parametrize("readout", ["late", "index"])
def test_the_packed_gradient_is_the_plain_sum(world: World, readout: str) -> None:
    params = world.params(readout=readout)
    model = world.build(params)
    unlike_start(model)
    batch = reranker.training_batch(world.examples, params, 5)
    reranker.backward(model, reranker.make_rows(model, world.examples, batch.pools, batch.requests), batch.targets)
    packed = {name: value.grad.clone() for name, value in model.trainable().items()}
    for value in model.trainable().values():
        value.grad = None
    windows, requests = batch.targets.control.shape[:2]
    for window in range(windows):
        pools = batch.pools.take(np.array([window]))
        for place, request in enumerate(batch.requests):
            row = reranker.make_rows(model, world.examples, pools, [request[[window]]])[0]
            scores = textbook_scores(model, row)
            wanted = torch.from_numpy(batch.targets.control[window, place])
            (reranker.ranknet(scores[None], wanted[None]) / (windows * requests)).backward()
    for name, value in model.trainable().items():
        torch.testing.assert_close(packed[name], value.grad, atol=1e-4, rtol=1e-4)
    assert any(value.grad.abs().max() > 1e-3 for value in model.trainable().values())


def test_the_bench_of_the_large_shape_runs_in_small() -> None:
    found = {figure.name: figure for figure in bench_large.bench_large(tokens=200, k=5, requests=2)}
    rates = [found[f"{name}_vs_matmul_rate"].ratio for name in ("train", "train_checkpointing", "score")]
    assert all(rate is not None and rate > 0 for rate in rates)
    assert found["parameters"].baseline == (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU, a small twin: {machine.name()}"
    )
    assert found["one_request_cached"].baseline == "prefix of 180 tokens"


def test_what_a_pass_keeps_for_the_gradient_is_counted_once() -> None:
    weight, x = torch.ones(4, 4, requires_grad=True), torch.ones(1000, 4)
    assert bench_engine.kept_mb(lambda: (x @ weight) + (x @ weight), [weight]) == pytest.approx(0.016)
    assert bench_engine.kept_mb(lambda: ((x @ weight).exp() * 2).exp(), [weight]) == pytest.approx(3 * 0.016)


def test_the_bench_of_a_busy_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    beside: list[bool] = []

    def measured(variables: dict[str, str], steps: int) -> float:
        """A step takes 2 s, five times that beside another process, three times with a limit of the spins."""
        assert steps == 3
        return (10.0 if not variables else 6.3) if beside else (2.0 if not variables else 2.1)

    class Busy:
        def __enter__(self) -> None:
            beside.append(True)

        def __exit__(self, *_: object) -> None:
            beside.clear()

    monkeypatch.setattr(neighbour, "step_seconds", measured)
    monkeypatch.setattr(neighbour, "busy_process", Busy)
    found = {timing.name: timing for timing in neighbour.bench_neighbour(3, {"default": {}, "limited": {"GOMP_SPINCOUNT": "9"}})}
    assert found["step_busy_default"].ratio == 5
    assert found["busy_neighbour_slowdown"].ratio == pytest.approx(3) and found["spin_limit_cost"].ratio == pytest.approx(1.05)


def test_a_busy_process_ends_with_its_measurement() -> None:
    with neighbour.busy_process():
        pass
    names = list(neighbour.SETTINGS)
    assert names[0] == "default" and neighbour.SETTINGS[names[-1]] == {"GOMP_SPINCOUNT": "5000"}
