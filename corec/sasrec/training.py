"""Resumable training of SASRec, and its output files.

With `sasrec.fast`, sequences of similar length share a batch, which avoids most padding. The full softmax is computed with its
gradient for blocks of positions, so that the scores stay in the processor's cache, in bfloat16 if the machine multiplies it
faster. Dropout masks come from random bytes.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from corec import CorecError, files, machine, paths, stages
from corec.checkpoint import Checkpoint
from corec.params import SasrecParams
from corec.sasrec.losses import loss
from corec.sasrec.model import SASRec
from corec.sasrec.ranking import by_length, items_by_user, pad, queries, rank_targets, ranking_metrics


def batches(lengths: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffle sequences into batches of similar length, each with about as many items as `size` average sequences.

    Lengths are sorted within random groups of 8 batches, so the composition of the batches changes from epoch to epoch.

    Parameters
    ----------
    lengths
        Length of each sequence [sequences].
    size
        Average number of sequences per batch.
    rng
        Random generator.

    Returns
    -------
    Indices of the sequences of each batch.
    """
    result: list[np.ndarray] = []
    order = rng.permutation(len(lengths))
    for start in range(0, len(order), 8 * size):
        group = order[start : start + 8 * size]
        result += by_length(group, lengths, size * lengths.mean())
    return [result[place] for place in rng.permutation(len(result))]


def padding_share(lengths: np.ndarray, groups: Sequence[np.ndarray]) -> float:
    """Share of padding among the computed positions if each group is padded to its longest sequence."""
    computed = sum(len(group) * lengths[group].max() for group in groups)
    return float(1 - lengths.sum() / computed)


def pieces(items: np.ndarray, size: int, offset: int) -> list[np.ndarray]:
    """Split a sequence into pieces of at most `size` items; consecutive pieces share one item.

    The first piece has `offset` items. It is drawn again every epoch, so the boundaries change. Every position but the first is a
    target exactly once.
    """
    ends = [*range(offset, len(items), size - 1), len(items)]
    starts = [0, *(end - 1 for end in ends[:-1])]
    return [items[start:end] for start, end in zip(starts, ends, strict=True) if end - start > 1]


@dataclass
class Trained:
    """A trained retriever with its learning curve."""

    model: SASRec
    curve: pd.DataFrame
    best_epoch: int
    dtype: str  # number format of the products with the item table


@dataclass
class Progress:
    """State of a training that its checkpoint holds beside the states of model, optimiser and random generators."""

    dtype: str  # number format of the products with the item table
    curve: list[dict[str, float]] = field(default_factory=list)
    best: float = -1.0
    best_epoch: int = 0
    best_state: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.curve[-1]["seconds"] if self.curve else 0.0

    def ended(self, params: SasrecParams, stop_after: int | None, max_seconds: float) -> bool:
        """Whether training stops before the next epoch (see :func:`train` for the limits)."""
        done = len(self.curve)
        if done >= params.epochs or done - self.best_epoch >= params.patience or (stop_after and done >= stop_after):
            return True
        return done > 0 and self.seconds * (done + 1) / done > max_seconds

    def add(self, epoch: dict[str, float], model: SASRec) -> None:
        """Append an epoch to the curve, and store the model's state if its validation NDCG@10 is the best so far."""
        self.curve.append(epoch)
        if epoch["NDCG@10"] > self.best:
            self.best, self.best_epoch = epoch["NDCG@10"], len(self.curve)
            self.best_state = {name: value.clone() for name, value in model.state_dict().items()}


def get_random_state(rng: np.random.Generator) -> dict[str, Any]:
    """States of all random generators that the training uses."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "numpy": json.dumps(rng.bit_generator.state), "cuda": cuda}


def set_random_state(state: dict[str, Any], rng: np.random.Generator) -> None:
    """Restore the states returned by :func:`get_random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    for number, numbers in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(numbers.cpu(), number)
    rng.bit_generator.state = json.loads(state["numpy"])


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
    """Train on the training interactions and select the epoch with the best validation NDCG@10.

    The checkpoint includes the states of the random generators, so that an interrupted and resumed run gives bitwise the same
    parameters as an uninterrupted one (on a CPU; on a GPU the order of summation varies).

    The function is long because its training loop belongs together.

    Parameters
    ----------
    interactions, windows
        Tables of :mod:`corec.data`; test interactions are not used.
    n_items
        Number of items of the catalogue.
    params, seed
        Settings of model and training.
    report
        Epochs between two printed lines (a line is also printed after 20 s without one).
    folder
        Folder of the checkpoint, written after every epoch; created if missing. None for no checkpoint.
    stop_after
        Stop after this number of epochs, as if interrupted.
    max_seconds
        Start no epoch that is expected to end after this many seconds of training; the first epoch always runs.

    Returns
    -------
    `curve` has one row per epoch: ``epoch loss seconds peak_memory_mb`` (seconds since the start, validation included; peak of
    the process) and the validation metrics.

    Raises
    ------
    CorecError
        If the loss is not finite.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    sequences = list(items_by_user(interactions[interactions["split"] == "train"]).values())
    valid = queries(interactions, windows[windows["split"] == "valid"], params.max_length)
    device = machine.device()
    model = SASRec(n_items, params).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=params.lr, betas=(0.9, params.beta2), weight_decay=1e-4, fused=params.fast
    )
    progress = Progress(
        str(machine.resolve_dtype(params.dtype)).removeprefix("torch.") if params.fast and params.loss == "ce" else "float32"
    )

    identity = files.digest([params.model_dump(exclude={"top_k"}), seed, n_items, [items.tolist() for items in sequences]])
    checkpoint = Checkpoint(folder / f"checkpoint-{params.loss}-{seed}.pt" if folder else None, identity)
    if saved := checkpoint.load(device):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        set_random_state(saved["random"], rng)
        progress = Progress(**saved["progress"])
        print(f"resumed after epoch {len(progress.curve)}", flush=True)
    params = params.model_copy(update={"dtype": progress.dtype})

    started, shown = time.monotonic() - progress.seconds, time.monotonic()
    while not progress.ended(params, stop_after, max_seconds):
        epoch = len(progress.curve) + 1
        value = train_epoch(model, optimizer, sequences, params, rng, epoch)
        if not np.isfinite(value):
            raise CorecError(f"SASRec's training loss is not a number in epoch {epoch}: lower sasrec.lr.")
        metrics = ranking_metrics(rank_targets(model, valid))
        used = {"seconds": time.monotonic() - started, "peak_memory_mb": machine.peak_memory_mb()}
        progress.add({"epoch": epoch, "loss": value, **used, **metrics}, model)
        if epoch % report == 0 or time.monotonic() - shown > 20:
            print(f"epoch {epoch}: loss {value:.3f}, validation NDCG@10 {metrics['NDCG@10']:.4f}", flush=True)
            shown = time.monotonic()
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": get_random_state(rng)}
        checkpoint.save({"progress": vars(progress), **states})
    model.load_state_dict(progress.best_state)
    return Trained(model, pd.DataFrame(progress.curve), progress.best_epoch, progress.dtype)


def train_epoch(
    model: SASRec,
    optimizer: torch.optim.Optimizer,
    sequences: Sequence[np.ndarray],
    params: SasrecParams,
    rng: np.random.Generator,
    epoch: int = 1,
) -> float:
    """Train for one epoch; returns the mean loss.

    With `decay`, the learning rate warms up during the first epoch and falls linearly to 0 at the end of the last one.

    Parameters
    ----------
    model, optimizer
        Updated in place.
    sequences
        Training items of each user, oldest first.
    params
        Parameters of stage 02.
    rng
        Random generator.
    epoch
        Number of the epoch, from 1.
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
            done = epoch - 1 + (number + 0.5) / len(groups)  # epochs so far, at the middle of this step
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


def save(trained: Trained, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the weights, the learning curve and the candidates to `folder`, and delete the checkpoints; returns the files."""
    written = [folder / "model.safetensors", folder / "curve.parquet", folder / "candidates.parquet"]
    with files.aside(written[0]) as part:
        save_file(trained.model.state_dict(), part)
    files.write_parquet(written[1], trained.curve)
    files.write_parquet(written[2], table)
    for checkpoint in folder.glob("**/checkpoint-*.pt"):
        checkpoint.unlink()
    return written


def load_candidates(run: str) -> pd.DataFrame:
    """Load the candidates of a run.

    Raises
    ------
    CorecError
        If stage 02 has not finished.
    """
    stages.require(run, "sasrec")
    return pd.read_parquet(paths.stage_dir(run, "sasrec") / "candidates.parquet")


def load(run: str, n_items: int, params: SasrecParams) -> SASRec:
    """Load the trained retriever of a run, in evaluation mode.

    Raises
    ------
    CorecError
        If stage 02 has not finished.
    """
    stages.require(run, "sasrec")
    model = SASRec(n_items, params)
    model.load_state_dict(load_file(paths.stage_dir(run, "sasrec") / "model.safetensors"))
    return model.to(machine.device()).eval()


def load_trained(run: str, n_items: int, params: SasrecParams) -> Trained:
    """Load the trained retriever of a run with its learning curve, as :func:`train` returned it.

    Raises
    ------
    CorecError
        If stage 02 has not finished.
    """
    record = stages.require(run, "sasrec")
    curve = pd.read_parquet(paths.stage_dir(run, "sasrec") / "curve.parquet")
    return Trained(load(run, n_items, params), curve, record["best_epoch"], record["dtype"])
