"""Full ranking and retrieval: encoding of prefixes, ranks of the targets among all unseen items, candidates of the windows."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from corec import CorecError
from corec.params import SasrecParams
from corec.sasrec.model import SASRec

KS = (5, 10, 20)  # cut-offs of the ranking metrics


class Queries(NamedTuple):
    """Prediction tasks: the latest items before each target, the target, and all items before it."""

    inputs: list[np.ndarray]  # latest items before the target, oldest first
    targets: np.ndarray  # [queries]
    seen: list[np.ndarray]  # all items before the target

    def part(self, start: int, size: int) -> "Queries":
        """Select `size` queries, starting at `start`."""
        rows = slice(start, start + size)
        return Queries(self.inputs[rows], self.targets[rows], self.seen[rows])


def pad(sequences: Sequence[np.ndarray]) -> Tensor:
    """Stack sequences to [batch, longest], padded with 0 on the right."""
    longest = max(map(len, sequences))
    return torch.from_numpy(np.stack([np.pad(sequence, (0, longest - len(sequence))) for sequence in sequences]))


def items_by_user(interactions: pd.DataFrame) -> dict[Any, np.ndarray]:
    """Items of each user, in the order of the table."""
    return {user: table.to_numpy(copy=True) for user, table in interactions.groupby("user")["item"]}


def chosen_again(interactions: pd.DataFrame) -> bool:
    """Whether a user has chosen an item more than once in training (``data.repeats``); seen items are then candidates again."""
    return bool(interactions[interactions["split"] == "train"].duplicated(["user", "item"]).any())


def queries(interactions: pd.DataFrame, windows: pd.DataFrame, max_length: int) -> Queries:
    """Make one query per window from the user's interactions before its target.

    ``seen`` is empty if items are chosen again (see :func:`chosen_again`).

    Parameters
    ----------
    interactions, windows
        Tables of stage 01.
    max_length
        Number of latest items in ``inputs``.
    """
    items = items_by_user(interactions)
    before = [items[user][:position] for user, position in zip(windows["user"], windows["position"], strict=True)]
    seen = [part[:0] for part in before] if chosen_again(interactions) else before
    return Queries([part[-max_length:] for part in before], windows["target"].to_numpy(copy=True), seen)


def by_length(rows: np.ndarray, lengths: np.ndarray, budget: float) -> list[np.ndarray]:
    """Sort `rows` by sequence length and split them into groups of about `budget` items each.

    Parameters
    ----------
    rows
        Indices into `lengths`.
    lengths
        Length of every sequence.
    budget
        Items per group.
    """
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    return np.split(rows, np.flatnonzero(np.diff(np.cumsum(lengths[rows]) // budget)) + 1)


@torch.inference_mode()
def encode(model: SASRec, inputs: Sequence[np.ndarray], tokens: int = 20_000) -> Tensor:
    """State after the last item of each sequence [sequences, hidden]; sequences of similar length share a pass.

    Parameters
    ----------
    model
        The retriever; it is set to evaluation mode.
    inputs
        Items of each sequence, oldest first, at most `max_length`.
    tokens
        Approximate number of positions per pass.
    """
    model.eval()
    lengths = np.array([len(items) for items in inputs])
    states = torch.empty(len(inputs), model.items.embedding_dim, device=model.items.weight.device)
    for group in by_length(np.arange(len(inputs)), lengths, tokens):
        last = torch.from_numpy(lengths[group] - 1)
        states[group] = model(pad([inputs[row] for row in group]).to(states.device))[torch.arange(len(group)), last]
    return states


@torch.inference_mode()
def rank_targets(model: SASRec, wanted: Queries, batch: int = 1024) -> np.ndarray:
    """Rank of each target among all items that the user has not seen [queries]; 1 is best.

    The rank is the number of unseen items with a score at least as high as that of the target (itself included), so nothing is
    sorted. Ties count against the target, so a constant scorer ranks it last.

    Parameters
    ----------
    model
        The retriever.
    wanted
        The queries.
    batch
        Queries scored at a time.
    """
    return rank_states(model, encode(model, wanted.inputs), wanted, batch)


@torch.inference_mode()
def rank_states(model: SASRec, states: Tensor, wanted: Queries, batch: int = 1024) -> np.ndarray:
    """Ranks of the targets [queries] from the states of the queries [queries, hidden] (see :func:`rank_targets`)."""
    ranks = []
    for start in range(0, len(states), batch):
        ranks.append(rank_scores(model.scores(states[start : start + batch]), wanted.part(start, batch)))
    return np.concatenate(ranks)


def rank_scores(scores: Tensor, wanted: Queries) -> np.ndarray:
    """Ranks of the targets [queries] from `scores` [queries, n_items + 1]; seen items and padding are overwritten in place."""
    rows = torch.from_numpy(np.repeat(np.arange(len(wanted.seen)), [len(items) for items in wanted.seen]))
    scores[:, 0] = -torch.inf
    scores[rows, torch.from_numpy(np.concatenate(wanted.seen))] = -torch.inf
    target = torch.from_numpy(wanted.targets)[:, None].to(scores.device)
    return (scores >= scores.gather(1, target)).sum(1).cpu().numpy()


def ranking_metrics(ranks: np.ndarray) -> dict[str, float]:
    """Mean HR and NDCG at 5, 10 and 20 from ranks among all unseen items, with one relevant item per query."""
    gains = 1 / np.log2(ranks + 1)
    hits = {f"HR@{k}": float((ranks <= k).mean()) for k in KS}
    return hits | {f"NDCG@{k}": float((gains * (ranks <= k)).mean()) for k in KS}


@torch.inference_mode()
def candidates(
    model: SASRec, interactions: pd.DataFrame, windows: pd.DataFrame, params: SasrecParams, batch: int = 256
) -> pd.DataFrame:
    """Retrieve the `top_k` unseen items with the highest scores for every window; of all items, if items are chosen again.

    Parameters
    ----------
    model
        The retriever.
    interactions, windows
        Tables of stage 01.
    params
        Parameters of stage 02.
    batch
        Windows of a user scored at a time.

    Returns
    -------
    Columns ``window candidates scores``; the last two are lists of length `top_k`, best first.

    Raises
    ------
    CorecError
        If a user has fewer than `top_k` unseen items.
    """
    again = chosen_again(interactions)
    left = model.items.num_embeddings - 1 - (0 if again else int(windows["position"].max()))
    if params.top_k > left:
        raise CorecError(
            f"Parameter sasrec.top_k is {params.top_k}, but some user has only {left} items of the catalogue left to "
            "see: lower sasrec.top_k and controls.k."
        )
    states = window_states(model, interactions, windows, params)
    items = items_by_user(interactions)
    best_items = np.empty((len(windows), params.top_k), dtype=np.int64)
    best_scores = np.empty((len(windows), params.top_k), dtype=np.float32)
    positions, owners, shown = windows["position"].to_numpy(), windows["user"].to_numpy(), time.monotonic()
    order = np.argsort(owners, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(owners[order])) + 1):
        user = owners[rows[0]]
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            seen = 0 * positions[part] if again else positions[part]
            best = retrieve(model, states[torch.from_numpy(part)], items[user], seen, params.top_k)
            best_items[part], best_scores[part] = best.indices.cpu().numpy(), best.values.cpu().numpy()
            if time.monotonic() - shown > 20:
                print(f"candidates: up to user {user}", flush=True)
                shown = time.monotonic()
    return pd.DataFrame({"window": windows["window"].to_numpy(), "candidates": list(best_items), "scores": list(best_scores)})


@torch.inference_mode()
def retrieve(model: SASRec, states: Tensor, items: np.ndarray, positions: np.ndarray, k: int) -> Any:
    """Retrieve the `k` best items and their scores for several prefixes of one user, without the items of each prefix.

    Parameters
    ----------
    model
        The retriever.
    states
        State after each prefix [prefixes, hidden].
    items
        Items of the user, oldest first.
    positions
        Length of each prefix [prefixes].
    k
        Number of items.

    Returns
    -------
    ``values`` and ``indices`` [prefixes, k], as of :func:`torch.topk`.
    """
    scores = model.scores(states)  # [prefixes, n_items + 1]
    history = torch.from_numpy(items[: positions.max()]).to(scores.device)
    seen = torch.arange(len(history), device=scores.device) < torch.from_numpy(positions).to(scores.device)[:, None]
    scores[:, history] = scores[:, history].masked_fill(seen, -torch.inf)
    return scores.topk(k, sorted=True)


@torch.inference_mode()
def window_states(model: SASRec, interactions: pd.DataFrame, windows: pd.DataFrame, params: SasrecParams) -> Tensor:
    """State just before the target of each window [windows, hidden].

    One pass over the first `max_length` items of a user gives the states of all prefixes within them. Windows with longer
    prefixes, whose input is the latest `max_length` items, are encoded separately.

    Parameters
    ----------
    model
        The retriever; it is set to evaluation mode.
    interactions, windows
        Tables of stage 01.
    params
        Parameters of stage 02.
    """
    model.eval()
    states = torch.empty(len(windows), params.hidden, device=model.items.weight.device)
    position, owner = windows["position"].to_numpy(), windows["user"].to_numpy()
    far = np.flatnonzero(position > params.max_length)
    if len(far):
        states[far] = encode(model, queries(interactions, windows.iloc[far], params.max_length).inputs)
    near = np.flatnonzero(position <= params.max_length)
    items = {user: sequence[: params.max_length] for user, sequence in items_by_user(interactions).items()}
    users = sorted({*owner[near].tolist()}, key=lambda user: len(items[user]))
    place = {user: number for number, user in enumerate(users)}
    rows = near[np.argsort([place[user] for user in owner[near]], kind="stable")]
    row_place = np.array([place[user] for user in owner[rows]])
    for start in range(0, len(users), 128):
        group = rows[np.searchsorted(row_place, start) : np.searchsorted(row_place, start + 128)]
        encoded = model(pad([items[user] for user in users[start : start + 128]]).to(states.device))
        which = torch.from_numpy(np.array([place[user] for user in owner[group]]) - start)
        states[group] = encoded[which, torch.from_numpy(position[group] - 1)]
    return states


@torch.inference_mode()
def soft_states(
    model: SASRec, interactions: pd.DataFrame, windows: pd.DataFrame, candidates: np.ndarray, params: SasrecParams
) -> np.ndarray:
    """States of the retriever for soft tokens [windows, K, 2 * hidden]: of each candidate, then of the user before the target.

    Each half is scaled to unit variance.

    Parameters
    ----------
    model, interactions, params
        As for :func:`window_states`.
    windows
        Windows, in the order of `candidates`.
    candidates
        Items [windows, K].
    """
    users = window_states(model, interactions, windows, params).cpu().numpy()
    items = model.items.weight.detach().cpu().numpy()
    items, users = items / items.std(), users / users.std()
    repeated = np.broadcast_to(users[:, None], (*candidates.shape, users.shape[1]))
    return np.concatenate([items[candidates], repeated], axis=-1).astype(np.float32)
