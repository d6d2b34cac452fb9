"""Where a run keeps its files, and the record each stage leaves when it is whole.

``runs/<run>/<stage>/`` holds what a stage wrote. Its ``stage.json`` is written last, so a stage without
one never finished; it also names the stages it was made from, so that stale inputs are noticed.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corec import CorecError
from corec.params import WITHOUT_EFFECT, Params

NOTEBOOKS = {
    "data": "01_data",
    "sasrec": "02_sasrec",
    "controls": "03_control_tokens",
    "reranker": "04_reranker",
    "evaluation": "05_evaluation",
    "figures": "06_figures",
    "efficiency": "09_efficiency",
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
    """Highest resident memory of this process so far, in MB (10^6 bytes).

    Linux counts it for this program alone in /proc; getrusage there also counts what its parent had when it began.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return round(int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6)
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

    def finish(self, outputs: Iterable[Path] = (), **facts: Any) -> dict[str, Any]:
        """Record the stage as whole: parameters, seconds, peak memory, digests of `outputs`, and `facts`."""
        digests = {path.name: sha256(path) for path in outputs}
        record = {
            "stage": self.name,
            "identity": digest([self.params, self.made_from, digests]),
            "made_from": self.made_from,
            "params": self.params,
            "seconds": round(time.time() - self.started, 1),
            "peak_memory_mb": peak_memory_mb(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "outputs": digests,
            **facts,
        }
        write_text(self.folder / "stage.json", json.dumps(record, indent=1))
        print(f"{self.name}: {record['seconds']:.0f} s, peak memory {record['peak_memory_mb']} MB -> {self.folder}")
        return record


def digest(value: Any) -> str:
    """A short digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def section(settings: Params, stage: str) -> dict[str, Any]:
    """The part of a run's parameters that the result of a stage depends on by itself."""
    own = {stage: getattr(settings, stage).model_dump(mode="json", exclude=WITHOUT_EFFECT.get(stage))}
    return own if stage in ("data", "figures") else own | {"seed": settings.seed}


def check(settings: Params, stage: str) -> str:
    """Require a stage, and that it and all before it were run with these parameters; returns its identity.

    Raises
    ------
    CorecError
        When it is missing or stale (see :func:`require`), or was run with other parameters.
    """
    record = require(settings.run, stage)
    if record["params"] != section(settings, stage):
        raise CorecError(
            f"Stage {stage!r} of run {settings.run!r} was made with other parameters: "
            f"run notebooks/{NOTEBOOKS[stage]}.ipynb again, or give the new settings another `run`."
        )
    for earlier in record["made_from"]:
        check(settings, earlier)
    return str(record["identity"])


def start(settings: Params, name: str, needs: Iterable[str] = ()) -> Stage:
    """Begin a stage: check the stages it `needs`, and withdraw its own earlier record.

    Raises
    ------
    CorecError
        When a needed stage is missing, stale or of other parameters (see :func:`check`).
    """
    made_from = {earlier: check(settings, earlier) for earlier in needs}
    stage = Stage(settings.run, name, section(settings, name), made_from)
    stage.folder.mkdir(parents=True, exist_ok=True)
    (stage.folder / "stage.json").unlink(missing_ok=True)
    return stage


def git_commit() -> str | None:
    """The checkout's commit, with ``+`` where tracked files differ from it; None outside a repository."""
    try:
        commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        commit, changed = (
            subprocess.run(["git", "-C", str(root()), *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def write_manifest(params: Params, of: Sequence[str], name: str = "manifest.json") -> None:
    """Put the :func:`manifest` of stages other than 06 into the folder of the run's figures."""
    write_text(figures_dir(params.run) / name, json.dumps(manifest(params, of), indent=1) + "\n")


def manifest(params: Params, of: Sequence[str] = ("data", "sasrec", "controls", "reranker", "evaluation")) -> dict[str, Any]:
    """What made a run: parameters, versions, commit, and time, peak memory and digests of each of the stages `of`."""
    found = {entry.name.lower(): entry.version for entry in importlib.metadata.distributions()}
    wanted = (
        "accelerate datasets duckdb matplotlib numpy pandas papermill peft pyarrow pydantic safetensors scipy seaborn".split()
    )
    wanted += ["tokenizers", "torch", "transformers"]
    stages = {}
    for stage in of:
        record = require(params.run, stage)
        stages[stage] = {name: value for name, value in record.items() if name not in ("stage", "params")}
    return {
        "run": params.run,
        "seed": params.seed,
        "commit": git_commit(),
        "params": params.model_dump(mode="json"),
        "python": platform.python_version(),
        "packages": {name: found.get(name.lower()) for name in wanted},
        "stages": stages,
    }
