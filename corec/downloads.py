"""Files from a public address, by pooch: cached, checked, and resumed where a connection was cut."""

import time
from pathlib import Path
from typing import Any

import pooch
import requests
import urllib3

from corec import CorecError, paths

ATTEMPTS = 5  # in a row without a new byte
CHUNK = 1 << 20


class Resuming:
    """A downloader for pooch that keeps what has arrived in `part`, and asks for the rest only.

    Parameters
    ----------
    part
        Where an unfinished download waits, between attempts and between runs.
    wait
        Seconds before the second attempt; doubled before each later one.
    """

    def __init__(self, part: Path, wait: float = 1.0) -> None:
        self.part, self.wait = part, wait

    def __call__(self, url: str, output_file: str, manager: Any) -> None:
        """Download `url` to `output_file` (raises requests' own errors when all attempts have failed)."""
        failures = 0
        while True:
            before = self.size()
            try:
                self.attempt(url)
            except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError):
                failures = 1 if self.size() > before else failures + 1
                if failures == ATTEMPTS:
                    raise
                print(f"  the connection was cut at {self.size() / 1e6:.0f} MB, going on from there", flush=True)
                time.sleep(self.wait * 2 ** (failures - 1))
            else:
                self.part.replace(output_file)
                return

    def size(self) -> int:
        """Bytes that have arrived."""
        return self.part.stat().st_size if self.part.exists() else 0

    def attempt(self, url: str) -> None:
        """One request for what is missing; prints a line every 10 s."""
        have = self.size()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, headers=headers, stream=True, timeout=30) as response:
            if response.status_code == 416:  # nothing is missing, or the file on the server is another
                self.part.unlink()
                raise requests.ConnectionError("the part on disk does not fit the file on the server")
            response.raise_for_status()
            have = have if response.status_code == 206 else 0
            total = have + int(response.headers.get("Content-Length", 0))
            shown = time.monotonic()
            with self.part.open("ab" if have else "wb") as file:
                while chunk := response.raw.read1(CHUNK):  # what there is, so that a cut loses nothing that arrived
                    file.write(chunk)
                    have += len(chunk)
                    if time.monotonic() - shown > 10:
                        print(f"  {have / 1e6:.0f} of {total / 1e6:.0f} MB", flush=True)
                        shown = time.monotonic()
        if have < total:
            raise requests.ConnectionError(f"{total - have} bytes did not arrive")


def fetch(url: str, folder: str, sha256: str | None = None) -> Path:
    """The file of an address in the cache, downloaded on first use.

    Parameters
    ----------
    url
        Where the file is.
    folder
        Of the cache.
    sha256
        What its digest must be; unchecked when None (the data card records what it was).

    Raises
    ------
    CorecError
        When the file cannot be had whole, or its digest is another.
    """
    name = url.rsplit("/", 1)[-1]
    cache = paths.cache_dir() / folder
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / name).exists():
        print(f"downloading {url} ...", flush=True)
    pooch.get_logger().setLevel("WARNING")
    try:
        return Path(pooch.retrieve(url, sha256, name, cache, downloader=Resuming(cache / f"{name}.part")))
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise CorecError(
            f"{url} could not be downloaded ({type(error).__name__}: {error}): check the network and run again, what has "
            "arrived is kept; or put the file into a folder and name that in data.path."
        ) from None
    except ValueError:
        raise CorecError(
            f"{url} is not the file that was asked for: its sha256 is not {sha256}; check data.sha256, or run again if "
            "the download was faulty (nothing of it was kept)."
        ) from None
