"""Cost of a ranked list: latency and throughput of retrieval and re-ranking, and price of 1000 lists.

A *list* is K items for one user under one request. Latency is measured for one list at a time, from token ids to scores;
throughput for lists computed in batches. The adapter of the re-ranker is merged into the backbone, as in deployment.
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

from corec import CorecError, controls, evaluation, files, machine, reranker, sasrec
from corec.data import Tables
from corec.evidence.features import Similarities, from_history, latest_items, similarity_tables
from corec.params import Params
from corec.reranker import Examples, Reranker, Row, engine
from corec.sasrec import SASRec
from corec.studies import keep_study

SYSTEMS = ("SASRec alone", "re-ranking, whole prompt", "re-ranking, cached prefix")
EVIDENCE = "evidence of the combiner"
# Rankers of notebook 05 that are priced, and the systems whose times they need.
PRICED = {
    "sasrec": SYSTEMS[:1],
    "rule": SYSTEMS[:1],
    "combiner": (SYSTEMS[0], EVIDENCE),
    "rule+combiner": (SYSTEMS[0], EVIDENCE),
    "boost": (SYSTEMS[0], EVIDENCE),
    "corec": (SYSTEMS[0], EVIDENCE, SYSTEMS[1]),
    "corec, further request": (SYSTEMS[0], EVIDENCE, SYSTEMS[2]),
}


def measure(tables: Tables, prepared: controls.Prepared, retriever: SASRec, model: Reranker, params: Params) -> pd.DataFrame:
    """Time each of :data:`SYSTEMS` for each K of ``efficiency.candidates`` and each number of control tokens.

    Requests are drawn from the K candidates of the retriever as in stage 03, one per user. Timings of different numbers of
    control tokens are interleaved (see :func:`corec.machine.interleaved`). `model` is modified: its adapter is merged.

    Returns
    -------
    Columns ``system K n_tokens p50_ms p95_ms lists_per_s items_per_s prompt_tokens usd_per_1000 dataset backbone dtype device``.
    The price is that of the machine's time at `lists_per_s`. `n_tokens` is missing for retrieval, and for the evidence of a
    combiner (:data:`EVIDENCE`, computed one list at a time, without titles and the fitted model). The rows of
    ``re-ranking, cached prefix`` are absent if the order of the prompt or the architecture does not allow caching (see
    :func:`corec.reranker.engine.prefill`); their lists are computed one at a time, and their price excludes the prefix.
    """
    settings, windows = params.efficiency, tables.windows[tables.windows["split"] == "test"]
    sample = windows.sample(n=min(settings.users, len(windows)), random_state=params.seed)
    left = len(tables.items) - int(windows["position"].max())
    if max(settings.candidates) > left:
        raise CorecError(
            f"Parameter efficiency.candidates lists {max(settings.candidates)}, but some user has only {left} items of the "
            "catalogue left to see: lower it."
        )
    merged = engine.merge(model)
    with_evidence = params.evidence.combiner != "none"
    similar = similarity_tables(tables, prepared.vocabulary, params.evidence) if with_evidence else None
    rng, rows = np.random.default_rng([params.seed, 9]), []
    for k in settings.candidates:
        print(f"K = {k}", flush=True)
        start = machine.now()
        sasrec.candidates(retriever, tables.interactions, windows, params.sasrec.model_copy(update={"top_k": k}))
        rate = len(windows) / (machine.now() - start)
        latency, retrieved = retrieval(tables, sample, retriever, params, k)
        rows.append({"system": SYSTEMS[0], "K": k, **latency, "lists_per_s": rate})
        pools = controls.make_pools(sample, retrieved, k, params.seed)
        if similar is not None:
            rows.append({"system": EVIDENCE, "K": k, **evidence_time(tables, sample, pools, similar, params)})
        prior = dict.fromkeys(sample["window"], np.zeros(k, np.float32))  # timings do not depend on its values
        examples = Examples(dict(zip(sample["window"], map(list, sample["history"]), strict=True)), prepared, prior)
        requests = {
            n: controls.draw_requests(pools, n, params.controls.protocol, prepared.vocabulary, rng)
            for n in params.controls.n_tokens
        }
        rows += [{"K": k, **row} for row in reranking(merged, examples, pools, requests, params)]
    table = pd.DataFrame(rows)
    hours = 1000 / table["lists_per_s"] / 3600
    table["items_per_s"], table["usd_per_1000"] = table["K"] * table["lists_per_s"], settings.usd_per_hour * hours
    order = ["system", "K", "n_tokens", "p50_ms", "p95_ms", "lists_per_s", "items_per_s", "prompt_tokens", "usd_per_1000"]
    dtype = str(merged.causal.dtype).removeprefix("torch.")
    about = {"backbone": params.reranker.backbone, "dtype": dtype, "device": machine.name()}
    return table[order].astype({"n_tokens": "Int64"}).assign(dataset=params.data.dataset, **about)


def retrieval(
    tables: Tables, few: pd.DataFrame, retriever: SASRec, params: Params, k: int
) -> tuple[dict[str, float], pd.DataFrame]:
    """Latency of retrieval for one user, and the retrieved candidates.

    Parameters
    ----------
    tables, retriever, params
        Tables of stage 01, model of stage 02, settings of the run.
    few
        Windows that are timed.
    k
        Candidates per window.

    Returns
    -------
    Median and 95th percentile in ms (``p50_ms``, ``p95_ms``), and the candidates of the windows in the format of stage 02.
    """
    queries = sasrec.queries(tables.interactions, few, params.sasrec.max_length)

    def find(number: int) -> Any:
        place = number % len(few)
        state = sasrec.encode(retriever, [queries.inputs[place]])
        return sasrec.retrieve(retriever, state, queries.seen[place], np.array([len(queries.seen[place])]), k)

    middle, high = machine.percentiles(find, params.efficiency.repeats)
    best = [find(place) for place in range(len(few))]
    columns = {"candidates": [b.indices[0].cpu().numpy() for b in best], "scores": [b.values[0].cpu().numpy() for b in best]}
    return {"p50_ms": 1e3 * middle, "p95_ms": 1e3 * high}, pd.DataFrame({"window": few["window"].to_numpy(), **columns})


def evidence_time(
    tables: Tables, few: pd.DataFrame, pools: controls.Pools, similar: Similarities, params: Params
) -> dict[str, float]:
    """Time of the evidence of one list from the similarities of the items (``p50_ms``, ``p95_ms``, ``lists_per_s``).

    Parameters
    ----------
    tables, few, pools, similar
        Tables of stage 01, windows that are timed, their candidates, and the similarities of the items.
    params
        Settings of the run.
    """
    histories = latest_items(tables, few, params.evidence.history)

    def find(number: int) -> Any:
        place = number % len(few)
        part = slice(place, place + 1)
        return from_history(histories[part], pools.candidates[part], similar, params.evidence.recent)

    middle, high = machine.percentiles(find, params.efficiency.repeats)
    return {"p50_ms": 1e3 * middle, "p95_ms": 1e3 * high, "lists_per_s": 1 / middle}


def cost(table: pd.DataFrame, results: pd.DataFrame, params: Params) -> pd.DataFrame:
    """What control and relevance cost: CP and NDCG of the rankers of a run, with time and price of their lists.

    Parameters
    ----------
    table
        Result of :func:`measure`.
    results
        ``metrics.csv`` of the run, stage 05.
    params
        Settings of the run. The times are those of the K that is nearest to ``controls.k``, the K of the results.

    Returns
    -------
    Columns ``ranker n_tokens cp ndcg ms usd_per_1000 cp_gain ndcg_gain cp_gain_per_s ndcg_gain_per_s usd_per_1000_items``. `ms`
    is the sum of the median times of the systems that the ranker uses, and the price is that of this time; the gains are those
    over ``sasrec``, and per second of the added time; the last is the added price of 1,000 more items among the first k that meet
    the whole request.
    """
    k, rows = params.figures.k, []
    nearest = min(table["K"].unique(), key=lambda size: abs(size - params.controls.k))
    here = table[table["K"] == nearest]
    values = evaluation.pick(results, protocol=params.controls.protocol, k=k, metric=["cp", "ndcg"])
    for n in sorted(here["n_tokens"].dropna().unique()):
        part = here[here["n_tokens"].isna() | (here["n_tokens"] == n)].set_index("system")
        asked = values[(values["n_tokens"] == n) & ((values["metric"] == "ndcg") | (values["tau"] == n))]
        found = asked.pivot_table(index="model", columns="metric", values="value").reindex(columns=["cp", "ndcg"])
        for ranker, systems in PRICED.items():
            model = ranker.split(",")[0]
            if model in found.index and set(systems) - {EVIDENCE} <= set(part.index):
                used = part.loc[[system for system in systems if system in part.index]]
                price = params.efficiency.usd_per_hour / 3600 * used["p50_ms"].sum()  # ms a list are s for 1,000 lists
                rows.append((ranker, int(n), *found.loc[model], used["p50_ms"].sum(), price))
    frame = pd.DataFrame(rows, columns=["ranker", "n_tokens", "cp", "ndcg", "ms", "usd_per_1000"])
    base = frame[frame["ranker"] == "sasrec"].set_index("n_tokens")
    for name in ("cp", "ndcg"):
        frame[f"{name}_gain"] = frame[name] - frame["n_tokens"].map(base[name])
    seconds = (frame["ms"] - frame["n_tokens"].map(base["ms"])) / 1000
    for name in ("cp", "ndcg"):
        frame[f"{name}_gain_per_s"] = frame[f"{name}_gain"] / seconds.where(seconds > 0)
    more = frame["cp_gain"].where(frame["cp_gain"] > 0) * k  # items per list
    frame["usd_per_1000_items"] = (frame["usd_per_1000"] - frame["n_tokens"].map(base["usd_per_1000"])) / more
    return frame


def reranking(
    model: Reranker, examples: Examples, pools: controls.Pools, requests: Mapping[int, np.ndarray], params: Params
) -> list[dict[str, Any]]:
    """Rows of :func:`measure` for the re-ranker at one K.

    Parameters
    ----------
    model
        Re-ranker with a merged adapter.
    examples, pools
        Histories, and candidates of the windows that are timed.
    requests
        Array [windows, n] by number of control tokens n.
    params
        Settings of the run.
    """
    rows = {n: reranker.make_rows(model, examples, pools, [request]) for n, request in requests.items()}
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
        prefix = engine.prefill(model, first[0])
        times = machine.interleaved([partial(answer, model, prefix, of) for of in rows.values()], params.efficiency.repeats)
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
    """Score one list without a cached prefix: row `number`, modulo the number of rows."""
    return model.forward([rows[number % len(rows)]]).cpu()


def answer(model: Reranker, prefix: engine.Prefix, rows: Sequence[Row], number: int) -> Tensor:
    """Score one list with a cached prefix, under the request of row `number`, modulo the number of rows."""
    return engine.answer(model, prefix, rows[number % len(rows)]).cpu()


def draw(table: pd.DataFrame) -> Figure:
    """Plot latency and throughput against K, one line per system; bands are the range over numbers of control tokens."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    shown = table[table["system"] != EVIDENCE]
    for axis, name, label in zip(axes, ("p50_ms", "lists_per_s"), ("median ms a list", "lists per second"), strict=True):
        sns.lineplot(shown, x="K", y=name, hue="system", errorbar=("pi", 100), marker="o", legend=axis is axes[1], ax=axis)
        axis.set(ylabel=label, yscale="log", xticks=sorted(shown["K"].unique()))
    axes[1].legend(bbox_to_anchor=(1, 0.5), loc="center left", frameon=False)
    return figure


def keep(table: pd.DataFrame, costs: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the results of :func:`measure` and :func:`cost`, the plot and the results page to `folder`; return the paths."""
    files.write_csv(folder / "cost.csv", costs, "%.4g")
    return [*keep_study(table, draw(table), folder / "efficiency", "%.4g"), folder / "cost.csv"]
