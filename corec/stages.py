"""The stages of a run: their inputs, and the record of each finished stage.

A stage writes to ``runs/<run>/<stage>/``. Its ``stage.json`` is written last, so a stage without one has not finished. The
record lists parameters, inputs and outputs, so that missing, changed and outdated stages are detected.

Runs share stages. The folder of a stage that does not depend on the name of the run is ``runs/.store/<stage>-<key>``, where
the key is a digest of the parameters of the stage and of all before it; ``runs/<run>/<stage>`` is a link to it.
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corec import CorecError, checked, code, conflicts, files, machine, paths, schemes
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
    "saturation": "12_saturation",
    "conflicts": "13_conflicts",
    "language": "14_language",
    "sessions": "15_sessions",
    "simulated_users": "16_simulated_users",
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
    "efficiency": ("data", "sasrec", "controls", "reranker", "figures"),
    "missing_metadata": ("data", "sasrec", "controls"),
    "transfer": ("data", "controls", "reranker"),
    "saturation": ("data", "controls", "reranker"),
    "conflicts": ("data", "sasrec", "controls", "reranker"),
    "language": ("data", "controls", "reranker"),
    "sessions": ("data", "controls", "reranker"),
    "simulated_users": ("data", "controls", "reranker"),
}
# Sections of the parameters that a stage reads, if it is not the section of its name.
SECTIONS = {
    "controls": ("controls", "evidence"),
    "evaluation": ("evaluation", "figures"),
    "retriever_study": ("sasrec", "study", "evaluation", "figures"),
    "prompt_study": ("reranker", "study", "evaluation", "figures"),
    "missing_metadata": ("reranker", "study", "evaluation", "figures"),
    "transfer": ("reranker", "study", "evaluation", "figures"),
    "saturation": ("study", "evaluation", "figures"),
    "conflicts": ("evaluation", "figures"),
    "language": ("study", "evaluation", "figures"),
    "sessions": ("efficiency", "evaluation", "figures"),
    "simulated_users": ("study", "evaluation", "figures"),
}
# Stages that write into figures/<run>/: 06, and the studies from 07 on. Their folders belong to one run.
OF_ONE_RUN = ("figures", *list(NOTEBOOKS)[list(NOTEBOOKS).index("retriever_study") :])


def section(settings: Params, stage: str, defaults: bool = True) -> dict[str, Any]:
    """Parameters that the result of a stage depends on directly (not through earlier stages), with or without `defaults`."""
    values = {
        name: getattr(settings, name).model_dump(mode="json", exclude=WITHOUT_EFFECT.get(name), exclude_defaults=not defaults)
        for name in SECTIONS.get(stage, (stage,))
    }
    return values if stage in ("data", "figures") else values | {"seed": settings.seed}


def key(settings: Params, stage: str) -> str:
    """Digest of the parameters of a stage and of all before it, known before the stage runs.

    Parameters with their defaults do not count, so keys stay the same if a later version adds parameters.
    """
    return files.digest([section(settings, stage, defaults=False), [key(settings, need) for need in needs(stage, settings)]])


def own_files(settings: Params, stage: str) -> list[Any]:
    """Name, size and time of modification of the user's files that a stage reads.

    For ``controls`` also the scheme, for ``transfer`` the identity of the re-ranker of the source.
    """
    named = {"data": [settings.data.path, settings.data.tagger], "controls": [settings.evidence.text]}.get(stage, [])
    if "reranker" in SECTIONS.get(stage, (stage,)):
        named = [settings.reranker.backbone]
    folders = [paths.from_root(each) for each in named if each]
    found = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_file()]
    facts: list[Any] = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in found]
    if stage == "transfer" and settings.study.source:
        facts.append((read_record(settings.study.source, "reranker") or {}).get("identity"))
    scheme = schemes.load_scheme(settings.controls.scheme) if stage == "controls" else ()
    return [*facts, *(attribute.model_dump(mode="json") for attribute in scheme)]


def fingerprint(settings: Params, stage: str) -> str:
    """Digest of all that a stage is made from, other stages excepted: its parameters, its code, and the user's files.

    Raises
    ------
    CorecError
        If the notebook of the stage is missing.
    """
    return files.digest([section(settings, stage), code.of_notebook(NOTEBOOKS[stage]), own_files(settings, stage)])


def store_dir(settings: Params, stage: str) -> Path:
    """Folder that holds the files of a stage: in the store, or that of the run for a stage of :data:`OF_ONE_RUN`."""
    shared = paths.root() / "runs" / ".store" / f"{stage}-{key(settings, stage)}"
    return paths.stage_dir(settings.run, stage) if stage in OF_ONE_RUN else shared


def attach(settings: Params, stage: str) -> Path:
    """Create the folder of a stage, and the link to it from the folder of the run; returns the latter.

    A folder of an earlier version in place of the link is moved: into the store if it is unfinished or its parameters are the
    same, or else to ``<stage>.old``.
    """
    place, folder = paths.stage_dir(settings.run, stage), store_dir(settings, stage)
    if place == folder:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    target = Path("..", folder.parent.name, folder.name)
    if place.is_symlink() and place.readlink() == target and folder.is_dir():
        return place
    if place.is_dir() and not place.is_symlink():
        before = (read_record(settings.run, stage) or {}).get("params")
        now = section(settings, stage)
        same = before is None or not checked.differences(now, with_defaults(before, now, stage))  # perhaps a checkpoint
        folder.parent.mkdir(parents=True, exist_ok=True)
        others = (place.with_name(f"{stage}.old{number or ''}") for number in itertools.count())
        place.rename(folder if same and not folder.exists() else next(path for path in others if not path.exists()))
    folder.mkdir(parents=True, exist_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    link = place.with_name(f".{stage}.{os.getpid()}")
    link.symlink_to(target)
    link.replace(place)
    return place


def needs(stage: str, settings: Params | None = None) -> tuple[str, ...]:
    """Stages that a stage reads: those of :data:`NEEDS`.

    With `settings` whose `stages` omit the re-ranker, ``transfer`` does not need it if it transfers nothing.
    """
    if stage == "transfer" and settings is not None and not (settings.study.transfers() or "reranker" in settings.stages):
        return tuple(need for need in NEEDS[stage] if need != "reranker")
    return NEEDS[stage]


def ancestors(stage: str, settings: Params | None = None) -> list[str]:
    """All stages that a stage depends on (see :func:`needs`), in the order of :data:`NOTEBOOKS`."""
    names = {name for need in needs(stage, settings) for name in (need, *ancestors(need, settings))}
    return [name for name in NOTEBOOKS if name in names]


def attach_finished(settings: Params, names: Iterable[str]) -> None:
    """Link the stages `names` that have finished with these parameters, in this run or another one."""
    for name in names:
        if record_in(store_dir(settings, name)) is not None:
            attach(settings, name)


def read_record(run: str, stage: str) -> dict[str, Any] | None:
    """Return the record of a stage, or None if the stage has not finished or its record is of an earlier version or damaged."""
    return record_in(paths.stage_dir(run, stage))


def record_in(folder: Path) -> dict[str, Any] | None:
    """The record in the folder of a stage (see :func:`read_record`)."""
    try:
        record: dict[str, Any] = json.loads((folder / "stage.json").read_text())
        whole = record.pop("checksum", None) in (None, files.digest(record))
        whole = whole and {"stage", "identity", "made_from", "params", "outputs"} <= record.keys()
        whole = whole and all({"sha256", "bytes", "modified_ns"} <= facts.keys() for facts in record["outputs"].values())
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        return None
    return record if whole else None


def require(run: str, stage: str, settings: Params | None = None) -> dict[str, Any]:
    """Return the record of a finished stage (`settings`: see :func:`needs`).

    Raises
    ------
    CorecError
        If the stage or one that it depends on is missing (all missing ones are named) or older than its input, or if one of their
        files has changed.
    """
    chain = [*ancestors(stage, settings), stage]
    records = {name: record for name in chain if (record := read_record(run, name)) is not None}
    if missing := [name for name in chain if name not in records]:
        names = ", ".join(map(repr, missing))
        notebooks = ", ".join(f"notebooks/{NOTEBOOKS[name]}.ipynb" for name in missing)
        plural = "s" * (len(missing) > 1)
        raise CorecError(f"Run {run!r} has no finished stage{plural} {names}: run {notebooks} with the same parameters first.")
    for name in chain:
        now = {need: records[need]["identity"] for need in needs(name, settings)}
        for earlier in sorted({*now, *(made_from := records[name]["made_from"])}):
            if made_from.get(earlier) != now.get(earlier):
                again = f"run notebooks/{NOTEBOOKS[name]}.ipynb again."
                raise CorecError(f"Stage {name!r} of run {run!r} is older than its input {earlier!r}: {again}")
    for name in chain:
        for fault in changed_files(paths.stage_dir(run, name), records[name]):
            raise CorecError(f"{fault}: run notebooks/{NOTEBOOKS[name]}.ipynb again.")
    return records[stage]


def changed_files(folder: Path, record: dict[str, Any], digests: bool = False) -> Iterator[str]:
    """Describe the outputs of the stage in `folder` that are missing or have changed since they were recorded.

    Size and modification time are compared; digests only if the time differs, or for all files with `digests`.
    """
    for name, facts in record["outputs"].items():
        path = folder / name
        if not path.exists():
            yield f"{path} is missing"
            continue
        status = path.stat()
        same_time = status.st_mtime_ns == facts["modified_ns"]
        same_size = status.st_size == facts["bytes"]
        if not same_size or ((digests or not same_time) and files.sha256(path) != facts["sha256"]):
            yield f"{path} has changed since stage {record['stage']!r} wrote it"


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
    chain = [*ancestors(stage, settings), stage]
    attach_finished(settings, chain)
    record = require(settings.run, stage, settings)
    for name in chain:
        now, before = section(settings, name), (read_record(settings.run, name) or {}).get("params")
        if changed := checked.differences(now, with_defaults(before, now, name)):
            raise CorecError(
                f"Stage {name!r} of run {settings.run!r} was made with other parameters ({'; '.join(changed[:4])}): "
                f"run notebooks/{NOTEBOOKS[name]}.ipynb again, or give the new settings another `run`."
            )
    return str(record["identity"])


@dataclass
class Stage:
    """A running stage, created by :func:`start`, or a finished one (:func:`look_or_start`).

    A running stage measures its time and writes its record.
    """

    run: str
    name: str
    params: dict[str, Any]
    made_from: dict[str, str]
    lock: int | None  # file descriptor; see :func:`corec.files.lock`
    fingerprint: str | None  # see :func:`fingerprint`; None outside a project's folder
    own_files: str = ""  # digest of :func:`own_files`
    record: dict[str, Any] | None = None  # of a finished stage
    started: float = field(default_factory=time.time)

    @property
    def look(self) -> bool:
        """Whether the stage has finished, and its results are only shown."""
        return self.record is not None

    @property
    def folder(self) -> Path:
        """Output folder of this stage."""
        return paths.stage_dir(self.run, self.name)

    def finish(self, outputs: Iterable[Path] = (), **facts: Any) -> dict[str, Any]:
        """Write and return the record: parameters, seconds, peak memory, digests of the `outputs`, and `facts`."""
        assert not self.look, "the stage has finished"
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
            "fingerprint": self.fingerprint,
            "own_files": self.own_files,
            "params": self.params,
            "seconds": round(time.time() - self.started, 1),
            "peak_memory_mb": machine.peak_memory_mb(),
            "machine": machine.hardware(),
            "outputs": written,
            **facts,
        }
        files.write_json(self.folder / "stage.json", record | {"checksum": files.digest(record)})
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None
        print(f"{self.name}: {record['seconds']:.0f} s, peak memory {record['peak_memory_mb']} MB -> {self.folder}")
        return record


def start(settings: Params, name: str) -> Stage:
    """Start a stage: check the stages that it needs, lock its folder, and delete its own earlier record.

    Raises
    ------
    CorecError
        If a needed stage is missing, outdated, or was run with other parameters (see :func:`check`), or if another process runs
        the stage.
    """
    attach_finished(settings, before := ancestors(name, settings))
    if missing := [need for need in before if read_record(settings.run, need) is None]:
        require(settings.run, missing[-1])
    made_from = {need: check(settings, need) for need in needs(name, settings)}
    folder = attach(settings, name)
    made_by = None
    with contextlib.suppress(CorecError):  # no notebooks: a folder of its own, as in tests
        made_by = fingerprint(settings, name)
    own = files.digest(own_files(settings, name))
    stage = Stage(settings.run, name, section(settings, name), made_from, files.lock(folder), made_by, own)
    (folder / "stage.json").unlink(missing_ok=True)
    return stage


def finished(settings: Params, name: str) -> dict[str, Any] | None:
    """Record of a stage that, like all before it, has finished with these parameters and the user's present files, or None."""
    try:
        check(settings, name)
    except CorecError:  # missing, outdated, damaged, or with other parameters
        return None
    for each in [*ancestors(name, settings), name]:
        if (read_record(settings.run, each) or {}).get("own_files") != files.digest(own_files(settings, each)):
            return None
    return read_record(settings.run, name)


def look_or_start(settings: Params, name: str, again: bool = False) -> Stage:
    """Return a stage that has finished with these parameters and inputs, to show its results, or else start it.

    One line is printed: whether the stage is run or looked at, and whether the code has changed since it finished.

    Parameters
    ----------
    settings
        Parameters of the run.
    name
        Name of the stage.
    again
        Start the stage even if it has finished. The environment variable ``COREC_AGAIN=1`` has the same effect.

    Raises
    ------
    CorecError
        If the parameters do not fit the stage (:func:`corec.conflicts.require`), or see :func:`start`.
    """
    conflicts.require(settings, name)
    again = again or os.environ.get("COREC_AGAIN") == "1"
    record = None if again else finished(settings, name)
    if record is None:
        print(f"run: stage {name!r} of run {settings.run!r} is computed")
        return start(settings, name)
    made_by = None
    with contextlib.suppress(CorecError):
        made_by = fingerprint(settings, name)
    changed = "" if record["fingerprint"] == made_by else ", by an earlier version of the code"
    print(f"look: stage {name!r} of run {settings.run!r} has finished{changed}; its results are shown, and nothing is trained")
    print(f"(to compute it again: stages.look_or_start(settings, {name!r}, again=True))")
    return Stage(settings.run, name, record["params"], record["made_from"], None, record["fingerprint"], record=record)
