"""Values that the training has never requested, or never seen, as tokens and as words (notebook 11).

Of each attribute, a share of the values is kept back from training. ``never requested``: candidates and histories show them, but
no request has them. ``never seen``: the training does not show them either, as if they were introduced later.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from corec import evaluation, files, stages, style
from corec.controls import Vocabulary, without
from corec.data import Tables
from corec.evaluation import error_bars
from corec.params import Params
from corec.reranker import Examples, Prompter, build, engine, fingerprint, score_parts, train, training_batch
from corec.scores import Scores
from corec.studies import keep_study, transfer
from corec.studies.trained import once

KEPT_BACK = ("never requested", "never seen")
FORMS = {"token": "tokens", "words": "words"}  # reranker.values


def choose(vocabulary: Vocabulary, share: float, seed: int) -> np.ndarray:
    """Values to keep back from training [values]: of each attribute a random share, at least one and not all."""
    rng, chosen = np.random.default_rng([seed, 18]), np.zeros(len(vocabulary.labels), dtype=bool)
    for number in range(len(vocabulary.attributes)):
        own = np.flatnonzero((vocabulary.attribute_of == number) & (vocabulary.frequency() > 0))
        if len(own) > 1:
            chosen[rng.permutation(own)[: np.clip(round(share * len(own)), 1, len(own) - 1)]] = True
    return chosen


def scored(
    tables: Tables, examples: Examples, params: Params, form: str, kept_back: str, values: np.ndarray, folder: Path
) -> Scores:
    """Train without some values and score the test requests, which have them; the scores are kept and read if they exist.

    Parameters
    ----------
    tables, examples
        Tables and windows of the run.
    params
        Settings of the run; the training has the share `study.ablation_share` of its steps.
    form
        ``reranker.values``: ``token`` or ``words``.
    kept_back
        One of :data:`KEPT_BACK`.
    values
        Values that are kept back [values].
    folder
        Folder of the kept scores and of the checkpoint; a second call resumes the training.
    """
    prepared, share = examples.prepared, params.study.ablation_share
    less = {name: max(1, round(share * getattr(params.reranker, name))) for name in ("curriculum_steps", "steps")}
    own = params.model_copy(update={"reranker": params.reranker.model_copy(update={"values": form, **less})})
    masked = without(prepared.vocabulary, values)
    unseen = kept_back == "never seen"
    given = examples._replace(prepared=prepared._replace(vocabulary=masked)) if unseen else examples
    pools, requests = prepared.pools["test"], [prepared.requests["test", n] for n in params.controls.n_tokens]
    sections = [stages.section(own, stage) for stage in ("data", "sasrec", "controls", "reranker")]
    asked = [part.tolist() for part in (pools.window, pools.candidates, *requests)]
    identity = files.digest([sections, fingerprint(examples), np.flatnonzero(values).tolist(), kept_back, asked])

    def compute(training: Path) -> Scores:
        print(f"{kept_back}, values as {FORMS[form]}", flush=True)
        model = build(tables.items, masked if unseen else prepared.vocabulary, own.reranker, own.seed)
        train(model, given, own, training, draw=training_batch if unseen else partial(training_batch, requested=masked))
        whole = Prompter(model.tokenizer, tables.items, prepared.vocabulary, own.reranker, model.prompter.limit)
        return score_parts(engine.merge(replace(model, prompter=whole)), examples, pools, requests, report=form)

    return once(folder / f"{kept_back.replace(' ', '-')}-{form}-{identity}.npz", compute)


def compare(tables: Tables, examples: Examples, params: Params, folder: Path) -> tuple[dict[str, Scores], np.ndarray]:
    """Scores of the four trainings (:data:`KEPT_BACK`, with tokens and with words), and the values kept back [values].

    Parameters
    ----------
    tables, examples, params, folder
        As for :func:`scored`; the share of values is `study.unseen`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = choose(examples.prepared.vocabulary, params.study.unseen, params.seed)
    found = {
        f"{FORMS[form]}, {kept_back}": scored(tables, examples, params, form, kept_back, values, folder)
        for kept_back in KEPT_BACK
        for form in FORMS
    }
    return found, values


def judge(
    scores: Mapping[str, Scores], values: np.ndarray, examples: Examples, users: np.ndarray, params: Params
) -> pd.DataFrame:
    """CP@k and NDCG@k of the models by whether the training had the requested values.

    Parameters
    ----------
    scores
        Scores by model: those of :func:`compare`, and ``corec``, the re-ranker of the run, which was trained with all values.
    values
        Values that were kept back [values].
    examples, users, params
        As for :func:`corec.studies.transfer.judge`.

    Returns
    -------
    Columns of :func:`corec.studies.transfer.judge` for requests of one constraint, and ``kept_back``, their number; `tokens` is
    ``trained`` or ``kept back``.
    """
    table = transfer.judge(scores, ~values, examples, users, params)
    names = {"shared": "trained", "new": "kept back"}
    table = table[table["tokens"].isin(names)]
    return (
        table.assign(tokens=table["tokens"].map(names), kept_back=int(values.sum())).drop(columns="source").reset_index(drop=True)
    )


def keep(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the table of :func:`judge`, its plot and the results page; returns the files."""
    with style.figure_style():
        return keep_study(table, draw(table), folder / "unseen", "%.5g")


def draw(table: pd.DataFrame) -> Figure:
    """Plot CP@k with one token of every model, and its difference from `corec`, by whether the training had the value."""
    rows, first = evaluation.pick(table, metric="cp"), table.iloc[0]
    names, kinds = list(rows["model"].unique()), ("trained", "kept back")
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.2 + 0.32 * len(names)), sharey=True, layout="constrained")
    for shift, (kind, color) in enumerate(zip(kinds, style.CYCLE, strict=False)):
        part = evaluation.pick(rows, tokens=kind).set_index("model").reindex(names)
        places, label = np.arange(len(names)) + 0.2 * (shift - 0.5), f"{kind} ({part['n_users'].iloc[0]} users)"
        for axis, column, ends in zip(axes, ("value", "ahead"), (("low", "high"), ("ahead_low", "ahead_high")), strict=True):
            axis.errorbar(part[column], places, xerr=error_bars(part, column, ends), fmt="o", color=color, label=label)
    axes[0].set(yticks=range(len(names)), yticklabels=names, xlabel=f"CP@{first['k']}, one constraint", xlim=(0, 1.02))
    axes[0].invert_yaxis()
    axes[1].axvline(0, color="0.5", linewidth=1)
    axes[1].set(xlabel="difference from corec, trained with all values")
    axes[1].legend(frameon=False, bbox_to_anchor=(1, 0.5), loc="center left", title="requested value")
    figure.suptitle(f"{style.title(table)}: {first['kept_back']} values kept back from training", fontsize="medium")
    return figure
