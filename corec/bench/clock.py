"""What a timing is: one line of a benchmark, and whole processes."""

import subprocess
import sys
import time
from typing import NamedTuple


class Figure(NamedTuple):
    """One line of a benchmark."""

    name: str
    value: float
    unit: str
    baseline: str = ""
    ratio: float | None = None


def process(code: str, *given: object) -> tuple[float, list[float]]:
    """Seconds of a whole Python process, and what its last line printed."""
    start = time.perf_counter()
    command = [sys.executable, "-c", code, *map(str, given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - start, [float(word) for word in done.stdout.splitlines()[-1].split()]
