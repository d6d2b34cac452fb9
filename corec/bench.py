"""Timings, side by side in one run: ``python -m corec.bench data``, or ``sasrec``, ``engine``, ``large``.

Prints one JSON object a line (``name value unit baseline ratio``: `ratio` is how the value stands to the named
baseline), or a table with ``--table``.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corec import CorecError, paths

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


# A whole training of the retriever on MovieLens-100K; prints when 95 % of the best validation NDCG@10 was reached.
TO_95 = """
import sys
from corec import data, params, paths, sasrec, sasrec_study
settings = params.load(paths.root() / "params" / "ml-100k.yaml")
own = settings.sasrec.model_copy(update={"fast": sys.argv[1] == "fast"})
tables = data.prepare(settings.data)
trained = sasrec.train(tables.interactions, tables.windows, len(tables.items), own, 0)
row = sasrec_study.test_row(trained, tables, settings)
print(row["seconds_to_95"], trained.curve["peak_memory_mb"].iloc[-1], row["valid NDCG@10"])
"""


def process(code: str, *given: object) -> tuple[float, list[float]]:
    """Seconds of a whole Python process, and what its last line printed."""
    start = time.perf_counter()
    command = [sys.executable, "-c", code, *map(str, given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
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
            ours, (write, peak, rows) = process(STAGE, folder, " ".join(REQUIRED))
            size = f"{number / 1e6:g}M"
            yield Figure(f"data_zcat_{size}", unpack, "s")
            yield Figure(f"data_seconds_{size}", ours, "s", "zcat + time to write", ours / (unpack + write))
            yield Figure(f"data_peak_{size}", peak, "MB")
            if pandas and number == 2_000_000:
                plain, (_, plain_peak, plain_rows) = process(PANDAS, folder, " ".join(REQUIRED))
                assert plain_rows == rows, "both keep the same interactions"
                yield Figure(f"data_vs_pandas_{size}", ours, "s", f"pandas.read_json, {plain:.1f} s", plain / ours)
                yield Figure(f"data_pandas_peak_{size}", plain_peak, "MB")


def short_tailed(users: int, n_items: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Sequences as Amazon's: median 3 items, at most 200."""
    lengths = np.ceil(rng.lognormal(np.log(2.6), 0.95, users)).clip(2, 200).astype(int)
    return [rng.integers(1, n_items + 1, length) for length in lengths]


def seconds(work: Callable[[], object], least: float = 3.0) -> float:
    """Fastest of several runs, as many as `least` seconds hold and two at the least."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < least:
        start = now()
        work()
        times.append(now() - start)
    return min(times)


def now() -> float:
    """The clock (s), once a GPU, where there is one, has done all it was told."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def percentiles(work: Callable[[int], object], times: int) -> tuple[float, float]:
    """Median and 95th percentile of the seconds of `times` calls, after one that warms up."""
    work(0)
    taken = []
    for number in range(times):
        start = now()
        work(number)
        taken.append(now() - start)
    return float(np.median(taken)), float(np.quantile(taken, 0.95))


def oracle(name: str) -> Any:
    """A plain version that lies in the tests.

    Raises
    ------
    CorecError
        When the tests are not there, as in an installed package.
    """
    folder = Path(__file__).parents[1] / "tests"
    if not (folder / f"{name}.py").exists():
        raise CorecError(f"This comparison needs tests/{name}.py: run it from a checkout of the project.")
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def bench_sasrec() -> Iterator[Figure]:
    """SASRec against a textbook version, and against the bare matrix products of the same shapes, side by side."""
    from corec import data, sasrec
    from corec.params import DataParams, SasrecParams

    params = SasrecParams(hidden=64, layers=2, heads=2, dropout=0.2, max_length=200, batch_size=128, fast=True)
    tables = data.prepare(DataParams(source="ml-1m"))
    train = tables.interactions[tables.interactions["split"] == "train"]
    rng, n_items = np.random.default_rng(0), len(tables.items)
    long = list(sasrec.items_by_user(train).values())
    for name, sequences in (("ml1m", long), ("short", short_tailed(60_000, n_items, rng))):
        cut = [piece for items in sequences for piece in sasrec.pieces(items, params.max_length + 1, params.max_length + 1)]
        cut = [cut[place] for place in rng.permutation(len(cut))[: 8 * params.batch_size * (1 if name == "ml1m" else 4)]]
        lengths = np.array([len(piece) for piece in cut])
        count = int(lengths.sum() - len(cut))
        taken: list[float] = []
        for level, label in enumerate(LADDER):
            taken.append(seconds(ladder(level, cut, n_items, params).epoch))
            before, ratio = (LADDER[level - 1], taken[-2] / taken[-1]) if level else ("", None)
            yield Figure(f"ladder_{name}_{level}: {label}", count / taken[-1], "interactions/s", before, ratio)
        yield Figure(f"train_textbook_{name}", count / taken[0], "interactions/s")
        yield Figure(f"train_vs_textbook_{name}", count / taken[-1], "interactions/s", "textbook", taken[0] / taken[-1])
        order, size = rng.permutation(len(cut)), params.batch_size
        random = [order[start : start + size] for start in range(0, len(cut), size)]
        yield Figure(f"padding_{name}_full", 1 - count / (len(cut) * params.max_length), "share")
        yield Figure(f"padding_{name}_batch", sasrec.padding_share(lengths - 1, random), "share")
        yield Figure(f"padding_{name}_bucketed", sasrec.padding_share(lengths - 1, sasrec.batches(lengths, size, rng)), "share")
    yield from bench_encoding(tables, params)
    base, mine = process(TO_95, "plain")[1], process(TO_95, "fast")[1]
    yield Figure("seconds_to_95_ml100k", mine[0], "s", f"fast: false, {base[0]:.1f} s", base[0] / mine[0])
    yield Figure("peak_to_95_ml100k", mine[1], "MB", f"fast: false, {base[1]:.0f} MB")
    yield Figure("valid_ndcg10_ml100k", mine[2], "", f"fast: false, {base[2]:.4f}")


# From the textbook's training to ours, one step at a time.
LADDER = (
    "textbook: everything padded to 200, attention written out, all logits",
    "fused attention (is_causal)",
    "only real positions meet the items",
    "padding to the longest of the batch",
    "batches of like length",
    "softmax and its gradient in blocks",
    "dropout from bytes",
    "fused AdamW",
    "bfloat16 products where they are faster",
)


class Rung(NamedTuple):
    """Training with some of the steps taken: the model, its loss on a list of sequences, and an epoch."""

    model: Any
    loss: Callable[[list[np.ndarray]], Any]
    epoch: Callable[[], None]


def ladder(level: int, cut: list[np.ndarray], n_items: int, params: Any) -> Rung:
    """Training on the sequences `cut` with the first `level` steps of :data:`LADDER` taken."""
    import torch
    from torch.nn import functional as F

    from corec import sasrec

    textbook = oracle("textbook_sasrec")
    rng = np.random.default_rng(0)
    own = params.model_copy(update={"fast": level >= 5, "dtype": "auto" if level >= 8 else "float32"})
    plain, ours = textbook.Textbook(n_items, own), sasrec.SASRec(n_items, own)
    ours.noise.fast = level >= 6
    model = ours if level else plain
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=level >= 7)
    lengths = np.array([len(piece) for piece in cut])

    def loss(batch: list[np.ndarray]) -> torch.Tensor:
        sequences = sasrec.pad(batch) if level >= 3 else textbook.pad_full(batch, own.max_length + 1)
        if level == 0:
            return plain.loss(sequences)
        if level == 1:
            scores = ours.scores(ours(sequences[:, :-1]))
            return F.cross_entropy(scores.flatten(0, 1), sequences[:, 1:].flatten(), ignore_index=0)
        return sasrec.loss(ours, sequences, own)

    def epoch() -> None:
        model.train()
        order = rng.permutation(len(cut))
        size = own.batch_size
        random = [order[start : start + size] for start in range(0, len(cut), size)]
        for group in sasrec.batches(lengths, size, rng) if level >= 4 else random:
            value = loss([cut[place] for place in group])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

    return Rung(model, loss, epoch)


def bench_encoding(tables: Any, params: Any) -> Iterator[Figure]:
    """Encoding, full ranking and retrieval on MovieLens-1M with random weights: their time does not depend on them."""
    import torch

    from corec import sasrec

    n_items, rng = len(tables.items), np.random.default_rng(0)
    model = sasrec.SASRec(n_items, params).eval()
    items = sasrec.items_by_user(tables.interactions)
    batch, length, width, head = 64, params.max_length, params.hidden, params.hidden // params.heads
    ids = torch.from_numpy(rng.integers(1, n_items + 1, (batch, length)))
    states, square = torch.randn(batch * length, width), torch.randn(width, width)
    triple, one = torch.randn(width, 3 * width), torch.randn(batch * params.heads, length, head)
    weights = torch.randn(batch * params.heads, length, length)

    def products() -> None:
        for _ in range(params.layers):
            states @ triple
            one @ one.transpose(1, 2)
            weights @ one
            for _ in range(3):
                states @ square

    with torch.inference_mode():
        bare, ours = seconds(products), seconds(lambda: model(ids))
        flop = params.layers * (2 * batch * length * width * 6 * width + 4 * batch * params.heads * length**2 * head)
        yield Figure(
            "encode_vs_matmul_rate", flop / ours / 1e9, "GFLOP/s", f"bare products, {flop / bare / 1e9:.0f}", bare / ours
        )
        test = tables.windows[tables.windows["split"] == "test"]
        wanted = sasrec.queries(tables.interactions, test, params.max_length)
        encoded = sasrec.encode(model, wanted.inputs)

        def sort() -> None:
            for start in range(0, len(encoded), 1024):
                model.scores(encoded[start : start + 1024]).argsort(descending=True)

        count, sorting = seconds(lambda: sasrec.rank_states(model, encoded, wanted)), seconds(sort)
        yield Figure("full_ranking_6040_users_s", count, "s", f"product and sorting, {sorting:.2f} s", sorting / count)
        yield Figure("full_ranking_users", len(encoded) / count, "users/s")
        users = list(items)
        positions = [np.arange(1, len(items[user])) for user in users]
        prefixes = torch.randn(sum(map(len, positions)), width)
        parts = np.cumsum([0, *map(len, positions)])

        def retrieve() -> None:
            for user, place, start, stop in zip(users, positions, parts[:-1], parts[1:], strict=True):
                for first in range(0, stop - start, 256):
                    chunk = slice(start + first, min(start + first + 256, stop))
                    sasrec.retrieve(model, prefixes[chunk], items[user], place[first : first + 256], 50)

        def matmul_and_topk() -> None:
            for start in range(0, len(prefixes), 256):
                (prefixes[start : start + 256] @ model.items.weight.T).topk(50)

        bare, ours = seconds(matmul_and_topk), seconds(retrieve)
        yield Figure("retrieve_vs_matmul_topk", ours, "s", f"matrix product + topk, {bare:.1f} s", ours / bare)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m corec.bench", description="Timings as JSON lines, or as a table.")
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="stage 01 on synthetic files of Amazon's format")
    data.add_argument("--reviews", type=int, nargs="+", default=[500_000, 1_000_000, 2_000_000, 4_000_000])
    data.add_argument("--items", type=int, default=200_000)
    data.add_argument("--no-pandas", action="store_true", help="leave out the comparison with pandas, which needs 10 GB")
    sasrec = commands.add_parser("sasrec", help="the retriever against a textbook version and bare matrix products")
    engine = commands.add_parser("engine", help="the re-ranker's engine against one request at a time")
    large = commands.add_parser("large", help="the engine on Llama-3-8B's shape, random weights, on a GPU")
    for command in (data, sasrec, engine, large):
        command.add_argument("--table", action="store_true", help="a table for people instead of JSON lines")
    given = parser.parse_args(arguments)
    if given.command == "engine":
        from corec.bench_engine import bench_engine

        made = bench_engine()
    elif given.command == "large":
        from corec.bench_large import bench_large

        made = bench_large()
    else:
        made = bench_sasrec() if given.command == "sasrec" else bench_data(given.reviews, given.items, not given.no_pandas)
    lines = sys.stdout
    try:
        with redirect_stdout(sys.stderr):  # what the parts print while they run is none of the figures
            for figure in made:
                if given.table:
                    ratio = "" if figure.ratio is None else f"{figure.ratio:8.2f} x {figure.baseline}"
                    print(f"{figure.name:28} {figure.value:10.2f} {figure.unit:14} {ratio}", file=lines, flush=True)
                else:
                    print(json.dumps(figure._asdict()), file=lines, flush=True)
    except CorecError as error:
        print(f"corec: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
