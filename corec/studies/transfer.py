"""A re-ranker trained on one data set, used on another one, whose attributes may be others."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from corec import CorecError, evaluation, paths, rankers, stages, style
from corec.controls import Prepared
from corec.data import Tables
from corec.evaluation import error_bars, order_by
from corec.intervals import by_user, with_differences
from corec.params import Params, RerankerParams
from corec.reranker import Examples, Reranker, build, engine, saved_dtype, score_parts, train, value_token
from corec.scores import Scores
from corec.studies import keep_study
from corec.studies.trained import take_weights

ANEW = "corec"  # trained on the target's own windows, in full
TRANSFERRED = "transferred"
SIMPLE = ("sasrec", "combiner", "rule", "rule+combiner")


class Transferred(NamedTuple):
    """A re-ranker with the trained weights of another run."""

    model: Reranker
    shared: np.ndarray  # whether the source trained each value of the target [values]
    params: Params  # of the target, with the prompt and read-out of the source


def settings(params: Params) -> Params:
    """Parameters of the target with the section `reranker` of the source run, except whether there is a prior.

    Raises
    ------
    CorecError
        If `study.source` names no run with a finished stage 04, or one that cannot be transferred.
    """
    source = params.study.source or params.run
    own = RerankerParams.checked(stages.require(source, "reranker")["params"]["reranker"], f"run {source!r}")
    if own.soft_width:
        raise CorecError(f"Parameter study.source: run {source!r} has soft tokens of its own retriever: name another run.")
    return params.model_copy(update={"reranker": own.model_copy(update={"prior": params.reranker.prior, "seeds": 1})})


def transfer(tables: Tables, prepared: Prepared, params: Params) -> Transferred:
    """Build a re-ranker for the target and give it the trained weights of the run `study.source`.

    The adapter and the head are those of the source. The rows of tokens that both runs have are those of the source; the other
    tokens of the target keep the mean of the rows of their words. A gate of the prior that the source lacks stays 1.

    Parameters
    ----------
    tables, prepared
        Results of stages 01 and 03 of the target.
    params
        Settings of the target.

    Raises
    ------
    CorecError
        If the source cannot be used (see :func:`settings`).
    """
    own = settings(params)
    folder = paths.stage_dir(params.study.source or params.run, "reranker")
    own = own.model_copy(update={"reranker": own.reranker.model_copy(update={"dtype": saved_dtype(folder)})})
    model = build(tables.items, prepared.vocabulary, own.reranker, params.seed)
    trained = take_weights(model, prepared.vocabulary, folder)
    words = own.reranker.values == "words"
    names = [value_token(prepared.vocabulary, value) for value in range(len(prepared.vocabulary.labels))]
    attributes = [f"<{prepared.vocabulary.attributes[number].name}>" for number in prepared.vocabulary.attribute_of]
    shared = np.array([token in trained for token in (attributes if words else names)])
    return Transferred(model, shared, own)


def compare(tables: Tables, examples: Examples, params: Params, folder: Path) -> tuple[dict[str, Scores], np.ndarray]:
    """Score the test windows by the transferred re-ranker, and by short trainings from its weights and from the initial ones.

    Parameters
    ----------
    tables, examples
        Tables, and windows, of the target.
    params
        Settings of the target: `study.source`, and `study.transfer_steps`, the steps of the short trainings. A training from the
        initial weights spends the same share of its steps on plain prompts as the run.
    folder
        Folder of the checkpoints.

    Returns
    -------
    Scores by model, and whether the source trained each value [values].
    """
    prepared = examples.prepared
    requests = [prepared.requests["test", n] for n in params.controls.n_tokens]
    identity = stages.require(params.study.source or params.run, "reranker")["identity"]

    def scored(model: Reranker, name: str) -> Scores:
        return score_parts(engine.merge(model), examples, prepared.pools["test"], requests, report=name)

    def short(model: Reranker, own: Params, plain: int, whole: int, name: str) -> Scores:
        update = {"curriculum_steps": plain, "steps": whole}
        own = own.model_copy(update={"reranker": own.reranker.model_copy(update=update)})
        where = folder / f"{name.replace(' ', '-')}-{identity}"
        train(model, examples, own, where)
        found = scored(model, name)
        (where / "checkpoint.pt").unlink(missing_ok=True)
        return found

    first = transfer(tables, prepared, params)
    shared, found = first.shared, {TRANSFERRED: scored(first.model, TRANSFERRED)}
    for count in params.study.transfer_steps:
        again, name = transfer(tables, prepared, params), f"{TRANSFERRED}, {count} steps"
        found[name] = short(again.model, again.params, 0, count, name)
        anew, name = params.reranker, f"{ANEW}, {count} steps"
        plain = min(count - 1, round(count * anew.curriculum_steps / (anew.curriculum_steps + anew.steps)))
        found[name] = short(build(tables.items, prepared.vocabulary, anew, params.seed), params, plain, count - plain, name)
    return found, shared


def judge(
    scores: Mapping[str, Scores],
    shared: np.ndarray,
    examples: Examples,
    users: np.ndarray,
    params: Params,
    base: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """CP@k (all constraints met) and NDCG@k by model and number of tokens, with paired differences from training anew.

    Requests of one token are also tabulated by whether the source trained the token (``shared``) or not (``new``).

    Parameters
    ----------
    scores
        Scores by model: those of :func:`compare`, ``corec`` for training anew, and ``zero-shot`` if the run has it.
    shared
        Whether the source trained each value [values].
    examples
        Windows of the target.
    users
        User of each test window [windows].
    params
        Settings of the target.
    base
        Models from which other models are subtracted, by name, where it is not ``corec``.

    Returns
    -------
    Columns ``model n_tokens tokens metric value low high ahead ahead_low ahead_high k n_users K dataset source protocol``.
    """
    prepared, pools = examples.prepared, examples.prepared.pools["test"]
    prior = np.stack([examples.prior[window] for window in pools.window]) if examples.prior else None
    cut, parts = params.figures.k, []
    for place, n in enumerate(params.controls.n_tokens):
        request, keys_of = prepared.requests["test", n], evaluation.control_and_relevance(cut, n)
        judged = evaluation.judge(pools, request, prepared.vocabulary.values_of)
        given = rankers.Inputs(np.zeros(pools.candidates.shape), prior)
        simple = rankers.without_model(pools, judged, given, params.evaluation.boost)
        orders = {name: simple[name] for name in SIMPLE if name in simple}
        orders |= {name: order_by(part.total()[:, place]) for name, part in scores.items()}
        measured = {name: evaluation.by_window(order, judged, [cut]) for name, order in orders.items()}
        groups = {"all": np.full(len(users), True)}
        if n == 1:
            asked, trained = request[:, 0] >= 0, shared[request[:, 0]]
            groups |= {"shared": asked & trained, "new": asked & ~trained}
        for tokens, rows in groups.items():
            if rows.any():
                keys = [(name, metric) for name in orders for metric in keys_of]
                columns = [measured[name][keys_of[metric]][rows] for name, metric in keys]
                values = by_user(np.stack(columns, axis=1).astype(float), users[rows])
                others = [keys.index(((base or {}).get(name, ANEW), metric)) for name, metric in keys]
                numbers = with_differences(values, values - values[:, others], params.evaluation, params.seed)
                table = pd.DataFrame(keys, columns=["model", "metric"]).join(numbers)
                parts.append(table.assign(n_tokens=n, tokens=tokens, n_users=len(values)))
    table = pd.concat(parts, ignore_index=True).assign(k=cut, K=pools.candidates.shape[1], dataset=params.data.dataset)
    table = table.assign(source=params.study.source or params.run, protocol=params.controls.protocol)
    names = "model n_tokens tokens metric value low high ahead ahead_low ahead_high k n_users K dataset source protocol"
    return table[names.split()]


def keep(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the table of :func:`judge`, its plot and the results page; returns the files."""
    with style.figure_style():
        return keep_study(table, draw(table), folder / "transfer", "%.5g")


def draw(table: pd.DataFrame) -> Figure:
    """Plot CP@k and NDCG@k of every model by number of tokens."""
    whole, first = table[table["tokens"] == "all"], table.iloc[0]
    names, lengths = list(whole["model"].unique()), sorted(whole["n_tokens"].unique())
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.4 + 0.3 * len(names)), sharey=True, layout="constrained")
    for axis, (metric, rows) in zip(axes, whole.groupby("metric", sort=True), strict=True):
        for shift, (n, color) in enumerate(zip(lengths, style.CYCLE, strict=False)):
            part = rows[rows["n_tokens"] == n].set_index("model").reindex(names)
            places = np.arange(len(names)) + 0.16 * (shift - (len(lengths) - 1) / 2)
            label = f"{n} token{'s' if n != 1 else ''}"
            axis.errorbar(part["value"], places, xerr=error_bars(part), fmt="o", markersize=3, color=color, label=label)
        axis.set(title=f"{str(metric).upper()}@{first['k']}", yticks=range(len(names)), yticklabels=names)
    axes[0].invert_yaxis()
    axes[1].legend(bbox_to_anchor=(1, 0.5), loc="center left", frameon=False)
    figure.suptitle(f"trained on {first['source']}, used on {first['dataset']}")
    return figure
