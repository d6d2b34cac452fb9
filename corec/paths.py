"""Where a run keeps its files, and the record each stage leaves when it is whole.

``runs/<run>/<stage>/`` holds what a stage wrote. Its ``stage.json`` is written last, so a stage without
one never finished; it also names the stages it was made from, so that stale inputs are noticed.
"""

import hashlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from corec import CorecError

NOTEBOOKS = {
    "data": "01_data",
    "sasrec": "02_sasrec",
    "controls": "03_control_tokens",
    "reranker": "04_reranker",
    "evaluation": "05_evaluation",
    "figures": "06_figures",
}


def root() -> Path:
    """The project's folder: ``COREC_ROOT``, else the checkout this module lies in."""
    return Path(os.environ.get("COREC_ROOT") or Path(__file__).parents[1]).resolve()


def cache_dir() -> Path:
    """Where downloads are kept between runs: ``COREC_CACHE``, else ``.cache`` in the project's folder."""
    path = Path(os.environ.get("COREC_CACHE") or root() / ".cache")
    path.mkdir(parents=True, exist_ok=True)
    return path


def stage_dir(run: str, stage: str) -> Path:
    """The folder of one stage of a run."""
    return root() / "runs" / run / stage


def figures_dir(run: str) -> Path:
    """The folder of a run's figures."""
    return root() / "figures" / run


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def peak_memory_mb() -> int:
    """Highest resident memory of this process so far, in MB (10^6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


def require(run: str, stage: str) -> dict[str, Any]:
    """The record of a finished stage.

    Raises
    ------
    CorecError
        When the stage has not been run to its end, or one it was made from has been run again since.
    """
    path = stage_dir(run, stage) / "stage.json"
    notebook = f"notebooks/{NOTEBOOKS[stage]}.ipynb"
    if not path.exists():
        raise CorecError(f"Run {run!r} has no finished stage {stage!r}: run {notebook} with the same parameters first.")
    record = json.loads(path.read_text())
    for earlier, identity in record["made_from"].items():
        if require(run, earlier)["identity"] != identity:
            raise CorecError(f"Stage {stage!r} of run {run!r} is older than its input {earlier!r}: run {notebook} again.")
    return record


@dataclass
class Stage:
    """One stage of a run: times it, and records it once it is whole. Made by :func:`start`."""

    run: str
    name: str
    params: dict[str, Any]
    made_from: dict[str, str]
    started: float = field(default_factory=time.time)

    @property
    def folder(self) -> Path:
        """Where this stage writes."""
        return stage_dir(self.run, self.name)

    @property
    def identity(self) -> str:
        """A short digest of this stage's parameters and of the stages it is made from."""
        return digest([self.params, self.made_from])

    def finish(self, outputs: Iterable[Path] = (), **facts: Any) -> dict[str, Any]:
        """Record the stage as whole: parameters, seconds, peak memory, digests of `outputs`, and `facts`."""
        record = {
            "stage": self.name,
            "identity": self.identity,
            "made_from": self.made_from,
            "params": self.params,
            "seconds": round(time.time() - self.started, 1),
            "peak_memory_mb": peak_memory_mb(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "outputs": {path.name: sha256(path) for path in outputs},
            **facts,
        }
        write_text(self.folder / "stage.json", json.dumps(record, indent=1))
        print(f"{self.name}: {record['seconds']:.0f} s, peak memory {record['peak_memory_mb']} MB -> {self.folder}")
        return record


def digest(value: Any) -> str:
    """A short digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def start(run: str, name: str, params: BaseModel | dict[str, Any], needs: Iterable[str] = ()) -> Stage:
    """Begin a stage: check the stages it `needs`, and withdraw its own earlier record.

    Raises
    ------
    CorecError
        When a needed stage is missing or stale (see :func:`require`).
    """
    made_from = {earlier: require(run, earlier)["identity"] for earlier in needs}
    values = params.model_dump(mode="json") if isinstance(params, BaseModel) else params
    stage = Stage(run, name, values, made_from)
    stage.folder.mkdir(parents=True, exist_ok=True)
    (stage.folder / "stage.json").unlink(missing_ok=True)
    return stage
