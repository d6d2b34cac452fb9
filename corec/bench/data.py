"""``python -m corec.bench data``: time and memory of stage 01 on synthetic files in the Amazon format."""

import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from corec import paths
from corec.bench.clock import Timing, process
from corec.data import synthetic

REQUIRED = ["title", "description", "brand", "rank", "price"]


# Programs of whole processes: the stage, and a plain version with pandas. Each prints the seconds of writing, its peak memory in
# MB and the number of interactions.
STAGE = """
import sys, time
from pathlib import Path
from corec import data, machine, params
folder = Path(sys.argv[1])
given = params.DataParams(source="amazon-2018", category="Synthetic", path=str(folder), split="paper")
given = given.model_copy(update={"required": sys.argv[2].split()})
tables = data.prepare(given)
start = time.perf_counter()
data.save(tables, folder)
print(time.perf_counter() - start, machine.peak_memory_mb(), len(tables.interactions))
"""

PANDAS = """
import json, sys, time
from pathlib import Path
import pandas as pd
from corec import data, machine, params
from corec.data import fields
folder = Path(sys.argv[1])
given = params.DataParams(source="amazon-2018", category="Synthetic", path=str(folder), split="paper")
items = pd.read_json(folder / "meta_Synthetic.json.gz", lines=True).rename(columns={"asin": "item_id"})
items = items.drop_duplicates("item_id")
text = {"rank": items["rank"].map(json.dumps), "category": items["category"].map(json.dumps)}
for name, parse in (*fields.PARSERS.items(), ("brand", fields.parse_brand)):
    items[name] = [parse(value).value for value in text.get(name, items[name])]
items["description"] = items["description"].str.len() > 0
items["complete"] = data.complete(items, sys.argv[2].split())
reviews = pd.read_json(folder / "Synthetic.json.gz", lines=True)
reviews = reviews[["reviewerID", "asin", "overall", "unixReviewTime"]]
reviews.columns = ["user_id", "item_id", "rating", "timestamp"]
interactions = data.split_by_time(reviews[reviews["item_id"].isin(items.loc[items["complete"], "item_id"])], given)
items = items[["item_id", *fields.PARSERS, "brand", "description", "complete"]]
described = data.describe_items(items, interactions).drop(columns="title_from")
tables = data.Tables(interactions, described, data.make_windows(interactions, given), items, pd.DataFrame())
start = time.perf_counter()
data.save(tables, folder)
print(time.perf_counter() - start, machine.peak_memory_mb(), len(interactions))
"""


def zcat(folder: Path) -> float:
    """Seconds of decompressing both files in `folder` with gzip, output discarded."""
    start = time.perf_counter()
    for path in sorted(folder.glob("*.json.gz")):
        subprocess.run(["gzip", "-dc", path], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def bench_data(reviews: list[int], items: int, pandas: bool = True) -> Iterator[Timing]:
    """Time stage 01 on synthetic files in the official format, compared with ``zcat`` and pandas, and measure its peak memory.

    The files are read once before the timings, so that all runs find them in the page cache.

    Parameters
    ----------
    reviews
        Numbers of reviews to measure.
    items
        Number of items.
    pandas
        Compare with pandas at two million reviews.
    """
    for number in sorted(reviews):
        with tempfile.TemporaryDirectory(dir=paths.cache_dir()) as scratch:
            folder = Path(scratch)
            synthetic.write(folder, users=number // 8, items=items, reviews=number, brands=2000)
            zcat(folder)
            unpack = zcat(folder)
            seconds, (write, peak, rows) = process(STAGE, folder, " ".join(REQUIRED))
            size = f"{number / 1e6:g}M"
            yield Timing(f"data_zcat_{size}", unpack, "s")
            yield Timing(f"data_seconds_{size}", seconds, "s", "zcat + time to write", seconds / (unpack + write))
            yield Timing(f"data_peak_{size}", peak, "MB")
            if pandas and number == 2_000_000:
                plain, (_, plain_peak, plain_rows) = process(PANDAS, folder, " ".join(REQUIRED))
                assert plain_rows == rows, "both keep the same interactions"
                yield Timing(f"data_vs_pandas_{size}", seconds, "s", f"pandas.read_json, {plain:.1f} s", plain / seconds)
                yield Timing(f"data_pandas_peak_{size}", plain_peak, "MB")
