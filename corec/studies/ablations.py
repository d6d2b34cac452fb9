"""Variants of the re-ranker, each trained for equally many steps on the same windows, and what each part of it brings."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from corec import CorecError, evaluation, evidence, files, frontier, pages, rankers, stages
from corec.controls import Prepared
from corec.data import Tables
from corec.evaluation import order_by
from corec.intervals import by_user, intervals
from corec.params import Params
from corec.rankers import Ranked
from corec.reranker import Examples, Reranker, build, engine, score_parts, train
from corec.scores import Scores

FULL = "corec"
SHUFFLED = "shuffled-tokens"  # the scores of `corec` under requests whose values are exchanged: no training of its own

# What differs from the run in its section `reranker`. `llamarec` has one empty request in a row, so it gets more windows a step.
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {},
    SHUFFLED: {},
    "without prior": {"prior": False},
    "ranknet": {"loss": "ranknet"},
    "ranknet, request as a whole": {"loss": "ranknet", "control": "request"},
    "listwise, request as a whole": {"control": "request"},
    "no match loss": {"match_loss": 0},
    "no truth bonus": {"truth_bonus": False},
    "no-control-scores": {"control_target": "none", "match_loss": 0},
    "all or nothing": {"control_target": "all"},
    "mixture": {"control_target": "mixture"},
    "ordinary rate of the gate": {"lr_gate": 1e-3},
    "more requests without tokens": {"train_tokens": [0, 0, 0, 1, 2, 3]},
    "soft tokens": {"soft_width": None},  # twice the width of the retriever
    "frozen-rows": {"lr_rows": 0},
    "plain-words": {"values": "words"},
    "llamarec": {
        "readout": "index", "control": "request", "prior": False, "loss": "truth", "train_tokens": [0], "curriculum_steps": 0,
        "requests_per_window": 1, "batch_size": 8,
    },
    "twice the steps": {},
}  # fmt: skip
SIMPLE = ("text", "sasrec", "combiner", "hard-filter", "rule")
K = 5  # cut-off of the metrics, if there are more candidates


def variant(params: Params, name: str) -> Params:
    """Settings of a variant: its changes, and `study.ablation_share` of the steps of the run.

    Raises
    ------
    CorecError
        If there is no variant of this name.
    """
    if name not in VARIANTS:
        raise CorecError(f"Parameter study.ablations lists {name!r}: choose from {', '.join(VARIANTS)}.")
    settings, share = params.reranker, params.study.ablation_share * (2 if name == "twice the steps" else 1)
    steps = {key: max(1, round(share * getattr(settings, key))) for key in ("curriculum_steps", "steps")}
    changes = steps | VARIANTS[name]
    if "soft_width" in changes:
        changes["soft_width"] = 2 * params.sasrec.hidden
    if changes["curriculum_steps"] == 0:
        changes["steps"] = sum(steps.values())
    return params.model_copy(update={"reranker": settings.model_copy(update=changes)})


def exchanged(requests: Sequence[np.ndarray], n_values: int, seed: int) -> list[np.ndarray]:
    """Requests in which every value is replaced by another one, by one random permutation of all values without fixed points."""
    cycle = np.random.default_rng([seed, 5]).permutation(n_values)
    other = np.empty(n_values, dtype=int)
    other[cycle] = np.roll(cycle, 1)
    return [np.where(request >= 0, other[request], -1) for request in requests]


def saved(path: Path) -> Scores | None:
    """Scores written by :func:`scores_of`, or None if the file is missing or damaged."""
    try:
        with np.load(path) as kept:
            return Scores(*(kept[name] for name in Scores._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def compare(items: pd.DataFrame, examples: Examples, params: Params, folder: Path) -> dict[str, Scores]:
    """Train the variants `study.ablations` and score the test windows, under one request of each length.

    The scores of each finished variant are stored in `folder`; a second call resumes after the last one.

    Returns
    -------
    Scores by variant, ``corec`` first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prepared = examples.prepared
    requests = [prepared.requests["test", n] for n in params.controls.n_tokens]
    before = [stages.section(params, stage) for stage in ("data", "sasrec", "controls", "reranker")]
    names = [FULL, *(name for name in params.study.ablations if name != FULL)]
    path_of = {name: folder / f"{files.digest([before, name, params.study.ablation_share])}.npz" for name in names}
    found: dict[str, Scores] = {}
    for name in names:
        if (kept := saved(path_of[name])) is None:
            model = trained(items, examples, params, FULL if name == SHUFFLED else name, folder)
            asked = exchanged(requests, len(prepared.vocabulary.labels), params.seed) if name == SHUFFLED else requests
            kept = score_parts(model, examples, prepared.pools["test"], asked, report=name)
            part = path_of[name].with_suffix(".part")
            with part.open("wb") as file:
                np.savez(file, **kept._asdict())
            part.replace(path_of[name])
        found[name] = kept
    return found


def trained(items: pd.DataFrame, examples: Examples, params: Params, name: str, folder: Path) -> Reranker:
    """Train a variant, or load it from its checkpoint below `folder`; the adapter is merged, for scoring."""
    own = variant(params, name)
    print(f"variant {name}: {own.reranker.curriculum_steps} plain and {own.reranker.steps} whole steps", flush=True)
    model = build(items, examples.prepared.vocabulary, own.reranker, own.seed)
    train(model, examples, own, folder / name.replace(" ", "-"))
    return engine.merge(model)


def text_scores(tables: Tables, prepared: Prepared, params: Params) -> np.ndarray:
    """Similarity of the titles of each candidate and of the latest items [windows, K], by the encoder MiniLM."""
    own = params.model_copy(update={"evidence": params.evidence.model_copy(update={"text": "minilm"})})
    similar = evidence.similarities_of(tables, prepared.vocabulary, own)
    found = evidence.gather(tables, prepared.pools["test"], similar, own.evidence)
    return found.values[..., found.names.index("text_recent")]


def judge(
    scores: Mapping[str, Scores], examples: Examples, users: np.ndarray, params: Params, text: np.ndarray | None = None
) -> pd.DataFrame:
    """CP@5 (all constraints met) and NDCG@5 of every variant by number of control tokens, with differences from ``corec``.

    Parameters
    ----------
    scores
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
    Columns ``variant n_tokens metric value low high ahead ahead_low ahead_high n_users K steps dataset protocol``. ``ahead`` is
    the paired difference from ``corec``. Rankers without a language model are included for comparison. Rows with the metric
    ``gap`` hold the mean of :func:`corec.frontier.gaps` over all strengths and numbers of tokens.
    """
    prepared, pools = examples.prepared, examples.prepared.pools["test"]
    prior = np.stack([examples.prior[window] for window in pools.window]) if examples.prior else None
    cut, keys, columns = min(K, pools.candidates.shape[1] - 1), [], []
    ranked = Ranked({}, {})
    for place, n in enumerate(params.controls.n_tokens):
        judged = evaluation.judge(pools, prepared.requests["test", n], prepared.vocabulary.values_of)
        given = rankers.Inputs(np.zeros(pools.candidates.shape), prior, text)
        simple = rankers.without_model(pools, judged, given, params.evaluation.boost)
        orders = {name: order_by(part.total()[:, place]) for name, part in scores.items()}
        orders |= {name: simple[name] for name in SIMPLE if name in simple}
        ranked.orders[n], ranked.judged[n] = {}, judged
        for name, order in orders.items():
            measured = evaluation.by_window(order, judged, [cut])
            for metric, key in (("cp", ("cp", cut, n)), ("ndcg", ("ndcg", cut, 0)))[not n :]:
                keys.append((name, n, metric))
                columns.append(measured[key])
    values = by_user(np.stack(columns, axis=1).astype(float), users)
    base = [keys.index((FULL, n, metric)) for _, n, metric in keys]
    both = np.concatenate([values, values - values[:, base]], axis=1)
    middle, (low, high), count = both.mean(axis=0), intervals(both, params.evaluation, params.seed), len(keys)
    table = pd.DataFrame(keys, columns=["variant", "n_tokens", "metric"]).assign(
        value=middle[:count], low=low[:count], high=high[:count],
        ahead=middle[count:], ahead_low=low[count:], ahead_high=high[count:],
    )  # fmt: skip
    if prior is not None:
        table = pd.concat([table, gap_rows(scores, ranked, prior, users, params)], ignore_index=True)
    steps = sum(getattr(variant(params, FULL).reranker, key) for key in ("curriculum_steps", "steps"))
    about = {"n_users": len(values), "K": pools.candidates.shape[1], "steps": steps}
    return table.astype({"n_tokens": "Int64"}).assign(dataset=params.data.dataset, protocol=params.controls.protocol, **about)


def gap_rows(scores: Mapping[str, Scores], ranked: Ranked, prior: np.ndarray, users: np.ndarray, params: Params) -> pd.DataFrame:
    """Rows of :func:`judge` with the metric ``gap``, for the variants that have a prior."""
    rows = []
    for name, part in scores.items():
        if part.prior.any():
            points = frontier.sweep(ranked, [part], prior, users, params)
            rows.append((name, "gap", *frontier.mean_gap(points, params)))
    return pd.DataFrame(rows, columns="variant metric value low high".split())


def keep(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the table of :func:`judge`, its plot and the results page; returns the files."""
    written = [folder / "ablations.csv", folder / "ablations.png"]
    files.write_text(written[0], table.to_csv(index=False, float_format="%.5g"))
    with sns.axes_style("whitegrid"):
        draw(table).savefig(written[1], dpi=130)
    plt.close()
    pages.write_study(folder)
    return written


def draw(table: pd.DataFrame) -> Figure:
    """Plot the differences from ``corec``: CP@5 by number of tokens, NDCG@5 without tokens, NDCG@5 by number of tokens."""
    names = [name for name in table["variant"].unique() if name != FULL]
    figure, axes = plt.subplots(1, 3, figsize=(13, 1.2 + 0.3 * len(names)), sharey=True, layout="constrained")
    relevance = table[table["metric"] == "ndcg"]
    panels = {
        "NDCG@5 without tokens": relevance[relevance["n_tokens"] == 0],
        "CP@5, all constraints met": table[table["metric"] == "cp"],
        "NDCG@5 with tokens": relevance[relevance["n_tokens"] > 0],
    }
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        lengths = sorted(rows["n_tokens"].unique())
        for shift, (n, color) in enumerate(zip(lengths, sns.color_palette("colorblind"), strict=False)):
            part = rows[rows["n_tokens"] == n].set_index("variant").reindex(names)
            errors = [(part["ahead"] - part["ahead_low"]).clip(lower=0), (part["ahead_high"] - part["ahead"]).clip(lower=0)]
            places = np.arange(len(names)) + 0.18 * (shift - (len(lengths) - 1) / 2)
            look = {"fmt": "o", "markersize": 3, "color": color, "label": f"{n} token{'s' if n != 1 else ''}"}
            axis.errorbar(part["ahead"], places, xerr=errors, **look)
        axis.axvline(0, color="0.3", linewidth=0.8)
        axis.set(title=title, xlabel="minus corec", yticks=range(len(names)), yticklabels=names)
    axes[0].invert_yaxis()
    axes[1].legend(fontsize="small")
    return figure
