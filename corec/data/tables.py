"""The tables that stage 01 makes, on disk and in memory.

- interactions: ``user user_id item rating timestamp position split``, sorted by user and time (stable: the file's order breaks
  ties). Users count from 0 and items from 1; item 0 is padding.
- items: ``item item_id title`` and the raw attributes; those that derive from behaviour (``train_count``, ``popularity_rank``,
  ``mean_rating``, ``rating_std``) know the training interactions only.
- windows: ``window user split position target history``, the re-ranker's examples.
- catalogue: every item of the source as it was read, before any is left out, with ``complete`` (has all that ``data.required``
  names).
- dirt: ``file reason rows``, the rows of a file that were left out, and the fields of items that hold no value.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from corec import CorecError, paths, stages

FILES = ("interactions", "items", "reviews", "metadata")  # of the table of dirt; other names there are fields


class Tables(NamedTuple):
    """The tables of a prepared data set (columns: see the module)."""

    interactions: pd.DataFrame
    items: pd.DataFrame
    windows: pd.DataFrame
    catalogue: pd.DataFrame
    dirt: pd.DataFrame


class Raw(NamedTuple):
    """What a source holds: interactions (``user_id item_id rating timestamp``, file order), catalogue and dirt."""

    interactions: pd.DataFrame
    catalogue: pd.DataFrame
    dirt: Mapping[tuple[str, str], int]


def complete(catalogue: pd.DataFrame, required: Sequence[str]) -> pd.Series:
    """Which items have all of the `required` columns (a list counts when it is not empty, a flag when it is set).

    Raises
    ------
    CorecError
        When the source has no such column.
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
    """Where a column holds something."""
    if column.dtype == bool:
        return column
    if column.dtype == object and column.map(lambda value: isinstance(value, list | np.ndarray)).any():
        return column.map(lambda value: isinstance(value, list | np.ndarray) and len(value) > 0)
    return column.notna()


def save(tables: Tables, folder: Path) -> list[Path]:
    """Write the tables as parquet; returns the files."""
    files = []
    for name, table in tables._asdict().items():
        files.append(folder / f"{name}.parquet")
        table.to_parquet(files[-1], index=False)
    return files


def load(run: str) -> Tables:
    """Tables of a run (raises CorecError when stage 01 has not finished)."""
    stages.require(run, "data")
    folder = paths.stage_dir(run, "data")
    return Tables(*(pd.read_parquet(folder / f"{name}.parquet") for name in Tables._fields))
