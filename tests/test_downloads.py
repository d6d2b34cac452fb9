"""Downloads from a local server that cuts connections, changes files or refuses."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest

from corec import CorecError, data, downloads, paths
from corec.params import DataParams

CONTENT = np.random.default_rng(0).bytes(300_000)


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT; the first `cuts` answers stop half way, and `ranges` says whether it can go on from there."""

    cuts: ClassVar[int] = 0
    ranges: ClassVar[bool] = True
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        Handler.asked.append((self.path, asked))
        if "absent" in self.path:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        half = Handler.cuts > 0
        Handler.cuts -= half
        self.wfile.write(CONTENT[start : start + (len(CONTENT) - start) // 2] if half else CONTENT[start:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Handler, "cuts", 0)
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
    path = downloads.fetch(f"{address}/file.gz", "here", hashlib.sha256(CONTENT).hexdigest())
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["file.gz"]
    starts = [int(asked.strip("bytes=-")) if asked else 0 for _, asked in Handler.asked]
    assert starts == [0, 150_000, 225_000, 262_500] if ranges else len(starts) == 4
    downloads.fetch(f"{address}/file.gz", "here")
    assert len(Handler.asked) == 4, "the second time it comes from the cache"


def test_a_later_run_goes_on_where_the_first_gave_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    Handler.cuts = 1
    with pytest.raises(CorecError, match=r"could not be downloaded .*run again, what has arrived is kept"):
        downloads.fetch(f"{address}/file.gz", "here")
    folder = paths.cache_dir() / "here"
    assert {entry.name for entry in folder.iterdir()} == {"file.gz.part"}
    assert downloads.fetch(f"{address}/file.gz", "here").read_bytes() == CONTENT
    assert Handler.asked[-1][1] == "bytes=150000-"


def test_a_part_that_is_no_part_of_the_file(address: str) -> None:
    folder = paths.cache_dir() / "here"
    folder.mkdir()
    (folder / "file.gz.part").write_bytes(bytes(len(CONTENT) + 5))
    assert downloads.fetch(f"{address}/file.gz", "here").read_bytes() == CONTENT


def test_a_wrong_checksum_keeps_nothing(address: str) -> None:
    with pytest.raises(CorecError, match=r"not the file that was asked for: its sha256 is not 0000.*check data.sha256"):
        downloads.fetch(f"{address}/file.gz", "here", "0" * 64)
    assert not list((paths.cache_dir() / "here").iterdir())


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
