"""Tables of stage 01, on disk and in memory.

- interactions: ``user user_id item rating timestamp position split``, sorted by user and time (stable: the file's order breaks
  ties). Users count from 0 and items from 1; item 0 is padding.
- items: ``item item_id title`` and the raw attributes; ``train_count``, ``popularity_rank``, ``category_rank``, ``mean_rating``
  and ``rating_std`` are computed from training interactions only.
- windows: ``window user split position target history``, the examples of the re-ranker.
- catalogue: all items of the source as read, before any are dropped; ``complete`` marks those with all `data.required`.
- dirt: ``file reason rows``, the number of dropped rows of each file, and of missing values of each field of the items.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from corec import CorecError, files, paths, stages

FILES = ("interactions", "items", "reviews", "metadata")  # values of dirt["file"] that are files; other values are fields


class Tables(NamedTuple):
    """Tables of a prepared data set (see :mod:`corec.data.tables` for the columns)."""

    interactions: pd.DataFrame
    items: pd.DataFrame
    windows: pd.DataFrame
    catalogue: pd.DataFrame
    dirt: pd.DataFrame


class Raw(NamedTuple):
    """Content of a source: interactions (``user_id item_id rating timestamp``, in the file's order), catalogue and dirt."""

    interactions: pd.DataFrame
    catalogue: pd.DataFrame
    dirt: Mapping[tuple[str, str], int]


def complete(catalogue: pd.DataFrame, required: Sequence[str]) -> pd.Series:
    """Mark the items that have all `required` columns: a non-empty list, a true flag, or a value that is not missing.

    Parameters
    ----------
    catalogue
        The items.
    required
        Names of columns.

    Raises
    ------
    CorecError
        If the source has no such column.
    """
    keep = pd.Series(True, index=catalogue.index)
    for name in required:
        if name not in catalogue:
            known = ", ".join(
                str(column) for column in catalogue if column not in ("item_id", "brand_raw", "complete", "description_start")
            )
            raise CorecError(f"Parameter data.required: the items of this source have no {name!r}: choose among {known}.")
        keep &= filled(catalogue[name])
    return keep


def filled(column: pd.Series) -> pd.Series:
    """Mark the rows of a column that hold a value: a non-empty list, True, or a value that is not missing."""
    if column.dtype == bool:
        return column
    if column.dtype == object and column.map(lambda value: isinstance(value, list | np.ndarray)).any():
        return column.map(lambda value: isinstance(value, list | np.ndarray) and len(value) > 0)
    return column.notna()


def save(tables: Tables, folder: Path) -> list[Path]:
    """Write each table as a parquet file to `folder`; returns the files."""
    written = []
    for name, table in tables._asdict().items():
        written.append(folder / f"{name}.parquet")
        files.write_parquet(written[-1], table)
    return written


def load(run: str) -> Tables:
    """Load the tables of a run.

    Raises
    ------
    CorecError
        If stage 01 has not finished.
    """
    stages.require(run, "data")
    folder = paths.stage_dir(run, "data")
    return Tables(*(pd.read_parquet(folder / f"{name}.parquet") for name in Tables._fields))
