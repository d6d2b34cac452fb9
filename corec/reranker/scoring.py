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
from corec.controls import Pools
from corec.params import ControlsParams
from corec.reranker import shards
from corec.reranker.model import Reranker
from corec.reranker.prompt import Row
from corec.scores import Scores


class Examples(NamedTuple):
    """Inputs of the re-ranker: item histories and priors by window, and the pools, requests and vocabulary of stage 03."""

    history: dict[int, list[int]]
    prepared: controls.Prepared
    prior: Mapping[int, np.ndarray] = {}  # scores of the combiner [K], in the order of the pool
    soft: Mapping[int, np.ndarray] = {}  # states of the retriever [K, soft_width], in the order of the pool


def load_examples(
    windows: pd.DataFrame,
    prepared: controls.Prepared,
    priors: Mapping[str, np.ndarray] | None = None,
    soft: Mapping[str, np.ndarray] | None = None,
) -> Examples:
    """Combine the histories of the windows in `prepared` with their pools.

    Parameters
    ----------
    windows
        Windows table of stage 01.
    prepared
        Result of stage 03, which may keep only a sample of the windows.
    priors
        Scores of the combiner [windows, K] by split (see :func:`corec.scores.load_evidence`); needed with ``reranker.prior``.
    soft
        States of the retriever [windows, K, width] by split (see :func:`corec.sasrec.soft_states`); needed with
        ``reranker.soft_width``.
    """
    sampled = np.concatenate([pools.window for pools in prepared.pools.values()])
    rows = windows.set_index("window").loc[sampled, "history"]
    prior, states = (
        {
            window: row
            for split, part in (parts or {}).items()
            for window, row in zip(prepared.pools[split].window, part, strict=True)
        }
        for parts in (priors, soft)
    )
    return Examples({window: list(history) for window, history in rows.items()}, prepared, prior, states)


def fingerprint(examples: Examples) -> str:
    """A digest of the training windows: histories, pools and vocabulary."""
    prepared, pools = examples.prepared, examples.prepared.pools["train"]
    arrays = [pools.window, pools.candidates, pools.truth, prepared.vocabulary.values_of]
    hashed = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()
    histories = [[int(item) for item in examples.history[window]] for window in pools.window]
    priors = [np.asarray(examples.prior[window]).tolist() for window in pools.window if window in examples.prior]
    states = [examples.soft[window] for window in pools.window if window in examples.soft]
    soft = hashlib.sha256(np.ascontiguousarray(states).tobytes()).hexdigest() if states else ""
    return files.digest([hashed, histories, prepared.vocabulary.labels, priors, soft])


def make_rows(
    reranker: Reranker,
    examples: Examples,
    pools: Pools,
    requests: Sequence[np.ndarray],
    plain: bool = False,
    hidden: np.ndarray | None = None,
) -> list[Row]:
    """Encode windows as rows, each window under several requests.

    Parameters
    ----------
    reranker, examples
        Prompter and histories.
    pools
        Windows and their candidates.
    requests
        One array [windows, n] per request; n may differ between requests. An array [windows] of sentences is a request too.
    plain
        Omit the titles and the history (see :meth:`corec.reranker.Prompter.row`).
    hidden
        Attributes that the lines of the candidates omit [windows, K, attributes]; None for none.

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
        omitted = None if hidden is None else hidden[i]
        made = [reranker.prompter.row(examples.history[window], pools.candidates[i], group, plain, omitted) for group in groups]
        prior = examples.prior[window] if reranker.params.prior else None
        soft = soft_of(examples, window) if reranker.params.soft_width else None
        rows += [row._replace(prior=prior, soft=soft) for row in made]
    return rows


def soft_of(examples: Examples, window: int) -> np.ndarray:
    """States of the retriever for a window (raises CorecError if the examples have none)."""
    if window not in examples.soft:
        raise CorecError(
            "Parameter reranker.soft_width needs the states of the retriever, which only the variant 'soft tokens' of notebook 8 "
            "passes: set it to 0, or pass `soft` to corec.reranker.load_examples."
        )
    return examples.soft[window]


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


def score(
    reranker: Reranker, examples: Examples, pools: Pools, requests: Sequence[np.ndarray], report: str | None = None
) -> np.ndarray:
    """Scores [windows, R, K] of the candidates of every window under its R requests (see :func:`score_parts`)."""
    return score_parts(reranker, examples, pools, requests, report).total()


@torch.inference_mode()
def score_parts(
    reranker: Reranker,
    examples: Examples,
    pools: Pools,
    requests: Sequence[np.ndarray],
    report: str | None = None,
    shard: tuple[int, int] | None = None,
) -> Scores:
    """Score the candidates of every window under its R requests.

    Rows are batched by length to reduce padding.

    Parameters
    ----------
    reranker, examples
        Model and histories.
    pools
        Windows and their candidates.
    requests
        R arrays [windows, n], or [windows] of sentences; n may differ between requests.
    report
        Label of a progress line, printed every 20 s; None for no progress lines.
    shard
        Number of the shard, from 0, and number of shards; None for all windows. Shards consist of whole batches, so that together
        they give the same numbers, bit for bit. The scores of the other windows are NaN.

    Raises
    ------
    CorecError
        If memory runs out.
    """
    reranker.model.eval()
    rows = make_rows(reranker, examples, pools, requests)
    reranker.prompter.report_cut()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prefix))
    shape = (len(rows), len(rows[0].suffixes), pools.candidates.shape[1])
    found, shown = Scores(*(np.full(shape, np.nan, np.float32) for _ in Scores._fields)), time.monotonic()
    size, (number, of) = reranker.params.eval_batch_size, shard or (0, 1)
    for start in range(number * size, len(order), of * size):
        part = order[start : start + size]
        found.prior[part] = 0
        with memory_for("eval_batch_size"):
            parts, prior = reranker.parts([rows[i] for i in part])
            if prior is not None and parts.gate is not None:
                found.prior[part] = (parts.gate[..., None] * prior[:, None]).cpu().numpy()
            found.relevance[part], found.control[part] = parts.relevance.cpu().numpy(), parts.control.cpu().numpy()
        if report and time.monotonic() - shown > 20:
            print(f"{report}: {start + len(part)} of {len(rows)} prompts", flush=True)
            shown = time.monotonic()
    return Scores(*(values.reshape(len(pools.window), len(requests), -1) for values in found))


def order_bias(reranker: Reranker, examples: Examples, pools: Pools, request: np.ndarray, shuffles: int = 8) -> float:
    """Share of the variance of the scores that is due to the order of the candidates in the prompt.

    The variance of a candidate's score over `shuffles` random orders, divided by the variance of all scores of its window; mean
    over the windows. The prior, which does not depend on the order, is left out.

    Parameters
    ----------
    reranker, examples
        Model and histories.
    pools, request
        Windows, and one request for each [windows, n].
    shuffles
        Number of orders.
    """
    rng, windows = np.random.default_rng(0), np.arange(len(pools.window))[:, None]
    found = np.empty((shuffles, *pools.candidates.shape))
    for number in range(shuffles):
        order = rng.random(pools.candidates.shape).argsort(axis=1)
        shuffled = pools._replace(candidates=pools.candidates[windows, order])
        parts = score_parts(reranker, examples, shuffled, [request])
        found[number][windows, order] = (parts.relevance + parts.control)[:, 0]
    whole = found.var(axis=(0, 2))
    return float((found.var(axis=0).mean(axis=1) / np.maximum(whole, 1e-12)).mean())


def score_split(
    reranker: Reranker,
    examples: Examples,
    split: str,
    params: ControlsParams,
    kept: Path | None = None,
    shard: tuple[int, int] | None = None,
) -> dict[str, Scores]:
    """Scores of the windows of a split by protocol, under one request of each length in ``params.n_tokens``.

    All requests of a window are scored in one pass. The test windows are also scored under `params.other_protocols`.

    Parameters
    ----------
    reranker, examples
        Model and histories.
    split
        ``valid`` or ``test``.
    params
        Requests.
    kept
        Folder of shards (see :mod:`corec.scale.shards`); if they are complete, nothing is computed. None for none.
    shard
        See :func:`score_parts`; a shard is saved in `kept`.
    """
    prepared, lengths = examples.prepared, params.n_tokens
    asked = {params.protocol: [prepared.requests[split, n] for n in lengths]}
    if split == "test":
        asked |= {name: [prepared.others[name, n] for n in lengths] for name in params.other_protocols}
    requests = [request for part in asked.values() for request in part]
    label = f"{reranker.params.readout}, {split}"
    pools, found = prepared.pools[split], None
    if kept is not None and shard is None and kept.is_dir():
        found = shards.gather(kept / shards.identity(reranker, pools, requests), len(pools.window))
    if found is None:
        found = score_parts(reranker, examples, pools, requests, label, shard)
        if kept is not None and shard is not None:
            shards.save(found, kept / shards.identity(reranker, pools, requests), *shard)
    else:
        print(f"{label}: all {len(pools.window)} windows were scored in shards", flush=True)
    parts = [slice(place * len(lengths), (place + 1) * len(lengths)) for place in range(len(asked))]
    return {name: found.under(part) for name, part in zip(asked, parts, strict=True)}
