"""Command ``corec``: ``run`` and ``grid`` make runs, ``compare`` and ``demo`` show them, ``verify`` and ``gc`` check them."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from corec import CorecError, compare, files, grid, paths, stages, store, verify, workflow


def parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    whole = argparse.ArgumentParser(prog="corec", description="Make runs and look after their files.")
    commands = whole.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the missing and outdated stages of runs")
    run.add_argument("params", type=Path, nargs="+", help="parameter files, e.g. params/ml-100k.yaml")
    run.add_argument(
        "--only", nargs="+", choices=list(stages.NOTEBOOKS), help="make these stages instead of those that the file names"
    )
    run.add_argument("--dag", action="store_true", help="print the graph of the stages (DOT) and run nothing")
    run.add_argument("--force", action="store_true", help="run the stages again even if they are up to date")
    run.add_argument("--profile", default=workflow.PROFILE, help="profile of Snakemake, e.g. profiles/slurm")
    many = commands.add_parser("grid", help="make the runs of a grid, and one table of them")
    many.add_argument("grid", type=Path, help="grid file, e.g. params/grid/tiny.yaml")
    many.add_argument("--dag", action="store_true", help="print the graph of the stages (DOT) and run nothing")
    many.add_argument("--profile", default=workflow.PROFILE, help="profile of Snakemake, e.g. profiles/slurm")
    compare.arguments(commands.add_parser("compare", help="compare two runs, user by user if they can be paired"))
    check = commands.add_parser("verify", help="compare the files of a run with their digests, and its pictures with its data")
    check.add_argument("run", help="name of a run in runs/, or a folder of results such as figures/ml-100k")
    check.add_argument(
        "--rerun", action="store_true", help="run the stages again, and compare the numbers with those of the folder"
    )
    demo = commands.add_parser("demo", help="steer the lists of a finished run in a browser")
    demo.add_argument("params", type=Path, nargs="?", default=Path("params/ml-100k.yaml"), help="parameter file of the run")
    demo.add_argument("--port", type=int, default=8866, help="port on this machine")
    demo.add_argument("--no-browser", action="store_true", help="open no browser")
    collect = commands.add_parser("gc", help="remove the stages that no run uses")
    collect.add_argument("--dry-run", action="store_true", help="list them only")
    return whole


def run(given: argparse.Namespace) -> int:
    """``corec run``."""
    started, targets = time.monotonic(), [workflow.Target(str(path), {}, given.only) for path in given.params]
    if given.dag:
        print(workflow.dag(targets), end="")
        return 0
    said = workflow.run(targets, given.profile, given.force)
    print(f"all done in {(time.monotonic() - started) / 60:.1f} min: {said}", flush=True)
    return 0


def many(given: argparse.Namespace) -> int:
    """``corec grid``."""
    if given.dag:
        print(workflow.dag(grid.targets(given.grid), given.grid), end="")
        return 0
    started = time.monotonic()
    said = workflow.run(grid.targets(given.grid), given.profile, grid=given.grid)
    minutes = (time.monotonic() - started) / 60
    print(f"all done in {minutes:.1f} min: {said} -> {grid.folder(given.grid)}", flush=True)
    return 0


def check(given: argparse.Namespace) -> int:
    """``corec verify``."""
    folder = Path(given.run)
    if not (folder / "manifest.json").exists() and (given.rerun or len(folder.parts) > 1):
        raise CorecError(f"{folder} has no manifest.json: name a folder in figures/, such as figures/ml-100k.")
    results = len(folder.parts) > 1
    faults = verify.faults(folder) if results else store.verify(given.run)
    for fault in faults:
        print(f"corec: {fault}.", file=sys.stderr)
    if not faults:
        print(f"{given.run}: all files are as recorded" + (", all pictures as drawn from their CSV files" if results else ""))
    if given.rerun:
        table = verify.rerun(folder)
        path = paths.root() / "runs" / ".verify" / f"{folder.name}.csv"
        files.write_csv(path, table)
        print(*verify.report(table), f"all numbers: {path}", sep="\n")
    return 1 if faults else 0


def collect(given: argparse.Namespace) -> int:
    """``corec gc``."""
    folders = store.unused()
    for folder in folders:
        print(folder)
    if given.dry_run:
        print(f"{len(folders)} stages that no run uses")
    else:
        print(f"removed {len(folders)} stages that no run uses, {store.remove(folders) / 1e6:.1f} MB")
    return 0


def demo(given: argparse.Namespace) -> int:
    """``corec demo``."""
    from corec.steering import server  # imports torch

    return server.serve(given.params, given.port, not given.no_browser)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    given = parser().parse_args(arguments)
    workflow.take_interrupts()
    try:
        return {"run": run, "grid": many, "compare": compare.show, "verify": check, "gc": collect, "demo": demo}[given.command](
            given
        )
    except CorecError as error:
        print(f"corec: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "corec: interrupted; the same command goes on from the last checkpoint of the stage that was running.",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
