"""Data sources by name: where their files are and how they are read."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from corec import CorecError
from corec.data import amazon, atomic, journey, movielens
from corec.data.tables import Raw
from corec.params import DataParams


@dataclass(frozen=True)
class Source:
    """A data source.

    Attributes
    ----------
    files
        Function that returns the paths of the files, downloaded if necessary.
    read
        Function that reads these files.
    """

    files: Callable[[DataParams], list[Path]]
    read: Callable[[list[Path], DataParams], Raw]


SOURCES = {
    "ml-100k": Source(movielens.files_of, movielens.read),
    "ml-1m": Source(movielens.files_of, movielens.read),
    "amazon-2018": Source(amazon.find_files, amazon.read),
    "complete-journey": Source(journey.files_of, journey.read),
    "files": Source(atomic.files_of, atomic.read),
}


def find_source(params: DataParams) -> Source:
    """Return the source `data.source`.

    Raises
    ------
    CorecError
        If there is no source of that name.
    """
    if params.source not in SOURCES:
        near = difflib.get_close_matches(params.source, SOURCES, n=1, cutoff=0)[0]
        raise CorecError(
            f"Parameter data.source: there is no data set {params.source!r} (there are {', '.join(SOURCES)}): "
            f"did you mean {near!r}?"
        )
    return SOURCES[params.source]


def source_files(params: DataParams) -> list[Path]:
    """Return the raw files of the configured source, downloaded if no `data.path` is given.

    Raises
    ------
    CorecError
        If the source is unknown, a file is missing, or a download fails.
    """
    return find_source(params).files(params)
