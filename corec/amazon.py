"""Amazon Review Data 2018 (Ni, Li and McAuley, EMNLP 2019): its files, read as a stream, and the dirt in them.

A category has two files of JSON lines: reviews and metadata. DuckDB decompresses, parses, joins and counts within a
fixed memory. Only users who can pass the split's first test ever reach Python, so memory does not grow
with the number of reviews. Rows that cannot be used are counted by reason and left out.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
from isal import isal_zlib
from isal.igzip_lib import IsalError

from corec import CorecError
from corec.params import DataParams

BLOCK = 1 << 16  # bytes read from a file at a time
GZIP = b"\x1f\x8b\x08"  # how every gzip member begins
# What DuckDB may use; beyond it, it works on disk. Two threads: gzip comes as one stream, and each has its own buffers.
MEMORY, THREADS = "300MB", 2
PART = 1_500_000  # reviews whose users are counted at a time


CATEGORIES = (
    "AMAZON_FASHION All_Beauty Appliances Arts_Crafts_and_Sewing Automotive Books CDs_and_Vinyl Cell_Phones_and_Accessories "
    "Clothing_Shoes_and_Jewelry Digital_Music Electronics Gift_Cards Grocery_and_Gourmet_Food Home_and_Kitchen "
    "Industrial_and_Scientific Kindle_Store Luxury_Beauty Magazine_Subscriptions Movies_and_TV Musical_Instruments "
    "Office_Products Patio_Lawn_and_Garden Pet_Supplies Prime_Pantry Software Sports_and_Outdoors Tools_and_Home_Improvement "
    "Toys_and_Games Video_Games"
).split()
SUFFIXES = (".json.gz", ".jsonl.gz", ".json", ".jsonl", ".gz", "")


def find(folder: Path, name: str) -> Path:
    """The file of this name in a folder, packed or plain (raises CorecError when there is none)."""
    for suffix in SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    raise CorecError(
        f"{folder / name}.json.gz is missing (so is {name} with {', '.join(SUFFIXES[1:-1])}): put the file there, set "
        "data.reviews to the kind that is there (full or 5-core), or leave data.path empty for the download."
    )


class Parsed(NamedTuple):
    """What a field holds: its value, or None and the reason why there is none."""

    value: str | float | None
    fault: str = ""


def parse_price(text: str | None) -> Parsed:
    """Dollars of ``$12.99`` or ``$1,234.56``; none for a range, as in the paper, or for anything else."""
    text = (text or "").strip()
    if not text or text == "[]":
        return Parsed(None, "missing")
    if found := re.fullmatch(r"\$?\s*(\d[\d,]{0,14}(?:\.\d{1,4})?|\.\d{1,4})", text, re.ASCII):
        return Parsed(float(found[1].replace(",", "")))
    return Parsed(None, "range" if re.match(r"\$[\d,.]+\s*-\s*\$[\d,.]+", text) else "not a price")


def strings(text: str | None) -> list[str]:
    """The strings of a field that is a JSON list, or one plain string, or empty."""
    text = (text or "").strip()
    if text.startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return [text]
        return [entry for entry in found if isinstance(entry, str) and entry.strip()]
    return [text] if text else []


def parse_rank(text: str | None) -> Parsed:
    """The best rank among ``>#1,234 in Electronics (See Top 100 …)``, one string or a list of them."""
    entries = strings(text)
    if not entries:
        return Parsed(None, "missing")
    found = [match[1] for entry in entries if (match := re.match(r"\W*(\d[\d,]{0,14})(?: Paid| Free)? in\b", entry, re.ASCII))]
    ranks = [number for digits in found if (number := int(digits.replace(",", ""))) > 0]
    return Parsed(float(min(ranks))) if ranks else Parsed(None, "not a rank")


def parse_title(text: str | None) -> Parsed:
    """The title without tags and entities; none when a script or a style sheet stands in its place."""
    text = (text or "").strip()
    if not text:
        return Parsed(None, "missing")
    if re.search(r"<script|function\s*\(|\{[^}]*:[^}]*;", text, re.IGNORECASE):
        return Parsed(None, "script or style")
    text = plain(text)
    return Parsed(text) if text else Parsed(None, "only markup")


def plain(text: str) -> str:
    """Text without entities, tags (also one that was cut off) and double spaces."""
    if "<" in text or "&" in text:
        text = re.sub(r"<[a-zA-Z/!][^<>]{0,2000}(?:>|$)", " ", html.unescape(text))
    return " ".join(text.split())


def parse_brand(text: str | None, normalise: bool = False) -> Parsed:
    """The brand; `normalise` drops ``by``, case and double spaces, and takes ``Unknown`` for none."""
    text = plain(text or "")
    if normalise:
        text = re.sub(r"^(?:visit the|by)(?:\s+|$)", "", text.casefold()).strip(" .,;:-")
    if not text or (normalise and text in ("unknown", "n/a", "na", "none", "generic", "no brand", "unbranded")):
        return Parsed(None, "missing")
    return Parsed(text) if len(text) <= 100 and "{" not in text else Parsed(None, "not a brand")


def parse_category(text: str | None) -> Parsed:
    """The leaf of the category list, without entities.

    In many lists lines of the description follow the categories; the first entry that reads like one (a sentence,
    more than six words, a percentage) ends the list.
    """
    leaf = None
    for entry in strings(text):
        name = plain(entry)
        if re.search(r"[.!?]$|[.!?] |[%<{]", name) or len(name) > 60 or len(name.split()) > 6:
            break
        leaf = name or leaf
    return Parsed(leaf) if leaf else Parsed(None, "missing")


def plain_blocks(file: BinaryIO, faults: Counter[str]) -> Iterator[bytes]:
    """The file's bytes, decompressed where it is gzip; after a fault, from the next member on.

    What a block of `BLOCK` packed bytes held is lost with a fault in it; a fault counts once, however many bytes
    after it look like the beginning of a member.
    """
    rest = file.read(BLOCK)
    if not rest.startswith(GZIP):
        while rest:
            yield rest
            rest = file.read(BLOCK)
    whole = True  # since the last fault, something could be read
    while rest:  # one member a turn
        engine = isal_zlib.decompressobj(wbits=31)
        try:
            while True:
                text = engine.decompress(rest)
                whole = whole or bool(text)
                yield text
                if engine.eof:
                    break
                rest = file.read(BLOCK)
                if not rest:
                    faults["gzip file cut short"] += 1
                    return
            rest = engine.unused_data.lstrip(b"\0")
            while not rest and (more := file.read(BLOCK)):  # a member may be followed by padding
                rest = more.lstrip(b"\0")
        except IsalError:  # type: ignore[misc]  # (its stub makes an instance of it)
            faults["gzip member broken"] += whole
            whole = False
            yield b"\n"  # ends the line that was cut
            rest = next_member(rest[1:], file)


def next_member(block: bytes, file: BinaryIO) -> bytes:
    """Bytes from what looks like the next gzip member on; empty at the end of the file."""
    while not (found := re.search(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]", block, re.DOTALL)):
        more = file.read(BLOCK)
        if not more:
            return b""
        block = block[-9:] + more
    return block[found.start() :]


def is_whole(path: Path) -> bool:
    """Whether a gzip file decompresses to its end and its checksums are right (DuckDB does not look at them)."""
    faults = Counter[str]()
    with path.open("rb") as file:
        for _ in plain_blocks(file, faults):
            if faults:
                return False
    return not faults


def salvage(source: Path, scratch: Path, faults: Counter[str]) -> Path:
    """A plain copy in `scratch` of what can be read of a broken file."""
    target = scratch / f"{source.name}.salvaged"
    with source.open("rb") as file, target.open("wb") as sink:
        for block in plain_blocks(file, faults):
            sink.write(block)
    return target


FIELDS = ("asin", "title", "brand", "rank", "price", "category")
PARSERS = {"title": parse_title, "rank": parse_rank, "price": parse_price, "category": parse_category}


class Column(NamedTuple):
    """A parsed column: its values, None or NaN where there is none, and how many rows have which fault."""

    values: pd.Series
    faults: Counter[str]


def parse_column(column: pa.Array, parse: Callable[[str | None], Parsed]) -> Column:
    """Parse every distinct text of a column once."""
    encoded = column.dictionary_encode("encode")
    texts = encoded.dictionary.to_pylist()
    values, reasons = zip(*map(parse, texts), strict=True) if texts else ((), ())
    rows = np.bincount(encoded.indices, minlength=len(texts))
    faults = Counter[str]()
    for reason, count in zip(reasons, rows.tolist(), strict=True):
        if reason:
            faults[reason] += count
    return Column(pa.array(values).take(encoded.indices).to_pandas(), faults)


def load_lines(
    database: duckdb.DuckDBPyConnection, query: str, columns: dict[str, str], path: Path, scratch: Path, faults: Counter[str]
) -> None:
    """Run `query`, in which ``{lines}`` stands for the JSON lines of a file.

    DuckDB decompresses and parses as a stream, in the file's order. It takes the wanted columns only, values of
    another type as text, and makes a row of NULLs of a line that is no JSON. A thread checks the compression
    meanwhile; a file in which it is broken is salvaged and loaded again.

    Raises
    ------
    CorecError
        When the file cannot be read, is no text of lines, or the disk is full.
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
            print(f"{path} is broken: what is whole in it will be used", flush=True)
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
    """A path as SQL text; braces and wildcards in it stand for themselves."""
    return "'" + re.sub(r"([\[\]*?])", r"[\1]", str(path)).replace("'", "''") + "'"


def open_database(scratch: Path, name: str) -> duckdb.DuckDBPyConnection:
    """A database on disk that stays within `MEMORY`, and spills to `scratch`."""
    return duckdb.connect(
        str(scratch / name), config={"memory_limit": MEMORY, "threads": THREADS, "temp_directory": str(scratch)}
    )


def read_metadata(path: Path, scratch: Path, params: DataParams, dirt: Counter[tuple[str, str]]) -> pd.DataFrame:
    """Items of a metadata file, in its order; of one that is listed again, the first.

    Returns
    -------
    Columns ``item_id title brand brand_raw rank price category description``: prices in dollars, the rank the best of
    any list, the description only whether there is one.

    Raises
    ------
    CorecError
        When the file cannot be read (see :func:`load_lines`), or no line of it names an item.
    """
    fields = dict.fromkeys((*FIELDS, "description"), "VARCHAR")
    parts, faults = [], Counter[str]()
    described = "coalesce(regexp_matches(description, '[[:alnum:]]'), false) as description"  # [] and [""] are none
    with open_database(scratch, "metadata.duckdb") as database:
        query = f"create or replace table items as select {', '.join(FIELDS)}, {described} from {{lines}}"
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
            ids, described = batch.column("asin").to_pandas(), batch.column("description").to_pandas()
            parts.append(pd.DataFrame({"item_id": ids, **values, "description": described}))
    columns = ["item_id", "title", "brand", "brand_raw", "rank", "price", "category", "description"]
    dirt["metadata", "line without an item"] += rows - named
    dirt["metadata", "item listed again"] += named - distinct
    dirt.update({("metadata", fault): count for fault, count in faults.items()})
    return pd.concat(parts, ignore_index=True)[columns]


def load_reviews(path: Path, scratch: Path) -> Counter[str]:
    """Load a review file's rows into a database in `scratch`; returns the faults of its compression.

    No join yet: it would shuffle the rows, and ``rowid`` has to count in the file's order.
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
    """Of the loaded reviews, those of complete items by users with enough of them, in the file's order.

    Which users pass is decided as :func:`corec.data.split_by_time` will: the first review of a user and an item
    counts; protocol ``paper`` keeps the `max_users` with the most, of those with `min_interactions` or more, and the
    `latest` of each.

    Parameters
    ----------
    path
        The file that was loaded.
    items
        Columns ``item_id`` and ``complete``.

    Returns
    -------
    Columns ``user_id rating timestamp item_id``: stars from 1 to 5, seconds since 1970.

    Raises
    ------
    CorecError
        When no line of the file has all four.
    """
    known = items[["item_id", "complete"]].assign(item=np.arange(len(items), dtype=np.int32))
    usable = "user_id is not null and asin is not null and timestamp is not null and rating is not null"
    least = params.min_interactions if params.protocol == "paper" else params.core
    most, latest = 2**60, 2**60
    if params.protocol == "paper":
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
        kept, parts = 0, 1 + rows // PART
        for part in range(parts):  # a share of the users at a time: what is counted in memory stays small
            database.execute(
                "create or replace temp table pairs as select user_id, item, min(reviews.rowid) as place from reviews join known "
                f"on asin = item_id where {usable} and complete and hash(user_id) % {parts} = {part} group by all"
            )
            kept += database.execute("select count(*) from pairs").fetchall()[0][0]
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
    dirt["reviews", "item reviewed again by the same user"] += rows - bad - stray - incomplete - kept
    return table.assign(item_id=items["item_id"].to_numpy()[table.pop("item")])


def not_of_the_format(path: Path, fields: str) -> CorecError:
    """What to say of a file without a single usable line."""
    return CorecError(
        f"{path} is not of the format of Amazon Review Data 2018: no line of it is a JSON object with {fields}; "
        "delete it (it is then downloaded again), or name another folder in data.path."
    )
