"""Request before or after the candidates: read-outs trained for equal time with several seeds, evaluated on their own scores."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from corec import evaluation, files, pages, stages, style
from corec.intervals import by_user, with_differences
from corec.params import Params
from corec.reranker import Examples, Reranker, backward, build, make_rows, score, train, training_batch
from corec.studies import with_reranker

# The paper's order and the packed order. `candidate` needs states that attend to the request, so the request must precede the
# candidates; `late` compares candidates with a request that follows them. With one request per row, twice the windows fit.
ALONE = {"request_position": "before", "requests_per_window": 1, "batch_size": 8, "micro_batch": 4}

ORDERS: dict[str, dict[str, Any]] = {
    "index, before": {"readout": "index", **ALONE},
    "candidate, before": {"readout": "candidate", **ALONE},
    "index, after": {"readout": "index", "request_position": "after"},
    "late, after": {"readout": "late", "request_position": "after"},
}

K = 5  # cut-off of the metrics, if there are more candidates


def step_seconds(reranker: Reranker, examples: Examples, params: Params, plain: bool) -> float:
    """Seconds of the forward and backward pass of one training step, minimum of two.

    `plain` selects the prompt without titles and history. The gradients are discarded.
    """
    batch, times = training_batch(examples, with_reranker(params, curriculum_steps=int(plain)), 0), []
    reranker.model.train()
    for _ in range(2):
        started = time.monotonic()
        backward(reranker, make_rows(reranker, examples, batch.pools, batch.requests, plain), batch.targets)
        times.append(time.monotonic() - started)
    for value in reranker.trainable().values():
        value.grad = None
    return min(times)


def valid_cp(reranker: Reranker, examples: Examples, params: Params) -> float:
    """Mean CP@5 (all constraints met) of the non-empty validation requests; used to select the learning rate."""
    pools, lengths = examples.prepared.pools["valid"], [n for n in params.controls.n_tokens if n]
    requests = [examples.prepared.requests["valid", n] for n in lengths]
    scores = score(reranker, examples, pools, requests)
    values, cut = [], min(K, pools.candidates.shape[1] - 1)
    for place, (n, request) in enumerate(zip(lengths, requests, strict=True)):
        judged = evaluation.judge(pools, request, examples.prepared.vocabulary.values_of)
        values.append(evaluation.by_window(evaluation.order_by(scores[:, place]), judged, [cut])["cp", cut, n])
    return float(np.mean(values))


def train_order(
    items: pd.DataFrame, examples: Examples, params: Params, label: str, steps: tuple[int, int] | None, kept: Path
) -> tuple[int, int]:
    """Run one training of :func:`compare_orders` and write its results.

    Parameters
    ----------
    items, examples
        Items table and windows.
    params
        Settings of this training.
    label
        Name in progress lines.
    steps
        Steps on the plain and on the whole prompt. None: as many as fit into half of ``reranker.max_minutes`` each,
        estimated from trial steps.
    kept
        File of the results (npz with ``scores curve valid``), written atomically.

    Returns
    -------
    Steps on the plain and on the whole prompt.
    """
    reranker = build(items, examples.prepared.vocabulary, params.reranker, params.seed)
    if steps is None:
        times = [step_seconds(reranker, examples, params, plain) for plain in (True, False)]
        plain, whole = (max(1, round(30 * params.reranker.max_minutes / seconds)) for seconds in times)
        steps = plain, whole
    print(f"{label}: {steps[0]} plain and {steps[1]} whole steps", flush=True)
    curve = train(reranker, examples, with_reranker(params, curriculum_steps=steps[0], steps=steps[1]), None)
    valid = valid_cp(reranker, examples, params) if len(params.study.rates) > 1 else np.nan
    pools, requests = examples.prepared.pools["test"], [examples.prepared.requests["test", n] for n in params.controls.n_tokens]
    scores = score(reranker, examples, pools, requests, report=label)
    files.write_arrays(kept, scores=scores, curve=curve.to_numpy(dtype=float), valid=valid)
    return steps


def compare_orders(
    items: pd.DataFrame, examples: Examples, params: Params, folder: Path
) -> tuple[dict[tuple[str, int], np.ndarray], pd.DataFrame]:
    """Train variants of :data:`ORDERS` with `study.seeds` seeds, each for `study.order_minutes`, and score the test windows.

    Half of the time is for the plain prompt, half for the whole prompt; the numbers of steps are estimated from trial steps.
    If `study.rates` lists several factors of the learning rates, the first seed is trained with each, and the best factor
    on validation (:func:`valid_cp`) is used for the other seeds of the variant. Each finished training is stored in
    `folder`; a second call resumes after the last one.

    Returns
    -------
    Scores [windows, R, K] by variant and seed, for one request of each of ``controls.n_tokens``; and the learning curves (rows
    of :func:`corec.reranker.train`) with additional columns ``variant seed rate valid_cp requests``, where ``requests`` counts
    the supervised requests up to that step and ``valid_cp`` is NaN with a single rate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores, curves = {}, []
    settings, study, tuned = params.reranker, params.study, len(params.study.rates) > 1
    before = [stages.section(params, stage) for stage in ("data", "sasrec", "controls", "reranker")]
    names: Sequence[str] = study.orders or list(ORDERS)
    rates = {name: study.rates for name in names}
    steps: dict[str, tuple[int, int] | None] = dict.fromkeys(names)
    for seed in range(params.seed, params.seed + study.seeds):
        for name in names:
            changes, minutes, results = ORDERS[name], study.order_minutes, {}
            for rate in rates[name]:
                kept = folder / f"{name.replace(', ', '-')}-{seed}-{files.digest([before, changes, minutes, rate, tuned])}.npz"
                if not kept.exists():
                    rated = {key: rate * getattr(settings, key) for key in ("lr", "lr_head", "lr_rows")}
                    variant = with_reranker(params, **changes, **rated, max_minutes=minutes).model_copy(update={"seed": seed})
                    label = f"{name}, seed {seed}, rate × {rate:g}"
                    steps[name] = train_order(items, examples, variant, label, steps[name], kept)
                results[rate] = np.load(kept)
            best = max(results, key=lambda rate: float(results[rate]["valid"]))
            if len(results) > 1:
                print(f"{name}: rate × {best:g} is the best of {list(results)} on validation", flush=True)
            rates[name], scores[name, seed] = [best], results[best]["scores"]
            batch = {"batch_size": settings.batch_size, "requests_per_window": settings.requests_per_window} | changes
            requests_per_step = batch["batch_size"] * batch["requests_per_window"]
            for rate, saved in results.items():
                curve = pd.DataFrame(saved["curve"], columns=["step", "plain", "loss", "seconds", "tokens"])
                curve = curve.assign(variant=name, seed=seed, rate=rate, valid_cp=float(saved["valid"]))
                curves.append(curve.assign(requests=requests_per_step * (curve["step"] + 1)))
    return scores, pd.concat(curves, ignore_index=True)


def judge_orders(
    scores: Mapping[tuple[str, int], np.ndarray], examples: Examples, users: np.ndarray, params: Params
) -> pd.DataFrame:
    """CP@5 (all constraints met) and NDCG@5 by number of control tokens, from the re-ranker's scores only (alpha = 0).

    Parameters
    ----------
    scores
        First result of :func:`compare_orders`.
    examples
        Pools and requests.
    users
        User of each test window [windows].
    params
        Settings of the run.

    Returns
    -------
    Columns ``variant n_tokens metric value low high ahead ahead_low ahead_high lowest highest seeds n_users K minutes dataset``
    and ``protocol``: the mean over seeds with its bootstrap interval over users; the paired difference from the first
    variant of `scores` (``index, before``, unless `study.orders` names others) with its interval; the range over seeds.
    ``sasrec`` (the retriever's order) and ``rule`` are included for comparison.
    """
    first, _ = next(iter(scores))
    pools = examples.prepared.pools["test"]
    keys, columns, ranges = [], [], []
    for place, n in enumerate(params.controls.n_tokens):
        judged = evaluation.judge(pools, examples.prepared.requests["test", n], examples.prepared.vocabulary.values_of)
        cut = min(K, pools.candidates.shape[1] - 1)
        orders = {"sasrec": [evaluation.retriever_order(pools)], "rule": [evaluation.rule_order(pools, judged.met)]}
        for (name, _), array in scores.items():
            orders.setdefault(name, []).append(evaluation.order_by(array[:, place]))
        for metric, key in evaluation.control_and_relevance(cut, n).items():
            for name, of in orders.items():
                seeds = np.stack([evaluation.by_window(order, judged, [cut])[key] for order in of])  # [seeds, windows]
                each = by_user(seeds.T.astype(float), users).mean(axis=0)
                keys.append((name, n, metric))
                columns.append(seeds.mean(axis=0))
                ranges.append((each.min(), each.max(), len(of)))
    values = by_user(np.stack(columns, axis=1).astype(float), users)
    base = [keys.index((first, n, metric)) for _, n, metric in keys]
    numbers = with_differences(values, values - values[:, base], params.evaluation, params.seed)
    table = pd.DataFrame(keys, columns=["variant", "n_tokens", "metric"]).join(numbers)
    table[["lowest", "highest", "seeds"]] = ranges
    about = {"n_users": len(values), "K": pools.candidates.shape[1], "minutes": params.study.order_minutes}
    return table.astype({"seeds": int}).assign(dataset=params.data.dataset, protocol=params.controls.protocol, **about)


def keep_orders(table: pd.DataFrame, curves: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the tables of :func:`judge_orders` and :func:`compare_orders`, their plot and the results page.

    Returns
    -------
    Paths of the files.
    """
    written = [folder / "orders.csv", folder / "order_curves.csv", folder / "orders.png"]
    for path, rows in zip(written, (table, curves), strict=False):
        files.write_csv(path, rows, "%.5g")
    files.write_picture(written[2], draw_orders(curves, table))
    plt.close()
    pages.write_study(folder)
    return written


def draw_orders(curves: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Plot the training loss against time and supervised requests, and CP@5 with intervals by number of control tokens."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    colors = dict(zip(ORDERS, style.CYCLE, strict=False)) | {"rule": "grey"}
    curves = curves.assign(rate=curves.get("rate", 1.0))
    by_training = curves.groupby(["variant", "seed", "rate"])["loss"]
    curves = curves.assign(smoothed=by_training.transform(lambda loss: loss.ewm(span=8).mean()))
    for axis, of in zip(axes, ("seconds", "requests"), strict=False):
        sns.lineplot(
            curves, x=of, y="smoothed", hue="variant", palette=colors, style="rate", units="seed", estimator=None, linewidth=0.9,
            style_order=sorted(set(curves["rate"]), reverse=True), legend=False, ax=axis,
        )  # fmt: skip
        axis.set(ylabel="RankNet loss (0.69 = chance)", xlabel={"requests": "supervised requests"}.get(of, of))
    axes[1].set(xscale="log")
    view = table[(table["metric"] == "cp") & ~table["variant"].eq("sasrec")]
    for shift, (name, color) in enumerate(colors.items()):
        rows = view[view["variant"] == name]
        if rows.empty:
            continue
        look = {"fmt": "o", "markersize": 4, "label": name, "color": color}
        places = rows["n_tokens"] + 0.08 * (shift - 2)
        axes[2].errorbar(places, rows["value"], yerr=evaluation.error_bars(rows), **look)
    axes[2].set(xlabel="control tokens", ylabel=f"CP@{K}, all constraints met", xticks=sorted(view["n_tokens"].unique()))
    axes[2].legend(bbox_to_anchor=(1, 0.5), loc="center left", frameon=False)
    return figure
