"""Record of one measurement, and timing of whole processes."""

import subprocess
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple


class Timing(NamedTuple):
    """One measurement of a benchmark."""

    name: str
    value: float
    unit: str
    baseline: str = ""  # what the value is compared with
    ratio: float | None = None  # value relative to the baseline, or speed-up over it, depending on the benchmark


def process(code: str, *given: object, env: Mapping[str, str] | None = None) -> tuple[float, list[float]]:
    """Run Python code in a new process.

    Parameters
    ----------
    code
        Program for ``python -c``.
    given
        Command-line arguments of the program.
    env
        Environment variables of the process; None for those of this one.

    Returns
    -------
    Wall-clock seconds of the process, and the numbers in the last line that it printed.
    """
    start = time.perf_counter()
    command = [sys.executable, "-c", code, *map(str, given)]
    completed = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - start, [float(word) for word in completed.stdout.splitlines()[-1].split()]
