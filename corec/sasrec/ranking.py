"""Full ranking and retrieval: encodings, ranks of the targets among all unseen items, and the candidates of every window."""

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
    """What to predict: the items before each target, the target, and all that the user has seen before it."""

    inputs: list[np.ndarray]  # latest items before the target, oldest first
    targets: np.ndarray  # [queries]
    seen: list[np.ndarray]  # all items before the target

    def part(self, start: int, size: int) -> "Queries":
        """The `size` queries from `start` on."""
        own = slice(start, start + size)
        return Queries(self.inputs[own], self.targets[own], self.seen[own])


def pad(sequences: Sequence[np.ndarray]) -> Tensor:
    """Stack sequences, padded on the right with 0: [batch, longest]."""
    longest = max(map(len, sequences))
    return torch.from_numpy(np.stack([np.pad(sequence, (0, longest - len(sequence))) for sequence in sequences]))


def items_by_user(interactions: pd.DataFrame) -> dict[Any, np.ndarray]:
    """Each user's items, in the order of the table."""
    return {user: table.to_numpy(copy=True) for user, table in interactions.groupby("user")["item"]}


def queries(interactions: pd.DataFrame, windows: pd.DataFrame, max_length: int) -> Queries:
    """The queries of some windows: each user's interactions before the window's target."""
    items = items_by_user(interactions)
    seen = [items[user][:position] for user, position in zip(windows["user"], windows["position"], strict=True)]
    return Queries([items[-max_length:] for items in seen], windows["target"].to_numpy(copy=True), seen)


def by_length(rows: np.ndarray, lengths: np.ndarray, budget: float) -> list[np.ndarray]:
    """Sort `rows` by the `lengths` of their sequences and cut them into groups of about `budget` items each."""
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    return np.split(rows, np.flatnonzero(np.diff(np.cumsum(lengths[rows]) // budget)) + 1)


@torch.inference_mode()
def encode(model: SASRec, inputs: Sequence[np.ndarray], tokens: int = 20_000) -> Tensor:
    """State after the last item of each sequence [sequences, hidden]; those of like length are computed together.

    Parameters
    ----------
    inputs
        Items, oldest first, at most `max_length`.
    tokens
        Positions computed at once.
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
    """Rank (1 = best) of each target among all items that the user has not seen [queries].

    No list is sorted: the rank is how many unseen items score as high as the target or higher. Ties count against
    the target, so a constant scorer ranks last.
    """
    return rank_states(model, encode(model, wanted.inputs), wanted, batch)


@torch.inference_mode()
def rank_states(model: SASRec, states: Tensor, wanted: Queries, batch: int = 1024) -> np.ndarray:
    """Ranks of the targets from the queries' `states` [queries, hidden] (see :func:`rank_targets`)."""
    ranks = []
    for start in range(0, len(states), batch):
        ranks.append(rank_scores(model.scores(states[start : start + batch]), wanted.part(start, batch)))
    return np.concatenate(ranks)


def rank_scores(scores: Tensor, wanted: Queries) -> np.ndarray:
    """Ranks of the targets from `scores` [queries, n_items + 1], in which seen items and padding are overwritten."""
    rows = torch.from_numpy(np.repeat(np.arange(len(wanted.seen)), [len(items) for items in wanted.seen]))
    scores[:, 0] = -torch.inf
    scores[rows, torch.from_numpy(np.concatenate(wanted.seen))] = -torch.inf
    target = torch.from_numpy(wanted.targets)[:, None].to(scores.device)
    return (scores >= scores.gather(1, target)).sum(1).cpu().numpy()


def ranking_metrics(ranks: np.ndarray) -> dict[str, float]:
    """HR and NDCG at 5, 10 and 20, full ranking, one relevant item each."""
    gains = 1 / np.log2(ranks + 1)
    hits = {f"HR@{k}": float((ranks <= k).mean()) for k in KS}
    return hits | {f"NDCG@{k}": float((gains * (ranks <= k)).mean()) for k in KS}


@torch.inference_mode()
def candidates(
    model: SASRec, interactions: pd.DataFrame, windows: pd.DataFrame, params: SasrecParams, batch: int = 256
) -> pd.DataFrame:
    """The `top_k` best unseen items of every window, best first, with their scores.

    Returns
    -------
    Columns ``window candidates scores`` (lists of `top_k`).

    Raises
    ------
    CorecError
        When some user has fewer than `top_k` unseen items: K is larger than the catalogue allows.
    """
    left = model.items.num_embeddings - 1 - int(windows["position"].max())
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
            best = retrieve(model, states[torch.from_numpy(part)], items[user], positions[part], params.top_k)
            best_items[part], best_scores[part] = best.indices.cpu().numpy(), best.values.cpu().numpy()
            if time.monotonic() - shown > 20:
                print(f"candidates: up to user {user}", flush=True)
                shown = time.monotonic()
    return pd.DataFrame({"window": windows["window"].to_numpy(), "candidates": list(best_items), "scores": list(best_scores)})


@torch.inference_mode()
def retrieve(model: SASRec, states: Tensor, items: np.ndarray, positions: np.ndarray, k: int) -> Any:
    """The `k` best items, with scores, for prefixes of one user; those within a prefix are left out of its list.

    Parameters
    ----------
    states
        After each prefix [prefixes, hidden].
    items
        The user's items in order.
    positions
        Length of each prefix [prefixes].
    """
    scores = model.scores(states)  # [prefixes, n_items + 1]
    own = torch.from_numpy(items[: positions.max()]).to(scores.device)
    seen = torch.arange(len(own), device=scores.device) < torch.from_numpy(positions).to(scores.device)[:, None]
    scores[:, own] = scores[:, own].masked_fill(seen, -torch.inf)
    return scores.topk(k, sorted=True)


@torch.inference_mode()
def window_states(model: SASRec, interactions: pd.DataFrame, windows: pd.DataFrame, params: SasrecParams) -> Tensor:
    """State just before each window's target [windows, hidden].

    One pass over a user's first `max_length` items gives the states of all prefixes within them; only windows
    further on, which see the latest `max_length` items, are encoded one by one.
    """
    model.eval()
    states = torch.empty(len(windows), params.hidden, device=model.items.weight.device)
    position, owner = windows["position"].to_numpy(), windows["user"].to_numpy()
    far = np.flatnonzero(position > params.max_length)
    if len(far):
        states[far] = encode(model, queries(interactions, windows.iloc[far], params.max_length).inputs)
    near = np.flatnonzero(position <= params.max_length)
    items = {user: own[: params.max_length] for user, own in items_by_user(interactions).items()}
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
