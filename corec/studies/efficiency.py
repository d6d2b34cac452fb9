"""What a ranked list costs: latency and throughput of retrieval and of re-ranking, and the price of a thousand.

A *list* is K items for one user under one request. Latency is that of one list at a time, from tokens to scores; throughput
that of lists computed together. The re-ranker has its adapter merged into the backbone, as one would serve it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from corec import controls, files, machine, pages, reranker, sasrec
from corec.data import Tables
from corec.params import Params
from corec.reranker import Examples, Reranker, Row, engine
from corec.sasrec import SASRec

SYSTEMS = ("SASRec alone", "re-ranking, from nothing", "re-ranking, prefix kept")


def measure(tables: Tables, prepared: controls.Prepared, retriever: SASRec, model: Reranker, params: Params) -> pd.DataFrame:
    """Time every one of :data:`SYSTEMS` for each K of ``efficiency.candidates`` and each number of control tokens.

    Requests are drawn from the retriever's own K candidates as in stage 03, one a user. Numbers of tokens take turns (see
    :func:`corec.machine.interleaved`). `model` is changed: its adapter is merged.

    Returns
    -------
    Columns ``system K n_tokens p50_ms p95_ms lists_per_s items_per_s prompt_tokens usd_per_1000 dataset backbone dtype device``;
    the price is that of the machine's time at `lists_per_s`. Retrieval has no `n_tokens`. ``prefix kept`` is missing where the
    order of the prompt or the architecture keeps nothing (see :func:`corec.reranker.engine.prefill`); its lists are made one
    after the other, and its price leaves out the prefix.
    """
    own, windows = params.efficiency, tables.windows[tables.windows["split"] == "test"]
    few = windows.sample(n=min(own.users, len(windows)), random_state=params.seed)
    merged = engine.merge(model)
    rng, rows = np.random.default_rng([params.seed, 9]), []
    for k in own.candidates:
        print(f"K = {k}", flush=True)
        start = machine.now()
        sasrec.candidates(retriever, tables.interactions, windows, params.sasrec.model_copy(update={"top_k": k}))
        rate = len(windows) / (machine.now() - start)
        each, found = retrieval(tables, few, retriever, params, k)
        rows.append({"system": SYSTEMS[0], "K": k, **each, "lists_per_s": rate})
        pools = controls.make_pools(few, found, k, params.seed)
        examples = Examples(dict(zip(few["window"], map(list, few["history"]), strict=True)), prepared)
        requests = {
            n: controls.draw_requests(pools, n, params.controls.protocol, prepared.table, rng) for n in params.controls.n_tokens
        }
        rows += [{"K": k, **row} for row in reranking(merged, examples, pools, requests, params)]
    table = pd.DataFrame(rows)
    hours = 1000 / table["lists_per_s"] / 3600
    table["items_per_s"], table["usd_per_1000"] = table["K"] * table["lists_per_s"], own.usd_per_hour * hours
    order = ["system", "K", "n_tokens", "p50_ms", "p95_ms", "lists_per_s", "items_per_s", "prompt_tokens", "usd_per_1000"]
    dtype = str(merged.causal.dtype).removeprefix("torch.")
    about = {"backbone": params.reranker.backbone, "dtype": dtype, "device": machine.name()}
    return table[order].astype({"n_tokens": "Int64"}).assign(dataset=params.data.dataset, **about)


def retrieval(
    tables: Tables, few: pd.DataFrame, retriever: SASRec, params: Params, k: int
) -> tuple[dict[str, float], pd.DataFrame]:
    """Latency of one user's K candidates, and the candidates of the windows `few` as stage 02 writes them."""
    wanted = sasrec.queries(tables.interactions, few, params.sasrec.max_length)

    def find(number: int) -> Any:
        place = number % len(few)
        state = sasrec.encode(retriever, [wanted.inputs[place]])
        return sasrec.retrieve(retriever, state, wanted.seen[place], np.array([len(wanted.seen[place])]), k)

    middle, high = machine.percentiles(find, params.efficiency.repeats)
    best = [find(place) for place in range(len(few))]
    found = {"candidates": [b.indices[0].cpu().numpy() for b in best], "scores": [b.values[0].cpu().numpy() for b in best]}
    return {"p50_ms": 1e3 * middle, "p95_ms": 1e3 * high}, pd.DataFrame({"window": few["window"].to_numpy(), **found})


def reranking(
    model: Reranker, examples: Examples, pools: controls.Pools, requests: Mapping[int, np.ndarray], params: Params
) -> list[dict[str, Any]]:
    """Rows of :func:`measure` for one K; `requests` holds for each number of tokens an array [windows, n]."""
    rows = {n: reranker.make_rows(model, examples, pools, [asked]) for n, asked in requests.items()}
    first = next(iter(rows.values()))
    with torch.inference_mode():
        works = [partial(forward, model, of) for of in rows.values()]
        times = machine.interleaved(works, params.efficiency.repeats)
    result: list[dict[str, Any]] = []
    for (n, of), (middle, high) in zip(rows.items(), times, strict=True):
        start = machine.now()
        reranker.score(model, examples, pools, [requests[n]])
        rate, length = len(of) / (machine.now() - start), np.mean([len(row.prefix) + len(row.suffixes[0]) for row in of])
        result.append(
            {
                "system": SYSTEMS[1],
                "n_tokens": n,
                "p50_ms": 1e3 * middle,
                "p95_ms": 1e3 * high,
                "lists_per_s": rate,
                "prompt_tokens": length,
            }
        )
    if model.packs and model.params.request_position == "after":
        kept = engine.prefill(model, first[0])
        times = machine.interleaved([partial(answer, model, kept, of) for of in rows.values()], params.efficiency.repeats)
        for (n, of), (middle, high) in zip(rows.items(), times, strict=True):
            length = np.mean([len(row.suffixes[0]) for row in of])
            result.append(
                {
                    "system": SYSTEMS[2],
                    "n_tokens": n,
                    "p50_ms": 1e3 * middle,
                    "p95_ms": 1e3 * high,
                    "lists_per_s": 1 / middle,
                    "prompt_tokens": length,
                }
            )
    return result


def forward(model: Reranker, rows: Sequence[Row], number: int) -> Tensor:
    """One list from nothing: scores of one of the rows."""
    return model.forward([rows[number % len(rows)]]).cpu()


def answer(model: Reranker, prefix: engine.Prefix, rows: Sequence[Row], number: int) -> Tensor:
    """One list from a kept prefix, under the request of one of the rows."""
    return engine.answer(model, prefix, rows[number % len(rows)].suffixes).cpu()


def draw(table: pd.DataFrame) -> Figure:
    """Latency and throughput by K, one line a system, one point a number of control tokens."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    for axis, name, label in zip(axes, ("p50_ms", "lists_per_s"), ("median ms a list", "lists a second"), strict=True):
        sns.lineplot(table, x="K", y=name, hue="system", errorbar=("pi", 100), marker="o", legend=axis is axes[1], ax=axis)
        axis.set(ylabel=label, yscale="log", xticks=sorted(table["K"].unique()))
    axes[1].legend(bbox_to_anchor=(1, 0.5), loc="center left", frameon=False)
    return figure


def keep(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the table and its picture; returns the files."""
    written = [folder / "efficiency.csv", folder / "efficiency.png"]
    files.write_text(written[0], table.to_csv(index=False, float_format="%.4g"))
    draw(table).savefig(written[1], dpi=130)
    plt.close()
    return written + pages.write(folder)
