"""``python -m corec.bench large``: training and scoring with the shape of a large model, compared with the matmul rate.

The weights are random: speed does not depend on their values, so no gated model is needed.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from corec import CorecError, machine, reranker
from corec.bench.clock import Timing
from corec.params import RerankerParams
from corec.reranker import Row, engine
from corec.scale import estimate

MODEL = "meta-llama/Meta-Llama-3-8B"

TWIN = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 4096}


def random_rows(windows: int, k: int, requests: int, tokens: int, rng: np.random.Generator) -> list[Row]:
    """Rows of random tokens: a history, `k` candidate lines of equal length and together as long as it, and the requests.

    Parameters
    ----------
    windows
        Number of rows.
    k, requests
        Candidates and requests per row; a request has ten tokens.
    tokens
        Length of a row, its requests included.
    rng
        Random generator.
    """
    prefix = tokens - 10 * requests
    line = prefix // (2 * k)
    spans = [(prefix - (k - place) * line, prefix - (k - place - 1) * line) for place in range(k)]
    ids = rng.integers(3, 4000, (windows, tokens))
    return [Row(row[:prefix].tolist(), spans, row[prefix:].reshape(requests, 10).tolist()) for row in ids]


def large(params: RerankerParams) -> reranker.Reranker:
    """Build a re-ranker with random weights and the shape of :data:`MODEL`, or of the small :data:`TWIN` without a GPU."""
    device = machine.device()
    config = LlamaConfig(**estimate.SHAPES[MODEL] | ({} if device == "cuda" else TWIN))
    dtype = machine.resolve_dtype(params.dtype)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        head = reranker.Head(config.hidden_size, config.num_hidden_layers + 1, params)
    model = reranker.adapt(model, list(range(config.vocab_size - 64, config.vocab_size)), params).to(device)
    # Rows come from `random_rows`, so stubs of the tokenizer and the prompter are enough.
    tokenizer, prompter = SimpleNamespace(pad_token_id=0), SimpleNamespace(limit=config.max_position_embeddings)
    return reranker.Reranker(model, tokenizer, head, cast(Any, prompter), params)


def forward_flop(config: Any, rows: int, tokens: int) -> float:
    """Floating-point operations of a forward pass as in :func:`corec.scale.estimate.plan`, without logits.

    Attention counts half, because of the causal mask.

    Parameters
    ----------
    config
        Configuration of a Llama-like model.
    rows, tokens
        Number of rows and their length.
    """
    width, heads, keys, inner = (
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.intermediate_size,
    )  # fmt: skip
    weights = width * width * (2 + 2 * keys / heads) + 3 * width * inner
    return float(rows * config.num_hidden_layers * (2 * weights * tokens + 2 * width * tokens**2))


def matmul_rate(size: int, dtype: torch.dtype, device: str) -> float:
    """Measured FLOP/s of the product of two [size, size] matrices."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / machine.seconds(lambda: left @ right)


def peak_memory_mb() -> float:
    """Peak memory in MB (10^6 bytes): allocated on the GPU since the last reset, or of the process without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else machine.peak_memory_mb()


def bench_large(tokens: int = 2048, k: int = 20, requests: int = 16, windows: int = 2) -> Iterator[Timing]:
    """Time training with and without gradient checkpointing, packed scoring, and one request against a cached prefix.

    The re-ranker has the default settings (`late`, requests after the candidates). Training is the forward and backward pass,
    without the optimiser, which updates only a few million parameters. Attention counts half, because of the causal mask;
    in ``bench engine`` it counts in full, as in its bare products.

    Parameters
    ----------
    tokens
        Length of a row, its requests included; at most 512 without a GPU.
    k, requests
        Candidates and requests per row.
    windows
        Rows of a training step, of which ``micro_batch`` share a pass, and of a scoring pass.
    """
    gpu = torch.cuda.is_available()
    if not gpu:
        tokens = min(tokens, 512)
    params = RerankerParams()
    model = large(params)
    config, rng = model.causal.config, np.random.default_rng(0)
    name = ("" if gpu else "no GPU, a small twin: ") + machine.name()
    yield Timing("parameters", float(sum(value.numel() for value in model.model.parameters())), "", name)
    bare = matmul_rate(8192 if gpu else 1024, model.causal.dtype, machine.device())
    yield Timing("matmul_rate", bare / 1e12, "TFLOP/s", name)
    rows = random_rows(windows, k, requests, tokens, rng)
    targets = reranker.Targets.of_control(rng.integers(0, 4, (windows, requests, k)).astype(np.float32))
    flop = forward_flop(config, windows, tokens)
    model.model.train()
    for label, checkpointing in (("train", False), ("train_checkpointing", True)):
        if checkpointing:
            model.causal.gradient_checkpointing_enable({"use_reentrant": False})
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = machine.seconds(lambda: reranker.backward(model, rows, targets))
        except CorecError:
            yield Timing(f"{label}_out_of_memory", peak_memory_mb(), "MB")
            continue
        rate = 2 * flop / seconds  # forward pass and gradient of the states; frozen weights need no gradient
        yield Timing(f"{label}_vs_matmul_rate", rate / 1e12, "TFLOP/s", f"{1e3 * seconds:.0f} ms a pass", rate / bare)
        yield Timing(f"{label}_peak_memory", peak_memory_mb(), "MB")
    merged = engine.merge(model)
    with torch.inference_mode():
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = machine.seconds(lambda: merged.forward(rows))
        rate = flop / seconds
        yield Timing("score_vs_matmul_rate", rate / 1e12, "TFLOP/s", f"{1e3 * seconds:.0f} ms a pass", rate / bare)
        yield Timing("score_peak_memory", peak_memory_mb(), "MB")
        prefix = engine.prefill(merged, rows[0])
        engine.answer(merged, prefix, rows[0].only(0))
        times = []
        for number in range(requests):
            start = machine.now()
            engine.answer(merged, prefix, rows[0].only(number))
            times.append(machine.now() - start)
    yield Timing("one_request_cached", 1e3 * float(np.median(times)), "ms", f"prefix of {prefix.length} tokens")
