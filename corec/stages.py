"""The stages of a run: their inputs, the record of each finished stage, and the manifest of a run.

A stage writes to ``runs/<run>/<stage>/``. Its ``stage.json`` is written last, so a stage without one has not finished. The
record lists parameters, inputs and outputs, so that missing, changed and outdated stages are detected.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corec import CorecError, files, machine, paths
from corec.params import WITHOUT_EFFECT, Params

NOTEBOOKS = {
    "data": "01_data",
    "sasrec": "02_sasrec",
    "controls": "03_control_tokens",
    "reranker": "04_reranker",
    "evaluation": "05_evaluation",
    "figures": "06_figures",
    "retriever_study": "07_retriever_study",
    "prompt_study": "08_prompt_study",
    "efficiency": "09_efficiency",
    "missing_metadata": "10_missing_metadata",
    "transfer": "11_transfer",
}
NEEDS: dict[str, tuple[str, ...]] = {
    "data": (),
    "sasrec": ("data",),
    "controls": ("data", "sasrec"),
    "reranker": ("data", "controls"),
    "evaluation": ("data", "controls", "reranker"),
    "figures": ("evaluation",),
    "retriever_study": ("data", "sasrec"),
    "prompt_study": ("data", "sasrec", "controls"),
    "efficiency": ("data", "sasrec", "controls", "reranker"),
    "missing_metadata": ("data", "sasrec", "controls"),
    "transfer": ("data", "controls", "reranker"),
}
# Sections of the parameters that a stage reads, if it is not the section of its name.
SECTIONS = {
    "controls": ("controls", "evidence"),
    "evaluation": ("evaluation", "figures"),
    "retriever_study": ("sasrec", "study"),
    "prompt_study": ("reranker", "study"),
    "missing_metadata": ("reranker", "study"),
    "transfer": ("reranker", "study"),
}
PACKAGES = (
    "accelerate datasets duckdb lightgbm matplotlib numpy pandas papermill peft pyarrow pydantic safetensors scikit-learn scipy "
    "seaborn tokenizers torch transformers"
).split()


def section(settings: Params, stage: str) -> dict[str, Any]:
    """Parameters that the result of a stage depends on directly (not through earlier stages)."""
    names = SECTIONS.get(stage, (stage,))
    values = {name: getattr(settings, name).model_dump(mode="json", exclude=WITHOUT_EFFECT.get(name)) for name in names}
    return values if stage in ("data", "figures") else values | {"seed": settings.seed}


def ancestors(stage: str) -> list[str]:
    """All stages that a stage depends on, in the order of :data:`NOTEBOOKS`."""
    names = {name for need in NEEDS[stage] for name in (need, *ancestors(need))}
    return [name for name in NOTEBOOKS if name in names]


def read_record(run: str, stage: str) -> dict[str, Any] | None:
    """Return the record of a stage, or None if the stage has not finished or its record is of an earlier version or damaged."""
    path = paths.stage_dir(run, stage) / "stage.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        whole = {"identity", "made_from", "params", "outputs"} <= record.keys()
        whole = whole and all({"sha256", "bytes", "modified_ns"} <= facts.keys() for facts in record["outputs"].values())
    except (FileNotFoundError, ValueError, AttributeError):
        return None
    return record if whole else None


def require(run: str, stage: str) -> dict[str, Any]:
    """Return the record of a finished stage.

    Raises
    ------
    CorecError
        If the stage or one that it depends on is missing (all missing ones are named) or older than its input, or if one of their
        files has changed.
    """
    chain = [*ancestors(stage), stage]
    records = {name: record for name in chain if (record := read_record(run, name)) is not None}
    if missing := [name for name in chain if name not in records]:
        names = ", ".join(map(repr, missing))
        notebooks = ", ".join(f"notebooks/{NOTEBOOKS[name]}.ipynb" for name in missing)
        plural = "s" * (len(missing) > 1)
        raise CorecError(f"Run {run!r} has no finished stage{plural} {names}: run {notebooks} with the same parameters first.")
    for name in chain:
        for earlier, identity in records[name]["made_from"].items():
            if records[earlier]["identity"] != identity:
                again = f"run notebooks/{NOTEBOOKS[name]}.ipynb again."
                raise CorecError(f"Stage {name!r} of run {run!r} is older than its input {earlier!r}: {again}")
    for name in chain:
        for fault in changed_files(run, name, records[name]):
            raise CorecError(f"{fault}: run notebooks/{NOTEBOOKS[name]}.ipynb again.")
    return records[stage]


def changed_files(run: str, stage: str, record: dict[str, Any], digests: bool = False) -> Iterator[str]:
    """Describe the outputs of a stage that are missing or have changed since they were recorded.

    Size and modification time are compared; digests only if the time differs, or for all files with `digests`.
    """
    for name, facts in record["outputs"].items():
        path = paths.stage_dir(run, stage) / name
        if not path.exists():
            yield f"{path} is missing"
            continue
        status = path.stat()
        same_time = status.st_mtime_ns == facts["modified_ns"]
        same_size = status.st_size == facts["bytes"]
        if not same_size or ((digests or not same_time) and files.sha256(path) != facts["sha256"]):
            yield f"{path} has changed since stage {stage!r} wrote it"


def verify(run: str) -> list[str]:
    """Compare the digests of all files that the finished stages of a run have recorded; returns one sentence per difference.

    Raises
    ------
    CorecError
        If the run has no finished stage.
    """
    records = {name: record for name in NOTEBOOKS if (record := read_record(run, name)) is not None}
    if not records:
        raise CorecError(f"There is no finished stage of a run {run!r} in {paths.root() / 'runs'}: name one of its folders.")
    return [fault for name, record in records.items() for fault in changed_files(run, name, record, digests=True)]


def differences(now: Any, then: Any, name: str = "") -> list[str]:
    """Describe the values in which two nested mappings differ: ``seed is 1, was 0``."""
    if isinstance(now, dict) and isinstance(then, dict):
        keys = [*now, *(key for key in then if key not in now)]
        return [text for key in keys for text in differences(now.get(key), then.get(key), f"{name}.{key}".lstrip("."))]
    return [] if now == then else [f"{name} is {now!r}, was {then!r}"]


def with_defaults(before: Any, now: dict[str, Any], stage: str) -> Any:
    """Recorded parameters of a stage `before`, completed by the defaults of parameters that later versions have added."""
    if not isinstance(before, dict):
        return before
    default = section(Params(), stage)
    return {
        key: default[key] | value if isinstance(value, dict) and isinstance(default.get(key), dict) else value
        for key, value in before.items()
    }


def check(settings: Params, stage: str) -> str:
    """Require that a stage and all before it have finished with these parameters; returns the identity of the stage.

    Raises
    ------
    CorecError
        If a stage is missing or outdated (see :func:`require`), or was run with other parameters, which are named.
    """
    record = require(settings.run, stage)
    for name in [*ancestors(stage), stage]:
        now, before = section(settings, name), (read_record(settings.run, name) or {}).get("params")
        if changed := differences(now, with_defaults(before, now, name)):
            raise CorecError(
                f"Stage {name!r} of run {settings.run!r} was made with other parameters ({'; '.join(changed[:4])}): "
                f"run notebooks/{NOTEBOOKS[name]}.ipynb again, or give the new settings another `run`."
            )
    return str(record["identity"])


@dataclass
class Stage:
    """A running stage, created by :func:`start`; measures its time and writes its record."""

    run: str
    name: str
    params: dict[str, Any]
    made_from: dict[str, str]
    started: float = field(default_factory=time.time)

    @property
    def folder(self) -> Path:
        """Output folder of this stage."""
        return paths.stage_dir(self.run, self.name)

    def finish(self, outputs: Iterable[Path] = (), **facts: Any) -> dict[str, Any]:
        """Write and return the record: parameters, seconds, peak memory, digests of the `outputs`, and `facts`."""
        written = {}
        for path in outputs:
            status = path.stat()
            written[os.path.relpath(path, self.folder)] = {
                "sha256": files.sha256(path),
                "bytes": status.st_size,
                "modified_ns": status.st_mtime_ns,
            }
        record = {
            "stage": self.name,
            "identity": files.digest([self.params, self.made_from, {name: each["sha256"] for name, each in written.items()}]),
            "made_from": self.made_from,
            "params": self.params,
            "seconds": round(time.time() - self.started, 1),
            "peak_memory_mb": machine.peak_memory_mb(),
            "machine": f"{platform.system()} {platform.machine()}, {machine.processor()}",
            "outputs": written,
            **facts,
        }
        files.write_json(self.folder / "stage.json", record)
        print(f"{self.name}: {record['seconds']:.0f} s, peak memory {record['peak_memory_mb']} MB -> {self.folder}")
        return record


def start(settings: Params, name: str) -> Stage:
    """Start a stage: check the stages that it needs, and delete its own earlier record.

    Raises
    ------
    CorecError
        If a needed stage is missing, outdated, or was run with other parameters (see :func:`check`).
    """
    if missing := [need for need in ancestors(name) if read_record(settings.run, need) is None]:
        require(settings.run, missing[-1])
    made_from = {need: check(settings, need) for need in NEEDS[name]}
    stage = Stage(settings.run, name, section(settings, name), made_from)
    stage.folder.mkdir(parents=True, exist_ok=True)
    (stage.folder / "stage.json").unlink(missing_ok=True)
    return stage


def git_state() -> dict[str, Any]:
    """Commit of the checkout, and whether tracked files outside ``figures`` differ from it (None outside a repository)."""
    try:
        changes = ["status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)figures"]  # to which runs write
        commands = (["rev-parse", "HEAD"], changes)
        commit, changed = (
            subprocess.run(["git", "-C", str(paths.root()), *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changed)}


def manifest(params: Params, of: Sequence[str]) -> dict[str, Any]:
    """Return what produced a run: parameters, versions, commit, and the records of the stages `of`, without their parameters."""
    installed = {entry.name.lower(): entry.version for entry in importlib.metadata.distributions()}
    stages = {}
    for stage in of:
        record = require(params.run, stage)
        stages[stage] = {name: value for name, value in record.items() if name not in ("stage", "params")}
        stages[stage]["outputs"] = {name: facts["sha256"] for name, facts in record["outputs"].items()}
    return {
        "run": params.run,
        "seed": params.seed,
        **git_state(),
        "params": params.model_dump(mode="json"),
        "python": platform.python_version(),
        "packages": {name: installed.get(name.lower()) for name in PACKAGES},
        "stages": stages,
    }


def write_manifest(params: Params, stage: str) -> None:
    """Write the manifest of a study or timing (`stage` and all stages before it) to the folder of the run's figures."""
    files.write_json(paths.figures_dir(params.run) / f"manifest-{stage}.json", manifest(params, [*ancestors(stage), stage]))
