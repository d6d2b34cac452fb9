"""``python -m corec.bench engine``: many requests of a user per forward pass, compared with one request at a time."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from corec import controls, data, machine, params, paths, profiles, reranker
from corec.bench.clock import Timing
from corec.bench.plain import reranker as plain
from corec.reranker import engine
from corec.reranker.fused import fuse

REQUESTS = 8


def world(k: int, windows: int) -> tuple[Any, Any, Any]:
    """Settings, examples and an untrained re-ranker of the default run, with K random candidates in every pool."""
    settings = profiles.load(paths.root() / "params" / "ml-100k-ranknet.yaml")
    few = params.MaxWindows(train=windows, valid=1, test=windows)
    own = settings.controls.model_copy(update={"k": k, "max_windows": few, "train_truth": "any"})
    settings = settings.model_copy(update={"controls": own})
    tables = data.prepare(settings.data)
    rng, n_items = np.random.default_rng(0), len(tables.items)
    some = tables.windows.groupby("split").sample(n=windows, random_state=0)
    found = [rng.permutation(np.setdiff1d(np.arange(1, n_items + 1), history))[:k] for history in some["history"]]
    frame = pd.DataFrame({"window": some["window"], "candidates": found, "scores": [np.arange(k, 0.0, -1)] * len(found)})
    prepared = controls.prepare(some, frame, tables.items, own, seed=0)
    model = reranker.build(tables.items, prepared.vocabulary, settings.reranker, seed=0)
    return settings, reranker.load_examples(some, prepared), model


def products(model: Any, batch: int, length: int) -> tuple[Callable[[], None], float]:
    """Function that computes the bare matrix products of a forward pass over [batch, length] tokens, and their FLOP."""
    config = model.config
    width, heads, keys, layers = (
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers,
    )  # fmt: skip
    head, inner, tokens = width // heads, config.intermediate_size, batch * length
    like = {"dtype": model.dtype, "device": model.device}
    shapes = [(width, width), (width, keys * head), (width, keys * head), (width, width)]
    shapes += [(width, inner), (width, inner), (inner, width)]
    inputs = {size: torch.randn(tokens, size, **like) for size in (width, inner)}
    weights = [torch.randn(out, into, **like) for into, out in shapes]
    query, square = torch.randn(batch * heads, length, head, **like), torch.randn(batch * heads, length, length, **like)

    def run() -> None:
        for _ in range(layers):
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)
            query @ query.mT
            square @ query

    flop = layers * (2 * tokens * sum(into * out for into, out in shapes) + 4 * batch * heads * length**2 * head)
    return run, flop


def bench_engine(k: int = 20, windows: int = 16) -> Iterator[Timing]:
    """Time scoring, cached prefixes and training, compared with the reference implementations and with bare matrix products."""
    settings, examples, model = world(k, windows)
    pools, table = examples.prepared.pools["test"], examples.prepared.vocabulary
    rng = np.random.default_rng(1)
    lengths = [1 + place % 3 for place in range(REQUESTS)]
    requests = [controls.draw_requests(pools, n, "random-candidate", table, rng) for n in lengths]
    rows = reranker.make_rows(model, examples, pools, requests)
    yield Timing("cores", os.cpu_count() or 1, "", machine.name())
    yield Timing("prefix_tokens", float(np.mean([len(row.prefix) for row in rows])), "tokens")
    yield Timing("request_tokens", float(np.mean([len(s) for row in rows for s in row.suffixes])), "tokens")
    yield from training(settings, examples, model)
    model.model.eval()
    with torch.inference_mode():
        some = np.arange(model.params.eval_batch_size)  # the reference is slow: both score the first few users only
        few, asked = pools.take(some), [request[some] for request in requests]
        ours = machine.seconds(lambda: reranker.score(model, examples, few, asked)) / len(some)
        for name, last in (("score_8_vs_full_logits", False), ("score_8_vs_last_logits", True)):
            slow = machine.seconds(lambda: [plain.scores(model, rows[i], last) for i in some]) / len(some)  # noqa: B023
            yield Timing(name, 1 / ours, "users/s", f"one forward a request, {1 / slow:.2f}", slow / ours)
        whole, _ = machine.percentiles(lambda i: plain.scores(model, single(rows, i), True), 16)
        merged = engine.merge(model)
        yield from rate(merged, rows)
    yield from one_by_one(merged, rows, whole)
    yield from against_the_library(merged, rows)


def single(rows: list[reranker.Row], number: int) -> reranker.Row:
    """Return the first row with one of its requests only."""
    return rows[0].only(number % REQUESTS)


@torch.inference_mode()
def one_by_one(model: reranker.Reranker, rows: list[reranker.Row], whole: float) -> Iterator[Timing]:
    """Time single requests with a cached prefix.

    Parameters
    ----------
    model
        Re-ranker with a merged adapter.
    rows
        Rows with :data:`REQUESTS` requests each.
    whole
        Seconds of a whole forward pass of the reference implementation, with the adapter not merged.
    """
    prefix = engine.prefill(model, rows[0])
    middle, high = machine.percentiles(lambda i: engine.answer(model, prefix, single(rows, i)), 80)
    yield Timing("one_request_cached_vs_forward", 1e3 * middle, "ms", f"whole forward, {1e3 * whole:.0f} ms", middle / whole)
    yield Timing("one_request_cached_p95", 1e3 * high, "ms")
    same, _ = machine.percentiles(lambda i: plain.scores(model, single(rows, i), True), 16)
    yield Timing("one_request_cached_vs_merged", 1e3 * middle, "ms", f"whole forward, merged, {1e3 * same:.0f} ms", middle / same)
    yield Timing("prefill", 1e3 * machine.seconds(lambda: engine.prefill(model, rows[0])), "ms")
    ours = machine.seconds(lambda: model.forward(rows[:8])) / 8
    yield Timing("score_8_merged", 1 / ours, "users/s")


@torch.inference_mode()
def against_the_library(model: reranker.Reranker, rows: list[reranker.Row]) -> Iterator[Timing]:
    """The fused layers against transformers' own with its SDPA attention, plain and compiled by ``torch.compile``.

    Adapter merged; a batch of packed rows, and one request behind a kept prefix. The start is the time until both have been
    computed once: of the fused layers with the trials that make them, of ``torch.compile`` with a fresh cache.
    """
    if model.fused is None:
        return
    batch = sorted(rows, key=lambda row: len(row.prefix))[: model.params.eval_batch_size]
    library = replace(model, fused=None)
    base = library.causal.base_model
    compiled = torch.compile(base, dynamic=True, options={"fx_graph_cache": False})
    ways = {"fused": (model, base), "sdpa": (library, base), "compile": (library, compiled)}
    started: dict[str, float] = {}
    scored, answered = {}, {}
    for name, (way, layers) in ways.items():
        setattr(way.causal, way.causal.base_model_prefix, layers)
        try:
            start = machine.now()
            if name == "fused":
                fuse(model.causal)
            prefix = engine.prefill(way, rows[0])
            works = [partial(way.forward, batch), partial(engine.answer, way, prefix, rows[0].only(0))]
            for work in works:
                work()
            started[name] = machine.now() - start
            scored[name] = machine.seconds(works[0]) / len(batch)
            answered[name] = machine.percentiles(lambda i: engine.answer(way, prefix, single(rows, i)), 40)[0]  # noqa: B023
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:  # no compiler, say
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
        finally:
            setattr(way.causal, way.causal.base_model_prefix, base)
    for name in ("sdpa", "compile"):
        if name not in answered:
            continue
        ratio = scored[name] / scored["fused"]
        yield Timing(f"score_8_fused_vs_{name}", 1 / scored["fused"], "users/s", f"transformers, {1 / scored[name]:.2f}", ratio)
        ratio = answered[name] / answered["fused"]
        label = f"transformers, {1e3 * answered[name]:.0f} ms"
        yield Timing(f"one_request_fused_vs_{name}", 1e3 * answered["fused"], "ms", label, ratio)
        ratio = started[name] / started["fused"]
        yield Timing(f"start_fused_vs_{name}", started["fused"], "s", f"transformers, {started[name]:.1f} s", ratio)


def rate(model: reranker.Reranker, rows: list[reranker.Row]) -> Iterator[Timing]:
    """FLOP/s of a batch of packed rows of similar length, compared with bare matrix products; shares of time by operation."""
    batch = sorted(rows, key=lambda row: len(row.prefix))[: model.params.eval_batch_size]
    size = reranker.collate(batch, 0, "end").ids.shape
    run, flop = products(model.causal, size[0], size[1])
    bare, ours = machine.seconds(run), machine.seconds(lambda: model.forward(batch))
    label = f"bare products, {flop / bare / 1e9:.0f}"
    yield Timing("score_vs_matmul_rate", flop / ours / 1e9, "GFLOP/s", label, bare / ours)
    yield from shares("scoring", lambda: model.forward(batch))


def shares(name: str, work: Callable[[], object]) -> Iterator[Timing]:
    """Shares of the time of `work` by operation, the ten largest."""
    with torch.profiler.profile() as profile:
        work()
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:10]:
        yield Timing(f"{name}: share of {event.key}", event.self_cpu_time_total / total, "", f"{event.count} calls")


def training_rate(model: reranker.Reranker, rows: list[reranker.Row], seconds: float) -> Timing:
    """FLOP/s of a training step that takes `seconds`, compared with the rate of the bare products of a forward pass.

    Counted are the products with the frozen weights and their gradients with respect to the inputs (4 FLOP a weight and token;
    no gradient of a frozen weight is computed), and of attention two products forward and four backward, over the lower triangle.
    Padding and the products of LoRA do not count.
    """
    size = model.params.micro_batch
    config, lengths = model.causal.config, [len(row.prefix) + sum(map(len, row.suffixes)) for row in rows]
    run, flop = products(model.causal, size, max(lengths))
    attention = 4 * config.num_hidden_layers * config.hidden_size  # FLOP of the two products, for each query and key
    weights = (flop - attention * size * max(lengths) ** 2) / (size * max(lengths))  # FLOP for each token
    done = 2 * weights * sum(lengths) + 3 * attention * sum(length * (length + 1) / 2 for length in lengths)
    bare = flop / machine.seconds(run)
    label = f"bare products, {bare / 1e9:.0f}; {sum(lengths) / seconds:.0f} tokens/s"
    return Timing("train_vs_matmul_rate", done / seconds / 1e9, "GFLOP/s", label, done / seconds / bare)


def kept_mb(work: Callable[[], object], weights: Iterable[Tensor]) -> float:
    """MB that a forward pass stores for the backward pass; each storage counts once, `weights` do not count."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = work()  # while it is referenced, no storage is reused
    del made
    return sum(sizes.values()) / 1e6


def training(settings: Any, examples: Any, model: reranker.Reranker) -> Iterator[Timing]:
    """Time a training step of the default run, compared with one request per forward pass, in supervised requests per second."""
    model.model.train()
    batch = reranker.training_batch(examples, settings, settings.reranker.curriculum_steps)
    rows = reranker.make_rows(model, examples, batch.pools, batch.requests)
    count = batch.targets.strength.size
    step = machine.seconds(lambda: reranker.backward(model, rows, batch.targets))
    ours = step / count
    yield training_rate(model, rows, step)
    yield from shares("training", lambda: reranker.backward(model, rows, batch.targets))
    library = replace(model, fused=None)
    slow = machine.seconds(lambda: reranker.backward(library, rows, batch.targets))
    yield Timing("train_fused_vs_library", step, "s", f"layers of transformers and peft, {slow:.2f} s", slow / step)
    yield Timing("train_peak_memory", machine.peak_memory_mb(), "MB")

    some, weights = rows[: model.params.micro_batch], list(model.model.parameters())
    requests = sum(len(row.suffixes) for row in some)
    alone = kept_mb(lambda: plain.scores(model, single(some, 0), False), weights)
    label = f"{requests} requests in a pass; the plain way, one: {alone:.0f} MB"
    yield Timing("train_activations", kept_mb(lambda: model.forward(some), weights), "MB", label)

    def one_at_a_time(last_only: bool) -> None:
        for row, control in zip(rows, batch.targets.control, strict=True):
            place = int(rng.integers(len(row.suffixes)))
            wanted = torch.from_numpy(control[place]).to(model.device)
            logits = plain.scores(model, row.only(place), last_only)
            reranker.ranknet(logits, wanted[None]).backward()

    rng = np.random.default_rng(0)
    for name, last in (("train_requests_vs_plain", False), ("train_requests_vs_last_logits", True)):
        slow = machine.seconds(partial(one_at_a_time, last)) / len(rows)
        yield Timing(name, 1 / ours, "requests/s", f"one a forward, {1 / slow:.2f}", slow / ours)
