"""Command line of the benchmarks: ``python -m corec.bench`` with ``data``, ``sasrec``, ``engine``, ``neighbour`` or ``large``.

Prints one JSON object per line (``name value unit baseline ratio``; `ratio` compares the value with the named baseline), or a
table with ``--table``; ``--csv`` also writes a CSV file as in ``figures/bench/``.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

from corec import CorecError, files
from corec.bench.clock import Timing


def measure(given: argparse.Namespace) -> Iterator[Timing]:
    """Yield the measurements of the chosen benchmark."""
    if given.command == "data":
        from corec.bench.data import bench_data

        return bench_data(given.reviews, given.items, not given.no_pandas)
    if given.command == "sasrec":
        from corec.bench.sasrec import bench_sasrec

        return bench_sasrec()
    if given.command == "engine":
        from corec.bench.engine import bench_engine

        return bench_engine()
    if given.command == "neighbour":
        from corec.bench.neighbour import bench_neighbour

        return bench_neighbour()
    from corec.bench.large import bench_large

    return bench_large()


def to_csv(figures: list[Timing]) -> str:
    """Format measurements as CSV, numbers with four significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Timing._fields)
    for figure in figures:
        ratio = "" if figure.ratio is None else f"{figure.ratio:.4g}"
        writer.writerow([figure.name, f"{figure.value:.4g}", figure.unit, figure.baseline, ratio])
    return text.getvalue()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m corec.bench", description="Timings as JSON lines, or as a table.")
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="stage 01 on synthetic files of Amazon's format")
    data.add_argument("--reviews", type=int, nargs="+", default=[500_000, 1_000_000, 2_000_000, 4_000_000])
    data.add_argument("--items", type=int, default=200_000)
    data.add_argument("--no-pandas", action="store_true", help="leave out the comparison with pandas, which needs 10 GB")
    sasrec = commands.add_parser("sasrec", help="the retriever against a textbook version and bare matrix products")
    engine = commands.add_parser("engine", help="the re-ranker's engine against one request at a time")
    neighbour = commands.add_parser("neighbour", help="a training step beside another busy process")
    large = commands.add_parser("large", help="the engine on Llama-3-8B's shape, random weights, on a GPU")
    for command in (data, sasrec, engine, neighbour, large):
        command.add_argument("--table", action="store_true", help="a table for people instead of JSON lines")
        command.add_argument("--csv", type=Path, help="also write the figures into this file once all are made")
    given = parser.parse_args(arguments)
    lines, made = sys.stdout, []
    try:
        with redirect_stdout(sys.stderr):  # progress lines are not measurements
            for figure in measure(given):
                made.append(figure)
                ratio = "" if figure.ratio is None else f"{figure.ratio:8.2f} x {figure.baseline}"
                row = f"{figure.name:28} {figure.value:10.2f} {figure.unit:14} {ratio}"
                print(row if given.table else json.dumps(figure._asdict()), file=lines, flush=True)
    except CorecError as error:
        print(f"corec: {error}", file=sys.stderr)
        return 1
    if given.csv:
        files.write_text(given.csv, to_csv(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
