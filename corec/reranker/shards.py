"""Scores of a part of the windows on disk, and their union: the files of :mod:`corec.scale.shards`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corec import code, files
from corec.controls import Pools
from corec.scores import Scores


def identity(reranker: Any, pools: Pools, requests: Sequence[np.ndarray]) -> str:
    """Digest of the code, the trained head, the settings of the re-ranker, the windows, their candidates and the requests."""
    hashed = hashlib.sha256(code.of_notebook("04_reranker").encode())
    for _, value in sorted(reranker.head.state_dict().items()):
        hashed.update(value.detach().float().cpu().numpy().tobytes())
    for array in (pools.window, pools.candidates, *requests):
        hashed.update(np.ascontiguousarray(array).tobytes())
    return files.digest([reranker.params.model_dump(mode="json"), hashed.hexdigest()])


def save(scores: Scores, folder: Path, number: int, of: int) -> Path:
    """Write the scores of a shard [windows, R, K], NaN for the windows of other shards; returns the file."""
    path = folder / f"{number}-of-{of}.npz"
    files.write_arrays(path, **scores._asdict())
    return path


def gather(folder: Path, windows: int) -> Scores | None:
    """Join the shards in `folder`; None if some of the `windows` are in none, or a file is damaged."""
    joined: Scores | None = None
    for path in sorted(folder.glob("*-of-*.npz")):
        if (kept := files.read_arrays(path, Scores._fields)) is None:
            print(f"{path} is damaged: it does not count", flush=True)
            continue
        part = Scores(**kept)
        if len(part.prior) != windows:
            continue
        pairs = zip(joined or part, part, strict=True)
        joined = Scores(*(np.where(np.isnan(left), right, left) for left, right in pairs))
    if joined is not None and (missing := int(np.isnan(joined.control).any(axis=(1, 2)).sum())):
        print(f"{folder}: the shards lack {missing} of {windows} windows, so all are scored here", flush=True)
        return None
    return joined
