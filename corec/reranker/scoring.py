"""Scores of the candidates of every window under its requests, and their dependence on the constraints."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from corec import CorecError, controls, files
from corec.controls import Pools, standardise
from corec.reranker.model import Reranker
from corec.reranker.prompt import Row


class Examples(NamedTuple):
    """Inputs of the re-ranker: item histories by window, and the pools, requests and vocabulary of stage 03."""

    history: dict[int, list[int]]
    prepared: controls.Prepared


def load_examples(windows: pd.DataFrame, prepared: controls.Prepared) -> Examples:
    """Combine the histories of the windows in `prepared` with their pools.

    Parameters
    ----------
    windows
        Windows table of stage 01.
    prepared
        Result of stage 03, which may keep only a sample of the windows.
    """
    sampled = np.concatenate([pools.window for pools in prepared.pools.values()])
    rows = windows.set_index("window").loc[sampled, "history"]
    return Examples({window: list(history) for window, history in rows.items()}, prepared)


def fingerprint(examples: Examples) -> str:
    """A digest of the training windows: histories, pools and vocabulary."""
    prepared, pools = examples.prepared, examples.prepared.pools["train"]
    arrays = [pools.window, pools.candidates, pools.truth, prepared.vocabulary.values_of]
    hashed = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()
    histories = [[int(item) for item in examples.history[window]] for window in pools.window]
    return files.digest([hashed, histories, prepared.vocabulary.labels])


def make_rows(
    reranker: Reranker, examples: Examples, pools: Pools, requests: Sequence[np.ndarray], plain: bool = False
) -> list[Row]:
    """Encode windows as rows, each window under several requests.

    Parameters
    ----------
    reranker, examples
        Prompter and histories.
    pools
        Windows and their candidates.
    requests
        One array [windows, n] per request; n may differ between requests.
    plain
        Omit the titles and the history (see :meth:`corec.reranker.Prompter.row`).

    Returns
    -------
    One row per window with ``request_position: after``. One row per window and request, the requests of a window
    consecutive, with ``before`` or if the architecture cannot share a prefix.
    """
    rows = []
    for i, window in enumerate(pools.window):
        of_window = [request[i] for request in requests]
        shared = reranker.packs and reranker.params.request_position == "after"
        groups = [of_window] if shared else [[request] for request in of_window]
        rows += [reranker.prompter.row(examples.history[window], pools.candidates[i], g, plain) for g in groups]
    return rows


@contextmanager
def memory_for(parameter: str) -> Iterator[None]:
    """Re-raise out-of-memory errors (GPU or CPU) as a CorecError that names the `parameter` to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(sign in str(error) for sign in signs):
            raise
        raise CorecError(
            f"The memory is not enough: lower reranker.{parameter} (or, where it is 1, reranker.requests_per_window or "
            "reranker.title_tokens, or set reranker.gradient_checkpointing) and run it again."
        ) from error


@torch.inference_mode()
def score(
    reranker: Reranker, examples: Examples, pools: Pools, requests: Sequence[np.ndarray], report: str | None = None
) -> np.ndarray:
    """Score the candidates of every window under its R requests.

    Rows are batched by length to reduce padding.

    Parameters
    ----------
    reranker, examples
        Model and histories.
    pools
        Windows and their candidates.
    requests
        R arrays [windows, n]; n may differ between requests.
    report
        Label of a progress line, printed every 20 s; None for no progress lines.

    Returns
    -------
    Scores [windows, R, K], float32.

    Raises
    ------
    CorecError
        If memory runs out.
    """
    reranker.model.eval()
    rows = make_rows(reranker, examples, pools, requests)
    reranker.prompter.report_cut()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prefix))
    result, shown = np.empty((len(rows), len(rows[0].suffixes), pools.candidates.shape[1]), np.float32), time.monotonic()
    size = reranker.params.eval_batch_size
    for start in range(0, len(order), size):
        part = order[start : start + size]
        with memory_for("eval_batch_size"):
            result[part] = reranker.forward([rows[i] for i in part]).cpu().numpy()
        if report and time.monotonic() - shown > 20:
            print(f"{report}: {start + len(part)} of {len(rows)} prompts", flush=True)
            shown = time.monotonic()
    return result.reshape(len(pools.window), len(requests), -1)


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


def score_split(reranker: Reranker, examples: Examples, split: str, lengths: Sequence[int]) -> np.ndarray:
    """Scores [windows, R, K] of the windows of a split, under one request of each of the R `lengths`."""
    pools, requests = examples.prepared.pools[split], [examples.prepared.requests[split, n] for n in lengths]
    return score(reranker, examples, pools, requests, report=f"{reranker.params.readout}, {split}")


def save_scores(
    scores: Mapping[tuple[str, str], np.ndarray], prepared: controls.Prepared, lengths: Sequence[int], folder: Path
) -> Path:
    """Write ``scores.parquet`` with columns ``split window n_tokens model scores``.

    Parameters
    ----------
    scores
        Arrays [windows, R, K] by model and split.
    prepared
        Result of stage 03, for the window numbers.
    lengths
        Number of constraints of each of the R requests.
    folder
        Folder of the file.

    Returns
    -------
    Path of the file.
    """
    parts = [
        pd.DataFrame(
            {"split": split, "window": prepared.pools[split].window, "n_tokens": n, "model": model, "scores": list(values[:, r])}
        )
        for (model, split), values in scores.items()
        for r, n in enumerate(lengths)
    ]
    path = folder / "scores.parquet"
    pd.concat(parts, ignore_index=True).to_parquet(path, index=False)
    return path
