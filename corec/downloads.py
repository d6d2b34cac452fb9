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


TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # answers after which it is worth to ask again


class Resuming:
    """A downloader for pooch that keeps what has arrived in `part`, and asks for the rest only.

    Beside the part lies what the server said of the file's version (ETag or date); the rest is taken of that
    version only, else the download starts anew.

    Parameters
    ----------
    part
        Where an unfinished download waits, between attempts and between runs.
    wait
        Seconds before the second attempt; doubled with every further one that brings nothing.
    """

    def __init__(self, part: Path, wait: float = 1.0) -> None:
        self.part, self.wait = part, wait
        self.version = part.with_name(part.name + ".version")

    def __call__(self, url: str, output_file: str, manager: Any) -> None:
        """Download `url` to `output_file` (raises requests' own errors when all attempts have failed)."""
        failures = 0
        while True:
            before = self.size()
            try:
                self.attempt(url)
            except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
                failures = 1 if self.size() > before else failures + 1
                if failures == ATTEMPTS:
                    raise
                print(f"  {error}: asking again from {self.size() / 1e6:.0f} MB on", flush=True)
                time.sleep(self.wait * 2 ** (failures - 1))
            else:
                self.part.replace(output_file)
                self.version.unlink(missing_ok=True)
                return

    def size(self) -> int:
        """Bytes that have arrived."""
        return self.part.stat().st_size if self.part.exists() else 0

    def attempt(self, url: str) -> None:
        """One request for what is missing; prints a line every 10 s."""
        have = self.size()
        version = self.version.read_text() if self.version.exists() else ""
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers |= {"Range": f"bytes={have}-"} | ({"If-Range": version} if version else {})
        with requests.get(url, headers=headers, stream=True, timeout=30) as response:
            whole = response.headers.get("Content-Range", "").rpartition("/")[2]
            if response.status_code == 416 and whole == str(have):
                return  # all of it is here already
            if response.status_code == 416:
                self.part.unlink(missing_ok=True)
                raise requests.ConnectionError("what is here does not fit the file on the server")
            if response.status_code in TRANSIENT:
                raise requests.ConnectionError(f"the server answered {response.status_code}")
            response.raise_for_status()
            resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            have = have if resumed else 0
            total = have + int(response.headers.get("Content-Length", 0))
            self.version.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
            shown = time.monotonic()
            with self.part.open("ab" if have else "wb") as file:
                while chunk := response.raw.read1(CHUNK):  # what there is, so that a cut loses nothing that arrived
                    file.write(chunk)
                    have += len(chunk)
                    if time.monotonic() - shown > 10:
                        print(f"  {have / 1e6:.0f} of {total / 1e6:.0f} MB", flush=True)
                        shown = time.monotonic()
        if have < total:
            raise requests.ConnectionError("the connection was cut")


def fetch(url: str, folder: str, sha256: str | None = None) -> Path:
    """The file of an address in the cache, downloaded on first use.

    Parameters
    ----------
    url
        Where the file is.
    folder
        Of the cache.
    sha256
        What its digest must be; unchecked when None (the stage's record says what it was).

    Raises
    ------
    CorecError
        When the file cannot be had whole, or its digest is another.
    """
    name = url.rsplit("/", 1)[-1]
    cache = paths.cache_dir() / folder / paths.digest(url.rsplit("/", 1)[0])[:8]
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
    except OSError as error:
        raise CorecError(f"{url} could not be saved in {cache} ({error}): make room there, or set COREC_CACHE.") from None
    except ValueError:
        raise CorecError(
            f"{url} is not the file that was asked for: its sha256 is not {sha256}; check data.sha256, or run again if "
            "the download was faulty (nothing of it was kept)."
        ) from None
