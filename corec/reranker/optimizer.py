"""Adam on float32 copies of what is trained, by one process or several."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from corec.params import RerankerParams
from corec.reranker import devices as parallel
from corec.reranker.devices import ALONE, Devices


class Master:
    """Adam on float32 copies of the parameters: bfloat16 alone would swallow small updates.

    Where the parameters are sharded, each process holds and moves its own part (see :mod:`corec.reranker.devices`).
    """

    def __init__(self, parameters: dict[str, nn.Parameter], params: RerankerParams, devices: Devices = ALONE) -> None:
        self.parameters, self.devices = parameters, devices
        self.copies = {name: nn.Parameter(parallel.local(value).detach().float().clone()) for name, value in parameters.items()}
        rates = {"head": params.lr_head, "rows": params.lr_rows, "adapter": params.lr}
        by_kind = {kind: [name for name in self.copies if self.kind(name) == kind] for kind in rates}
        self.names = [name for names in by_kind.values() for name in names]  # in the optimiser's order
        groups = [{"params": [self.copies[n] for n in by_kind[kind]], "base": rate} for kind, rate in rates.items()]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)

    @staticmethod
    def kind(name: str) -> str:
        """Which learning rate a parameter has: ``head``, ``rows`` (of the new tokens) or ``adapter``."""
        return "head" if name.startswith("head.") else "rows" if "trainable_tokens" in name else "adapter"

    def gradients(self) -> dict[str, Tensor]:
        """What the backward pass left in this process's parameters, in float32; takes it away."""
        found = {name: parallel.local(value.grad).float() for name, value in self.parameters.items() if value.grad is not None}
        for value in self.parameters.values():
            value.grad = None
        return found

    def step(self, scale: float) -> float:
        """One update at `scale` times the base rates; clips the gradient's norm at 1 and returns it.

        Gradients are summed over all processes first. One that is not finite changes nothing.
        """
        shards: list[Tensor] = []
        copied: list[Tensor] = []
        gradients = self.gradients()
        for name, copy in self.copies.items():
            copy.grad = gradients.get(name)
            if copy.grad is not None:
                (shards if parallel.is_sharded(self.parameters[name]) else copied).append(copy.grad)
        self.devices.add_up(copied)
        if shards:
            none = torch.zeros((), device=shards[0].device)
            there, here = (sum((gradient.square().sum() for gradient in some), none) for some in (shards, copied))
            norm = (self.devices.total(float(there)) + here).sqrt()
            nn.utils.clip_grads_with_norm_(self.copies.values(), 1.0, norm)
        else:
            norm = nn.utils.clip_grad_norm_(self.copies.values(), 1.0)
        if not norm.isfinite():
            return float(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * scale
        self.optimizer.step()
        self.copy_back()
        return float(norm)

    @torch.no_grad()
    def copy_back(self) -> None:
        """Write the copies into the model."""
        for name, copy in self.copies.items():
            parallel.local(self.parameters[name]).copy_(copy)

    def state(self) -> dict[str, Any]:
        """Copies and Adam's state, put together from all processes: what a checkpoint holds."""
        found = self.optimizer.state_dict()
        moments = {
            i: {key: parallel.whole(v, self.parameters[self.names[i]]) if v.ndim else v for key, v in each.items()}
            for i, each in found["state"].items()
        }
        copies = {name: parallel.whole(copy.detach(), self.parameters[name]) for name, copy in self.copies.items()}
        return {"copies": copies, "optimizer": found | {"state": moments}}

    def load(self, saved: dict[str, Any]) -> None:
        """Take up a :meth:`state`, of however many processes, and write it into the model."""
        with torch.no_grad():
            for name, copy in self.copies.items():
                copy.copy_(parallel.part(saved["copies"][name], self.parameters[name]))
        moments = {
            i: {key: parallel.part(v, self.parameters[self.names[i]]) if v.ndim else v for key, v in each.items()}
            for i, each in saved["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict(saved["optimizer"] | {"state": moments})
        self.copy_back()


class ZeroMaster(Master):
    """The same by DeepSpeed's ZeRO-2: each process keeps Adam's state of a part of the copies, and gets that part's gradients.

    DeepSpeed sees the copies as a model of their own, whose loss is their product with the gradients that the re-ranker's
    backward pass left: differentiating that hands it those gradients. Checkpoints are the same as :class:`Master`'s.
    It takes the version of DeepSpeed in :data:`corec.reranker.devices.DEEPSPEED`.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], params: RerankerParams, devices: Devices) -> None:
        import deepspeed

        super().__init__(parameters, params, devices)
        size = math.ceil(sum(copy.numel() for copy in self.copies.values()) / 1024) * 1024  # its buffers, by default 500 million
        self.layout = self.optimizer.state_dict()["param_groups"]
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend=None if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # it only counts with it
            "zero_optimization": {"stage": 2, "reduce_bucket_size": size, "allgather_bucket_size": size},
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        copies: Any = nn.ParameterList(self.copies.values())
        self.engine, self.zero, *_ = deepspeed.initialize(model=copies, optimizer=self.optimizer, config=settings)

    def step(self, scale: float) -> float:
        """As :meth:`Master.step`."""
        gradients = self.gradients()
        squares = sum(float(gradient.square().sum()) for gradient in gradients.values())
        if not math.isfinite(norm := math.sqrt(self.devices.total(squares))):
            return norm
        for group in self.zero.param_groups:
            group["lr"] = group["base"] * scale
        products = [(self.copies[name] * gradient).sum() for name, gradient in gradients.items()]
        self.engine.backward(torch.stack(products).sum() * self.devices.size)  # it takes the mean over the processes
        self.engine.step()
        self.copy_back()
        return float(self.engine.get_global_grad_norm())

    def state(self) -> dict[str, Any]:
        """As :meth:`Master.state`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self.link()
        steps = next(iter(self.zero.optimizer.state.values()))["step"]
        moments = {
            i: {"step": steps.clone()}
            | {key: safe_get_full_optimizer_state(self.copies[name], key) for key in ("exp_avg", "exp_avg_sq")}
            for i, name in enumerate(self.names)
        }
        copies = {name: copy.detach().clone() for name, copy in self.copies.items()}
        return {"copies": copies, "optimizer": {"state": moments, "param_groups": self.layout}}

    def load(self, saved: dict[str, Any]) -> None:
        """As :meth:`Master.load`."""
        from deepspeed.utils import safe_set_full_optimizer_state

        moments = saved["optimizer"]["state"]
        with torch.no_grad():
            for name, copy in self.copies.items():
                copy.copy_(saved["copies"][name])
        self.zero.refresh_fp32_params()
        for flat in self.zero.single_partition_of_fp32_groups:  # Adam begins its state only with its first step
            zeros = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
            self.zero.optimizer.state[flat] = {"step": next(iter(moments.values()))["step"].clone()} | zeros
        self.link()
        for i, of in moments.items():  # none of a parameter that never had a gradient
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(self.copies[self.names[i]], of[key], key)
        self.copy_back()

    def link(self) -> None:
        """Let DeepSpeed find each copy's part of Adam's state.

        It does so by itself behind the first group's first step, when the other groups have no state yet (as of 0.19).
        """
        self.zero._hp_optimizer_states_linked = False
        self.zero._lazy_init_hp_params_optimizer_state()


def make(parameters: dict[str, nn.Parameter], params: RerankerParams, devices: Devices) -> Master:
    """The optimiser for how the processes were launched."""
    return (ZeroMaster if devices.zero else Master)(parameters, params, devices)
