"""The machine: its device, number format, processor and memory.

torch is imported by the functions that need it: stages 01, 05 and 06 run without.
"""

import functools
import os
import platform
import random
import resource
import statistics
import sys
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device() -> str:
    """The device of the models: ``cuda`` where there is a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def processor() -> str:
    """The processor's name, its number of cores, and which of its instructions multiply bfloat16."""
    info = Path("/proc/cpuinfo")
    facts = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    values = {name.strip(): value.strip() for name, value in facts.items()}
    name = values.get("model name") or platform.processor() or platform.machine()
    special = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in values.get("flags", "").split()]
    return ", ".join([name, f"{os.cpu_count()} cores", *special])


def name() -> str:
    """The GPU's name; without a GPU, the :func:`processor`'s."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def peak_memory_mb() -> int:
    """Highest resident memory of this process so far, in MB (10^6 bytes).

    Linux counts it for this program alone in /proc; getrusage there also counts what its parent had when it began.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return round(int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


@functools.cache
def resolve_dtype(name: str) -> "torch.dtype":
    """The number format of a name; ``auto`` is the faster of bfloat16 and float32 on this machine.

    A GPU takes bfloat16 where it supports it. Among CPUs, those with bfloat16 instructions multiply it several times faster than
    float32, and those without several times slower, so one small product of each is timed, once a process.
    """
    import torch

    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(256, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(partial(torch.matmul, left, right), number=1, repeat=5))
    return min(seconds, key=seconds.__getitem__)


def now() -> float:
    """The clock (s), once a GPU, where there is one, has done all that it was given."""
    from torch.utils.benchmark import timer

    return timer()


def seconds(work: Callable[[], object], least: float = 3.0) -> float:
    """Fastest of several runs (s), as many as `least` seconds hold, on as many threads as torch is set to."""
    import torch
    from torch.utils.benchmark import Timer

    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=least).times)


def percentiles(work: Callable[[int], object], times: int) -> tuple[float, float]:
    """Median and 95th percentile (s) of `times` calls, after one that warms up; each call gets its number."""
    return interleaved([work], times)[0]


def interleaved(works: Sequence[Callable[[int], object]], times: int) -> list[tuple[float, float]]:
    """:func:`percentiles` of several kinds of work.

    Each is warmed up; then the kinds take turns, in another order each time, so that what the machine does meanwhile, and what
    one kind leaves in its caches, falls on all alike.
    """
    for work in works:
        work(0)
    rng = random.Random(0)
    taken: list[list[float]] = [[] for _ in works]
    for number in range(times):
        for place in rng.sample(range(len(works)), len(works)):
            start = now()
            works[place](number)
            taken[place].append(now() - start)
    return [(statistics.median(each), statistics.quantiles(each, n=20, method="inclusive")[-1]) for each in taken]
