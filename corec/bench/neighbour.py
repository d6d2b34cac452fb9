"""Time of a training step beside another busy process, by the settings of OpenMP's waiting threads.

After each parallel loop, the threads of OpenMP wait for each other. They spin, so a thread that has lost its core to another
program keeps the others busy without progress. ``GOMP_SPINCOUNT`` limits the spins before a thread sleeps.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from corec.bench.clock import Timing, process
from corec.workflow import SPINS

STEP = """
import statistics, sys, time
from corec import reranker
from corec.bench.engine import world
settings, examples, model = world(20, 8)
model.model.train()
batch = reranker.training_batch(examples, settings, settings.reranker.curriculum_steps)
rows = reranker.make_rows(model, examples, batch.pools, batch.requests)
times = []
for _ in range(int(sys.argv[1]) + 1):
    start = time.perf_counter()
    reranker.backward(model, rows, batch.targets)
    times.append(time.perf_counter() - start)
print(statistics.median(times[1:]))
"""
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "spins_2000": {"GOMP_SPINCOUNT": "2000"},
    f"spins_{SPINS}": {"GOMP_SPINCOUNT": str(SPINS)},
}


@contextmanager
def busy_process() -> Iterator[None]:
    """Run a process of normal priority that keeps one core busy."""
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def step_seconds(variables: dict[str, str], steps: int) -> float:
    """Median seconds of a training step of the run ml-100k-ranknet in a new process with these environment variables."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    return process(STEP, steps, env=inherited | variables)[1][0]


def bench_neighbour(steps: int = 4, settings: dict[str, dict[str, str]] | None = None) -> Iterator[Timing]:
    """Time a training step alone and beside a busy process, for each of :data:`SETTINGS`.

    Parameters
    ----------
    steps
        Steps of a measurement, after a first one for warm-up.
    settings
        Environment variables by name; the first and the last are those without and with the setting of ``corec run``.
    """
    settings, alone, beside = settings or SETTINGS, {}, {}
    for name, variables in settings.items():
        alone[name] = step_seconds(variables, steps)
        with busy_process():
            beside[name] = step_seconds(variables, steps)
        yield Timing(f"step_alone_{name}", alone[name], "s")
        yield Timing(f"step_busy_{name}", beside[name], "s", "alone", beside[name] / alone[name])
    first, *_, chosen = settings
    yield Timing("busy_neighbour_slowdown", beside[chosen], "s", f"alone, {alone[chosen]:.3g} s", beside[chosen] / alone[chosen])
    yield Timing("spin_limit_cost", alone[chosen], "s", f"no limit, {alone[first]:.3g} s", alone[chosen] / alone[first])
