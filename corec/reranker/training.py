"""Fine-tuning: batches, losses and the training loop."""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from corec import CorecError, controls, files, stages
from corec.checkpoint import Checkpoint
from corec.controls import Pools, Vocabulary
from corec.params import Params, RerankerParams
from corec.reranker import devices
from corec.reranker.model import Reranker, build, save
from corec.reranker.optimizer import MasterAdamW, kind, load_state, whole_state
from corec.reranker.prompt import Row
from corec.reranker.readout import Parts, listwise, match_loss, ranknet
from corec.reranker.scoring import Examples, fingerprint, make_rows, memory_for


class Targets(NamedTuple):
    """What a batch is trained on: R requests and K candidates per window, n constraints per request."""

    control: np.ndarray  # control scores [windows, R, K], with the truth bonus
    wanted: np.ndarray  # what the requests ask of each candidate [windows, R, K], see ``reranker.control_target``
    met: np.ndarray  # constraints met [windows, R, n, K], 0 where a request has fewer
    known: np.ndarray  # whether that is known [windows, R, n, K], 0 or 1; used with ``reranker.attribute_dropout``
    present: np.ndarray  # constraints of the requests [windows, R, n], 0 or 1
    truth: np.ndarray  # the true next item [windows, K], 0 or 1; all 0 without a truth bonus
    strength: np.ndarray  # of the requests [windows, R]

    @classmethod
    def of_control(cls, control: np.ndarray) -> "Targets":
        """Targets for RankNet from control scores [windows, R, K] only."""
        windows, requests, k = control.shape
        met, present = np.zeros((windows, requests, 0, k), np.float32), np.zeros((windows, requests, 0), np.float32)
        truth, strength = np.zeros((windows, k), np.float32), np.ones((windows, requests), np.float32)
        return cls(control, control, met, np.ones_like(met), present, truth, strength)

    def take(self, rows: Any) -> "Targets":
        """Select windows."""
        return Targets(*(values[rows] for values in self))


class TrainingBatch(NamedTuple):
    """Windows of one optimiser step with their requests and targets."""

    pools: Pools
    requests: list[np.ndarray]  # R arrays [windows, n], or [windows] of sentences
    targets: Targets
    plain: bool
    hidden: np.ndarray | None = None  # attributes that the lines of the candidates omit [windows, K, attributes]


def training_batch(examples: Examples, params: Params, step: int, requested: Vocabulary | None = None) -> TrainingBatch:
    """Draw the batch of a step; it depends on seed and step only, so a resumed training uses the same batches.

    The requests are drawn from the values of the candidates in `requested`, by default those of `examples`.

    In the first `curriculum_steps` steps, prompts are plain: in the first half of them, requests have one constraint; in the
    second half, their lengths cycle through those of ``train_tokens`` without 0. In later steps they cycle through all lengths.
    With ``curriculum_k``, plain prompts have fewer candidates, drawn at random from the pool.

    With the loss ``listwise``, the strength of each request is the square of a uniform number, so that half are below 1/4;
    otherwise it is 1.

    With ``attribute_dropout``, whole prompts omit this share of the candidates' attributes; the targets do not depend on it.
    """
    settings, prepared = params.reranker, examples.prepared
    rng = np.random.default_rng([params.seed, 4, step])
    plain = step < settings.curriculum_steps
    pools = prepared.pools["train"]
    pools = pools.take(rng.choice(len(pools.window), min(settings.batch_size, len(pools.window)), replace=False))
    lengths = settings.train_tokens or params.controls.n_tokens
    if plain and settings.curriculum_k:
        part = step * len(settings.curriculum_k) // settings.curriculum_steps
        pools = pools.narrow(settings.curriculum_k[part], rng)
    if plain:
        lengths = [1] if 2 * step < settings.curriculum_steps else [n for n in lengths if n] or [1]
    wanted = settings.requests_per_window
    first = step * wanted if wanted < len(lengths) else 0  # too few for all lengths: take them in turn over the steps
    lengths = [lengths[(first + i) % len(lengths)] for i in range(wanted)]
    asking = requested or prepared.vocabulary
    requests = [controls.draw_requests(pools, n, params.controls.protocol, asking, rng) for n in lengths]
    truth = pools.is_truth() if settings.truth_bonus and not plain else np.zeros(pools.candidates.shape, dtype=bool)
    met = [controls.matches(pools.candidates, request, prepared.vocabulary.values_of) for request in requests]
    shape = (len(pools.window), wanted)
    asked = np.stack([controls.wanted(each, settings.control_target) for each in met], axis=1)
    targets = Targets(
        asked + truth[:, None],
        asked,
        np.zeros((*shape, max(lengths), pools.candidates.shape[1]), np.float32),
        np.ones((*shape, max(lengths), pools.candidates.shape[1]), np.float32),
        np.zeros((*shape, max(lengths)), np.float32),
        truth.astype(np.float32),
        (rng.random(shape) ** 2 if settings.loss == "listwise" else np.ones(shape)).astype(np.float32),
    )
    known = prepared.vocabulary.known(pools.candidates)  # [windows, K, attributes]
    rows = np.arange(len(pools.window))[:, None]
    for place, (request, each) in enumerate(zip(requests, met, strict=True)):
        targets.met[:, place, : request.shape[1]] = each.transpose(0, 2, 1)
        targets.known[:, place, : request.shape[1]] = known.transpose(0, 2, 1)[rows, prepared.vocabulary.kind(request)]
        targets.present[:, place, : request.shape[1]] = request >= 0
    hidden = rng.random(known.shape) < settings.attribute_dropout if settings.attribute_dropout and not plain else None
    return TrainingBatch(pools, requests, targets, plain, hidden)


def schedule(progress: float, warmup: float) -> float:
    """Learning-rate factor after a share `progress` of training: linear warm-up, then a cosine to 0."""
    if progress < warmup:
        return max(progress / warmup, 0.02)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / max(1e-9, 1 - warmup))))


def loss_of(parts: Parts, prior: Tensor | None, targets: Targets, params: RerankerParams) -> Tensor:
    """Training loss of a batch.

    ``ranknet``: RankNet on control scores. ``listwise``: divergence from softmax(p + c * strength * wanted + b * truth), where p
    is the prior (0 if the model has none), c = ``control_logits`` and b = ``truth_logits``. ``truth``: cross-entropy to the true
    next item. With ``control: constraints``, ``match_loss`` times the cross-entropy of each constraint is added; with
    ``auxiliary``, that number times RankNet on the scores of the read-out ``candidate``. With ``attribute_dropout``, constraints
    on unknown attributes of a candidate are omitted from the cross-entropy, and count in `wanted` with the model's own
    probability.

    Parameters
    ----------
    parts, prior
        Result of :meth:`corec.reranker.Reranker.parts`.
    targets
        Targets of the same windows.
    params
        Loss and its weights.
    """
    control, asked, met, known, present, truth, strength = (
        torch.from_numpy(values).to(parts.control.device) for values in targets
    )
    shape = strength.shape  # windows, R; a window has one row, or one for each request
    parts = Parts(
        parts.relevance.reshape(len(control), -1, control.shape[-1]),
        parts.control.reshape(control.shape),
        None if parts.gate is None else parts.gate.reshape(shape),
        None if parts.match is None else parts.match.reshape(met.shape),
        None if parts.auxiliary is None else parts.auxiliary.reshape(control.shape),
    )
    if params.attribute_dropout and parts.match is not None:
        asked = (torch.where(known > 0, met, parts.match.detach().sigmoid()) * present[..., None]).sum(2)
    prior = None if prior is None else prior.reshape(len(control), -1, prior.shape[-1])[:, 0]
    scores = parts.scores(prior, strength[..., None])
    if params.loss == "ranknet":
        loss = ranknet(scores, control)
    elif params.loss == "truth":
        loss = -(scores.log_softmax(-1) * truth[:, None]).sum(-1).mean()
    else:
        wanted = params.control_logits * strength[..., None] * asked + params.truth_logits * truth[:, None]
        loss = listwise(scores, wanted if prior is None else wanted + prior[:, None])
    if parts.auxiliary is not None:
        loss = loss + params.auxiliary * ranknet(parts.auxiliary, control)
    if parts.match is not None and params.match_loss:
        loss = loss + params.match_loss * match_loss(parts.match, met, present, known if params.attribute_dropout else None)
    return loss


def backward(
    reranker: Reranker,
    rows: Sequence[Row],
    targets: Targets,
    module: nn.Module | None = None,
) -> float:
    """Accumulate the gradient of the loss of a batch, `micro_batch` windows at a time; returns the loss.

    Windows of similar length share a pass, which reduces padding.

    Parameters
    ----------
    reranker
        The model.
    rows
        Rows of all windows, in order (see :func:`corec.reranker.make_rows`).
    targets
        Targets of all windows, in order.
    module
        The re-ranker prepared for several processes (see :mod:`corec.reranker.devices`); the last pass then averages the
        gradients over the processes.
    """
    compute = module or reranker.parts
    windows, total = len(targets.control), 0.0
    per_window = len(rows) // windows
    groups = [rows[i * per_window : (i + 1) * per_window] for i in range(windows)]
    order = sorted(range(windows), key=lambda i: max(len(row.prefix) for row in groups[i]))
    size = reranker.params.micro_batch
    for start in range(0, windows, size):
        some, last = order[start : start + size], start + size >= windows
        wait = module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()
        with wait, memory_for("micro_batch"):
            parts, prior = compute([row for i in some for row in groups[i]])
            loss = loss_of(parts, prior, targets.take(some), reranker.params) * (len(some) / windows)
            loss.backward()
        total += loss.item()
    return total


def spread(rows: Tensor) -> Tensor:
    """Uniformity loss of `rows` [tokens, hidden]: log of the mean of exp(-2 d^2), d the distance of two rows of length 1.

    It is 0 if all rows point in one direction and about -4 if they are orthogonal (Wang and Isola, ICML 2020).
    """
    return torch.pdist(F.normalize(rows.float(), dim=-1)).pow(2).mul(-2).exp().mean().log()


def add_contrast(reranker: Reranker) -> None:
    """Add the gradient of ``reranker.row_contrast`` times :func:`spread` of the rows of the new tokens."""
    for name, rows in reranker.trainable().items():
        if kind(name) == "rows":
            (gradient,) = torch.autograd.grad(reranker.params.row_contrast * spread(rows), rows)
            rows.grad = gradient if rows.grad is None else rows.grad + gradient


def not_a_number(step: int, batch: TrainingBatch, folder: Path | None) -> CorecError:
    """Return the error for a loss or gradient that is not finite; writes the batch to ``failed_batch.json`` in `folder`."""
    where = ""
    if folder:
        kept = {
            "step": step,
            "plain": batch.plain,
            "window": batch.pools.window.tolist(),
            "candidates": batch.pools.candidates.tolist(),
            "requests": [request.tolist() for request in batch.requests],
            "control": batch.targets.control.tolist(),
        }
        files.write_text(folder / "failed_batch.json", json.dumps(kept))
        where = f" (its batch is in {folder / 'failed_batch.json'})"
    return CorecError(
        f"The training loss or its gradient is not a number at step {step}{where}: lower reranker.lr or reranker.lr_head."
    )


class Clock:
    """Time spent in training, and progress of the learning-rate schedule.

    The progress is measured in steps. While the steps are not expected to finish within `max_minutes`, it is measured in time, so
    that the learning rate still decreases to 0.
    """

    def __init__(self, max_minutes: float, spent: float) -> None:
        self.limit, self.spent, self.started = 60 * max_minutes, spent, time.monotonic() - spent

    def tick(self) -> None:
        """Update the time spent, measured by the first process."""
        self.spent = devices.agree(time.monotonic() - self.started)

    def progress(self, step: int, total: int) -> float:
        """Progress at `step`, as a share of the training."""
        late = self.spent / (step + 1) * total > self.limit and self.spent > 60
        return self.spent / self.limit if late else step / total


def train(
    reranker: Reranker,
    examples: Examples,
    params: Params,
    folder: Path | None,
    stop_after: int | None = None,
    accelerator: Accelerator | None = None,
    draw: Callable[[Examples, Params, int], TrainingBatch] | None = None,
) -> pd.DataFrame:
    """Fine-tune with the loss ``reranker.loss``; resumes from the checkpoint in `folder`, if there is one.

    Training starts from the initial parameters of the model (its ``start``), even if it was trained before, and ends after
    ``curriculum_steps + steps`` steps or after `max_minutes` (see :class:`Clock`). The function is long because its
    training loop belongs together.

    Parameters
    ----------
    reranker, examples, params
        Model, windows, and settings of the run.
    folder
        Folder of the checkpoint; None for no checkpoint.
    stop_after
        Stop after this number of steps, as if interrupted.
    accelerator
        Accelerator of ``accelerate launch``; the windows of each step are divided among its processes.
    draw
        Function that draws the batch of a step; None for :func:`training_batch`. The checkpoint does not record it: another
        function needs another folder.

    Returns
    -------
    One row per step: ``step plain loss seconds tokens``.

    Raises
    ------
    CorecError
        If the loss or gradient is not finite (the batch is then written to ``failed_batch.json``), memory runs out, or the
        windows of a step cannot be divided equally.
    """
    accelerator = accelerator or Accelerator(cpu=reranker.device.type == "cpu")
    settings, first, say = params.reranker, accelerator.is_main_process, accelerator.print
    total = settings.curriculum_steps + settings.steps
    end = min(total, stop_after or total)
    reranker.reset()
    module = devices.prepare(reranker, accelerator)
    optimizer = MasterAdamW(trainable(module), settings)
    rows: list[list[Any]] = []
    clock, shown = Clock(settings.max_minutes, 0.0), time.monotonic()

    section = stages.section(params, "reranker")
    section["reranker"] = {
        name: value for name, value in section["reranker"].items() if name not in ("dtype", "zero_shot", "seeds")
    }
    sections = [stages.section(params, stage) for stage in ("data", "sasrec", "controls")]
    identity = files.digest([*sections, section, fingerprint(examples)])
    checkpoint = Checkpoint(folder / "checkpoint.pt" if folder else None, identity)
    dtype = str(reranker.causal.dtype)
    if saved := checkpoint.load("cpu", say):
        if saved["dtype"] != dtype:
            raise CorecError(
                f"{checkpoint.path} was made in {saved['dtype']}, this training computes in {dtype}: set reranker.dtype to "
                f"'{saved['dtype'].removeprefix('torch.')}' to go on, or delete the file."
            )
        rows, clock = saved["rows"], Clock(settings.max_minutes, saved["spent"])
        load_state(module, optimizer, saved["optimizer"])
        reranker.trained = True
        say(f"resumed after step {len(rows)}", flush=True)
    devices.require_same(len(rows), checkpoint.path)

    before = len(rows)
    while len(rows) < end and clock.spent < clock.limit:
        step = len(rows)
        reranker.model.train()
        torch.manual_seed(params.seed * 1_000_003 + step + (accelerator.process_index << 32))
        batch = (draw or training_batch)(examples, params, step)
        part = devices.share(len(batch.pools.window), accelerator.process_index, accelerator.num_processes)
        pools = batch.pools.take(np.arange(len(batch.pools.window))[part])
        hidden = None if batch.hidden is None else batch.hidden[part]
        prompts = make_rows(reranker, examples, pools, [request[part] for request in batch.requests], batch.plain, hidden)
        losses = devices.gather(backward(reranker, prompts, batch.targets.take(part), module))
        loss = sum(losses) / len(losses)
        if settings.row_contrast:
            add_contrast(reranker)
        clock.tick()
        reranker.trained = True
        norm = optimizer.update(schedule(clock.progress(step, total), settings.warmup))
        if not math.isfinite(norm + loss):
            reranker.trained = step > 0
            error = not_a_number(step, batch, folder if first else None)
            accelerator.wait_for_everyone()
            raise error
        tokens = sum(devices.gather(sum(len(row.prefix) + sum(map(len, row.suffixes)) for row in prompts)))
        rows.append([step, batch.plain, loss, clock.spent, tokens])
        if time.monotonic() - shown > 20 or step + 1 == end:
            recent = np.mean([row[2] for row in rows[-10:]])
            say(f"step {step + 1} of {end}: loss {recent:.3f}, {clock.spent / 60:.1f} min", flush=True)
            shown = time.monotonic()
        last = len(rows) == end or clock.spent >= clock.limit
        due = len(rows) % settings.checkpoint_steps == 0 and len(rows) < total
        if due or (last and not stop_after and len(rows) > before):
            state = whole_state(module, optimizer)  # called by all processes
            if first:
                checkpoint.save({"dtype": dtype, "rows": rows, "spent": clock.spent, "optimizer": state})
    if len(rows) < end:
        say(f"ended at step {len(rows)} of {end}: raise reranker.max_minutes ({settings.max_minutes:g}), train anew", flush=True)
    if first:
        reranker.prompter.report_cut()
    return pd.DataFrame(rows, columns=["step", "plain", "loss", "seconds", "tokens"])


def repeat(items: pd.DataFrame, examples: Examples, params: Params, seed: int, folder: Path) -> Reranker:
    """Train and save another re-ranker on the same windows, which differs in the seed of batches, requests and initial weights.

    Parameters
    ----------
    items
        Items table of stage 01.
    examples, params
        As for :func:`train`.
    seed
        Seed of the training.
    folder
        Folder of stage 04; the re-ranker is in its subfolder ``seed-<seed>``.
    """
    own = folder / f"seed-{seed}"
    own.mkdir(parents=True, exist_ok=True)
    reranker = build(items, examples.prepared.vocabulary, params.reranker, seed)
    save(reranker, train(reranker, examples, params.model_copy(update={"seed": seed}), own), own)
    return reranker


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, without the prefix of the wrapper for several processes."""
    return {name.removeprefix("module."): value for name, value in module.named_parameters() if value.requires_grad}
