"""Comparison of the parsers of free text: quality of the requests, and control and relevance of the lists (notebook 14)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from corec import CorecError, backbones, evaluation, files, style
from corec.controls import Prepared, Vocabulary, matches
from corec.evaluation import error_bars, order_by, pick
from corec.intervals import by_user, with_differences
from corec.params import Params
from corec.rankers import by_combiner
from corec.scores import Scores
from corec.studies import keep_study
from corec.studies.language import Request, Sentence, accuracy, by_attribute, made, pairs, to_values, values
from corec.studies.parsers import Constrained, Grammar, Nearest

GOLD = "gold"
SHOTS = 12  # labelled sentences in the prompt of the language model
Parsed = dict[str, dict[str, list[Request]]]  # by set and parser


def parse(sets: Mapping[str, Sequence[Sentence]], vocabulary: Vocabulary, params: Params) -> tuple[Parsed, float | None]:
    """Parse all sentences with the parsers `study.parsers`.

    The threshold of ``nearest`` is selected on other sentences of known phrases; the first of them are the examples of ``model``.

    Returns
    -------
    The requests, and the threshold of ``nearest`` (None without it).
    """
    found: Parsed = {name: {} for name in sets}
    threshold, known = None, made(params.study.sentences, "known", params.seed + 1)
    for parser in params.study.parsers:
        print("parser:", parser, flush=True)
        if parser == "model":
            model = Constrained(vocabulary, params.reranker.backbone, known[:SHOTS])
            for name, part in sets.items():
                found[name][parser] = model.all([sentence.text for sentence in part])
            continue
        if parser == "nearest":
            nearest = Nearest(vocabulary, backbones.sentence_encoder())
            threshold = nearest.tune(known)
        one = Grammar(vocabulary) if parser == "grammar" else nearest
        for name, part in sets.items():
            found[name][parser] = [one(sentence.text) for sentence in part]
    return found, threshold


def measure(sets: Mapping[str, Sequence[Sentence]], parsed: Parsed, params: Params) -> pd.DataFrame:
    """Quality of the requests by set and parser, with intervals from a bootstrap over sentences.

    Returns
    -------
    Columns ``set parser metric value low high n``: ``exact`` (all constraints right, and no other), ``precision``, ``recall`` and
    ``f1`` of single constraints, and the share of sentences that are right in each attribute.
    """
    rows, tail = [], (1 - params.evaluation.confidence) / 2
    for name, sentences in sets.items():
        draws = np.random.default_rng([params.seed, 15]).integers(
            0, len(sentences), (params.evaluation.bootstrap, len(sentences))
        )
        for parser, requests in parsed[name].items():
            whole = accuracy(sentences, requests) | by_attribute(sentences, requests)
            drawn = []
            for places in draws:
                some = [sentences[place] for place in places], [requests[place] for place in places]
                drawn.append(accuracy(*some) | by_attribute(*some))
            for metric, value in whole.items():
                low, high = np.quantile([each[metric] for each in drawn], [tail, 1 - tail])
                rows.append((name, parser, metric, value, low, high, len(sentences)))
    return pd.DataFrame(rows, columns="set parser metric value low high n".split())


def requests_of(
    sentences: Sequence[Sentence], parsed: Mapping[str, Sequence[Request]], prepared: Prepared
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Requests [windows, n] of the test windows by parser, and ``gold``: in turn, the sentences that have constraints.

    Sentences with a label that no item has are left out.

    Returns
    -------
    The requests, and the place of the sentence of each window [windows].
    """
    known = {(attribute.name, label) for attribute, label in values(prepared.vocabulary)}
    places = [place for place, sentence in enumerate(sentences) if sentence.request and pairs(sentence.request) <= known]
    if not places:
        raise CorecError("No sentence has constraints that items of this data set meet: write some into sentences.yaml.")
    chosen = np.array(places)[np.arange(len(prepared.pools["test"].window)) % len(places)]
    every = {GOLD: [sentence.request for sentence in sentences], **parsed}
    return {name: to_values([part[place] for place in chosen], prepared.vocabulary) for name, part in every.items()}, chosen


def end_to_end(
    requests: Mapping[str, np.ndarray],
    scores: Sequence[Scores],
    prepared: Prepared,
    prior: np.ndarray,
    sentence_of: np.ndarray,
    params: Params,
) -> pd.DataFrame:
    """Control and relevance of the lists for the parsed requests, judged by the gold request; intervals over sentences.

    Parameters
    ----------
    requests
        Result of :func:`requests_of`.
    scores
        Scores of COREC for these requests, in this order, one entry per seed.
    prepared, prior, sentence_of, params
        Result of stage 03, scores of the combiner [windows, K], sentence of each window [windows], and settings of the run.

    Returns
    -------
    Columns ``ranker parser metric value low high ahead ahead_low ahead_high k n_sentences n_windows seeds K dataset``: ``cp`` is
    the share of the first k that meets the whole gold request; ``ahead`` is the paired difference from the gold request.
    """
    pools, values_of, cut = prepared.pools["test"], prepared.vocabulary.values_of, params.figures.k
    combined = by_combiner(pools, prior)
    gold = requests[GOLD]
    wanted = np.all(matches(pools.candidates, gold, values_of) | (gold < 0)[:, None], axis=2)
    keys, columns = [], []
    for place, (parser, request) in enumerate(requests.items()):
        rule = evaluation.rule_order(combined, matches(pools.candidates, request, values_of))
        rankers = {"rule+combiner": [rule], "corec": [order_by(part.total()[:, place]) for part in scores]}
        for ranker, orders in rankers.items():
            judged = evaluation.Judged(pools.is_truth(), wanted[..., None])
            each = [evaluation.by_window(order, judged, [cut]) for order in orders]
            for metric, key in evaluation.control_and_relevance(cut, 1).items():
                keys.append((ranker, parser, metric))
                columns.append(np.mean([part[key] for part in each], axis=0))
    values = by_user(np.stack(columns, axis=1).astype(float), sentence_of)
    base = [keys.index((ranker, GOLD, metric)) for ranker, _, metric in keys]
    table = pd.DataFrame(keys, columns=["ranker", "parser", "metric"])
    table = table.join(with_differences(values, values - values[:, base], params.evaluation, params.seed))
    table = table.assign(k=cut, n_sentences=len(values), n_windows=len(sentence_of), seeds=len(scores))
    return table.assign(K=params.controls.k, dataset=params.data.dataset)


def keep(table: pd.DataFrame, lists: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the tables of :func:`measure` and :func:`end_to_end`, the plot and the results page; returns the files."""
    files.write_csv(folder / "language_lists.csv", lists, "%.5g")
    with style.figure_style():
        return [*keep_study(table, draw(table, lists), folder / "language", "%.5g"), folder / "language_lists.csv"]


def draw(table: pd.DataFrame, lists: pd.DataFrame) -> Figure:
    """Plot exact match and F1 by set and parser, and CP of the lists by parser."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", sharey=False)
    parsers, names = list(table["parser"].unique()), list(table["set"].unique())
    for axis, metric, title in ((axes[0], "exact", "exact match"), (axes[1], "f1", "F1 of the constraints")):
        for shift, (parser, color) in enumerate(zip(parsers, style.CYCLE, strict=False)):
            rows = pick(table, metric=metric, parser=parser).set_index("set").loc[names]
            places = np.arange(len(names)) + 0.18 * (shift - (len(parsers) - 1) / 2)
            axis.errorbar(places, rows["value"], yerr=error_bars(rows), fmt="o", color=color, label=parser)
        axis.set(title=title, xticks=range(len(names)), ylim=(0, 1.02))
        axis.set_xticklabels([f"{name} ({pick(table, set=name)['n'].iloc[0]})" for name in names], rotation=20)
    axes[0].legend(frameon=False)
    sources, first = list(lists["parser"].unique()), lists.iloc[0]
    for ranker, offset in (("rule+combiner", -0.08), ("corec", 0.08)):
        rows, mark = pick(lists, ranker=ranker, metric="cp").set_index("parser").loc[sources], style.mark(ranker)
        places, label = np.arange(len(sources)) + offset, style.label(ranker)
        axes[2].errorbar(places, rows["value"], yerr=error_bars(rows), fmt=mark.marker, color=mark.color, label=label)
    axes[2].set(title=f"CP@{first['k']} for the gold request,\nby the request that is used", xticks=range(len(sources)))
    axes[2].set_xticklabels(sources)
    axes[2].set_ylim(bottom=0)
    axes[2].legend(frameon=False)
    figure.suptitle(f"requests in free text; lists: {first['dataset']}, K = {first['K']}, {first['n_windows']} windows")
    return figure
