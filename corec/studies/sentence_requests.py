"""The sentence itself as the request: the trained re-ranker learns to read sentences made from templates (notebook 14).

The request is the sentence, followed by the tokens of all attributes. The state of an attribute's token is compared with the
candidates as the state of a constraint is (``control: constraints``). A constraint that the sentence does not have is trained
to be met by no candidate, so that it does not change the order.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from corec import CorecError, files, stages
from corec.controls import Vocabulary
from corec.data import Tables
from corec.params import Params
from corec.reranker import Examples, Targets, TrainingBatch, build, engine, fingerprint, score_parts, train, training_batch
from corec.scores import Scores
from corec.studies.language import TYPOS, phrases, values, with_typos, write
from corec.studies.trained import NO_LIMIT, folder_of, scores_once, seeds_of, take_weights


def by_attribute(batch: TrainingBatch, vocabulary: Vocabulary) -> Targets:
    """Targets with one constraint per attribute: those of the requests, and constraints that no candidate meets.

    Parameters
    ----------
    batch
        Windows and targets, and requests [windows, n] of values, which are of different attributes.
    vocabulary
        Attributes and values.

    Returns
    -------
    Targets whose `met` and `known` are [windows, R, attributes, K] and `present` is [windows, R, attributes].
    """
    targets = batch.targets
    windows, r, _, k = targets.met.shape
    shape = (windows, r, len(vocabulary.attributes), k)
    met = np.zeros(shape, np.float32)
    known = np.broadcast_to(vocabulary.known(batch.pools.candidates).transpose(0, 2, 1)[:, None], shape).astype(np.float32)
    for place, request in enumerate(batch.requests):
        kinds = vocabulary.kind(request)
        rows, columns = np.nonzero(kinds >= 0)
        met[rows, place, kinds[rows, columns]] = targets.met[rows, place, columns]
    return targets._replace(met=met, known=known, present=np.ones(shape[:3], np.float32))


def draw(examples: Examples, params: Params, step: int) -> TrainingBatch:
    """Draw the batch of a step (see :func:`corec.reranker.training_batch`), with sentences in place of values.

    Their frames and phrases are ``known`` ones; half of the sentences have typos.
    """
    vocabulary, rng = examples.prepared.vocabulary, np.random.default_rng([params.seed, 19, step])
    batch = training_batch(examples, params, step)

    def sentence(request: np.ndarray) -> str:
        asked = [int(value) for value in request if value >= 0]
        labels = {vocabulary.attributes[vocabulary.attribute_of[value]].name: vocabulary.labels[value] for value in asked}
        return with_typos(write(labels, "known", rng), TYPOS * int(rng.integers(2)), rng)

    sentences = [np.array([sentence(row) for row in request]) for request in batch.requests]
    return batch._replace(requests=sentences, targets=by_attribute(batch, vocabulary))


def scores(tables: Tables, examples: Examples, params: Params, asked: Sequence[np.ndarray], folder: Path) -> list[Scores]:
    """Fine-tune each trained re-ranker of the run on sentences, and score sentences as requests.

    Parameters
    ----------
    tables, examples
        Tables and windows of the run.
    params
        Settings of the run, whose stage 04 has finished. The training has `study.sentence_plain_steps` steps on plain prompts,
        then `study.sentence_steps` steps on whole prompts, and no time limit.
    asked
        R arrays [windows] of sentences, for the test windows.
    folder
        Folder of the kept scores and of the checkpoint; a second call resumes after the last training.

    Returns
    -------
    Scores [windows, R, K], one entry per seed.

    Raises
    ------
    CorecError
        If a re-ranker of the run is missing, or a value of the run has no phrases.
    """
    names = [(attribute.name, label) for attribute, label in values(examples.prepared.vocabulary)]
    if without := [f"{name}: {label}" for name, label in names if label not in phrases().get(name, {})]:
        raise CorecError(
            f"The value {without[0]!r} has no phrases: add some to corec/studies/phrases.yaml, or set study.sentence_steps to 0."
        )
    folder.mkdir(parents=True, exist_ok=True)
    study = params.study
    update = {"curriculum_steps": study.sentence_plain_steps, "steps": study.sentence_steps, "max_minutes": NO_LIMIT}
    changed = params.reranker.model_copy(update=update)
    record, texts = stages.require(params.run, "reranker")["identity"], [part.tolist() for part in asked]
    given, found = [fingerprint(examples), record, phrases(), texts], []
    for seed in seeds_of(params):
        own = params.model_copy(update={"reranker": changed, "seed": seed})
        identity = files.digest([stages.section(own, "reranker"), *given])

        def compute(training: Path, own: Params = own) -> Scores:
            print(f"sentences as requests, seed {own.seed}", flush=True)
            model = build(tables.items, examples.prepared.vocabulary, own.reranker, own.seed)
            take_weights(model, examples.prepared.vocabulary, folder_of(params, own.seed))
            train(model, examples, own, training, draw=draw)
            return score_parts(engine.merge(model), examples, examples.prepared.pools["test"], asked, "sentences")

        found.append(scores_once(folder / f"sentences-{seed}-{identity}.npz", compute))
    return found
