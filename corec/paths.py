"""Folders of a run and of the cache. All paths start at one root, independent of the working directory."""

import os
from pathlib import Path


def checkout() -> Path:
    """Folder that holds this package, the ``Snakefile`` and its profiles."""
    return Path(__file__).resolve().parents[1]


def root() -> Path:
    """Folder of the project: ``COREC_ROOT``, or else the checkout that holds this module."""
    return Path(os.environ.get("COREC_ROOT") or checkout()).resolve()


def cache_dir() -> Path:
    """Folder of downloads, kept between runs: ``COREC_CACHE``, or else ``.cache`` in the project's folder. Created if missing."""
    path = Path(os.environ.get("COREC_CACHE") or root() / ".cache")
    path.mkdir(parents=True, exist_ok=True)
    return path


def stage_dir(run: str, stage: str) -> Path:
    """Folder of one stage of a run."""
    return root() / "runs" / run / stage


def figures_dir(run: str) -> Path:
    """Folder of the figures of a run."""
    return root() / "figures" / run


def from_root(path: str | Path) -> Path:
    """Resolve a path of a parameter: absolute (``~`` is the home folder), or relative to the project's folder."""
    return root() / Path(path).expanduser()
