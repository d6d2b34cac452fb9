"""The machine: device, number format, processor, memory, and timing.

torch is imported inside the functions that need it, because stages 01, 05 and 06 run without it.
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
    """Device of the models: ``cuda`` if there is a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def bfloat16_instructions() -> list[str] | None:
    """The instructions of an x86 processor that multiply bfloat16; None where they cannot be read (no Linux, no x86)."""
    lines = cpu_facts().get("flags")
    return None if lines is None else [flag for flag in ("avx512_bf16", "amx_bf16") if flag in lines.split()]


def cpu_facts() -> dict[str, str]:
    """What Linux says of the processor, by name; empty on other systems."""
    info = Path("/proc/cpuinfo")
    facts = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    return {name.strip(): value.strip() for name, value in facts.items()}


def processor() -> str:
    """Name of the processor, number of its cores, and its instructions for multiplying bfloat16."""
    name = cpu_facts().get("model name") or platform.processor() or platform.machine()
    return ", ".join([name, f"{os.cpu_count()} cores", *(bfloat16_instructions() or [])])


def hardware() -> str:
    """Operating system, processor, and the GPU if this process has used it."""
    torch = sys.modules.get("torch")
    gpu = [torch.cuda.get_device_name()] if torch is not None and torch.cuda.is_initialized() else []
    return ", ".join([f"{platform.system()} {platform.machine()}", processor(), *gpu])


def name() -> str:
    """Name of the GPU, or of the processor if there is none (see :func:`processor`)."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def peak_memory_mb() -> int:
    """Peak resident memory of this process, in MB (10^6 bytes).

    On Linux it is read from /proc: there, getrusage also counts the memory of the parent process at the start of this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return round(int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


@functools.cache
def resolve_dtype(name: str) -> "torch.dtype":
    """Number format of a name; ``auto`` is the faster of bfloat16 and float32 on this machine.

    On a GPU, ``auto`` is bfloat16 if the GPU supports it. CPUs with bfloat16 instructions multiply it several times faster than
    float32, and CPUs without them several times slower. Where the instructions are known, they decide, so that a busy machine
    gives the same answer; elsewhere a small product in each format is timed, once per process.
    """
    import torch

    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    instructions = bfloat16_instructions()
    if instructions is not None:
        return torch.bfloat16 if instructions else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(256, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(partial(torch.matmul, left, right), number=1, repeat=20))
    return min(seconds, key=seconds.__getitem__)


def now() -> float:
    """Current time (s) after all work queued on the GPU, if there is one, has finished."""
    from torch.utils.benchmark import timer

    return timer()


def seconds(work: Callable[[], object], least: float = 3.0) -> float:
    """Time (s) per call of `work`: the fastest repetition within `least` seconds, with torch's current number of threads."""
    import torch
    from torch.utils.benchmark import Timer

    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=least).times)


def percentiles(work: Callable[[int], object], times: int) -> tuple[float, float]:
    """Median and 95th percentile (s) of `times` calls of `work`, after a warm-up; each call gets its number."""
    return interleaved([work], times)[0]


def interleaved(works: Sequence[Callable[[int], object]], times: int, warm_up: float = 0.5) -> list[tuple[float, float]]:
    """Median and 95th percentile (s) of several functions, timed in turn.

    The functions are first called in turn for `warm_up` seconds, three times each at least. Then, in each of `times` rounds,
    every function is called once in a random order, so that other load on the machine and the state of its caches affect all
    alike.

    Parameters
    ----------
    works
        Functions of the number of the call.
    times
        Calls of each function.
    warm_up
        Seconds of calls that are not timed.
    """
    started, number = now(), 0
    while number < 3 or now() - started < warm_up:
        for work in works:
            work(number)
        number += 1
    rng = random.Random(0)
    durations: list[list[float]] = [[] for _ in works]
    for number in range(times):
        for place in rng.sample(range(len(works)), len(works)):
            start = now()
            works[place](number)
            durations[place].append(now() - start)
    return [(statistics.median(each), statistics.quantiles(each, n=20, method="inclusive")[-1]) for each in durations]
