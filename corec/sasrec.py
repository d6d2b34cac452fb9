"""Stage 02: SASRec, the retriever (Kang and McAuley, 2018), and its candidates for every window.

Sequences are padded on the right, so with a causal mask no real position ever sees padding, and the state at
position t depends on items 0 … t only: one pass trains every position, and encodes every prefix.

Where the time does not go: only real positions meet the output product; ranks are counted, not sorted. With
`sasrec.fast` sequences of like length share a batch, so that hardly any padding is computed; the full softmax is
computed a block of positions at a time, with its gradient, so that scores stay in the processor's cache, in bfloat16
where the machine multiplies it faster; dropout masks come from random bytes.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from corec import CorecError, machine, paths
from corec.params import WITHOUT_EFFECT, SasrecParams

KS = (5, 10, 20)
BLOCK = 256  # positions whose scores are computed at a time


class Noise:
    """Dropout whose masks come from random bytes, drawn from a seed that the training loop sets for every step.

    PyTorch draws a 32-bit number for each element of a mask on one core; a byte is enough, and much faster. The
    share that is kept is a multiple of 1/256, and what is kept is scaled by just that share. Without `fast`, and on a
    GPU, it is PyTorch's own dropout.
    """

    def __init__(self, rate: float, fast: bool) -> None:
        self.rate, self.fast, self.dropped = rate, fast, round(256 * rate)
        self.generator = np.random.Generator(np.random.SFC64(0))

    def seed(self, *seeds: int) -> None:
        """Start the stream of a step."""
        self.generator = np.random.Generator(np.random.SFC64(seeds))

    def __call__(self, states: Tensor, training: bool) -> Tensor:
        """Drop elements of `states` (any shape) in training."""
        if not self.fast or states.is_cuda:
            return F.dropout(states, self.rate, training)
        if not training or not self.dropped:
            return states
        drawn = torch.from_numpy(self.generator.integers(0, 256, states.shape, dtype=np.uint8))
        return states * ((drawn >= self.dropped) * (256 / (256 - self.dropped)))


class Block(nn.Module):
    """Causal self-attention and a position-wise feed-forward layer, each after a layer norm (pre-norm).

    Dropout is on what each layer adds, not on the attention weights: that keeps the fused attention kernel.
    """

    def __init__(self, params: SasrecParams, noise: Noise) -> None:
        super().__init__()
        width = params.hidden
        self.heads, self.noise = params.heads, noise
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        """States [batch, length, hidden] of the next layer from those of this one."""
        batch, length, width = states.shape
        qkv = self.qkv(self.norm_attention(states)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)  # [batch, heads, length, width]
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        states = states + self.noise(mixed, self.training)
        inner = self.noise(self.inner(self.norm_forward(states)).relu(), self.training)
        return states + self.noise(self.outer(inner), self.training)


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
        self.noise = Noise(params.dropout, params.fast)
        self.blocks = nn.ModuleList(Block(params, self.noise) for _ in range(params.layers))
        self.norm = nn.LayerNorm(params.hidden)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=params.hidden**-0.5)
        with torch.no_grad():
            self.items.weight[0] = 0

    def forward(self, sequences: Tensor) -> Tensor:
        """States [batch, length, hidden] of right-padded `sequences` [batch, length]."""
        length = sequences.shape[1]
        states = self.items(sequences) + self.positions.weight[:length]
        states = self.noise(states, self.training)
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


class FullSoftmax(torch.autograd.Function):
    """Mean cross-entropy against all items, with its gradients, `BLOCK` positions at a time.

    What ``cross_entropy(states @ items.T, targets)`` is. That would write all scores to memory and read them again
    several times; here a block of them stays in the cache (of up to some ten thousand items) until its share of both
    gradients is done. The three products are made in `dtype`; with bfloat16 scores and gradients are rounded to it, the
    rest is float32.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, items: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Loss of `states` [positions, hidden] against `items` [n_items, hidden], whose rows `targets` count from 0."""
        count, rows, table = len(states), states.to(dtype), items.to(dtype)
        to_states, to_items, total = torch.empty_like(rows), torch.zeros_like(items), states.new_zeros(())
        for start in range(0, count, BLOCK):
            part = slice(start, start + BLOCK)
            wanted = targets[part, None]
            scores = (rows[part] @ table.T).float()  # [block, n_items]
            scores -= scores.amax(1, keepdim=True)
            own = scores.gather(1, wanted)
            sums = scores.exp_().sum(1, keepdim=True)
            total += (sums.log() - own).sum()
            scores /= sums * count
            scores.scatter_add_(1, wanted, torch.full_like(own, -1 / count))
            shares = scores.to(dtype)
            torch.mm(shares, table, out=to_states[part])
            if dtype == items.dtype:
                to_items.addmm_(shares.T, rows[part])
            else:
                to_items += shares.T @ rows[part]
        ctx.save_for_backward(to_states.to(states.dtype), to_items)
        return total / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Scale what :meth:`forward` has found."""
        to_states, to_items = ctx.saved_tensors
        return gradients[0] * to_states, gradients[0] * to_items, None, None


def loss(model: SASRec, sequences: Tensor, params: SasrecParams) -> Tensor:
    """Mean loss over every position of right-padded `sequences` [batch, length + 1] that has a next item.

    ``ce``: cross-entropy against the full softmax over all items. ``bce``: the original's binary cross-entropy,
    each true next item against one uniform negative that is not in the same row of `sequences`. ``sampled``: cross-entropy
    against `negatives` uniform items, drawn for each row of `sequences` and shared by its positions. ``gbce``: binary
    cross-entropy against as many, the positive's probability raised to the power beta (Petrov and Macdonald, RecSys
    2023, who draw them for each position), with beta = a (t (1 - 1/a) + 1/a), a = negatives / (n_items - 1), t = `gbce_t`.
    """
    inputs, targets = sequences[:, :-1], sequences[:, 1:]
    real = targets > 0
    encoded = model(inputs)  # [batch, length, hidden]
    states, wanted = encoded[real], targets[real]  # [positions, hidden], [positions]
    n_items = model.items.num_embeddings - 1
    if params.loss == "ce" and not params.fast:
        return F.cross_entropy(model.scores(states), wanted)
    if params.loss == "ce":
        softmax = FullSoftmax.apply(states, model.items.weight[1:], wanted - 1, machine.resolve_dtype(params.dtype))
        return softmax  # type: ignore[no-any-return]
    if params.loss == "bce":
        negatives = torch.randint_like(targets, 1, n_items + 1)
        for _ in range(10):  # draw again where a negative is one of the user's own items
            own = (negatives[:, :, None] == sequences[:, None, :]).any(-1)
            if not own.any():
                break
            negatives = torch.where(own, torch.randint_like(targets, 1, n_items + 1), negatives)
        pairs = torch.stack([wanted, negatives[real]], -1)  # [positions, 2]
        logits = (model.items(pairs) * states[:, None]).sum(-1)
        return F.binary_cross_entropy_with_logits(logits, torch.tensor([1.0, 0.0]).to(logits).expand_as(logits))
    drawn = torch.randint(1, n_items + 1, (len(targets), params.negatives), device=sequences.device)
    positive = (states * model.items(wanted)).sum(-1, keepdim=True)  # [positions, 1]
    negative = (encoded @ model.items(drawn).mT)[real]  # [positions, negatives]
    rows = real.nonzero()[:, 0]
    negative = negative.masked_fill(drawn[rows] == wanted[:, None], -torch.inf)
    if params.loss == "sampled":
        return (torch.logsumexp(torch.cat([positive, negative], 1), 1) - positive[:, 0]).mean()
    share = params.negatives / (n_items - 1)
    beta = share * (params.gbce_t * (1 - 1 / share) + 1 / share)
    return (-beta * F.logsigmoid(positive[:, 0]) - F.logsigmoid(-negative).sum(1)).mean()


def batches(lengths: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffle sequences into batches of like length, each with about as many items as `size` average sequences.

    Lengths are sorted within random groups of 8 batches, so that who meets whom still changes from epoch to epoch.
    """
    result: list[np.ndarray] = []
    order = rng.permutation(len(lengths))
    for start in range(0, len(order), 8 * size):
        group = order[start : start + 8 * size]
        result += by_length(group, lengths, size * lengths.mean())
    return [result[place] for place in rng.permutation(len(result))]


def by_length(rows: np.ndarray, lengths: np.ndarray, budget: float) -> list[np.ndarray]:
    """Sort `rows` by the `lengths` of their sequences and cut them into groups of about `budget` items each."""
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    return np.split(rows, np.flatnonzero(np.diff(np.cumsum(lengths[rows]) // budget)) + 1)


def padding_share(lengths: np.ndarray, groups: Sequence[np.ndarray]) -> float:
    """Share of computed positions that hold no item, when each group is padded to its longest."""
    computed = sum(len(group) * lengths[group].max() for group in groups)
    return float(1 - lengths.sum() / computed)


def pieces(items: np.ndarray, size: int, offset: int) -> list[np.ndarray]:
    """Cut a sequence into pieces of at most `size` items that share one item with the next.

    The first piece has `offset` items (drawn anew every epoch), so that no cut is always in the same place; every
    position but the first is a target once.
    """
    ends = [*range(offset, len(items), size - 1), len(items)]
    starts = [0, *(end - 1 for end in ends[:-1])]
    return [items[start:end] for start, end in zip(starts, ends, strict=True) if end - start > 1]


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


@dataclass
class Trained:
    """A trained retriever, its learning curve and how it does on validation."""

    model: SASRec
    curve: pd.DataFrame
    best_epoch: int
    dtype: str  # of the products with the item table


def train(
    interactions: pd.DataFrame,
    windows: pd.DataFrame,
    n_items: int,
    params: SasrecParams,
    seed: int,
    report: int = 5,
    folder: Path | None = None,
    stop_after: int | None = None,
    max_seconds: float = float("inf"),
) -> Trained:
    """Train on the training interactions, keep the epoch with the best validation NDCG@10.

    A checkpoint keeps the states of the random generators too, so that a run that was interrupted and resumed gives
    bitwise the parameters of one that was not (on a CPU; a GPU adds up gradients in any order).

    Parameters
    ----------
    interactions, windows
        Of :mod:`corec.data`; test interactions are never looked at.
    report
        Epochs between two printed lines (a line is printed every 20 s in any case).
    folder
        Where a checkpoint is kept after every epoch, made if need be; without one none is kept.
    stop_after
        Stop after so many epochs, as if interrupted.
    max_seconds
        Start no epoch that would most likely end after so many seconds of training; the first one is always run.

    Returns
    -------
    Its `curve` has one row an epoch: ``epoch loss seconds peak_memory_mb`` (seconds since the start, validation
    included; peak of the process) and the validation metrics.

    Raises
    ------
    CorecError
        When the loss is no longer a number.
    """
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    sequences = list(items_by_user(interactions[interactions["split"] == "train"]).values())
    valid = queries(interactions, windows[windows["split"] == "valid"], params.max_length)
    device = machine.device()
    model = SASRec(n_items, params).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=params.lr, betas=(0.9, params.beta2), weight_decay=1e-4, fused=params.fast
    )
    checkpoint, shown = folder / f"checkpoint-{params.loss}-{seed}.pt" if folder else None, time.monotonic()
    rng = np.random.default_rng(seed)
    own = params.model_dump(exclude={"top_k", *WITHOUT_EFFECT["sasrec"]})
    state: dict[str, Any] = {"identity": paths.digest([own, seed, n_items, [items.tolist() for items in sequences]])}
    state |= {"curve": [], "best": -1.0, "best_epoch": 0, "best_state": {}, "dtype": "float32"}
    if params.fast and params.loss == "ce":
        state["dtype"] = str(machine.resolve_dtype(params.dtype)).removeprefix("torch.")
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["identity"] == state["identity"]:
            model.load_state_dict(saved.pop("model"))
            optimizer.load_state_dict(saved.pop("optimizer"))
            torch.set_rng_state(saved.pop("torch").cpu())
            for number, numbers in enumerate(saved.pop("cuda")):
                torch.cuda.set_rng_state(numbers.cpu(), number)
            rng.bit_generator.state = json.loads(saved.pop("numpy"))
            state = saved
            print(f"resumed after epoch {len(state['curve'])}", flush=True)
        else:
            print(f"{checkpoint.name} is of other data or parameters: training begins anew", flush=True)
    params = params.model_copy(update={"dtype": state["dtype"]})
    spent = state["curve"][-1]["seconds"] if state["curve"] else 0.0
    started = time.monotonic() - spent
    for epoch in range(len(state["curve"]) + 1, params.epochs + 1):
        if epoch - 1 - state["best_epoch"] >= params.patience or (stop_after and epoch > stop_after):
            break
        if epoch > 1 and spent * epoch / (epoch - 1) > max_seconds:
            break
        value = train_epoch(model, optimizer, sequences, params, rng, epoch)
        if not np.isfinite(value):
            raise CorecError(f"SASRec's training loss is not a number in epoch {epoch}: lower sasrec.lr.")
        metrics = ranking_metrics(rank_targets(model, valid))
        spent = time.monotonic() - started
        used = {"seconds": spent, "peak_memory_mb": paths.peak_memory_mb()}
        state["curve"].append({"epoch": epoch, "loss": value, **used, **metrics})
        if metrics["NDCG@10"] > state["best"]:
            state |= {"best": metrics["NDCG@10"], "best_epoch": epoch}
            state["best_state"] = {name: value.clone() for name, value in model.state_dict().items()}
        if epoch % report == 0 or time.monotonic() - shown > 20:
            print(f"epoch {epoch}: loss {value:.3f}, validation NDCG@10 {metrics['NDCG@10']:.4f}", flush=True)
            shown = time.monotonic()
        if checkpoint:
            part = checkpoint.with_suffix(".part")
            random = {"torch": torch.get_rng_state(), "numpy": json.dumps(rng.bit_generator.state)}
            random["cuda"] = torch.cuda.get_rng_state_all() if device == "cuda" else []
            torch.save(state | random | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, part)
            part.replace(checkpoint)
    model.load_state_dict(state["best_state"])
    return Trained(model, pd.DataFrame(state["curve"]), state["best_epoch"], state["dtype"])


def train_epoch(
    model: SASRec,
    optimizer: torch.optim.Optimizer,
    sequences: Sequence[np.ndarray],
    params: SasrecParams,
    rng: np.random.Generator,
    epoch: int = 1,
) -> float:
    """One pass over all training sequences [items, oldest first]; returns the mean loss.

    With `decay` the learning rate rises during the first `epoch` and falls linearly, to 0 at the end of the last.
    """
    model.train()
    size = params.max_length + 1
    cut = [piece for items in sequences for piece in pieces(items, size, int(rng.integers(2, size + 1)))]
    if params.fast:
        groups = batches(np.array([len(piece) for piece in cut]), params.batch_size, rng)
    else:
        order = rng.permutation(len(cut))
        groups = [order[start : start + params.batch_size] for start in range(0, len(order), params.batch_size)]
    total, count = 0.0, 0
    for number, group in enumerate(groups):
        if params.decay:
            done = epoch - 1 + (number + 0.5) / len(groups)  # epochs, in the middle of this step
            optimizer.param_groups[0]["lr"] = params.lr * min(1.0, done) * (1 - done / params.epochs)
        if params.fast:
            model.noise.seed(int(rng.integers(2**32)))
        value = loss(model, pad([cut[place] for place in group]).to(model.items.weight.device), params)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        weight = sum(len(cut[place]) - 1 for place in group) if params.fast else len(group)
        total, count = total + value.item() * weight, count + weight
    return total / count


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


def save(trained: Trained, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write weights, learning curve and candidates, and remove the checkpoints; returns the files."""
    files = [folder / "model.safetensors", folder / "curve.parquet", folder / "candidates.parquet"]
    save_file(trained.model.state_dict(), files[0])
    trained.curve.to_parquet(files[1], index=False)
    table.to_parquet(files[2], index=False)
    for checkpoint in folder.glob("**/checkpoint-*.pt"):
        checkpoint.unlink()
    return files


def load_candidates(run: str) -> pd.DataFrame:
    """The candidates of a run (raises CorecError when stage 02 has not finished)."""
    paths.require(run, "sasrec")
    return pd.read_parquet(paths.stage_dir(run, "sasrec") / "candidates.parquet")
