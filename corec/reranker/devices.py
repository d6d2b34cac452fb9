"""Training on several devices, as ``accelerate launch`` starts it: a share of each step's windows on each, gradients summed.

All processes draw the same batch from seed and step, each computes its own windows, and the sum of their gradients is that
of one process with the whole batch (but for dropout, which each draws for itself). The launch's configuration
(``params/launch/``) says where the weights are:

- data parallel: all of them on every device. Only the few gradients of the adapter, head and new rows travel.
- FSDP: those of each transformer layer in equal shards, put together while the layer computes (``fully_shard``).
- DeepSpeed ZeRO-2: as data parallel, with Adam's state and the summed gradients in equal shards
  (:class:`corec.reranker.optimizer.ZeroMaster`).
"""

import importlib.util
import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from corec import CorecError

DEEPSPEED = "0.19.8"  # the version that ZeRO-2 was tried with, and some of whose inner names it needs


@dataclass(frozen=True)
class Devices:
    """The processes that train together, and this one's place among them."""

    rank: int = 0
    size: int = 1
    sharded: bool = False  # by FSDP
    zero: bool = False  # by DeepSpeed's ZeRO-2

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def share(self, windows: int) -> slice:
        """Which of a step's windows this process computes: equally many on each.

        Raises
        ------
        CorecError
            When they cannot be shared equally.
        """
        if windows % self.size:
            raise CorecError(
                f"{windows} windows a step cannot be shared equally by {self.size} processes: set reranker.batch_size to a "
                f"multiple of {self.size}, or start another number of processes."
            )
        each = windows // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.size == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float32 if torch.cuda.is_available() else torch.float64, device=here())
        dist.all_reduce(summed)
        return float(summed)

    def agreed(self, value: float) -> float:
        """The first process's number, on all of them."""
        return self.total(value if self.first else 0.0)

    def same(self, steps: int, checkpoint: Path | None) -> None:
        """Raise CorecError unless all processes go on from the same number of steps."""
        if self.total(float(steps != self.agreed(steps))):
            raise CorecError(
                f"The processes do not find the same {checkpoint}: give all machines one folder for runs/, or delete it on all."
            )

    def add_up(self, gradients: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over all processes (float32, one message for all)."""
        if self.size > 1 and (parts := list(gradients)):
            flat = torch.cat([part.reshape(-1) for part in parts])
            dist.all_reduce(flat)
            for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(summed.reshape(part.shape))


ALONE = Devices()


def here() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def join() -> Devices:
    """Meet the other processes of ``accelerate launch`` (none when started without it); takes this process's own GPU.

    Raises
    ------
    CorecError
        When the launch asks for DeepSpeed and it is not installed, or for another of its stages than 2, or for more processes
        than there are GPUs.
    """
    zero = asked_for("ACCELERATE_USE_DEEPSPEED")
    if zero and importlib.util.find_spec("deepspeed") is None:
        raise CorecError(
            f"The launch asks for DeepSpeed, which is not installed: pip install deepspeed=={DEEPSPEED}, or choose another."
        )
    if zero and (stage := os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")) != "2":
        raise CorecError(
            f"deepspeed_config.zero_stage is {stage}, of DeepSpeed's stages 2 alone is built: set it to 2, or shard the "
            "weights by params/launch/fsdp.yaml."
        )
    started, cards = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if torch.cuda.is_available() and started > cards:
        raise CorecError(f"{started} processes for {cards} GPUs: give accelerate launch --num_processes {cards}.")
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))  # loading a backbone takes a while
    several = state.num_processes > 1
    return Devices(state.process_index, state.num_processes, asked_for("ACCELERATE_USE_FSDP") and several, zero and several)


def asked_for(name: str) -> bool:
    """Whether ``accelerate launch`` has set this variable to true."""
    return os.environ.get(name, "false").lower() == "true"


def leave(devices: Devices) -> None:
    """Part from the other processes once all is written; without a GPU this ends the process.

    gloo's threads now and then abort a process that ends in the ordinary way ("terminate called without an active exception").
    """
    if torch.cuda.is_available():
        PartialState().destroy_process_group()
    elif devices.size > 1:
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def one_first() -> AbstractContextManager[Any]:
    """A context that the first process of each machine enters alone, and the others after it: for downloads."""
    return PartialState().local_main_process_first()


def shard(model: Any, devices: Devices) -> None:
    """Leave on each device its share of every transformer layer of a Hugging Face `model`, in place.

    The model may come from the CPU: its layers go to the device one by one, and what is not in a layer (the embeddings) whole.
    Gradients arrive summed over all processes, in float32 on the way.

    Raises
    ------
    CorecError
        When the architecture does not say which of its modules are layers.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise CorecError(
            f"Parameter reranker.backbone: {type(model).__name__} does not say what its layers are, so it cannot be sharded: "
            "launch with params/launch/ddp.yaml, or choose another model."
        )
    mesh, policy = init_device_mesh(here().type, (devices.size,)), MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in layers:  # each by itself: under a common root, transformers no longer hands out the layers' states
        wrapped: Any = fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        wrapped.set_force_sum_reduction_for_comms(True)
        wrapped.set_gradient_divide_factor(1.0)
    model.to(here())


def is_sharded(value: Tensor) -> bool:
    """Whether each process holds a part of this tensor only."""
    return isinstance(value, DTensor)


def local(value: Tensor) -> Tensor:
    """The part that this process holds of a sharded tensor; any other tensor as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which each process holds a `part`, cut as the sharded `like` is (a call of all processes)."""
    if not isinstance(like, DTensor):
        return part
    together: Any = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return together.full_tensor()


def part(value: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`whole`: this process's part of a tensor."""
    return distribute_tensor(value, like.device_mesh, like.placements).to_local() if isinstance(like, DTensor) else value
