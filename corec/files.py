"""Atomic writes, and digests of files and values."""

import hashlib
import json
from pathlib import Path
from typing import Any

from corec import CorecError


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: readers see the old file or the whole new one. Creates the folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        reason = f"{path} could not be written ({error.strerror})"
        raise CorecError(f"{reason}: free disk space, or make the folder writable.") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON (see :func:`write_text`)."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Short digest of a value that JSON can represent: the first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
