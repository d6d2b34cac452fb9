"""Interference of control tokens: control and relevance by number of tokens, and the similarity of the tokens' states.

The re-ranker of the run is compared with one that is trained with ``reranker.row_contrast``, a loss that pushes the rows of the
new tokens apart. Its weight is selected on validation.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from corec import conflicts, evaluation, files, stages, style
from corec.controls import Pools, Vocabulary
from corec.data import Tables
from corec.evaluation import error_bars, order_by, pick
from corec.intervals import by_user, with_differences
from corec.params import Params
from corec.reranker import (
    Examples,
    Reranker,
    build,
    collate,
    engine,
    fingerprint,
    make_rows,
    score_parts,
    token_rows,
    train,
    value_token,
)
from corec.scores import Scores
from corec.studies import keep_study
from corec.studies.trained import load_seed, once

CONTRAST = "corec, contrast"
ALONE = "corec, constraints alone"
MODELS = ("before training", "corec", CONTRAST)
OF = ("rows", "states", "projected")
VALID = 200  # validation windows on which the weight is selected
SHOWN = 64  # test windows whose states are compared
COLUMNS = "model n_tokens metric value low high ahead ahead_low ahead_high K k dataset protocol n_users seeds weight".split()


class Trained(NamedTuple):
    """Scores of one training, and the similarity of its tokens."""

    test: Scores  # under one request of each length
    valid: Scores  # of the first :data:`VALID` windows
    cosines: pd.DataFrame  # of :func:`cosines`
    alone: dict[int, np.ndarray] | None = None  # control terms [windows, K] of the single constraints, added; by length


def value_tokens(vocabulary: Vocabulary) -> list[str]:
    """Token of each value, in the order of the vocabulary."""
    return [value_token(vocabulary, value) for value in range(len(vocabulary.labels))]


def mean_cosine(vectors: np.ndarray, groups: np.ndarray, counts: np.ndarray | None = None) -> tuple[float, float]:
    """Mean cosine similarity of the pairs of `vectors` [N, width] of the same group and of different groups [N].

    `counts` [N, N] selects the pairs; None: all pairs of different vectors.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    similar, same = unit @ unit.T, groups[:, None] == groups
    counts = ~np.eye(len(unit), dtype=bool) if counts is None else counts
    means = [float(similar[counts & part].mean()) if (counts & part).any() else float("nan") for part in (same, ~same)]
    return means[0], means[1]


@torch.inference_mode()
def states(model: Reranker, examples: Examples, pools: Pools, request: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """State of every constraint of the requests: one vector for each constraint of each window.

    Parameters
    ----------
    model, examples
        The re-ranker and the histories.
    pools, request
        Windows, and one request for each [windows, n]; windows with a constraint that could not be drawn are omitted.

    Returns
    -------
    States [windows * n, hidden] (the mean over the tokens of the constraint, with the layers mixed), and the same states in the
    space in which they are compared with the candidates [windows * n, head_width].
    """
    whole, found = np.flatnonzero(np.asarray((request >= 0).all(axis=1))), []
    for start in range(0, len(whole), 8):
        part = whole[start : start + 8]
        rows = make_rows(model, examples, pools.take(part), [request[part]])
        batch = collate(rows, model.tokenizer.pad_token_id, model.params.pooling, model.device)
        layers = model.states(model.inputs(batch), batch.positions, batch.mask)
        pooled = model.head.pool(batch.constraints.flatten(1, 2), layers)[:, : request.shape[1]]  # [rows, n, hidden]
        found.append(pooled.flatten(0, 1).float())
    vectors = torch.cat(found)
    return vectors.cpu().numpy(), model.head.request(vectors).cpu().numpy()


def cosines(model: Reranker, examples: Examples, params: Params) -> pd.DataFrame:
    """Mean cosine similarity of the rows of the values' tokens, and of the states of two constraints, by number of constraints.

    The pairs of states are those of different values in different windows, each occurrence by itself, so that the mean does not
    depend on how often a value occurs.

    Returns
    -------
    Columns ``of n_tokens same other``: ``rows`` (n_tokens 0), ``states`` or ``projected``; pairs of the same and of other
    attributes.
    """
    vocabulary, pools = examples.prepared.vocabulary, examples.prepared.pools["test"].take(slice(0, SHOWN))
    kinds = vocabulary.attribute_of
    table = [("rows", 0, *mean_cosine(token_rows(model, value_tokens(vocabulary)).to_numpy(), kinds))]
    for n in (n for n in params.controls.n_tokens if n):
        request = examples.prepared.requests["test", n][:SHOWN]
        whole = np.asarray((request >= 0).all(axis=1))
        if not whole.any():
            continue
        asked, window = request[whole].ravel(), np.repeat(np.arange(whole.sum()), n)
        counts = (asked[:, None] != asked) & (window[:, None] != window)
        for name, vectors in zip(("states", "projected"), states(model, examples, pools, request), strict=True):
            table.append((name, n, *mean_cosine(vectors, kinds[asked], counts)))
    return pd.DataFrame(table, columns=["of", "n_tokens", "same", "other"])


def scored(model: Reranker, examples: Examples, params: Params, label: str, alone: bool = False) -> Trained:
    """Cosines of a re-ranker, and its scores of the test windows and of the first validation windows.

    With `alone`, also the control terms of requests of one constraint, for each constraint of the longer requests.
    """
    similar, prepared, lengths = cosines(model, examples, params), examples.prepared, params.controls.n_tokens
    model, pools = engine.merge(model), prepared.pools["test"]
    whole = [prepared.requests["test", n] for n in lengths]
    single = [part[:, [place]] for part in whole if part.shape[1] > 1 for place in range(part.shape[1])] if alone else []
    found = score_parts(model, examples, pools, [*whole, *single], f"{label}, test")
    test = found.under(slice(len(lengths)))
    sums, place = {}, len(lengths)
    for number, part in enumerate(whole):
        n = part.shape[1]
        if alone and n:
            sums[n] = found.control[:, number] if n == 1 else found.control[:, place : place + n].sum(axis=1)
            place += n if n > 1 else 0
    some = [prepared.requests["valid", n][:VALID] for n in lengths]
    valid = score_parts(model, examples, prepared.pools["valid"].take(slice(0, VALID)), some)
    return Trained(test, valid, similar, sums if alone else None)


def contrasted(tables: Tables, examples: Examples, params: Params, weight: float, seed: int, folder: Path) -> Trained:
    """Train with ``reranker.row_contrast`` = `weight`; the result is kept in `folder` and read if it exists.

    Parameters
    ----------
    tables, examples, params
        Tables, windows and settings of the run.
    weight, seed
        Weight of the loss, and seed of the training.
    folder
        Folder of the kept result and of the checkpoint.
    """
    changed = params.reranker.model_copy(update={"row_contrast": weight})
    own = params.model_copy(update={"reranker": changed, "seed": seed})
    sections = [stages.section(own, stage) for stage in ("data", "sasrec", "controls", "reranker")]
    path = folder / f"contrast-{weight:g}-{seed}-{files.digest([sections, fingerprint(examples)])}.npz"
    names = [f"{split}_{name}" for split in ("test", "valid") for name in Scores._fields]

    def compute(training: Path) -> dict[str, np.ndarray]:
        print(f"row_contrast {weight:g}, seed {seed}", flush=True)
        model = build(tables.items, examples.prepared.vocabulary, own.reranker, seed)
        train(model, examples, own, training)
        found = scored(model, examples, params, f"row_contrast {weight:g}")
        parts = {"test": found.test, "valid": found.valid}
        arrays = {f"{split}_{name}": part for split, each in parts.items() for name, part in each._asdict().items()}
        return arrays | {"cosines": found.cosines.assign(of=[OF.index(name) for name in found.cosines["of"]]).to_numpy(float)}

    kept = once(path, [*names, "cosines"], compute)
    parts = [Scores(*(kept[f"{split}_{name}"] for name in Scores._fields)) for split in ("test", "valid")]
    frame = pd.DataFrame(kept["cosines"], columns=["of", "n_tokens", "same", "other"])
    frame["of"] = [OF[int(place)] for place in frame["of"]]
    return Trained(parts[0], parts[1], frame.astype({"n_tokens": int}))


def validation(found: Trained, examples: Examples, params: Params) -> float:
    """Mean CP@k (all constraints met) over the numbers of constraints, on validation."""
    prepared, cut, values = examples.prepared, params.figures.k, []
    pools = prepared.pools["valid"].take(slice(0, VALID))
    for place, n in enumerate(params.controls.n_tokens):
        if n:
            judged = evaluation.judge(pools, prepared.requests["valid", n][:VALID], prepared.vocabulary.values_of)
            values.append(evaluation.by_window(order_by(found.valid.total()[:, place]), judged, [cut])["cp", cut, n].mean())
    return float(np.mean(values))


class Compared(NamedTuple):
    """Result of :func:`compare`."""

    trained: dict[str, list[Trained]]  # one entry per seed
    weight: float  # selected on validation
    chosen: dict[str, float]  # mean CP@k on validation by weight; ``0`` is the re-ranker of the run


def compare(tables: Tables, examples: Examples, params: Params, folder: Path) -> Compared:
    """Score the re-rankers of the run, and train others with ``reranker.row_contrast``.

    The weights of `study.contrast` are compared on validation with one training each; the best one is trained with the first
    `study.seeds` of the `reranker.seeds` seeds of the run, and compared with the run's trainings of these seeds.

    Parameters
    ----------
    tables, examples, params
        Tables, windows and settings of the run, whose stage 04 has finished.
    folder
        Folder of finished trainings; a second call resumes after the last one.

    Raises
    ------
    CorecError
        Before the first training, if the values are not tokens with states of their own.
    """
    conflicts.require(params, "saturation")
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: list[Trained]() for name in MODELS}
    seeds = range(params.seed, params.seed + min(params.study.seeds, params.reranker.seeds))
    start = build(tables.items, examples.prepared.vocabulary, params.reranker, params.seed)
    empty = Scores(*(np.empty(0),) * 3)
    found[MODELS[0]].append(Trained(empty, empty, cosines(start, examples, params)))
    for seed in seeds:
        found["corec"].append(scored(load_seed(tables, examples, params, seed), examples, params, f"seed {seed}", alone=True))
    first = {weight: contrasted(tables, examples, params, weight, params.seed, folder) for weight in params.study.contrast}
    chosen = {f"{weight:g}": validation(each, examples, params) for weight, each in first.items()}
    weight = max(first, key=lambda weight: chosen[f"{weight:g}"])
    found[CONTRAST] = [contrasted(tables, examples, params, weight, seed, folder) for seed in seeds]
    return Compared(found, weight, {"0": validation(found["corec"][0], examples, params), **chosen})


def measure(compared: Compared, examples: Examples, users: np.ndarray, params: Params) -> pd.DataFrame:
    """Control and relevance by number of constraints, with paired differences of the model from ``corec``.

    ``corec, constraints alone`` adds the control terms of requests of one constraint each, so that no constraint can interfere
    with another one; its prior and relevance are those of the whole request.

    ``cp`` and ``cd`` count items that meet all constraints; ``cp_gap`` and ``cd_gap`` are their differences from the best that
    the candidates allow (``rule``), 0 at best; ``ndcg`` is NDCG@k.

    Parameters
    ----------
    compared
        Result of :func:`compare`.
    examples, users, params
        Windows, user of each test window [windows], and settings of the run.

    Returns
    -------
    Columns of :data:`COLUMNS`.
    """
    prepared, cut, keys, columns = examples.prepared, params.figures.k, [], []
    for place, n in enumerate(params.controls.n_tokens):
        judged = evaluation.judge(prepared.pools["test"], prepared.requests["test", n], prepared.vocabulary.values_of)
        best = evaluation.by_window(evaluation.rule_order(prepared.pools["test"], judged.met), judged, [cut])
        totals = {model: [part.test.total()[:, place] for part in compared.trained[model]] for model in ("corec", CONTRAST)}
        if n > 1:
            totals[ALONE] = [
                part.test.total(0)[:, place] + part.alone[n] for part in compared.trained["corec"] if part.alone is not None
            ]
        for model, of_seeds in totals.items():
            each = [evaluation.by_window(order_by(total), judged, [cut]) for total in of_seeds]
            values = {"ndcg": np.mean([part["ndcg", cut, 0] for part in each], axis=0)}
            for name, key in {"cp": ("cp", cut, n), "cd": ("cd", 0, n)}.items() if n else ():
                values[name] = np.mean([part[key] for part in each], axis=0)
                values[f"{name}_gap"] = values[name] - best[key]
            for metric, column in values.items():
                keys.append((model, n, metric))
                columns.append(column)
    whole = by_user(np.stack(columns, axis=1).astype(float), users)
    base = [keys.index(("corec", n, metric)) for _, n, metric in keys]
    numbers = with_differences(whole, whole - whole[:, base], params.evaluation, params.seed)
    table = pd.DataFrame(keys, columns=COLUMNS[:3]).join(numbers).assign(n_users=len(whole), weight=compared.weight)
    table = table.assign(dataset=params.data.dataset, protocol=params.controls.protocol, K=params.controls.k, k=cut)
    return table.assign(seeds=len(compared.trained["corec"]))[COLUMNS]


def similarity(trained: Mapping[str, Sequence[Trained]]) -> pd.DataFrame:
    """Mean over the seeds of :func:`cosines` by model; columns ``model of n_tokens same other``."""
    parts = [part.cosines.assign(model=model) for model, each in trained.items() for part in each]
    table = pd.concat(parts).groupby(["model", "of", "n_tokens"], sort=False)[["same", "other"]].mean()
    return table.reset_index()


def keep(table: pd.DataFrame, similar: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the tables of :func:`measure` and :func:`similarity`, the plot and the results page; returns the files."""
    files.write_csv(folder / "similarity.csv", similar, "%.4g")
    with style.figure_style():
        return [*keep_study(table, draw(table, similar), folder / "saturation", "%.5g"), folder / "similarity.csv"]


def draw(table: pd.DataFrame, similar: pd.DataFrame) -> Figure:
    """Plot the loss of control against the best possible, and the cosines of the tokens, by number of constraints."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    first, colors = table.iloc[0], {"before training": "0.6", "corec": style.BLUE, CONTRAST: style.ORANGE, ALONE: "0.3"}
    for axis, metric, title in (
        (axes[0], "cp_gap", f"CP@{first['k']} minus the best\nthat the candidates allow"),
        (axes[1], "ndcg", f"NDCG@{first['k']}"),
    ):
        for place, (model, rows) in enumerate(pick(table, metric=metric).groupby("model", sort=False)):
            tokens, bars = rows["n_tokens"] + 0.1 * (place - 1), error_bars(rows)
            axis.errorbar(tokens, rows["value"], yerr=bars, fmt="o-", color=colors[str(model)], label=style.label(str(model)))
        axis.set(title=title, xlabel="control tokens", xticks=sorted(pick(table, metric=metric)["n_tokens"].unique()))
    axes[0].axhline(0, color="0.3", linewidth=0.8)
    axes[0].legend(frameon=False, fontsize="small", loc="lower right")
    for model, rows in pick(similar, of="projected").groupby("model", sort=False):
        color = colors[str(model)]
        axes[2].plot(rows["n_tokens"], rows["same"], "o-", color=color, label=f"{style.label(str(model))}, same attribute")
        axes[2].plot(rows["n_tokens"], rows["other"], "d:", color=color, label=f"{style.label(str(model))}, other attributes")
    axes[2].set(
        title="cosine similarity of two constraints,\nas compared with the candidates",
        xlabel="control tokens",
        xticks=sorted(pick(similar, of="projected")["n_tokens"].unique()),
    )
    axes[2].legend(frameon=False, fontsize="small", loc="center", bbox_to_anchor=(0.5, 0.58))
    figure.suptitle(f"{style.title(table)}, {first['n_users']} users, seeds: {first['seeds']}")
    return figure
