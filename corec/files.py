"""Atomic writes, locks, and digests of files and values.

A file is written under another name, flushed to the disk and then renamed (:func:`aside`): readers see the old file or the whole
new one, also if the process is killed or the disk is full.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corec import CorecError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield the path to which a file or folder is to be written; at the end of the block it replaces `path`.

    Creates the folder of `path` if missing. If the block fails, nothing is left and an earlier file is kept.

    Raises
    ------
    CorecError
        If it cannot be written.
    """
    host = "".join(character if character.isalnum() else "_" for character in platform.node())
    part = path.with_name(f".part-{host}-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".part-{host}-*-{path.name}"):
            if left == part or not runs(int(left.name.removeprefix(f".part-{host}-").split("-")[0])):
                discard(left)  # of a process that was killed
        yield part
        for file in [part] if part.is_file() else sorted(part.rglob("*")):
            if file.is_file():
                flush(file)
        if part.is_dir():
            discard(path)
        part.replace(path)
        flush(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            discard(part)
        reason = f"{path} could not be written ({error.strerror or error})"
        raise CorecError(f"{reason}: free disk space, or make the folder writable.") from None
    except BaseException:
        discard(part)
        raise


def runs(process: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def discard(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file (see :func:`aside`)."""
    with aside(path) as part:
        part.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON (see :func:`aside`)."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_csv(path: Path, table: "pd.DataFrame", form: str | None = None) -> None:
    """Write a table as CSV without its index (see :func:`aside`), numbers in the format `form`, such as ``%.6g``."""
    write_text(path, table.to_csv(index=False, float_format=form))


def write_parquet(path: Path, table: "pd.DataFrame") -> None:
    """Write a table as parquet without its index (see :func:`aside`)."""
    with aside(path) as part:
        table.to_parquet(part, index=False)


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays by name as an npz file (see :func:`aside`)."""
    with aside(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray] | None:
    """Read arrays by name from an npz file; None if the file is missing, damaged, or lacks one of them."""
    try:
        with np.load(path) as kept:
            return {name: kept[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError):
        return None


def write_picture(path: Path, figure: "Figure") -> None:
    """Write a figure as PNG (see :func:`aside`)."""
    with aside(path) as part:
        figure.savefig(part, dpi=130, format="png")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Short digest of a value that JSON can represent: the first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def lock(folder: Path) -> int:
    """Lock the folder of a stage for this process, until the file descriptor returned is closed or the process ends.

    The lock belongs to the process, so a cell that starts a stage can be run again.

    Raises
    ------
    CorecError
        If another process holds the lock.
    """
    held = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(held)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise CorecError(f"Another process is working in {folder}: wait until it has ended, or stop it.") from None
        raise CorecError(f"{folder} cannot be locked ({error.strerror}): use a file system with locks.") from None
    return held
