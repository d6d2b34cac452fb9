"""Timings, side by side in one run: ``python -m corec.bench data``.

Prints one JSON object a line (``name value unit baseline ratio``: `ratio` is how the value stands to the named
baseline), or a table with ``--table``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from corec import paths

REQUIRED = ["title", "description", "brand", "rank", "price"]


class Figure(NamedTuple):
    """One line of a benchmark."""

    name: str
    value: float
    unit: str
    baseline: str = ""
    ratio: float | None = None


# Whole processes, as the stage and as a plain reading by pandas would run; each prints its seconds of writing and its peak.
STAGE = """
import sys, time
from pathlib import Path
from corec import data, params, paths
folder = Path(sys.argv[1])
given = params.DataParams(source="amazon-2018", category="Synthetic", path=str(folder), protocol="paper")
given = given.model_copy(update={"required": sys.argv[2].split()})
tables = data.prepare(given)
start = time.perf_counter()
data.save(tables, folder)
print(time.perf_counter() - start, paths.peak_memory_mb(), len(tables.interactions))
"""
PANDAS = """
import json, sys, time
from pathlib import Path
import pandas as pd
from corec import amazon, data, params, paths
folder = Path(sys.argv[1])
given = params.DataParams(source="amazon-2018", category="Synthetic", path=str(folder), protocol="paper")
items = pd.read_json(folder / "meta_Synthetic.json.gz", lines=True).rename(columns={"asin": "item_id"})
items = items.drop_duplicates("item_id")
text = {"rank": items["rank"].map(json.dumps), "category": items["category"].map(json.dumps)}
for name, parse in (*amazon.PARSERS.items(), ("brand", amazon.parse_brand)):
    items[name] = [parse(value).value for value in text.get(name, items[name])]
items["description"] = items["description"].str.len() > 0
items["complete"] = data.complete(items, sys.argv[2].split())
reviews = pd.read_json(folder / "Synthetic.json.gz", lines=True)
reviews = reviews[["reviewerID", "asin", "overall", "unixReviewTime"]]
reviews.columns = ["user_id", "item_id", "rating", "timestamp"]
interactions = data.split_by_time(reviews[reviews["item_id"].isin(items.loc[items["complete"], "item_id"])], given)
items = items[["item_id", *amazon.PARSERS, "brand", "description", "complete"]]
described = data.describe_items(items, interactions)
tables = data.Tables(interactions, described, data.make_windows(interactions, given), items, pd.DataFrame())
start = time.perf_counter()
data.save(tables, folder)
print(time.perf_counter() - start, paths.peak_memory_mb(), len(interactions))
"""


def process(code: str, folder: Path) -> tuple[float, list[float]]:
    """Seconds of a whole Python process, and what its last line printed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), " ".join(REQUIRED)], stdout=subprocess.PIPE, text=True, check=True
    )
    return time.perf_counter() - start, [float(word) for word in done.stdout.splitlines()[-1].split()]


def zcat(folder: Path) -> float:
    """Seconds that ``zcat`` takes for both files, the text thrown away."""
    start = time.perf_counter()
    for path in sorted(folder.glob("*.json.gz")):
        subprocess.run(["gzip", "-dc", path], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def bench_data(reviews: list[int], items: int, pandas: bool = True) -> Iterator[Figure]:
    """Stage 01 on synthetic files of the official format: against ``zcat``, against pandas at two million, and its memory.

    The files are read once before they are timed, so all find them in the system's cache.
    """
    from corec import synthetic

    for number in sorted(reviews):
        with tempfile.TemporaryDirectory(dir=paths.cache_dir()) as scratch:
            folder = Path(scratch)
            synthetic.write(folder, users=number // 8, items=items, reviews=number, brands=2000)
            zcat(folder)
            unpack = zcat(folder)
            ours, (write, peak, rows) = process(STAGE, folder)
            size = f"{number / 1e6:g}M"
            yield Figure(f"data_zcat_{size}", unpack, "s")
            yield Figure(f"data_seconds_{size}", ours, "s", "zcat + time to write", ours / (unpack + write))
            yield Figure(f"data_peak_{size}", peak, "MB")
            if pandas and number == 2_000_000:
                plain, (_, plain_peak, plain_rows) = process(PANDAS, folder)
                assert plain_rows == rows, "both keep the same interactions"
                yield Figure(f"data_vs_pandas_{size}", ours, "s", f"pandas.read_json, {plain:.1f} s", plain / ours)
                yield Figure(f"data_pandas_peak_{size}", plain_peak, "MB")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m corec.bench", description="Timings as JSON lines, or as a table.")
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="stage 01 on synthetic files of Amazon's format")
    data.add_argument("--reviews", type=int, nargs="+", default=[500_000, 1_000_000, 2_000_000, 4_000_000])
    data.add_argument("--items", type=int, default=200_000)
    data.add_argument("--no-pandas", action="store_true", help="leave out the comparison with pandas, which needs 10 GB")
    for command in (data,):
        command.add_argument("--table", action="store_true", help="a table for people instead of JSON lines")
    given = parser.parse_args(arguments)
    for figure in bench_data(given.reviews, given.items, pandas=not given.no_pandas):
        if given.table:
            ratio = "" if figure.ratio is None else f"{figure.ratio:8.2f} x {figure.baseline}"
            print(f"{figure.name:24} {figure.value:10.2f} {figure.unit:3} {ratio}", flush=True)
        else:
            print(json.dumps(figure._asdict()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
