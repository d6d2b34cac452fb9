"""Scores of the trained re-rankers of a run under further requests, and kept scores of the trainings of a study."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from corec import files, paths
from corec.controls import Vocabulary
from corec.data import Tables
from corec.params import Params
from corec.reranker import Examples, Reranker, engine, load, new_tokens, score_parts, trained_tokens
from corec.scores import Scores

NO_LIMIT = 1e6  # reranker.max_minutes of a training that is defined by its steps


def seeds_of(params: Params) -> range:
    """Seeds of the `reranker.seeds` trained re-rankers of the run."""
    return range(params.seed, params.seed + params.reranker.seeds)


def folder_of(params: Params, seed: int) -> Path:
    """Folder of the re-ranker of the run that was trained with `seed`."""
    stage = paths.stage_dir(params.run, "reranker")
    return stage if seed == params.seed else stage / f"seed-{seed}"


def load_seed(tables: Tables, examples: Examples, params: Params, seed: int) -> Reranker:
    """Load the re-ranker of the run that was trained with `seed` (raises CorecError if it is missing)."""
    return load(folder_of(params, seed), tables.items, examples.prepared.vocabulary, params.reranker)


def score_all(tables: Tables, examples: Examples, params: Params, requests: Sequence[np.ndarray]) -> list[Scores]:
    """Scores of the test windows under further requests, by each of the `reranker.seeds` trained re-rankers of the run.

    All requests of a window are scored in one pass.

    Parameters
    ----------
    tables, examples
        Tables and windows of the run.
    params
        Settings of the run, whose stage 04 has finished.
    requests
        R arrays [windows, n]; n may differ between requests.

    Returns
    -------
    Scores [windows, R, K], one entry per seed.

    Raises
    ------
    CorecError
        If a re-ranker of the run is missing.
    """
    scores = []
    for seed in seeds_of(params):
        model = engine.merge(load_seed(tables, examples, params, seed))
        scores.append(score_parts(model, examples, examples.prepared.pools["test"], requests, f"seed {seed}"))
    return scores


def take_weights(model: Reranker, vocabulary: Vocabulary, folder: Path) -> list[str]:
    """Give an untrained re-ranker the trained weights that :func:`corec.reranker.save` wrote to `folder`.

    These are the adapter, the parts of the head that both have, and the rows of the tokens that both have. They become the
    initial values of the model.

    Returns
    -------
    The new tokens of the saved re-ranker.

    Raises
    ------
    CorecError
        If the folder contains no adapter.
    """
    trained, tokens = trained_tokens(folder), list(new_tokens(vocabulary, model.params))
    weights, head = load_file(folder / "adapter" / "adapter_model.safetensors"), load_file(folder / "head.safetensors")
    here = [place for place, token in enumerate(tokens) if token in trained]
    there = [trained.index(tokens[place]) for place in here]
    with torch.no_grad():
        for name, value in model.trainable().items():
            key = name.removeprefix("model.").replace(".default", "")
            if name.startswith("model.") and "trainable_tokens" in name:
                value[here] = weights[key][there].to(value.device, value.dtype)
            elif name.startswith("model."):
                value.copy_(weights[key])
    own = model.head.state_dict()
    model.head.load_state_dict({name: value for name, value in head.items() if name in own}, strict=False)
    model.start = {name: value.detach().clone() for name, value in model.trainable().items()}
    return trained


def once(path: Path, names: Sequence[str], compute: Callable[[Path], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """Arrays that are kept at `path`, or else those of `compute`, which are then kept there.

    Parameters
    ----------
    path
        File, ``.npz``.
    names
        Names of the arrays.
    compute
        Function that trains and scores. Its argument is the folder of the checkpoint, from which a second call resumes and which
        is removed at the end.
    """
    training = path.with_suffix("")
    if (kept := files.read_arrays(path, names)) is not None:
        files.discard(training)
        return kept
    training.mkdir(parents=True, exist_ok=True)
    found = compute(training)
    files.write_arrays(path, **found)
    files.discard(training)
    return found


def scores_once(path: Path, compute: Callable[[Path], Scores]) -> Scores:
    """Scores that are kept at `path`, or else those of `compute` (see :func:`once`)."""
    return Scores(**once(path, Scores._fields, lambda training: compute(training)._asdict()))
