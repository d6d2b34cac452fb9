"""Training on several processes with accelerate: the share of each process in a step, and the preparation of the re-ranker.

All processes draw the same batch from seed and step, and each computes its own windows. The mean of their gradients equals the
gradient of one process with the whole batch, except for dropout, which each process draws independently. The file of
``params/launch/`` that is passed to ``accelerate launch`` selects where the weights are: on every device (data parallel), or the
weights of each transformer layer in shards (FSDP).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from corec import CorecError
from corec.reranker.model import Reranker
from corec.reranker.prompt import Row
from corec.reranker.readout import Parts


class Scorer(nn.Module):
    """Forward pass of the re-ranker as a module that accelerate can wrap."""

    def __init__(self, reranker: Reranker) -> None:
        super().__init__()
        self.model, self.head = reranker.model, reranker.head
        if reranker.params.readout == "index" and not reranker.params.auxiliary:
            self.head.requires_grad_(False)
        self._parts = reranker.parts

    def forward(self, rows: Sequence[Row]) -> tuple[Parts, Tensor | None]:
        """Parts of the scores, and the prior (see :meth:`corec.reranker.Reranker.parts`)."""
        return self._parts(rows)


def prepare(reranker: Reranker, accelerator: Accelerator) -> nn.Module:
    """Wrap the re-ranker as a module for the processes of `accelerator`: data parallel, or with sharded layers.

    With FSDP, a single process in a process group has one shard of each layer, which is the whole layer.

    Raises
    ------
    CorecError
        If FSDP is requested and the architecture does not name its transformer layers.
    """
    module = Scorer(reranker)
    if asked_for("ACCELERATE_USE_FSDP") and torch.distributed.is_initialized():
        return shard(module, reranker, accelerator)
    return accelerator.prepare_model(module)


def asked_for(name: str) -> bool:
    """Whether ``accelerate launch`` has set this variable to true."""
    return os.environ.get(name, "false").lower() == "true"


def shard(module: Scorer, reranker: Reranker, accelerator: Accelerator) -> nn.Module:
    """Shard every transformer layer over the devices; all other parameters are data parallel.

    The FSDP of accelerate is not used, for three reasons. Without a GPU it falls back to data parallelism, so it could not be
    tested. It also wraps the whole model, and transformers then no longer returns the states of the layers, which the read-outs
    need. It requires one number format for all trained parameters, but the head is float32. Layers on the CPU are moved to the
    device one at a time.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    reranker.fused = None  # FSDP gathers the weights of a layer when its module is called
    names = layer_names(reranker.causal)
    for layer in [layer for layer in reranker.causal.modules() if type(layer).__name__ in names]:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    module.to(accelerator.device)
    sharded = [name for name, value in module.named_parameters() if isinstance(value, DTensor)]
    setattr(module, "_ddp_params_and_buffers_to_ignore", sharded)  # noqa: B010  # where DistributedDataParallel looks
    ids = [accelerator.device.index] if accelerator.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids)


def layer_names(model: Any) -> list[str]:
    """Class names of the transformer layers of a Hugging Face model (raises CorecError if it does not name them)."""
    names = sorted(getattr(model, "_no_split_modules", None) or ())
    present = {type(module).__name__ for module in model.modules()}
    if not present & set(names):
        raise CorecError(
            f"Parameter reranker.backbone: {type(model).__name__} does not declare its layers, so it cannot be sharded: "
            "launch with params/launch/ddp.yaml, or choose another model."
        )
    return [name for name in names if name in present]


def share(windows: int, rank: int, size: int) -> slice:
    """Windows of a step that the process `rank` of `size` computes; every process has the same number.

    Raises
    ------
    CorecError
        If `windows` is not a multiple of `size`.
    """
    if windows % size:
        raise CorecError(
            f"{windows} windows a step cannot be shared equally by {size} processes: set reranker.batch_size to a "
            f"multiple of {size}, or start another number of processes."
        )
    each = windows // size
    return slice(rank * each, (rank + 1) * each)


def gather(value: Any) -> list[Any]:
    """Gather a value from every process; all processes return the list."""
    return list(gather_object([value]))


def agree(value: Any) -> Any:
    """Broadcast the value of the first process; all processes return it."""
    return broadcast_object_list([value])[0]


def require_same(steps: int, checkpoint: Path | None) -> None:
    """Raise CorecError unless all processes resume from the same number of steps."""
    if len(set(gather(steps))) > 1:
        raise CorecError(
            f"The processes do not find the same {checkpoint}: give all machines one folder for runs/, or delete it on all."
        )
