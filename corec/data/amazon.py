"""Reader of Amazon Review Data 2018 (Ni, Li and McAuley, EMNLP 2019), as a stream; unusable rows are counted.

A category has two files of JSON lines: reviews and metadata. DuckDB decompresses, parses, joins and counts them within a
memory limit. Only the reviews of users who pass the first condition of the split are loaded into Python, so memory does not
grow with the number of reviews. Unusable rows are dropped and counted by reason.
"""

import difflib
import re
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd

from corec import CorecError, download, paths
from corec.data.fields import FIELDS, PARSERS, parse_brand, parse_column
from corec.data.salvage import GZIP, is_whole, salvage
from corec.data.tables import Raw, complete
from corec.params import DataParams

# Limits of DuckDB; above MEMORY it spills to disk. Two threads: gzip is a single stream, and each thread has its own buffers.
MEMORY, THREADS = "300MB", 2

PART = 1_500_000  # reviews counted per pass; a pass covers a share of the users

CATEGORIES = (
    "AMAZON_FASHION All_Beauty Appliances Arts_Crafts_and_Sewing Automotive Books CDs_and_Vinyl Cell_Phones_and_Accessories "
    "Clothing_Shoes_and_Jewelry Digital_Music Electronics Gift_Cards Grocery_and_Gourmet_Food Home_and_Kitchen "
    "Industrial_and_Scientific Kindle_Store Luxury_Beauty Magazine_Subscriptions Movies_and_TV Musical_Instruments "
    "Office_Products Patio_Lawn_and_Garden Pet_Supplies Prime_Pantry Software Sports_and_Outdoors Tools_and_Home_Improvement "
    "Toys_and_Games Video_Games"
).split()

SUFFIXES = (".json.gz", ".jsonl.gz", ".json", ".jsonl", ".gz", "")


def find(folder: Path, name: str) -> Path:
    """Return the path of the file `name` in `folder`, compressed or plain (see :data:`SUFFIXES`).

    Raises
    ------
    CorecError
        If there is no such file.
    """
    for suffix in SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    raise CorecError(
        f"{folder / name}.json.gz is missing (so is {name} with {', '.join(SUFFIXES[1:-1])}): put the file there, set "
        "data.reviews to the kind that is there (full or 5-core), or leave data.path empty for the download."
    )


def find_files(params: DataParams) -> list[Path]:
    """Return the review file and the metadata file of ``data.category``, from the folder `data.path` or downloaded.

    Raises
    ------
    CorecError
        If no category is given, the category is unknown, a file is missing, or a download fails.
    """
    if params.category is None:
        raise CorecError("Parameter data.category is empty: name a category of the files, such as Gift_Cards.")
    part = "_5" if params.reviews == "5-core" else ""
    names = [f"{params.category}{part}", f"meta_{params.category}"]
    if params.path is not None:
        return [find(paths.from_root(params.path), name) for name in names]
    if params.category not in CATEGORIES:
        near = difflib.get_close_matches(params.category, CATEGORIES, n=1, cutoff=0)[0]
        raise CorecError(f"Parameter data.category: there is no category {params.category!r}: did you mean {near!r}?")
    folders = ["categoryFilesSmall" if part else "categoryFiles", "metaFiles2"]
    return [
        download.fetch(f"{params.url}/{folder}/{name}.json.gz", "amazon-2018", params.sha256.get(f"{name}.json.gz"))
        for folder, name in zip(folders, names, strict=True)
    ]


def read(files: list[Path], params: DataParams) -> Raw:
    """Read interactions and items of a category.

    A thread loads the reviews while the metadata is parsed: both spend most of their time in decompression.

    Parameters
    ----------
    files
        Review file and metadata file (see :func:`find_files`).
    params
        Parameters of stage 01.

    Raises
    ------
    CorecError
        If a file cannot be read or has no usable line.
    """
    reviews, metadata = files
    dirt = Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory(dir=paths.cache_dir()) as folder, ThreadPoolExecutor(1) as pool:
        scratch = Path(folder)
        loading = pool.submit(load_reviews, reviews, scratch)
        items = read_metadata(metadata, scratch, params, dirt)
        items["complete"] = complete(items, params.required)
        dirt.update({("reviews", reason): count for reason, count in loading.result().items()})
        interactions = choose_reviews(reviews, scratch, items, params, dirt)
    return Raw(interactions, items, dirt)


def read_metadata(path: Path, scratch: Path, params: DataParams, dirt: Counter[tuple[str, str]]) -> pd.DataFrame:
    """Read the items of a metadata file, in the file's order; of repeated items, the first is kept.

    Parameters
    ----------
    path, scratch
        The file, and a folder for temporary files.
    params
        Parameters of stage 01; `brand` selects the normalisation.
    dirt
        Counts of faults by field and reason; updated in place.

    Returns
    -------
    Columns ``item_id title brand brand_raw rank price category description description_start``. ``price`` is in dollars, ``rank``
    is the smallest rank in any list, ``description`` is True if there is a description, and ``description_start`` holds its first
    300 characters if the title may be missing.

    Raises
    ------
    CorecError
        If the file cannot be read (see :func:`load_lines`), or no line names an item.
    """
    fields = dict.fromkeys((*FIELDS, "description"), "VARCHAR")
    parts, faults = [], Counter[str]()
    described = "coalesce(regexp_matches(description, '[[:alnum:]]'), false) as description"  # [] and [""] count as none
    # The description is kept only if the title may be missing, so that few descriptions are in memory.
    doubtful = "title is null or not regexp_matches(title, '[[:alnum:]]') or regexp_matches(title, '<|&|function|\\x7B', 'i')"
    first = "list_filter(json_extract_string(description, '$[*]'), lambda text: regexp_matches(text, '[[:alnum:]]'))[1]"
    text = f"case when json_valid(description) and json_type(description) = 'ARRAY' then {first} else description end"
    started = f"case when {doubtful} then substr({text}, 1, 300) end as description_start"
    with open_database(scratch, "metadata.duckdb") as database:
        query = f"create or replace table items as select {', '.join(FIELDS)}, {described}, {started} from {{lines}}"
        load_lines(database, query, fields, path, scratch, faults)
        rows, named, distinct = database.execute("select count(*), count(asin), count(distinct asin) from items").fetchall()[0]
        if not named:
            raise not_of_the_format(path, "asin")
        first = "select min(rowid) from items where asin is not null group by asin"
        listed = database.sql(f"select * from items where rowid in ({first}) order by rowid")
        for batch in listed.to_arrow_reader(100_000):
            parsed = {name: parse_column(batch.column(name), parse) for name, parse in PARSERS.items()}
            parsed["brand_raw"] = parse_column(batch.column("brand"), parse_brand)
            if params.brand == "normalised":
                parsed["brand"] = parse_column(batch.column("brand"), partial(parse_brand, normalise=True))
            else:
                parsed["brand"] = parsed["brand_raw"]
            for name, column in parsed.items():
                dirt.update({(name, fault): count for fault, count in column.faults.items() if name != "brand_raw"})
            values = {name: column.values for name, column in parsed.items()}
            others = {name: batch.column(name).to_pandas() for name in ("description", "description_start")}
            parts.append(pd.DataFrame({"item_id": batch.column("asin").to_pandas(), **values, **others}))
    columns = ["item_id", "title", "brand", "brand_raw", "rank", "price", "category", "description", "description_start"]
    dirt["metadata", "line without an item"] += rows - named
    dirt["metadata", "item listed again"] += named - distinct
    dirt.update({("metadata", fault): count for fault, count in faults.items()})
    return pd.concat(parts, ignore_index=True)[columns]


def load_reviews(path: Path, scratch: Path) -> Counter[str]:
    """Load the rows of a review file into a database in `scratch`; returns the counts of compression faults.

    The rows are not joined here: a join would change their order, and ``rowid`` must follow the file's order.
    """
    columns = {"reviewerID": "VARCHAR", "asin": "VARCHAR", "overall": "FLOAT", "unixReviewTime": "BIGINT"}
    query = (
        "create or replace table reviews as "
        "select reviewerID as user_id, asin, overall as rating, unixReviewTime as timestamp from {lines}"
    )
    faults = Counter[str]()
    with open_database(scratch, "reviews.duckdb") as database:
        load_lines(database, query, columns, path, scratch, faults)
    return faults


def choose_reviews(
    path: Path, scratch: Path, items: pd.DataFrame, params: DataParams, dirt: Counter[tuple[str, str]]
) -> pd.DataFrame:
    """Select the reviews of complete items by users with enough of them, in the file's order.

    The function is long because its queries belong together.

    The users are the same that :func:`corec.data.split_by_time` selects. Only the first review of an item by a user counts.
    Split ``paper`` keeps users with at least `min_interactions`, of these the `max_users` with the most, and the `latest`
    reviews of each. Split ``leave-one-out`` keeps users with at least `core`.

    Parameters
    ----------
    path
        The file that :func:`load_reviews` loaded, for messages.
    scratch
        Folder of the database.
    items
        Columns ``item_id`` and ``complete``.
    params
        Parameters of stage 01.
    dirt
        Counts of dropped rows by reason; updated in place.

    Returns
    -------
    Columns ``user_id rating timestamp item_id``: stars from 1 to 5, seconds since 1970.

    Raises
    ------
    CorecError
        If no line of the file has all four.
    """
    known = items[["item_id", "complete"]].assign(item=np.arange(len(items), dtype=np.int32))
    usable = "user_id is not null and asin is not null and timestamp is not null and rating is not null"
    least = params.min_interactions if params.split == "paper" else params.core
    most, latest = 2**60, 2**60
    if params.split == "paper":
        most, latest = params.max_users, max(params.latest, least)
    with open_database(scratch, "reviews.duckdb") as database:
        database.register("known", known)
        rows, bad, stray, incomplete = database.execute(
            f"select count(*), count(*) filter (not ({usable})), count(*) filter ({usable} and item is null), "
            f"count(*) filter ({usable} and not complete) from reviews left join known on asin = item_id"
        ).fetchall()[0]
        if rows == bad:
            raise not_of_the_format(path, "reviewerID, asin, overall and unixReviewTime")
        database.execute("create table firsts (user_id varchar, item integer, place bigint)")
        distinct, parts = 0, 1 + rows // PART
        for part in range(parts):  # one share of the users per pass, which limits memory
            database.execute(
                "create or replace temp table pairs as select user_id, item, min(reviews.rowid) as place from reviews join known "
                f"on asin = item_id where {usable} and complete and hash(user_id) % {parts} = {part} group by all"
            )
            distinct += database.execute("select count(*) from pairs").fetchall()[0][0]
            database.execute(
                "insert into firsts select * from pairs where user_id in "
                f"(select user_id from pairs group by user_id having count(*) >= {least})"
            )
        chosen = f"select user_id from firsts group by user_id order by count(*) desc, min(place) limit {most}"
        newest = "row_number() over (partition by firsts.user_id order by timestamp desc, place desc)"
        table = database.execute(
            "select firsts.user_id as user_id, item, rating, timestamp from firsts join reviews on reviews.rowid = place "
            f"where firsts.user_id in ({chosen}) qualify {newest} <= {latest} order by place"
        ).df()
    dirt["reviews", "line without user, item, rating or time"] += bad
    dirt["reviews", "review without metadata"] += stray
    dirt["reviews", "review of an incomplete item"] += incomplete
    dirt["reviews", "item reviewed again by the same user"] += rows - bad - stray - incomplete - distinct
    return table.assign(item_id=items["item_id"].to_numpy()[table.pop("item")])


def load_lines(
    database: duckdb.DuckDBPyConnection, query: str, columns: dict[str, str], path: Path, scratch: Path, faults: Counter[str]
) -> None:
    """Run `query`, in which ``{lines}`` stands for the JSON lines of a file.

    DuckDB decompresses and parses as a stream, in the file's order. It reads only the given columns, reads values of another type
    as text, and turns a line that is not JSON into a row of NULLs. A thread checks the compression at the same time; if it is
    broken, the file is salvaged and loaded again.

    Parameters
    ----------
    database, query
        Connection, and the SQL statement to run.
    columns
        SQL type of each column, by name.
    path, scratch
        The file, and a folder for the salvaged copy.
    faults
        Counts of compression faults; updated in place.

    Raises
    ------
    CorecError
        If the file cannot be read, is not text in lines, or the disk is full.
    """
    wanted = ", ".join(f"{name}: '{kind}'" for name, kind in columns.items())
    form = f"format='newline_delimited', columns={{{wanted}}}, ignore_errors=true"

    def load(source: Path, compression: str) -> None:
        table = f"read_json({quoted(source)}, {form}, compression='{compression}')"
        database.execute(query.format(lines=table))

    try:
        with path.open("rb") as file:
            packed = file.read(3).startswith(GZIP)
        if not packed:
            load(path, "none")
            return
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(is_whole, path)
            try:
                load(path, "gzip")
            except duckdb.IOException:
                if whole.result():
                    raise
        if not whole.result():
            print(f"{path} is damaged: its readable lines will be used", flush=True)
            rescued = salvage(path, scratch, faults)
            load(rescued, "none")
            rescued.unlink()
    except (duckdb.Error, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CorecError(
            f"{path} could not be read ({reason}): check that it is a file of JSON lines that you may read, and that the "
            f"disk of {scratch.parent} has room."
        ) from error


def quoted(path: Path) -> str:
    """Return a path as an SQL string literal: quotes and the wildcards ``[ ] * ?`` are escaped, braces stay as they are."""
    return "'" + re.sub(r"([\[\]*?])", r"[\1]", str(path)).replace("'", "''") + "'"


def open_database(scratch: Path, name: str) -> duckdb.DuckDBPyConnection:
    """Open a database on disk that uses at most `MEMORY` and spills to `scratch`."""
    return duckdb.connect(
        str(scratch / name), config={"memory_limit": MEMORY, "threads": THREADS, "temp_directory": str(scratch)}
    )


def not_of_the_format(path: Path, fields: str) -> CorecError:
    """Return the error for a file without a usable line."""
    return CorecError(
        f"{path} is not of the format of Amazon Review Data 2018: no line of it is a JSON object with {fields}; "
        "delete it (it is then downloaded again), or name another folder in data.path."
    )
