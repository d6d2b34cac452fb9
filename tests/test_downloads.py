"""Downloads from a local server that cuts connections, changes files or refuses."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest

from corec import CorecError, data, download, paths
from corec.params import DataParams

CONTENT = np.random.default_rng(0).bytes(300_000)


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT; the first `cuts` answers stop half way, and `ranges` says whether it can go on from there."""

    cuts: ClassVar[int] = 0
    busy: ClassVar[int] = 0
    version: ClassVar[str] = "one"
    ranges: ClassVar[bool] = True
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        Handler.asked.append((self.path, asked))
        if "absent" in self.path:
            self.send_error(404)
            return
        if Handler.busy > 0:
            Handler.busy -= 1
            self.send_error(503)
            return
        stale = self.headers.get("If-Range", self.version) != self.version
        start = 0 if stale else int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.send_header("ETag", self.version)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        half = Handler.cuts > 0
        Handler.cuts -= half
        self.wfile.write(CONTENT[start : start + (len(CONTENT) - start) // 2] if half else CONTENT[start:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Handler, "cuts", 0)
    monkeypatch.setattr(Handler, "busy", 0)
    monkeypatch.setattr(Handler, "version", "one")
    monkeypatch.setattr(Handler, "ranges", True)
    monkeypatch.setattr(Handler, "asked", [])
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_resumed(address: str, ranges: bool) -> None:
    Handler.cuts, Handler.ranges = 3, ranges
    path = download.fetch(f"{address}/file.gz", "here", hashlib.sha256(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["file.gz"]
    starts = [int(asked.strip("bytes=-")) if asked else 0 for _, asked in Handler.asked]
    assert starts == [0, 150_000, 225_000, 262_500] if ranges else len(starts) == 4
    download.fetch(f"{address}/file.gz", "here")
    assert len(Handler.asked) == 4, "the second time it comes from the cache"


def test_a_later_run_goes_on_where_the_first_gave_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    Handler.cuts = 1
    with pytest.raises(CorecError, match=r"could not be downloaded .*run again \(the downloaded part is kept"):
        download.fetch(f"{address}/file.gz", "here")
    assert {path.name for path in (paths.cache_dir() / "here").rglob("*.*")} == {"file.gz.part", "file.gz.part.version"}
    assert download.fetch(f"{address}/file.gz", "here").read_bytes() == CONTENT
    assert Handler.asked[-1][1] == "bytes=150000-"


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 5])
def test_a_part_that_is_all_or_more_than_all(address: str, size: int) -> None:
    folder = download.fetch(f"{address}/file.gz", "here").parent
    (folder / "file.gz").rename(folder / "file.gz.part")
    if size > len(CONTENT):
        (folder / "file.gz.part").write_bytes(bytes(size))
    assert download.fetch(f"{address}/file.gz", "here").read_bytes() == CONTENT
    assert len(Handler.asked) == (2 if size == len(CONTENT) else 3), "what is whole is not fetched again"


def test_a_file_that_has_changed_starts_anew(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(download, "ATTEMPTS", 1)
        Handler.cuts = 1
        with pytest.raises(CorecError):
            download.fetch(f"{address}/file.gz", "here")
    part = next((paths.cache_dir() / "here").rglob("*.part"))
    part.write_bytes(bytes(part.stat().st_size))  # what has arrived was of another version
    Handler.version = "two"
    assert download.fetch(f"{address}/file.gz", "here").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(address: str) -> None:
    Handler.busy = 3
    assert download.fetch(f"{address}/file.gz", "here").read_bytes() == CONTENT


def test_a_full_disk(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.Resuming, "attempt", full)
    with pytest.raises(CorecError, match=r"could not be saved in .*No space left.*set COREC_CACHE"):
        download.fetch(f"{address}/file.gz", "here")


def test_a_wrong_checksum_keeps_nothing(address: str) -> None:
    with pytest.raises(CorecError, match=r"not the expected file: its sha256 is not 0000.*check data.sha256"):
        download.fetch(f"{address}/file.gz", "here", "0" * 64)
    assert not [path for path in (paths.cache_dir() / "here").rglob("*") if path.is_file()]


def test_files_of_a_category_by_name(address: str) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    params = DataParams(source="amazon-2018", category="Gift_Cards", reviews="5-core", url=address)
    files = data.source_files(params.model_copy(update={"sha256": {"Gift_Cards_5.json.gz": digest}}))
    assert [path.name for path in files] == ["Gift_Cards_5.json.gz", "meta_Gift_Cards.json.gz"]
    assert [path for path, _ in Handler.asked] == [
        "/categoryFilesSmall/Gift_Cards_5.json.gz",
        "/metaFiles2/meta_Gift_Cards.json.gz",
    ]
    data.source_files(params.model_copy(update={"reviews": "full"}))
    assert Handler.asked[-1][0] == "/categoryFiles/Gift_Cards.json.gz"


def test_an_address_without_the_file(address: str) -> None:
    with pytest.raises(CorecError, match=r"absent/categoryFiles/Gift_Cards.json.gz could not be downloaded \(HTTPError: 404"):
        data.source_files(DataParams(source="amazon-2018", category="Gift_Cards", url=f"{address}/absent"))
