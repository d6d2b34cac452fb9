"""Finished stages: their files compared with their records (``corec verify``), and removed if unused (``corec gc``)."""

import os
import shutil
from pathlib import Path

from corec import CorecError, files, paths, stages


def unused() -> list[Path]:
    """Folders of the store to which no run links."""
    runs = paths.root() / "runs"
    used = {place.resolve() for place in runs.glob("[!.]*/*") if place.is_symlink()}
    return [folder for folder in sorted((runs / ".store").glob("*")) if folder.is_dir() and folder.resolve() not in used]


def remove(folders: list[Path]) -> int:
    """Remove folders of the store; returns the number of bytes that their files had.

    Raises
    ------
    CorecError
        If a process is working in one of them.
    """
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    locks = [files.lock(folder) for folder in folders]
    for folder in folders:
        (folder / "stage.json").unlink(missing_ok=True)  # first, so that an interrupted removal leaves an unfinished stage
        shutil.rmtree(folder)
    for lock in locks:
        os.close(lock)
    return size


def verify(run: str) -> list[str]:
    """Compare the digests of all files that the finished stages of a run have recorded; returns one sentence per difference.

    Raises
    ------
    CorecError
        If the run has no finished stage.
    """
    records = {name: record for name in stages.NOTEBOOKS if (record := stages.read_record(run, name)) is not None}
    if not records:
        raise CorecError(f"There is no finished stage of a run {run!r} in {paths.root() / 'runs'}: name one of its folders.")
    folders = {name: paths.stage_dir(run, name) for name in records}
    return [fault for name, record in records.items() for fault in stages.changed_files(folders[name], record, digests=True)]
