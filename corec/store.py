"""Removes the stages that no run uses from the store (see :mod:`corec.stages`): ``corec gc``."""

import shutil
from pathlib import Path

from corec import paths


def unused() -> list[Path]:
    """Folders of the store to which no run links."""
    runs = paths.root() / "runs"
    used = {place.resolve() for place in runs.glob("[!.]*/*") if place.is_symlink()}
    return [folder for folder in sorted((runs / ".store").glob("*")) if folder.resolve() not in used]


def remove(folders: list[Path]) -> int:
    """Remove folders of the store; returns the number of bytes that their files had."""
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    for folder in folders:
        (folder / "stage.json").unlink(missing_ok=True)  # first, so that an interrupted removal leaves an unfinished stage
        shutil.rmtree(folder)
    return size
