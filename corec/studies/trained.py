"""Scores of the trained re-rankers of a run under further requests."""

from collections.abc import Sequence

import numpy as np

from corec import paths
from corec.data import Tables
from corec.params import Params
from corec.reranker import Examples, engine, load, score_parts
from corec.scores import Scores


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
    folder, scores = paths.stage_dir(params.run, "reranker"), []
    for number in range(params.reranker.seeds):
        place = folder / f"seed-{params.seed + number}" if number else folder
        model = engine.merge(load(place, tables.items, examples.prepared.vocabulary, params.reranker))
        scores.append(score_parts(model, examples, examples.prepared.pools["test"], requests, f"seed {params.seed + number}"))
    return scores
