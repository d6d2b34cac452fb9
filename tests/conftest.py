"""A small made-up data set in the official atomic files, and a project folder of its own for every test."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from corec import stages
from corec.params import Params

GENRES = ["Comedy", "Drama", "Action", "Horror"]
# Files with tests of several minutes. They start first: otherwise the other process would wait for the last of them.
LONG = ("test_faults.py", "test_workflow.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of the files `LONG` before the others."""
    items.sort(key=lambda item: item.path.name not in LONG)


def write_atomic(
    folder: Path, users: int = 40, items: int = 60, length: int = 12, seed: int = 0, title: str = "Film number"
) -> Path:
    """Write ``ml-100k.inter`` and ``ml-100k.item`` with `users` random sequences."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(users):
        for step, item in enumerate(rng.choice(items, length, replace=False)):
            lines.append(f"u{user}\ti{item}\t{rng.integers(1, 6)}\t{1000 + step // 2}")
    (folder / "ml-100k.inter").write_text("\n".join(lines) + "\n")
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for item in range(items):
        genres = " ".join(rng.choice(GENRES, rng.integers(1, 3), replace=False))
        lines.append(f"i{item}\t{title} {item}\t{1960 + item % 40}\t{genres}")
    (folder / "ml-100k.item").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs, figures and cache of a test go to its temporary folder."""
    monkeypatch.setenv("COREC_ROOT", str(tmp_path))
    monkeypatch.setenv("COREC_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def project(own_folder: Path) -> Path:
    """The test's folder with the notebooks and the parameter files."""
    for name in ("notebooks", "params"):
        (own_folder / name).symlink_to(Path(__file__).parents[1] / name)
    return own_folder


@pytest.fixture
def atomic(tmp_path: Path) -> Path:
    """A folder with the made-up data set."""
    return write_atomic(tmp_path / "raw")


@pytest.fixture
def start_stages() -> Callable[[Params, str], stages.Stage]:
    """A function that begins a stage of a run, all that it needs finished without outputs."""

    def start(settings: Params, name: str) -> stages.Stage:
        for need in stages.ancestors(name):
            stages.start(settings, need).finish()
        return stages.start(settings, name)

    return start
