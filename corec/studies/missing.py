"""Rankers when metadata is missing or wrong: the rule with imputed values, COREC, and both together.

The shop knows a vocabulary in which values are hidden or wrong (:mod:`corec.controls.incomplete`); evidence, training and prompts
use it. Requests and judgement use the true vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from corec import conflicts, controls, evaluation, evidence, files, stages
from corec.controls import Prepared, Vocabulary, standardise
from corec.data import Tables
from corec.evaluation import order_by
from corec.intervals import by_user, with_differences
from corec.params import Params
from corec.rankers import boost, by_combiner
from corec.reranker import build, engine, fingerprint, load_examples, score_parts, train
from corec.scores import Scores
from corec.studies import imputers
from corec.studies.trained import scores_once

DROPOUT = "corec-dropout"
# Imputers that need no trained re-ranker, and those of them that give probabilities.
SIMPLE = (
    "none",
    "most-frequent",
    "tf-idf",
    "tf-idf-probability",
    "words-and-values",
    "tf-idf-and-table",
    "nearest-title",
    "tagger",
)
ALL_ATTRIBUTES = "all"
SOFT = ("tf-idf-probability", "words-and-values", "tf-idf-and-table")


class Condition(NamedTuple):
    """What the shop knows."""

    missing: float  # share of the pairs of an item and an attribute that are unknown
    wrong: float  # share of the known pairs that have other values
    seed: int  # of the choice of the pairs, and of the training; combiner, candidates and requests have the seed of the run

    def apply(self, vocabulary: Vocabulary) -> Vocabulary:
        """The vocabulary as the shop knows it."""
        return controls.corrupt(controls.hide(vocabulary, self.missing, self.seed), self.wrong, self.seed)


class Key(NamedTuple):
    """A value for each test window: a metric of a ranker under requests of n constraints."""

    missing: float
    wrong: float
    n_tokens: int
    model: str
    imputer: str
    metric: str


def conditions(params: Params) -> list[Condition]:
    """Conditions of the study, for `study.seeds` seeds: `study.missing`, and `study.wrong` with nothing missing."""
    shares = [(share, 0.0) for share in params.study.missing] + [(0.0, share) for share in params.study.wrong if share]
    seeds = range(params.seed, params.seed + params.study.seeds)
    return [Condition(*share, seed) for seed in seeds for share in shares]


class Case(NamedTuple):
    """A condition with what follows from it: the known vocabulary, and the scores of the combiner by split."""

    condition: Condition
    known: Vocabulary
    priors: Mapping[str, np.ndarray]


def values_by_imputer(case: Case, titles: Sequence[str], embeddings: np.ndarray | None, params: Params) -> dict[str, np.ndarray]:
    """Values of all items [items + 1, values] by imputer: 0 or 1, or probabilities. Known values are kept.

    The exception is ``tf-idf-and-table``, for wrong values: the mean of the known value and of the probability that the other
    titles give.

    Parameters
    ----------
    case
        What the shop knows.
    titles
        Titles of the items 1 … n.
    embeddings
        Embeddings of the titles by MiniLM; None to leave ``nearest-title`` out.
    params
        Settings of the run; its backbone is the tagger if `study.tagger` is true.
    """
    known = case.known
    words = imputers.by_words(known, titles)
    found = {
        "none": np.zeros_like(words),
        "most-frequent": imputers.most_frequent(known),
        "tf-idf": imputers.decided(known, words),
        "tf-idf-probability": words,
        "words-and-values": imputers.by_words(known, titles, with_values=True),
    }
    if embeddings is not None:
        found["nearest-title"] = imputers.nearest(known, embeddings)
    if params.study.tagger:
        found["tagger"] = imputers.tagged(known, titles, params.reranker.backbone)
    filled = {name: imputers.filled(known, guesses) for name, guesses in found.items()}
    if case.condition.wrong:
        others = imputers.by_words(known, titles, folds=5)
        filled["tf-idf-and-table"] = (imputers.table(known) + others) / 2
    return filled


def cases(tables: Tables, prepared: Prepared, params: Params) -> Iterator[Case]:
    """Cases of :func:`conditions`. The evidence and the combiner are computed from the known values of each."""
    with_evidence = params.evidence.combiner != "none"
    whole = evidence.similarities_of(tables, prepared.vocabulary, params) if with_evidence else None
    for condition in conditions(params):
        known, priors = condition.apply(prepared.vocabulary), {}
        if whole is not None:
            similar = whole._replace(values=evidence.weighted_values(known))
            priors = evidence.make(tables, prepared, similar, params)[1].priors
        yield Case(condition, known, priors)


def asked(prepared: Prepared, lengths: Sequence[int]) -> list[np.ndarray]:
    """Requests to score: those of all lengths, then each constraint of the longer ones alone, [windows, n] each."""
    whole = [prepared.requests["test", n] for n in lengths]
    return whole + [request[:, [place]] for request in whole if request.shape[1] > 1 for place in range(request.shape[1])]


def models_of(params: Params) -> list[str]:
    """Models to train: ``corec``, unless `study.without_dropout` is false, and ``corec-dropout``."""
    return ["corec", DROPOUT] if params.study.without_dropout else [DROPOUT]


def settings_of(model: str, params: Params) -> Params:
    """Settings of the training of ``corec`` or of ``corec-dropout``, which has `study.attribute_dropout`."""
    dropout = params.study.attribute_dropout if model == DROPOUT else 0.0
    return params.model_copy(update={"reranker": params.reranker.model_copy(update={"attribute_dropout": dropout})})


def scores_of(model: str, case: Case, tables: Tables, prepared: Prepared, params: Params, folder: Path) -> Scores:
    """Train a model on what the shop knows and score :func:`asked`; the scores are kept in `folder` and read if they exist.

    Parameters
    ----------
    model
        ``corec`` or ``corec-dropout`` (see :func:`settings_of`).
    case
        What the shop knows.
    tables, prepared
        Results of stages 01 and 03.
    params
        Settings of the run.
    folder
        Folder of the kept scores and of the checkpoint.
    """
    own = settings_of(model, params).model_copy(update={"seed": case.condition.seed})
    examples = load_examples(tables.windows, prepared._replace(vocabulary=case.known), case.priors)
    requests, pools = asked(prepared, params.controls.n_tokens), prepared.pools["test"]
    given = [case.known.values_of.tolist(), *(part.tolist() for part in (pools.window, pools.candidates, *requests))]
    given += [tables.items["title"].tolist(), [attribute.model_dump() for attribute in case.known.attributes]]
    priors = {split: part.round(3).tolist() for split, part in case.priors.items()}
    sections = [stages.section(own, stage) for stage in ("data", "sasrec", "controls", "reranker")]
    identity = files.digest([sections, fingerprint(examples), given, priors])
    name = f"{model}-{case.condition.missing:g}-{case.condition.wrong:g}-{case.condition.seed}-{identity}.npz"

    def compute(training: Path) -> Scores:
        print(f"{model}: {case.condition.missing:.0%} missing, {case.condition.wrong:.0%} wrong, seed {own.seed}", flush=True)
        trained = build(tables.items, case.known, own.reranker, own.seed)
        train(trained, examples, own, training)
        return score_parts(engine.merge(trained), examples, pools, requests, report=model)

    return scores_once(folder / name, compute)


def rankings(
    case: Case, prepared: Prepared, values_of: Mapping[str, np.ndarray], scores: Mapping[str, Scores], params: Params
) -> dict[int, dict[tuple[str, str], np.ndarray]]:
    """Rankings [windows, K] by number of constraints, then by model and imputer.

    The model ``rule`` with a hard imputer orders by the number of constraints met, ties by the combiner. With probabilities it is
    the boost, with the expected number of constraints met and the weight `reranker.control_logits`. The imputers ``corec`` and
    ``corec-dropout`` are the probabilities of these models, from requests of one constraint, where the value is unknown. With
    wrong values, they are the mean of the known value and the probability. The imputer ``truth`` knows all values. Without a
    prior, the retriever's standardised scores take its place, and the models ``corec`` and ``corec-dropout`` have no part of the
    retriever.

    Parameters
    ----------
    case, prepared, params
        As for :func:`scores_of`.
    values_of
        Result of :func:`values_by_imputer`.
    scores
        Result of :func:`scores_of` by model.
    """
    pools, lengths, logits = prepared.pools["test"], params.controls.n_tokens, params.reranker.control_logits
    prior = case.priors.get("test", standardise(pools.retriever_score))
    combined = by_combiner(pools, prior)
    told = case.known.known(pools.candidates)  # [windows, K, attributes]
    rows, single, found = np.arange(len(pools.window))[:, None], len(lengths), {}
    for place, n in enumerate(lengths):
        request = prepared.requests["test", n]
        met = controls.matches(pools.candidates, request, prepared.vocabulary.values_of)
        orders = {
            ("sasrec", "none"): evaluation.retriever_order(pools),
            ("combiner", "none"): evaluation.retriever_order(combined),
            ("rule", "truth"): evaluation.rule_order(combined, met),
        }
        for name, part in values_of.items():
            values = part[pools.candidates[:, :, None], request[:, None]] * (request >= 0)[:, None]  # [windows, K, n]
            soft = name in SOFT
            orders["rule", name] = order_by(boost(prior, values, logits)) if soft else evaluation.rule_order(combined, values)
        is_known = told.transpose(0, 2, 1)[rows, prepared.vocabulary.kind(request)].transpose(0, 2, 1)  # [windows, K, n]
        known_met = controls.matches(pools.candidates, request, case.known.values_of)
        for name, own in scores.items():
            orders[name, "none"] = order_by(own.total()[:, place])
            first = single if n > 1 else place
            chance = own.control[:, first : first + n].transpose(0, 2, 1) / logits
            told_met = (known_met + chance) / 2 if case.condition.wrong else known_met
            orders["rule", name] = order_by(boost(prior, np.where(is_known, told_met, chance), logits))
        single += n if n > 1 else 0
        found[n] = orders
    return found


def quality(
    case: Case, prepared: Prepared, values_of: Mapping[str, np.ndarray], scores: Mapping[str, Scores], params: Params
) -> pd.DataFrame:
    """Area under the ROC curve of the guesses whether a candidate meets a constraint on an unknown value.

    The pairs are those of the candidates and of the requests of one constraint, where the value is unknown. 0.5 is chance.

    Parameters
    ----------
    case, prepared, values_of, scores, params
        As for :func:`rankings`.

    Returns
    -------
    Columns ``missing wrong seed attribute imputer auc pairs``; attributes without unknown pairs of both kinds are omitted.
    """
    pools, place = prepared.pools["test"], params.controls.n_tokens.index(1)
    request = prepared.requests["test", 1]
    kinds = prepared.vocabulary.kind(request)
    met = controls.matches(pools.candidates, request, prepared.vocabulary.values_of)[..., 0]
    unknown = ~np.take_along_axis(case.known.known(pools.candidates), kinds[:, None], axis=2)[..., 0] & (request >= 0)
    guesses = {name: part[pools.candidates, request] for name, part in values_of.items() if name != "none"}
    guesses |= {name: part.control[:, place] for name, part in scores.items()}
    rows = []
    for number, attribute in enumerate(prepared.vocabulary.attributes):
        pairs = unknown & (kinds == number)
        if 0 < met[pairs].sum() < pairs.sum():
            found = ((name, roc_auc_score(met[pairs], part[pairs])) for name, part in guesses.items())
            rows += [(*case.condition, attribute.name, name, area, pairs.sum()) for name, area in found]
    return pd.DataFrame(rows, columns="missing wrong seed attribute imputer auc pairs".split())


class Measured(NamedTuple):
    """Result of :func:`measure`."""

    values: dict[Key, np.ndarray]  # [seeds, windows]
    guesses: pd.DataFrame  # of :func:`quality`


def measure(tables: Tables, prepared: Prepared, params: Params, folder: Path, embeddings: np.ndarray | None) -> Measured:
    """Train and rank under all :func:`conditions`; CP@k (all constraints met) and NDCG@k of every seed and window.

    Parameters
    ----------
    tables, prepared
        Results of stages 01 and 03.
    params
        Settings of the run; k is ``figures.k``.
    folder
        Folder of the kept scores; a second call resumes after the last one.
    embeddings
        See :func:`values_by_imputer`.

    Raises
    ------
    CorecError
        Before the first training, if the settings do not fit the study (see :mod:`corec.conflicts`).
    """
    conflicts.require(params, "missing_metadata")
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[Key, list[np.ndarray]] = {}
    guesses = []
    titles, cut = tables.items["title"].tolist(), params.figures.k
    for case in cases(tables, prepared, params):
        scores = {model: scores_of(model, case, tables, prepared, params, folder) for model in models_of(params)}
        values_of = values_by_imputer(case, titles, embeddings, params)
        guesses.append(quality(case, prepared, values_of, scores, params))
        for n, orders in rankings(case, prepared, values_of, scores, params).items():
            judged = evaluation.judge(prepared.pools["test"], prepared.requests["test", n], prepared.vocabulary.values_of)
            for (model, imputer), order in orders.items():
                values = evaluation.by_window(order, judged, [cut])
                for metric, key in evaluation.control_and_relevance(cut, n).items():
                    found.setdefault(Key(*case.condition[:2], n, model, imputer, metric), []).append(values[key].astype(float))
    return Measured({key: np.stack(values) for key, values in found.items()}, pd.concat(guesses, ignore_index=True))


def tabulate(measured: Mapping[Key, np.ndarray], prepared: Prepared, users: np.ndarray, params: Params) -> pd.DataFrame:
    """Means over seeds and users with intervals, and paired differences from the rule with the best imputer.

    The best imputer of a condition and a number of constraints is the one of :data:`SIMPLE` with the highest CP on the same test
    windows, a choice in favour of the imputers. Requests of one constraint are also tabulated by attribute.

    Parameters
    ----------
    measured
        Values of :func:`measure`.
    prepared
        Result of stage 03.
    users
        User of each test window [windows].
    params
        Settings of the run.

    Returns
    -------
    Columns of :data:`corec.evaluation.COLUMNS`, and
    ``run missing wrong imputer attribute best ahead ahead_low ahead_high seeds lowest highest ahead_lowest ahead_highest``.
    `seeds` is their number, `seed` the first one. `attribute` is ``all``, or that of the requests. `lowest` and `highest` are the
    range over the seeds of `value`, which is their mean; `ahead_lowest` and `ahead_highest` that of `ahead`, with the same
    imputer for all seeds.
    """
    vocabulary, cut, parts = prepared.vocabulary, params.figures.k, []
    groups: dict[tuple[float, float, int], list[Key]] = {}
    for key in measured:
        groups.setdefault(key[:3], []).append(key)
    for (*_, n), keys in groups.items():
        kinds = vocabulary.kind(prepared.requests["test", n])[:, 0] if n == 1 else np.full(len(users), -1)
        chosen = {ALL_ATTRIBUTES: np.full(len(users), True)}
        chosen |= {each.name: kinds == number for number, each in enumerate(vocabulary.attributes)}
        for attribute, rows in chosen.items():
            if not rows.any():
                continue
            windows = np.stack([measured[key][:, rows] for key in keys], axis=2)  # [seeds, windows, keys]
            seeds = np.stack([by_user(part, users[rows]) for part in windows])  # [seeds, users, keys]
            values = seeds.mean(axis=0)
            means = dict(zip(keys, values.mean(axis=0), strict=True))
            choice = [
                key for key in keys if key.model == "rule" and key.imputer in SIMPLE and key.metric == ("cp" if n else "ndcg")
            ]
            best = max(choice, key=means.__getitem__)
            base = [keys.index(best._replace(metric=key.metric)) for key in keys]
            numbers = with_differences(values, values - values[:, base], params.evaluation, params.seed)
            table = pd.DataFrame(keys, columns=list(Key._fields)).join(numbers)
            each = seeds.mean(axis=1)
            for name, part in (("", each), ("ahead_", each - each[:, base])):
                table[f"{name}lowest"], table[f"{name}highest"] = part.min(axis=0), part.max(axis=0)
            parts.append(table.assign(attribute=attribute, best=best.imputer, n_users=len(values)))
    table = pd.concat(parts, ignore_index=True)
    table["tau"] = table["n_tokens"].where(table["metric"] == "cp").astype("Int64")
    table = table.assign(dataset=params.data.dataset, protocol=params.controls.protocol, K=params.controls.k, k=cut)
    table = table.assign(run=params.run, seed=params.seed, seeds=params.study.seeds)
    own = "run missing wrong imputer attribute best ahead ahead_low ahead_high seeds"
    return table[evaluation.COLUMNS + own.split() + "lowest highest ahead_lowest ahead_highest".split()]
