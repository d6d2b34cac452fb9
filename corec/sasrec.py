"""Stage 02: SASRec, the retriever (Kang and McAuley, 2018), and its candidates for every window.

Sequences are padded on the right, so with a causal mask no real position ever sees padding, and the state at
position t depends on items 0 … t only: one pass trains every position.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from corec import CorecError, paths
from corec.params import SasrecParams

KS = (5, 10, 20)


class Block(nn.Module):
    """Causal self-attention and a position-wise feed-forward layer, each after a layer norm (pre-norm).

    Dropout is on what each layer adds, not on the attention weights: that keeps the fused attention kernel.
    """

    def __init__(self, params: SasrecParams) -> None:
        super().__init__()
        width = params.hidden
        self.heads, self.dropout = params.heads, params.dropout
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(params.dropout), nn.Linear(width, width))

    def forward(self, states: Tensor) -> Tensor:
        """States [batch, length, hidden] of the next layer from those of this one."""
        batch, length, width = states.shape
        qkv = self.qkv(self.norm_attention(states)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)  # [batch, heads, length, width]
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        states = states + F.dropout(mixed, self.dropout, self.training)
        return states + F.dropout(self.feed_forward(self.norm_forward(states)), self.dropout, self.training)


class SASRec(nn.Module):
    """Self-attentive sequential recommendation: the state after item t scores item t + 1 by inner product.

    Parameters
    ----------
    n_items
        Items count from 1 to `n_items`; 0 is padding.
    params
        Widths, depth and dropout.
    """

    def __init__(self, n_items: int, params: SasrecParams) -> None:
        super().__init__()
        if params.hidden % params.heads:
            raise CorecError(
                f"Parameter sasrec.hidden ({params.hidden}) is not a multiple of sasrec.heads ({params.heads}): "
                "change one of them."
            )
        self.items = nn.Embedding(n_items + 1, params.hidden, padding_idx=0)
        self.positions = nn.Embedding(params.max_length, params.hidden)
        self.blocks = nn.ModuleList(Block(params) for _ in range(params.layers))
        self.norm = nn.LayerNorm(params.hidden)
        self.dropout = params.dropout
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=params.hidden**-0.5)
        with torch.no_grad():
            self.items.weight[0] = 0

    def forward(self, sequences: Tensor) -> Tensor:
        """States [batch, length, hidden] of right-padded `sequences` [batch, length]."""
        length = sequences.shape[1]
        states = self.items(sequences) + self.positions.weight[:length]
        states = F.dropout(states, self.dropout, self.training)
        for block in self.blocks:
            states = block(states)
        return self.norm(states)

    def scores(self, states: Tensor) -> Tensor:
        """Scores [..., n_items + 1] of all items after `states` [..., hidden]; padding gets minus infinity."""
        scores = states @ self.items.weight.T
        scores[..., 0] = -torch.inf
        return scores


class Queries(NamedTuple):
    """What to predict: the items before each target, the target, and all that the user has seen before it."""

    inputs: list[np.ndarray]  # latest items before the target, oldest first
    targets: np.ndarray  # [queries]
    seen: list[np.ndarray]  # all items before the target


def pad(sequences: list[np.ndarray]) -> Tensor:
    """Stack sequences, padded on the right with 0: [batch, longest]."""
    longest = max(map(len, sequences))
    return torch.from_numpy(np.stack([np.pad(sequence, (0, longest - len(sequence))) for sequence in sequences]))


def queries(interactions: pd.DataFrame, windows: pd.DataFrame, max_length: int) -> Queries:
    """The queries of some windows: each user's interactions before the window's target."""
    items = {user: table.to_numpy(copy=True) for user, table in interactions.groupby("user")["item"]}
    seen = [items[user][:position] for user, position in zip(windows["user"], windows["position"], strict=True)]
    return Queries([items[-max_length:] for items in seen], windows["target"].to_numpy(copy=True), seen)


def loss(model: SASRec, sequences: Tensor, kind: str) -> Tensor:
    """Mean loss over every position of right-padded `sequences` [batch, length + 1] that has a next item.

    ``ce``: cross-entropy against the full softmax over all items. ``bce``: the original's binary cross-entropy,
    each true next item against one uniform negative that is not in the user's sequence.
    """
    inputs, targets = sequences[:, :-1], sequences[:, 1:]
    real = targets > 0
    states = model(inputs)[real]  # [positions, hidden]
    if kind == "ce":
        return F.cross_entropy(model.scores(states), targets[real])
    negatives = torch.randint_like(targets, 1, model.items.num_embeddings)
    for _ in range(10):  # draw again where a negative is one of the user's own items
        own = (negatives[:, :, None] == sequences[:, None, :]).any(-1)
        negatives = torch.where(own, torch.randint_like(targets, 1, model.items.num_embeddings), negatives)
    pairs = torch.stack([targets[real], negatives[real]], -1)  # [positions, 2]
    logits = (model.items(pairs) * states[:, None]).sum(-1)
    return F.binary_cross_entropy_with_logits(logits, torch.tensor([1.0, 0.0]).expand_as(logits))


def pieces(items: np.ndarray, size: int, offset: int) -> list[np.ndarray]:
    """Cut a sequence into pieces of at most `size` items that share one item with the next.

    The first piece has `offset` items (drawn anew every epoch), so that no cut is always in the same place; every
    position but the first is a target once.
    """
    ends = [*range(offset, len(items), size - 1), len(items)]
    starts = [0, *(end - 1 for end in ends[:-1])]
    return [items[start:end] for start, end in zip(starts, ends, strict=True) if end - start > 1]


@torch.inference_mode()
def rank_targets(model: SASRec, wanted: Queries, batch: int = 256) -> np.ndarray:
    """Rank (1 = best) of each target among all items that the user has not seen [queries].

    Ties count against the target, so a constant scorer ranks last.
    """
    model.eval()
    ranks = []
    for start in range(0, len(wanted.targets), batch):
        scores = unseen_scores(model, wanted, slice(start, start + batch))
        target = torch.from_numpy(wanted.targets[start : start + batch])[:, None]
        ranks.append((scores >= scores.gather(1, target)).sum(1))
    return torch.cat(ranks).numpy()


def unseen_scores(model: SASRec, wanted: Queries, part: slice) -> Tensor:
    """Scores [batch, n_items + 1] of part of the queries, minus infinity for items that the user has seen."""
    inputs = wanted.inputs[part]
    last = torch.tensor([len(items) - 1 for items in inputs])
    scores = model.scores(model(pad(inputs))[torch.arange(len(inputs)), last])
    seen = wanted.seen[part]
    rows = torch.from_numpy(np.repeat(np.arange(len(seen)), [len(items) for items in seen]))
    scores[rows, torch.from_numpy(np.concatenate(seen))] = -torch.inf
    return scores


def ranking_metrics(ranks: np.ndarray) -> dict[str, float]:
    """HR and NDCG at 5, 10 and 20, full ranking, one relevant item each."""
    gains = 1 / np.log2(ranks + 1)
    hits = {f"HR@{k}": float((ranks <= k).mean()) for k in KS}
    return hits | {f"NDCG@{k}": float((gains * (ranks <= k)).mean()) for k in KS}


@dataclass
class Trained:
    """A trained retriever, its learning curve and how it does on validation."""

    model: SASRec
    curve: pd.DataFrame
    best_epoch: int


def train(
    interactions: pd.DataFrame, windows: pd.DataFrame, n_items: int, params: SasrecParams, seed: int, report: int = 5
) -> Trained:
    """Train on the training interactions, keep the epoch with the best validation NDCG@10.

    Parameters
    ----------
    interactions, windows
        Of :mod:`corec.data`; test interactions are never looked at.
    report
        Epochs between two printed lines (a line is printed every 20 s in any case).
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    sequences = [table.to_numpy(copy=True) for _, table in interactions[interactions["split"] == "train"].groupby("user")["item"]]
    valid = queries(interactions, windows[windows["split"] == "valid"], params.max_length)
    model = SASRec(n_items, params)
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.lr, weight_decay=1e-4)
    curve: list[dict[str, float]] = []
    best, best_state, shown = -1.0, {}, time.monotonic()
    for epoch in range(1, params.epochs + 1):
        model.train()
        size = params.max_length + 1
        cut = [piece for items in sequences for piece in pieces(items, size, int(generator.integers(2, size + 1)))]
        order = generator.permutation(len(cut))
        total = 0.0
        for start in range(0, len(order), params.batch_size):
            batch = [cut[i] for i in order[start : start + params.batch_size]]
            value = loss(model, pad(batch), params.loss)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += value.item() * len(batch)
        if not np.isfinite(total):
            raise CorecError(f"SASRec's training loss is not a number in epoch {epoch}: lower sasrec.lr.")
        metrics = ranking_metrics(rank_targets(model, valid))
        curve.append({"epoch": epoch, "loss": total / len(cut), **metrics})
        if metrics["NDCG@10"] > best:
            best, best_epoch = metrics["NDCG@10"], epoch
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
        if epoch % report == 0 or time.monotonic() - shown > 20:
            print(f"epoch {epoch}: loss {total / len(cut):.3f}, validation NDCG@10 {metrics['NDCG@10']:.4f}", flush=True)
            shown = time.monotonic()
        if epoch - best_epoch >= params.patience:
            break
    model.load_state_dict(best_state)
    return Trained(model, pd.DataFrame(curve), best_epoch)


@torch.inference_mode()
def candidates(
    model: SASRec, interactions: pd.DataFrame, windows: pd.DataFrame, params: SasrecParams, batch: int = 512
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
    model.eval()
    wanted = queries(interactions, windows, params.max_length)
    left = model.items.num_embeddings - 1 - max(map(len, wanted.seen))
    if params.top_k > left:
        raise CorecError(
            f"Parameter sasrec.top_k is {params.top_k}, but some user has only {left} items of the catalogue left to "
            "see: lower sasrec.top_k and controls.k."
        )
    top_items: list[np.ndarray] = []
    top_scores: list[np.ndarray] = []
    shown = time.monotonic()
    for start in range(0, len(windows), batch):
        best = unseen_scores(model, wanted, slice(start, start + batch)).topk(params.top_k, sorted=True)
        top_items.extend(best.indices.numpy())
        top_scores.extend(best.values.numpy())
        if time.monotonic() - shown > 20:
            print(f"candidates: {start + batch} of {len(windows)} windows", flush=True)
            shown = time.monotonic()
    return pd.DataFrame({"window": windows["window"].to_numpy(), "candidates": top_items, "scores": top_scores})


def save(trained: Trained, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write weights, learning curve and candidates; returns the files."""
    files = [folder / "model.safetensors", folder / "curve.parquet", folder / "candidates.parquet"]
    save_file(trained.model.state_dict(), files[0])
    trained.curve.to_parquet(files[1], index=False)
    table.to_parquet(files[2], index=False)
    return files


def load_candidates(run: str) -> pd.DataFrame:
    """The candidates of a run (raises CorecError when stage 02 has not finished)."""
    paths.require(run, "sasrec")
    return pd.read_parquet(paths.stage_dir(run, "sasrec") / "candidates.parquet")
