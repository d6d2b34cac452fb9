"""The sentence itself as the request: the trained re-ranker learns to read sentences made from templates (notebook 14).

The request is the sentence, followed by the tokens of all attributes. The state of an attribute's token is compared with the
candidates as the state of a constraint is (``control: constraints``). A constraint that the sentence does not have is trained
to be met by no candidate, so that it does not change the order.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from corec import files, stages
from corec.controls import Vocabulary
from corec.data import Tables
from corec.params import Params
from corec.reranker import Examples, Targets, TrainingBatch, build, engine, fingerprint, score_parts, train, training_batch
from corec.scores import Scores
from corec.studies.language import TYPOS, phrases, with_typos, write
from corec.studies.trained import folder_of, once, take_weights


def by_attribute(targets: Targets, requests: Sequence[np.ndarray], vocabulary: Vocabulary) -> Targets:
    """Targets with one constraint per attribute: those of the requests, and constraints that no candidate meets.

    Parameters
    ----------
    targets
        Targets of the requests.
    requests
        R arrays [windows, n] of values, of different attributes each.
    vocabulary
        Attributes and values.
    """
    windows, r, _, k = targets.met.shape
    shape = (windows, r, len(vocabulary.attributes), k)
    met = np.zeros(shape, np.float32)
    for place, request in enumerate(requests):
        kinds = vocabulary.kind(request)
        rows, columns = np.nonzero(kinds >= 0)
        met[rows, place, kinds[rows, columns]] = targets.met[rows, place, columns]
    return targets._replace(met=met, known=np.ones(shape, np.float32), present=np.ones(shape[:3], np.float32))


def draw(examples: Examples, params: Params, step: int) -> TrainingBatch:
    """Draw the batch of a step (see :func:`corec.reranker.training_batch`), with sentences in place of values.

    Their frames and phrases are ``known`` ones; half of the sentences have typos.
    """
    vocabulary, rng = examples.prepared.vocabulary, np.random.default_rng([params.seed, 19, step])
    batch = training_batch(examples, params, step)

    def sentence(values: np.ndarray) -> str:
        asked = [int(value) for value in values if value >= 0]
        labels = {vocabulary.attributes[vocabulary.attribute_of[value]].name: vocabulary.labels[value] for value in asked}
        return with_typos(write(labels, "known", rng), TYPOS * int(rng.integers(2)), rng)

    sentences = [np.array([sentence(row) for row in request]) for request in batch.requests]
    return batch._replace(requests=sentences, targets=by_attribute(batch.targets, batch.requests, vocabulary))


def scores(tables: Tables, examples: Examples, params: Params, asked: Sequence[np.ndarray], folder: Path) -> list[Scores]:
    """Fine-tune each trained re-ranker of the run on sentences, and score sentences as requests.

    Parameters
    ----------
    tables, examples
        Tables and windows of the run.
    params
        Settings of the run, whose stage 04 has finished; the training has `study.sentence_steps` steps, all on whole prompts.
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
        If a re-ranker of the run is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    changed = params.reranker.model_copy(update={"curriculum_steps": 0, "steps": params.study.sentence_steps})
    record = stages.require(params.run, "reranker")["identity"]
    found = []
    for seed in range(params.seed, params.seed + params.reranker.seeds):
        own = params.model_copy(update={"reranker": changed, "seed": seed})
        texts = [part.tolist() for part in asked]
        identity = files.digest([stages.section(own, "reranker"), fingerprint(examples), record, phrases(), texts])

        def compute(training: Path, own: Params = own) -> Scores:
            print(f"sentences as requests, seed {own.seed}", flush=True)
            model = build(tables.items, examples.prepared.vocabulary, own.reranker, own.seed)
            take_weights(model, examples.prepared.vocabulary, folder_of(params, own.seed))
            train(model, examples, own, training, draw=draw)
            return score_parts(engine.merge(model), examples, examples.prepared.pools["test"], asked, "sentences")

        found.append(once(folder / f"sentences-{seed}-{identity}.npz", compute))
    return found
