"""Values that the training has never requested, or never seen, as tokens and as words (notebook 11).

Of each attribute, a share of the values is kept back from training. ``never requested``: the lines of the items show them, but no
request has them. ``never seen``: the lines do not show them either, and the titles of these items do not name them. The items
themselves, and the prior, stay as they are. ``all values``: the same training with nothing kept back.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from corec import CorecError, evaluation, files, stages, style
from corec.controls import Vocabulary, without
from corec.data import Tables
from corec.evaluation import error_bars
from corec.params import Params
from corec.reranker import Examples, Prompter, build, engine, fingerprint, score_parts, train, training_batch
from corec.scores import Scores
from corec.studies import keep_study, shortened, transfer
from corec.studies.trained import NO_LIMIT, scores_once

ALL = "all values"
CASES = (ALL, "never requested", "never seen")
FORMS = {"token": "tokens", "words": "words"}  # reranker.values
KINDS = {"shared": "trained", "new": "kept back"}


def choose(vocabulary: Vocabulary, share: float, seed: int) -> np.ndarray:
    """Values to keep back from training [values]: a random share of those of each attribute, at least one and not all.

    Of an attribute with one value, none is kept back.
    """
    rng, chosen = np.random.default_rng([seed, 18]), np.zeros(len(vocabulary.labels), dtype=bool)
    for number in range(len(vocabulary.attributes)):
        own = np.flatnonzero((vocabulary.attribute_of == number) & (vocabulary.frequency() > 0))
        if len(own) > 1:
            chosen[rng.permutation(own)[: np.clip(round(share * len(own)), 1, len(own) - 1)]] = True
    return chosen


def unnamed(items: pd.DataFrame, vocabulary: Vocabulary, values: np.ndarray) -> pd.DataFrame:
    """The items table with titles that do not name those of the `values` [values], a mask, that the item has."""

    def title(text: str, own: np.ndarray) -> str:
        for value in own[(own >= 0) & values[own]]:
            text = re.sub(rf"(?<!\w){re.escape(vocabulary.labels[value])}(?!\w)", " ", text, flags=re.IGNORECASE)
        return " ".join(text.split())

    return items.assign(title=[title(*row) for row in zip(items["title"], vocabulary.values_of[1:], strict=True)])


def chosen_windows(request: np.ndarray, values: np.ndarray, params: Params) -> np.ndarray:
    """Test windows that are scored [rows]: all, or those that ask for one of the values and some of the others.

    Parameters
    ----------
    request
        Requests of one constraint [windows, 1]; -1 where a window has none.
    values
        Values that are kept back [values].
    params
        Settings of the run. `study.unseen_windows` windows that ask for another value are drawn at random; None takes all.
    """
    if params.study.unseen_windows is None:
        return np.arange(len(request))
    asked, kept_back = request[:, 0] >= 0, values[request[:, 0]]
    others = np.random.default_rng([params.seed, 19]).permutation(np.flatnonzero(asked & ~kept_back))
    return np.sort(np.concatenate([np.flatnonzero(asked & kept_back), others[: params.study.unseen_windows]]))


def restricted(examples: Examples, rows: np.ndarray) -> Examples:
    """The examples with the test windows `rows` only."""
    prepared = examples.prepared
    requests = {key: part[rows] if key[0] == "test" else part for key, part in prepared.requests.items()}
    pools = prepared.pools | {"test": prepared.pools["test"].take(rows)}
    return examples._replace(prepared=prepared._replace(pools=pools, requests=requests))


def scored(tables: Tables, examples: Examples, params: Params, form: str, case: str, values: np.ndarray, folder: Path) -> Scores:
    """Train without some values and score the test requests, which have them; the scores are kept and read if they exist.

    Parameters
    ----------
    tables, examples
        Tables and windows of the run; of the test windows, those to be scored.
    params
        Settings of the run. The training has the share `study.ablation_share` of its steps and no time limit.
    form
        ``reranker.values``: ``token`` or ``words``.
    case
        One of :data:`CASES`.
    values
        Values that are kept back [values].
    folder
        Folder of the kept scores and of the checkpoint; a second call resumes the training.
    """
    prepared, items = examples.prepared, tables.items
    less = shortened(params.reranker, params.study.ablation_share) | {"values": form, "max_minutes": NO_LIMIT}
    own = params.model_copy(update={"reranker": params.reranker.model_copy(update=less)})
    masked = without(prepared.vocabulary, values)
    pools, requests = prepared.pools["test"], [prepared.requests["test", n] for n in params.controls.n_tokens]
    record = stages.require(params.run, "controls")["identity"]
    given = [record, stages.section(own, "reranker"), fingerprint(examples)]
    given += [part.tolist() for part in (pools.window, pools.candidates, *requests)]
    if case != ALL:
        given += [np.flatnonzero(values).tolist(), case]

    def compute(training: Path) -> Scores:
        print(f"values as {FORMS[form]}, {case}", flush=True)
        if case == "never seen":
            model = build(unnamed(items, prepared.vocabulary, values), masked, own.reranker, own.seed)
            train(model, examples._replace(prepared=prepared._replace(vocabulary=masked)), own, training)
            whole = Prompter(model.tokenizer, items, prepared.vocabulary, own.reranker, model.prompter.limit)
            model = replace(model, prompter=whole)
        else:
            model = build(items, prepared.vocabulary, own.reranker, own.seed)
            train(model, examples, own, training, draw=partial(training_batch, requested=None if case == ALL else masked))
        return score_parts(engine.merge(model), examples, pools, requests, report=form)

    return scores_once(folder / f"{case.replace(' ', '-')}-{form}-{files.digest(given)}.npz", compute)


def compare(tables: Tables, examples: Examples, params: Params, folder: Path) -> tuple[dict[str, Scores], np.ndarray]:
    """Scores of the trainings (:data:`CASES`, with tokens and with words), and the values kept back [values].

    The scored windows are those of :func:`chosen_windows`.

    Parameters
    ----------
    tables, examples, params, folder
        As for :func:`scored`; the share of values is `study.unseen`. `study.unseen_trainings` restricts the six trainings.

    Raises
    ------
    CorecError
        If no test request of one constraint asks for a value that is kept back, or all do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = choose(examples.prepared.vocabulary, params.study.unseen, params.seed)
    request = examples.prepared.requests["test", 1][:, 0]
    asked = values[request[request >= 0]]
    if asked.all() or not asked.any():
        raise CorecError(
            f"Parameter study.unseen is {params.study.unseen}: of {len(asked)} test requests, {asked.sum()} ask for one of the "
            f"{values.sum()} values kept back; change it, or set it to 0."
        )
    examples = restricted(examples, chosen_windows(examples.prepared.requests["test", 1], values, params))
    trainings = {f"{name}, {case}": (form, case) for form, name in FORMS.items() for case in CASES}
    names = params.study.unseen_trainings or trainings
    parts = {
        name: scored(tables, examples, params, form, case, values, folder)
        for name, (form, case) in trainings.items()
        if name in names
    }
    return parts, values


def judge(
    scores: Mapping[str, Scores], values: np.ndarray, examples: Examples, users: np.ndarray, params: Params
) -> pd.DataFrame:
    """CP@k and NDCG@k of the models by whether the training had the requested values.

    Parameters
    ----------
    scores
        Scores by model: those of :func:`compare`, and ``corec``, the re-ranker of the run, which had all values and all steps, if
        the run has one.
    values
        Values that were kept back [values].
    examples, users, params
        As for :func:`corec.studies.transfer.judge`.

    Returns
    -------
    Columns of :func:`corec.studies.transfer.judge` for requests of one constraint, and ``kept_back``, their number; `tokens` is
    ``trained`` or ``kept back``. `ahead` is the difference from the training in the same form with all values; for ``corec`` and
    the rankers without a language model, from ``corec``, or without it from the first training. ``gain gain_low gain_high``: the
    difference from the order ``over``, that of the combiner, or of SASRec if the examples have no prior.
    """
    rows = chosen_windows(examples.prepared.requests["test", 1], values, params)
    base = {name: f"{name.split(', ')[0]}, {ALL}" for name in scores if ", " in name}
    if transfer.ANEW in scores:
        scores = {**scores, transfer.ANEW: scores[transfer.ANEW].take(rows)}
    else:
        base |= dict.fromkeys(transfer.SIMPLE, next(iter(scores)))
    judged = partial(transfer.judge, scores, ~values, restricted(examples, rows), users[rows], params)
    table, over = judged(base), "combiner" if examples.prior else "sasrec"
    apart = judged(dict.fromkeys(table["model"], over))
    gain = {f"gain{end}": apart[f"ahead{end}"] for end in ("", "_low", "_high")}
    table = table.assign(**gain, over=over, kept_back=int(values.sum()))
    table = table[table["tokens"].isin(KINDS)]
    table = table.assign(tokens=table["tokens"].map(KINDS))
    return table.drop(columns="source").reset_index(drop=True)


def keep(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the table of :func:`judge`, its plot and the results page; returns the files."""
    with style.figure_style():
        return keep_study(table, draw(table), folder / "unseen", "%.5g")


def draw(table: pd.DataFrame) -> Figure:
    """Plot CP@k with one token of every model, and the differences from the same training with all values."""
    rows, first = evaluation.pick(table, metric="cp"), table.iloc[0]
    names = list(rows["model"].unique())
    less = [name for name in names if ", " in name and not name.endswith(ALL)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.3 * len(names)), layout="constrained")
    columns = ("value", ("low", "high"), names), ("ahead", ("ahead_low", "ahead_high"), less)
    for axis, (column, ends, shown) in zip(axes, columns, strict=True):
        for shift, (kind, color) in enumerate(zip(KINDS.values(), style.CYCLE, strict=False)):
            part = evaluation.pick(rows, tokens=kind).set_index("model").reindex(shown)
            places, label = np.arange(len(shown)) + 0.2 * (shift - 0.5), f"{kind} ({part['n_users'].iloc[0]} users)"
            axis.errorbar(part[column], places, xerr=error_bars(part, column, ends), fmt="o", color=color, label=label)
        axis.set(yticks=range(len(shown)), yticklabels=shown, ylim=(len(shown) - 0.5, -0.5))
    axes[0].set(xlabel=f"CP@{first['k']}, one constraint", xlim=(0, 1.02))
    axes[1].axvline(0, color="0.5", linewidth=1)
    axes[1].set(xlabel="difference from the same training with all values")
    axes[1].locator_params(axis="x", nbins=6)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, title="requested value")
    figure.suptitle(f"{style.title(table)}: {first['kept_back']} values kept back from training", fontsize="medium")
    return figure
