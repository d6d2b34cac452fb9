"""What this machine is good at."""

import functools
import os
import platform
import time
from typing import Any

import torch


def device() -> str:
    """Where models go: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def name() -> str:
    """The GPU's name; without one the processor's, its cores, and which instructions for bfloat16 it has."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    special = [flag for flag in ("avx512_bf16", "amx_bf16") if found.get(flag)]
    return ", ".join([found.get("cpu_name", platform.machine()), f"{os.cpu_count()} cores", *special])


@functools.cache
def resolve_dtype(name: str) -> torch.dtype:
    """The number format of a name; ``auto`` is the faster of bfloat16 and float32 on this machine.

    A GPU takes bfloat16. Among CPUs, those with bfloat16 instructions multiply it several times faster than
    float32, and those without several times slower, so one small product of each is timed, once a process.
    """
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if torch.cuda.is_available():
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(256, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return min(seconds, key=seconds.__getitem__)
