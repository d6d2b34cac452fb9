"""Reader of RecBole's atomic files: tab-separated text with a ``name:type`` header, one file of interactions and one of items."""

import csv
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from corec import CorecError, paths
from corec.data.fields import parse_title
from corec.data.tables import Raw, complete
from corec.params import DataParams

Dirt = Counter[tuple[str, str]]
# Columns of the items table that stage 01 computes.
DERIVED = ("item", "train_count", "popularity_rank", "mean_rating", "rating_std", "complete", "category_from")


class Lines(NamedTuple):
    """Complete lines of a file as text, the type of each column, and the number of lines with too few or too many fields."""

    table: pd.DataFrame
    types: dict[str, str]
    cut: int


def read_lines(path: Path) -> Lines:
    """Read an atomic file; lines with another number of fields than the header are dropped and counted.

    Raises
    ------
    CorecError
        If the file is missing, is not text, or has no header or a column twice.
    """
    if not path.exists():
        raise CorecError(f"{path} is missing: put the file there, or leave the parameter data.path empty.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    except (OSError, csv.Error, ValueError) as error:
        raise CorecError(
            f"{path} is not a tab-separated text file with a header ({str(error).splitlines()[0]}): correct or replace it."
        ) from None
    names = [name.split(":")[0] for name in header]
    types = {name.split(":")[0]: name.partition(":")[2] or "token" for name in header}
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise CorecError(f"{path} has the column {twice[0]!r} twice in its header: give one of them another name.")
    whole = [row for row in rows if len(row) == len(names)]
    return Lines(pd.DataFrame(whole, columns=names, dtype=str), types, len(rows) - len(whole))


def find_pair(folder: Path) -> list[Path]:
    """Return the ``.inter`` and the ``.item`` file of a folder.

    Raises
    ------
    CorecError
        If the folder does not hold exactly one of each.
    """
    pair = []
    for suffix in ("inter", "item"):
        files = sorted(folder.glob(f"*.{suffix}"))
        if len(files) != 1:
            what = f"several .{suffix} files ({', '.join(file.name for file in files)})" if files else f"no .{suffix} file"
            raise CorecError(f"Parameter data.path: {folder} holds {what}: leave one .inter and one .item file there.")
        pair += files
    return pair


def require_columns(lines: Lines, path: Path, *wanted: str) -> None:
    """Raise CorecError unless the file has all `wanted` columns."""
    for name in wanted:
        if name not in lines.table:
            raise CorecError(f"{path} has no column {name!r} (it has {', '.join(lines.table.columns)}): add it to the header.")


def to_numbers(column: pd.Series, dirt: Dirt, name: str) -> pd.Series:
    """Convert a column of text to finite numbers, NaN for other values; counts missing values and values that are not numbers."""
    numbers = pd.to_numeric(column, errors="coerce").replace([np.inf, -np.inf], np.nan)
    blank = column.fillna("").str.strip() == ""
    dirt[name, "missing"] += int(blank.sum())
    dirt[name, "not a number"] += int((numbers.isna() & ~blank).sum())
    return numbers


def drop_unusable(interactions: pd.DataFrame, items: pd.DataFrame, dirt: Dirt, repeats: bool = False) -> pd.DataFrame:
    """Drop and count interactions with unknown or incomplete items, and repeated ones (the first in the file is kept).

    Parameters
    ----------
    interactions
        Columns ``user_id item_id``, in the file's order.
    items
        Columns ``item_id complete``.
    dirt
        Counts of dropped rows by reason; updated in place.
    repeats
        Keep repeated interactions.
    """
    known = interactions["item_id"].isin(items["item_id"])
    dirt["interactions", "item without a line in the item file"] += int((~known).sum())
    whole = interactions["item_id"].isin(items.loc[items["complete"], "item_id"])
    dirt["interactions", "of an incomplete item"] += int((known & ~whole).sum())
    again = interactions.duplicated(["user_id", "item_id"]) & whole & (not repeats)
    dirt["interactions", "item chosen again by the same user"] += int(again.sum())
    return interactions[whole & ~again]


def read(files: list[Path], params: DataParams) -> Raw:
    """Read interactions and items from a user's own atomic files.

    The first file needs the columns ``user_id item_id timestamp`` and may have ``rating``. The second needs ``item_id`` and
    ``title`` (or ``movie_title``); each further column becomes an attribute: ``token`` as text, ``token_seq`` as a list split at
    spaces, ``float`` as a number. Unusable rows and values are dropped and counted.

    Parameters
    ----------
    files
        The ``.inter`` and the ``.item`` file.
    params
        Parameters of stage 01; `required` names what an item must have.

    Raises
    ------
    CorecError
        If a file or a column is missing, a column has a name that stage 01 uses itself, or no line is usable.
    """
    dirt: Dirt = Counter()
    inter, item = (read_lines(path) for path in files)
    require_columns(inter, files[0], "user_id", "item_id", "timestamp")
    require_columns(item, files[1], "item_id")
    items = item.table.rename(columns={} if "title" in item.table else {"movie_title": "title"})
    if "title" not in items:
        raise CorecError(f"{files[1]} has no column 'title' (it has {', '.join(item.table.columns)}): add it to the header.")
    if taken := [name for name in items if name in DERIVED]:
        raise CorecError(f"{files[1]}: the column name {taken[0]!r} is used by the package itself: give the column another name.")
    dirt["interactions", "cut line"] += inter.cut
    dirt["items", "cut line"] += item.cut
    named = items["item_id"].str.strip() != ""
    dirt["items", "line without an item"] += int((~named).sum())
    dirt["items", "item listed again"] += int(items[named].duplicated("item_id").sum())
    items = items[named].drop_duplicates("item_id").reset_index(drop=True)
    titles = [parse_title(text) for text in items["title"]]
    dirt.update(("title", title.fault) for title in titles if title.fault)
    items["title"] = [title.value for title in titles]
    for name in items.columns.drop(["item_id", "title"]):
        kind = item.types[name]
        if kind == "float":
            items[name] = to_numbers(items[name], dirt, name)
        elif kind.endswith("_seq"):
            items[name] = items[name].str.split()
        else:
            items[name] = items[name].str.strip().replace("", None)
    items["complete"] = complete(items, params.required)
    table = inter.table
    numbers = {name: pd.to_numeric(table[name], errors="coerce") for name in ("timestamp", "rating") if name in table}
    usable = (table["user_id"].str.strip() != "") & (table["item_id"].str.strip() != "")
    for values in numbers.values():
        usable &= np.isfinite(values)
    dirt["interactions", "line without user, item, rating or time"] += int((~usable).sum())
    if not usable.any():
        raise CorecError(f"{files[0]} has no line with a user, an item and a numeric timestamp: correct or replace it.")
    interactions = table[["user_id", "item_id"]].assign(rating=np.nan).assign(**numbers)[usable]
    return Raw(drop_unusable(interactions, items, dirt), items, dirt)


def files_of(params: DataParams) -> list[Path]:
    """Return the pair of files in the folder `data.path`.

    Raises
    ------
    CorecError
        See :func:`find_pair`.
    """
    assert params.path is not None, "checked by DataParams"
    return find_pair(paths.from_root(params.path))
