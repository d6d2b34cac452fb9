"""The folders of a run and of the cache. All paths come from one root, whatever the working directory."""

import os
from pathlib import Path


def root() -> Path:
    """The project's folder: ``COREC_ROOT``, else the checkout that holds this module."""
    return Path(os.environ.get("COREC_ROOT") or Path(__file__).parents[1]).resolve()


def cache_dir() -> Path:
    """The folder of downloads, kept between runs: ``COREC_CACHE``, else ``.cache`` in the project's folder."""
    path = Path(os.environ.get("COREC_CACHE") or root() / ".cache")
    path.mkdir(parents=True, exist_ok=True)
    return path


def stage_dir(run: str, stage: str) -> Path:
    """The folder of one stage of a run."""
    return root() / "runs" / run / stage


def figures_dir(run: str) -> Path:
    """The folder of a run's figures."""
    return root() / "figures" / run


def from_root(path: str | Path) -> Path:
    """A path that a parameter names: absolute (``~`` is the home folder), or relative to the project's folder."""
    return root() / Path(path).expanduser()
