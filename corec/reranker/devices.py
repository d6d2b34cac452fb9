"""Several processes by accelerate: what each computes of a step, and how the re-ranker is prepared for it.

All processes draw the same batch from seed and step, and each computes its own windows. The mean of their gradients is that of
one process with the whole batch (but for dropout, which each draws for itself). ``accelerate launch`` with a file of
``params/launch/`` says where the weights are: on every device (data parallel), or those of each transformer layer in shards
(FSDP).
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


class Scorer(nn.Module):
    """The re-ranker's forward pass as a module, which accelerate can wrap."""

    def __init__(self, reranker: Reranker) -> None:
        super().__init__()
        self.model, self.head = reranker.model, reranker.head
        if reranker.params.readout == "index":
            self.head.requires_grad_(False)
        self._score = reranker.forward

    def forward(self, rows: Sequence[Row]) -> Tensor:
        """Scores [rows, R, K] (see :meth:`corec.reranker.Reranker.forward`)."""
        return self._score(rows)


def prepare(reranker: Reranker, accelerator: Accelerator) -> nn.Module:
    """The re-ranker as a module, prepared for the processes of `accelerator`: data parallel, or its layers sharded.

    Raises
    ------
    CorecError
        For a launch with FSDP where the architecture does not say which of its modules are layers.
    """
    module = Scorer(reranker)
    if accelerator.num_processes > 1 and asked_for("ACCELERATE_USE_FSDP"):
        return shard(module, reranker, accelerator)
    return accelerator.prepare_model(module)


def asked_for(name: str) -> bool:
    """Whether ``accelerate launch`` has set this variable to true."""
    return os.environ.get(name, "false").lower() == "true"


def shard(module: Scorer, reranker: Reranker, accelerator: Accelerator) -> nn.Module:
    """Leave on each device its share of every transformer layer; all else is data parallel.

    accelerate's own FSDP is not used: it takes the launch for data parallel where there is no GPU, so that nothing of it could be
    tested there; it wraps the whole model too, under which transformers no longer returns the states of the layers that the
    read-outs take; and it wants one number format for all trained parameters, where the head is float32. Layers may come from
    the CPU; they go to the device one by one.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    names = layer_names(reranker.causal)
    for layer in [layer for layer in reranker.causal.modules() if type(layer).__name__ in names]:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    module.to(accelerator.device)
    sharded = [name for name, value in module.named_parameters() if isinstance(value, DTensor)]
    setattr(module, "_ddp_params_and_buffers_to_ignore", sharded)  # noqa: B010  # where DistributedDataParallel looks
    ids = [accelerator.device.index] if accelerator.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids)


def layer_names(model: Any) -> list[str]:
    """The class names of a Hugging Face model's transformer layers (raises CorecError where it does not give them)."""
    names = sorted(getattr(model, "_no_split_modules", None) or ())
    present = {type(module).__name__ for module in model.modules()}
    if not present & set(names):
        raise CorecError(
            f"Parameter reranker.backbone: {type(model).__name__} does not say what its layers are, so it cannot be sharded: "
            "launch with params/launch/ddp.yaml, or choose another model."
        )
    return [name for name in names if name in present]


def share(windows: int, rank: int, size: int) -> slice:
    """Which of a step's windows the process `rank` of `size` computes: equally many on each.

    Raises
    ------
    CorecError
        When they cannot be shared equally.
    """
    if windows % size:
        raise CorecError(
            f"{windows} windows a step cannot be shared equally by {size} processes: set reranker.batch_size to a "
            f"multiple of {size}, or start another number of processes."
        )
    each = windows // size
    return slice(rank * each, (rank + 1) * each)


def gather(value: Any) -> list[Any]:
    """A value of every process, on all of them."""
    return list(gather_object([value]))


def agree(value: Any) -> Any:
    """The first process's value, on all of them."""
    return broadcast_object_list([value])[0]


def require_same(steps: int, checkpoint: Path | None) -> None:
    """Raise CorecError unless all processes go on from the same number of steps."""
    if len(set(gather(steps))) > 1:
        raise CorecError(
            f"The processes do not find the same {checkpoint}: give all machines one folder for runs/, or delete it on all."
        )
