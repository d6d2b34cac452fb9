"""Scores of every window's candidates under its requests, and what they say of the tokens."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from corec import CorecError, controls
from corec.controls import Pools, standardise
from corec.reranker.model import Reranker
from corec.reranker.prompt import Row


class Examples(NamedTuple):
    """What the re-ranker reads of a run: histories by window, and stage 03's pools and vocabulary."""

    history: dict[int, list[int]]
    prepared: controls.Prepared


def load_examples(windows: pd.DataFrame, prepared: controls.Prepared) -> Examples:
    """Histories of the windows that were kept, beside their pools."""
    kept = np.concatenate([pools.window for pools in prepared.pools.values()])
    rows = windows.set_index("window").loc[kept, "history"]
    return Examples({window: list(history) for window, history in rows.items()}, prepared)


def make_rows(
    reranker: Reranker, examples: Examples, pools: Pools, requests: Sequence[np.ndarray], plain: bool = False
) -> list[Row]:
    """Rows of some windows under several requests each.

    Parameters
    ----------
    requests
        One array [windows, n] for each request; n may differ.

    Returns
    -------
    One row a window (`after`), or one a window and request, a window's requests together (`before`, or where the
    architecture cannot share a prefix).
    """
    rows = []
    for i, window in enumerate(pools.window):
        given = [request[i] for request in requests]
        shared = reranker.packs and reranker.params.request_position == "after"
        groups = [given] if shared else [[request] for request in given]
        rows += [reranker.prompter.row(examples.history[window], pools.candidates[i], g, plain) for g in groups]
    return rows


@contextmanager
def memory_for(parameter: str) -> Iterator[None]:
    """Turn want of memory, on a GPU or in the machine, into a sentence that names the `parameter` to lower."""
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
    """Scores [windows, R, K] of every window's candidates under its R requests.

    Rows are batched by length, so that little padding is computed.

    Parameters
    ----------
    requests
        R arrays [windows, n].
    report
        What to call this in a progress line, printed every 20 s.
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
    """Mean standardised score of candidates that meet a whole request less that of the others, by request.

    Parameters
    ----------
    scores
        [windows, R, K], of the R `requests`.
    """
    gaps = {}
    for place, request in enumerate(requests):
        if request.shape[1]:
            met = controls.matches(pools.candidates, request, values_of).all(axis=2)
            values = standardise(scores[:, place])
            gaps[place] = float(values[met].mean() - values[~met].mean())
    return gaps


def score_split(reranker: Reranker, examples: Examples, split: str, lengths: Sequence[int]) -> np.ndarray:
    """Scores [windows, R, K] of a split's windows under their requests of each of `lengths`."""
    pools, requests = examples.prepared.pools[split], [examples.prepared.requests[split, n] for n in lengths]
    return score(reranker, examples, pools, requests, report=f"{reranker.params.readout}, {split}")


def save_scores(
    scores: Mapping[tuple[str, str], np.ndarray], prepared: controls.Prepared, lengths: Sequence[int], folder: Path
) -> Path:
    """Write scores [windows, R, K] by model and split as ``scores.parquet`` (``split window n_tokens model scores``)."""
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
