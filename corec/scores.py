"""Scores on disk: those of the combiner (stage 03) and those of the language model (stage 04). Neither needs torch to be read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from pyarrow import parquet

from corec import controls, files, paths, stages
from corec.controls import Pools, Prepared, standardise


class Scores(NamedTuple):
    """Parts of the scores of several windows, each [windows, R, K], float32."""

    prior: np.ndarray  # gate times prior; 0 without a prior
    relevance: np.ndarray
    control: np.ndarray  # at strength 1

    def take(self, rows: np.ndarray) -> "Scores":
        """Select windows."""
        return Scores(*(part[rows] for part in self))

    def under(self, requests: slice) -> "Scores":
        """Select requests."""
        return Scores(*(part[:, requests] for part in self))

    def total(self, strength: float = 1.0) -> np.ndarray:
        """Scores [windows, R, K] with the control term weighted by `strength`."""
        return self.prior + self.relevance + np.float32(strength) * self.control


def save(scores: Mapping[tuple[str, str, int, str], Scores], prepared: Prepared, lengths: Sequence[int], folder: Path) -> Path:
    """Write ``scores.parquet`` with columns ``protocol split window n_tokens model seed prior relevance control``.

    Parameters
    ----------
    scores
        Scores by model, split, seed and protocol of the requests.
    prepared
        Result of stage 03, for the window numbers.
    lengths
        Number of constraints of each of the R requests.
    folder
        Folder of the file.

    Returns
    -------
    The file.
    """
    parts = [
        pd.DataFrame(
            {
                "protocol": protocol,
                "split": split,
                "window": prepared.pools[split].window,
                "n_tokens": n,
                "model": model,
                "seed": seed,
            }
            | {name: list(part[:, r]) for name, part in values._asdict().items()}
        )
        for (model, split, seed, protocol), values in scores.items()
        for r, n in enumerate(lengths)
    ]
    path = folder / "scores.parquet"
    files.write_parquet(path, pd.concat(parts, ignore_index=True))
    return path


def load(run: str, protocol: str) -> dict[tuple[str, str], list[Scores]]:
    """Scores of a run by model and split, one entry per seed.

    Parameters
    ----------
    run
        Name of the run.
    protocol
        Protocol of the requests: ``controls.protocol``, or one of ``controls.other_protocols`` (test windows only). The R
        requests are in the order of ``controls.n_tokens``.

    Raises
    ------
    CorecError
        If stage 04 has not finished.
    """
    stages.require(run, "reranker")
    file = paths.stage_dir(run, "reranker") / "scores.parquet"
    table = pd.read_parquet(file, filters=[("protocol", "==", protocol)])
    found: dict[tuple[str, str], list[Scores]] = {}
    for (model, split, _), rows in table.groupby(["model", "split", "seed"], sort=False):
        by_length = [part for _, part in rows.groupby("n_tokens", sort=False)]
        parts = [np.stack([np.stack(list(part[name])) for part in by_length], axis=1) for name in Scores._fields]
        found.setdefault((str(model), str(split)), []).append(Scores(*parts))
    return found


def score_gap(scores: np.ndarray, pools: Pools, requests: Sequence[np.ndarray], values_of: np.ndarray) -> dict[int, float]:
    """Mean standardised score of the candidates that meet all constraints of a request, minus that of the others.

    Parameters
    ----------
    scores
        [windows, R, K].
    pools
        Windows and their candidates.
    requests
        R arrays [windows, n].
    values_of
        Value ids of each item [items + 1, slots], from the vocabulary.

    Returns
    -------
    Difference by index of the request; empty requests are omitted.
    """
    gaps = {}
    for place, request in enumerate(requests):
        if request.shape[1]:
            met = controls.matches(pools.candidates, request, values_of).all(axis=2)
            values = standardise(scores[:, place])
            gaps[place] = float(values[met].mean() - values[~met].mean())
    return gaps


def load_evidence(run: str, column: str = "prior") -> dict[str, np.ndarray]:
    """Scores of the combiner [windows, K] by split, or another `column` of the evidence; empty if the run does not have it.

    Raises
    ------
    CorecError
        If stage 03 has not finished.
    """
    stages.require(run, "controls")
    path = paths.stage_dir(run, "controls") / "evidence.parquet"
    if not path.exists() or column not in parquet.read_schema(path).names:
        return {}
    table = pd.read_parquet(path, columns=["split", column])
    return {str(split): np.stack(list(part[column])) for split, part in table.groupby("split", sort=False)}
