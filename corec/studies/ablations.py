"""Variants of the re-ranker that differ in one part, trained on the same windows, and what each part brings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from corec import CorecError, evaluation, files, frontier, rankers, stages, style
from corec.controls import Prepared
from corec.data import Tables
from corec.evaluation import error_bars, order_by
from corec.evidence.features import latest_items
from corec.evidence.text import title_embeddings
from corec.intervals import by_user, with_differences
from corec.params import Params
from corec.rankers import Ranked
from corec.reranker import Examples, Reranker, build, engine, fingerprint, score_parts, train
from corec.scores import Scores
from corec.studies import keep_study, shortened

FULL = "corec"
SHUFFLED = "shuffled-tokens"  # the scores of `corec` under requests whose values are exchanged: no training of its own
TOKENLESS = ("llamarec",)  # scored under the empty request whatever the number of tokens
LISTWISE = {"loss": "listwise"}

# Settings of each variant in the section `reranker`, where they differ from `corec`. `llamarec` has one empty request in a row,
# so it gets more windows a step. Numbers of steps and tokens, and the width of soft tokens, come from :func:`variant`.
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {},
    SHUFFLED: {},
    "without prior": {"prior": False},
    "ranknet": {"loss": "ranknet"},
    "ranknet, request as a whole": {"loss": "ranknet", "control": "request"},
    "listwise, request as a whole": LISTWISE | {"control": "request"},
    "no match loss": {"match_loss": 0},
    "no truth bonus": {"truth_bonus": False},
    "no-control-scores": {"control_target": "none", "match_loss": 0},
    "all or nothing": {"control_target": "all"},
    "mixture": {"control_target": "mixture"},
    "ordinary rate of the gate": {"lr_gate": 1e-3},
    "more requests without tokens": {},
    "soft tokens": {},
    "frozen-rows": {"lr_rows": 0},
    "plain-words": {"values": "words"},
    "llamarec": {
        "readout": "index", "control": "request", "prior": False, "loss": "truth", "truth_bonus": True, "train_tokens": [0],
        "show_attributes": False, "curriculum_steps": 0, "requests_per_window": 1, "batch_size": 8,
    },
    "twice the steps": {},
}  # fmt: skip
SIMPLE = ("text", "sasrec", "combiner", "hard-filter+combiner", "rule+combiner", "hard-filter", "rule")


def variant(params: Params, name: str) -> Params:
    """Settings of a variant: its changes, and `study.ablation_share` of the steps of the run.

    Raises
    ------
    CorecError
        If the variant does not differ from ``corec``, or does not fit the run.
    """
    settings, share = params.reranker, params.study.ablation_share * (2 if name == "twice the steps" else 1)
    steps = shortened(settings, share)
    changes: dict[str, Any] = steps | VARIANTS[name]
    if name == "soft tokens":
        changes["soft_width"] = 2 * params.sasrec.hidden
    if name == "more requests without tokens":
        changes["train_tokens"] = [0, 0, *params.controls.n_tokens]
    if changes["curriculum_steps"] == 0:
        changes["steps"] = sum(steps.values())
    try:
        own = params.model_copy(update={"reranker": settings.model_copy(update=changes)})
    except CorecError as error:
        raise CorecError(
            f"Parameter study.ablations lists {name!r}, which does not fit this run ({error}): leave it out."
        ) from None
    if name not in (FULL, SHUFFLED) and own == variant(params, FULL):
        raise CorecError(f"Parameter study.ablations lists {name!r}, which equals {FULL!r} in this run: leave it out.")
    return own


def exchanged(requests: Sequence[np.ndarray], n_values: int, seed: int) -> list[np.ndarray]:
    """Requests in which every value is replaced by another one, by one random permutation of all values without fixed points."""
    cycle = np.random.default_rng([seed, 5]).permutation(n_values)
    other = np.empty(n_values, dtype=int)
    other[cycle] = np.roll(cycle, 1)
    return [np.where(request >= 0, other[request], -1) for request in requests]


class Variant(NamedTuple):
    """Scores of a variant on the test windows, and the number of steps that it was trained for."""

    scores: Scores
    steps: int


def saved(path: Path) -> Variant | None:
    """Scores written by :func:`compare`, or None if the file is missing or damaged."""
    kept = files.read_arrays(path, [*Scores._fields, "steps"])
    return None if kept is None else Variant(Scores(*(kept[name] for name in Scores._fields)), int(kept["steps"]))


def compare(items: pd.DataFrame, examples: Examples, params: Params, folder: Path) -> dict[str, Variant]:
    """Train the variants `study.ablations` and score the test windows, under one request of each length.

    The scores of each finished variant are stored in `folder`; a second call resumes after the last one.

    Returns
    -------
    Scores by variant, ``corec`` first.

    Raises
    ------
    CorecError
        If a variant does not fit the run (before the first training).
    """
    folder.mkdir(parents=True, exist_ok=True)
    prepared, pools = examples.prepared, examples.prepared.pools["test"]
    requests = [prepared.requests["test", n] for n in params.controls.n_tokens]
    names = [FULL, *params.study.ablations]
    given = [part.tolist() for part in (pools.window, pools.candidates, *requests)]
    priors = [examples.prior[window].tolist() for window in pools.window if window in examples.prior]
    path_of = {}
    for name in names:
        settings = stages.section(variant(params, name), "reranker")
        identity = files.digest([name, settings, fingerprint(examples), given, priors])
        path_of[name] = folder / f"{name.replace(' ', '-')}-{identity}.npz"
    found: dict[str, Variant] = {}
    for name in names:
        if (kept := saved(path_of[name])) is None:
            model, steps = trained(items, examples, params, FULL if name == SHUFFLED else name, folder)
            asked = exchanged(requests, len(prepared.vocabulary.labels), params.seed) if name == SHUFFLED else requests
            asked = [requests[params.controls.n_tokens.index(0)]] * len(requests) if name in TOKENLESS else asked
            kept = Variant(score_parts(model, examples, pools, asked, report=name), steps)
            files.write_arrays(path_of[name], **kept.scores._asdict(), steps=steps)
        if name != FULL:  # which other variants and the study of K use again
            (folder / name.replace(" ", "-") / "checkpoint.pt").unlink(missing_ok=True)
        found[name] = kept
    return found


def trained(items: pd.DataFrame, examples: Examples, params: Params, name: str, folder: Path) -> tuple[Reranker, int]:
    """Train a variant, or load it from its checkpoint below `folder`; the adapter is merged, for scoring.

    Returns
    -------
    The re-ranker, and the number of steps that it was trained for.
    """
    own = variant(params, name)
    print(f"variant {name}: {own.reranker.curriculum_steps} plain and {own.reranker.steps} whole steps", flush=True)
    model = build(items, examples.prepared.vocabulary, own.reranker, own.seed)
    curve = train(model, examples, own, folder / name.replace(" ", "-"))
    return engine.merge(model), len(curve)


def text_scores(tables: Tables, prepared: Prepared, params: Params) -> np.ndarray:
    """Similarity of the titles of each candidate and of the latest items [windows, K], by the encoder MiniLM."""
    pools, vectors = prepared.pools["test"], title_embeddings(tables.items["title"].tolist(), "minilm")
    recent = latest_items(tables, tables.windows.set_index("window").loc[pools.window], params.evidence.recent)
    similar = np.einsum("whd,wkd->wk", vectors[recent], vectors[pools.candidates])
    return similar / np.maximum((recent > 0).sum(axis=1), 1)[:, None]


def judge(
    variants: Mapping[str, Variant], examples: Examples, users: np.ndarray, params: Params, text: np.ndarray | None = None
) -> pd.DataFrame:
    """CP@k (all constraints met) and NDCG@k of every variant by number of control tokens, with differences from ``corec``.

    Parameters
    ----------
    variants
        Result of :func:`compare`.
    examples
        Pools, requests and priors.
    users
        User of each test window [windows].
    params
        Settings of the run.
    text
        Result of :func:`text_scores`; None to leave the ranker ``text`` out.

    Returns
    -------
    Columns ``variant n_tokens metric k value low high ahead ahead_low ahead_high steps n_users K dataset protocol``; k is
    ``figures.k``. ``ahead`` is the paired difference from ``corec``. Rankers without a language model are included for
    comparison; they have no ``steps``. Rows with the metric ``gap`` hold the mean of :func:`corec.frontier.gaps` over all
    strengths and numbers of tokens.
    """
    prepared, pools = examples.prepared, examples.prepared.pools["test"]
    prior = np.stack([examples.prior[window] for window in pools.window]) if examples.prior else None
    cut, keys, columns, judged_of = params.figures.k, [], [], {}
    for place, n in enumerate(params.controls.n_tokens):
        judged = judged_of[n] = evaluation.judge(pools, prepared.requests["test", n], prepared.vocabulary.values_of)
        given = rankers.Inputs(np.zeros(pools.candidates.shape), prior, text)
        simple = rankers.without_model(pools, judged, given, params.evaluation.boost)
        orders = {name: order_by(part.scores.total()[:, place]) for name, part in variants.items()}
        orders |= {name: simple[name] for name in SIMPLE if name in simple}
        for name, order in orders.items():
            measured = evaluation.by_window(order, judged, [cut])
            for metric, key in evaluation.control_and_relevance(cut, n).items():
                keys.append((name, n, metric))
                columns.append(measured[key])
    values = by_user(np.stack(columns, axis=1).astype(float), users)
    base = [keys.index((FULL, n, metric)) for _, n, metric in keys]
    numbers = with_differences(values, values - values[:, base], params.evaluation, params.seed)
    table = pd.DataFrame(keys, columns=["variant", "n_tokens", "metric"]).join(numbers)
    if prior is not None:
        ranked = Ranked({n: {} for n in judged_of}, judged_of)
        table = pd.concat([table, gap_rows(variants, ranked, prior, users, params)], ignore_index=True)
    steps = table["variant"].map({name: part.steps for name, part in variants.items()})
    about = {"k": cut, "n_users": len(values), "K": pools.candidates.shape[1]}
    table = table.assign(steps=steps.astype("Int64"), dataset=params.data.dataset, protocol=params.controls.protocol, **about)
    return table.astype({"n_tokens": "Int64"})


def gap_rows(
    variants: Mapping[str, Variant], ranked: Ranked, prior: np.ndarray, users: np.ndarray, params: Params
) -> pd.DataFrame:
    """Rows of :func:`judge` with the metric ``gap``, for the variants that have a prior."""
    rows = []
    for name, part in variants.items():
        if part.scores.prior.any():
            points = frontier.sweep(ranked, [part.scores], prior, users, params)
            rows.append((name, "gap", *frontier.mean_gap(points, params)))
    return pd.DataFrame(rows, columns="variant metric value low high".split())


def keep(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the table of :func:`judge`, its plot and the results page; returns the files."""
    with style.figure_style():
        return keep_study(table, draw(table), folder / "ablations", "%.5g")


def draw(table: pd.DataFrame) -> Figure:
    """Plot the differences from ``corec``: NDCG@k without tokens, CP@k and NDCG@k by number of tokens."""
    k = table["k"].iloc[0]
    names = [name for name in table["variant"].unique() if name != FULL]
    figure, axes = plt.subplots(1, 3, figsize=(13, 1.2 + 0.3 * len(names)), sharey=True, layout="constrained")
    relevance = table[table["metric"] == "ndcg"]
    panels = {
        f"NDCG@{k} without tokens": relevance[relevance["n_tokens"] == 0],
        f"CP@{k}, all constraints met": table[table["metric"] == "cp"],
        f"NDCG@{k} with tokens": relevance[relevance["n_tokens"] > 0],
    }
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        lengths = sorted(rows["n_tokens"].unique())
        colors = style.CYCLE if lengths != [0] else ["0.3"]
        for shift, (n, color) in enumerate(zip(lengths, colors, strict=False)):
            part = rows[rows["n_tokens"] == n].set_index("variant").reindex(names)
            errors = error_bars(part, "ahead", ("ahead_low", "ahead_high"))
            places = np.arange(len(names)) + 0.18 * (shift - (len(lengths) - 1) / 2)
            look = {"fmt": "o", "markersize": 3, "color": color, "label": f"{n:g} token{'s' if n != 1 else ''}"}
            axis.errorbar(part["ahead"], places, xerr=errors, **look)
        axis.axvline(0, color="0.3", linewidth=0.8)
        axis.set(title=title, xlabel="minus corec", yticks=range(len(names)), yticklabels=names)
    axes[0].invert_yaxis()
    axes[2].legend(bbox_to_anchor=(1, 0.5), loc="center left", frameon=False)
    return figure
