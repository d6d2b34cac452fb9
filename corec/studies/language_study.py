"""Comparison of the parsers of free text: quality of the requests, and control and relevance of the lists (notebook 14)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from corec import CorecError, backbones, evaluation, files, style
from corec.controls import Prepared, Vocabulary, matches
from corec.data import Tables
from corec.evaluation import error_bars, order_by, pick
from corec.intervals import by_user, with_differences
from corec.params import Params
from corec.rankers import by_combiner
from corec.reranker import Examples
from corec.scores import Scores
from corec.studies import keep_study, sentence_requests
from corec.studies.language import Request, Sentence, accuracy, by_attribute, made, pairs, to_values, values
from corec.studies.parsers import Constrained, Grammar, Nearest
from corec.studies.trained import score_all

GOLD = "gold"
SENTENCE = "sentence"  # the sentence itself is the request
LISTED = ("templates, known", "templates, new", "hand-written")  # sets for which lists are made
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
    direct: Sequence[Scores] = (),
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
    direct
        Scores of COREC for the sentences themselves, one entry per seed; empty if it has not been trained on sentences.

    Returns
    -------
    Columns ``ranker parser metric value low high ahead ahead_low ahead_high k n_sentences n_windows seeds K dataset``: ``cp`` is
    the share of the first k that meets the whole gold request; ``ahead`` is the paired difference from the gold request. For the
    sentences themselves, it contains the effect of their further training steps.
    """
    pools, values_of, cut = prepared.pools["test"], prepared.vocabulary.values_of, params.figures.k
    combined = by_combiner(pools, prior)
    gold = requests[GOLD]
    wanted = np.all(matches(pools.candidates, gold, values_of) | (gold < 0)[:, None], axis=2)
    rankings = {}
    for place, (parser, request) in enumerate(requests.items()):
        rankings["rule+combiner", parser] = [evaluation.rule_order(combined, matches(pools.candidates, request, values_of))]
        rankings["corec", parser] = [order_by(part.total()[:, place]) for part in scores]
    if direct:
        rankings["corec", SENTENCE] = [order_by(part.total()[:, 0]) for part in direct]
    keys, columns = [], []
    judged = evaluation.Judged(pools.is_truth(), wanted[..., None])
    for (ranker, parser), orders in rankings.items():
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


def lists_of(
    sets: Mapping[str, Sequence[Sentence]],
    parsed: Parsed,
    tables: Tables,
    examples: Examples,
    params: Params,
    priors: Mapping[str, np.ndarray],
    folder: Path,
) -> pd.DataFrame:
    """:func:`end_to_end` for the sets :data:`LISTED`, also with the sentences as requests if `study.sentence_steps` is not 0.

    Parameters
    ----------
    sets, parsed
        Sentences, and result of :func:`parse`.
    tables, examples, params
        Tables, windows and settings of the run, whose stage 04 has finished.
    priors
        Scores of the combiner [windows, K] by split.
    folder
        Folder of the kept scores and of the checkpoint of the training on sentences.

    Returns
    -------
    Columns of :func:`end_to_end` and ``set``.
    """
    prepared = examples.prepared
    chosen = {name: requests_of(sets[name], parsed[name], prepared) for name in LISTED}
    scores = score_all(tables, examples, params, [request for requests, _ in chosen.values() for request in requests.values()])
    texts = [np.array([sets[name][place].text for place in places]) for name, (_, places) in chosen.items()]
    direct = sentence_requests.scores(tables, examples, params, texts, folder) if params.study.sentence_steps else []
    found, start = [], 0
    for number, (name, (requests, places)) in enumerate(chosen.items()):
        end = start + len(requests)
        own = [part.under(slice(start, end)) for part in scores]
        whole = [part.under(slice(number, number + 1)) for part in direct]
        table = end_to_end(requests, own, prepared, priors["test"], places, params, whole)
        found.append(table.assign(set=name))
        start = end
    return pd.concat(found, ignore_index=True)


def keep(table: pd.DataFrame, lists: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the tables of :func:`measure` and :func:`lists_of`, the plot and the results page; returns the files."""
    files.write_csv(folder / "language_lists.csv", lists, "%.5g")
    with style.figure_style():
        return [*keep_study(table, draw(table, lists), folder / "language", "%.5g"), folder / "language_lists.csv"]


def draw(table: pd.DataFrame, lists: pd.DataFrame) -> Figure:
    """Plot exact match and F1 by set and parser, and CP of the lists by what is used as the request."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")
    parsers, names = list(table["parser"].unique()), list(table["set"].unique())
    for axis, metric, title in ((axes[0], "exact", "exact match"), (axes[1], "f1", "F1 of the constraints")):
        for shift, (parser, color) in enumerate(zip(parsers, style.CYCLE, strict=False)):
            rows = pick(table, metric=metric, parser=parser).set_index("set").loc[names]
            places = np.arange(len(names)) + 0.18 * (shift - (len(parsers) - 1) / 2)
            axis.errorbar(places, rows["value"], yerr=error_bars(rows), fmt="o", color=color, label=parser)
        axis.set(title=title, xticks=range(len(names)), ylim=(0, 1.02))
        axis.set_xticklabels([f"{name} ({pick(table, set=name)['n'].iloc[0]})" for name in names], rotation=20)
    axes[0].legend(frameon=False)
    first = lists.iloc[0]
    for axis, name in zip(axes[2:], LISTED[1:], strict=True):
        part = pick(lists, set=name, metric="cp")
        sources = list(part["parser"].unique())
        for ranker, offset in (("rule+combiner", -0.08), ("corec", 0.08)):
            rows, mark = pick(part, ranker=ranker).set_index("parser").reindex(sources), style.mark(ranker)
            places, label = np.arange(len(sources)) + offset, style.label(ranker)
            axis.errorbar(places, rows["value"], yerr=error_bars(rows), fmt=mark.marker, color=mark.color, label=label)
        axis.set(
            title=f"CP@{first['k']} for the gold request:\n{name}", xticks=range(len(sources)), xlabel="request that is used"
        )
        axis.set_xticklabels(sources, rotation=20)
        axis.set_ylim(bottom=0)
    axes[3].legend(frameon=False)
    figure.suptitle(f"requests in free text; lists: {first['dataset']}, K = {first['K']}, {first['n_windows']} windows")
    return figure
