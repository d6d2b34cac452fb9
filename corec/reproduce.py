"""Run the notebooks of a run in order, by papermill: ``python -m corec.reproduce params/ml-100k.yaml``.

The field ``stages`` of the file lists the stages of the run. Executed copies are saved in ``runs/<run>/notebooks/``; the output
of the cells is printed during execution.
"""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from corec import CorecError, paths, profiles, stages
from corec.conflicts import in_missing

SPINS = 5_000  # spins of a waiting OpenMP thread before it sleeps: see docs/engine.md, "A busy neighbour"


def run(path: Path, only: Sequence[str] | None = None) -> None:
    """Execute the notebooks with the parameters of a file.

    Parameters
    ----------
    path
        A YAML file as in ``params/``.
    only
        Names of the stages to run, instead of those in ``stages`` of the file.

    Raises
    ------
    CorecError
        If a parameter is wrong, the run `study.source` of a transfer is missing, or a notebook stops; the message names the
        notebook and the reason.
    """
    settings = profiles.load(path)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for name in ("papermill", "nbclient", "traitlets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it logs the trace of a kernel that ends while it is interrupted
    if "GOMP_SPINCOUNT" not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
        print(f"GOMP_SPINCOUNT={SPINS}: waiting threads sleep soon, so that other programs slow the run less", flush=True)
    chosen = only or settings.stages
    if "missing_metadata" in chosen and (fault := in_missing(settings)):
        raise CorecError(f"{path}: {fault}")
    if "transfer" in chosen and settings.study.source not in (None, settings.run):
        stages.require(str(settings.study.source), "reranker")
    for stage, notebook in stages.NOTEBOOKS.items():
        if stage in chosen:
            print(f"== {notebook}", flush=True)
            started = time.monotonic()
            execute(notebook, profiles.find(path), settings.run)
            print(f"== {notebook}: {time.monotonic() - started:.0f} s", flush=True)


def execute(notebook: str, profile: Path, run: str) -> None:
    """Execute one notebook with a profile and save the executed copy in the folder of the run (raises as :func:`run`)."""
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    folder = paths.root() / "runs" / run / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    source = paths.root() / "notebooks" / f"{notebook}.ipynb"
    try:
        papermill.execute_notebook(
            str(source),
            str(folder / source.name),
            parameters={"profile": str(profile)},
            kernel_name="python3",
            cwd=str(paths.root()),
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            log_output=False,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # no warning of a local connection, no trace when interrupted
        )
    except DeadKernelError:
        raise CorecError(
            f"{notebook} was killed, most likely because the memory was not enough: lower reranker.micro_batch, "
            "reranker.eval_batch_size or sasrec.batch_size, and run it again."
        ) from None
    except NoSuchKernel:
        raise CorecError("There is no Jupyter kernel `python3`: `python -m pip install ipykernel` brings it.") from None
    except PapermillExecutionError as error:
        if error.ename == "CorecError":
            raise CorecError(f"{notebook} stopped: {error.evalue}") from None
        raise CorecError(
            f"{notebook} stopped with {error.ename}: {error.evalue} (the whole trace is in {folder / source.name})."
        ) from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    description = "Run the COREC notebooks in order with the parameters of a YAML file."
    parser = argparse.ArgumentParser(prog="python -m corec.reproduce", description=description)
    parser.add_argument("params", type=Path, help="parameter file, e.g. params/ml-100k.yaml")
    parser.add_argument(
        "--only", nargs="+", choices=list(stages.NOTEBOOKS), help="run these stages instead of those that the file names"
    )
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="papermill")
    started = time.monotonic()
    try:
        run(given.params, given.only)
    except CorecError as error:
        print(f"corec: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "corec: interrupted; the same command goes on from the last checkpoint of the stage that was running.",
            file=sys.stderr,
        )
        return 130
    print(f"all done in {(time.monotonic() - started) / 60:.1f} min", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
