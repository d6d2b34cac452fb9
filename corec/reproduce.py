"""Notebooks 1 to 6 in order, by papermill: ``python -m corec.reproduce params/ml-100k.yaml`` (9 with ``--only``).

Executed copies go to ``runs/<run>/notebooks/``; what the cells print is shown as it comes.
"""

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

from corec import CorecError, params, paths

WHOLE = ("data", "sasrec", "controls", "reranker", "evaluation", "figures")  # what the paper's figures take


def run(path: Path, only: list[str] | None = None) -> None:
    """Execute the notebooks with the parameters of a file.

    Parameters
    ----------
    path
        A YAML file as in ``params/``.
    only
        Names of stages, when not just those of :data:`WHOLE` are wanted.

    Raises
    ------
    CorecError
        For wrong parameters, or when a notebook stops; then it says which, and why.
    """
    settings = params.load(path)
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for name in ("papermill", "nbclient", "traitlets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    folder = paths.root() / "runs" / settings.run / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    for stage, notebook in paths.NOTEBOOKS.items():
        if stage not in (only or WHOLE):
            continue
        print(f"== {notebook}", flush=True)
        started = time.monotonic()
        source = paths.root() / "notebooks" / f"{notebook}.ipynb"
        try:
            papermill.execute_notebook(
                str(source),
                str(folder / source.name),
                parameters=settings.model_dump(mode="json"),
                kernel_name="python3",
                cwd=str(paths.root()),
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                log_output=False,
            )
        except DeadKernelError:
            raise CorecError(
                f"{notebook} was killed, most likely for want of memory: lower reranker.micro_batch, "
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
        print(f"== {notebook}: {time.monotonic() - started:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    description = "Run the COREC notebooks in order with the parameters of a YAML file."
    parser = argparse.ArgumentParser(prog="python -m corec.reproduce", description=description)
    parser.add_argument("params", type=Path, help="parameter file, e.g. params/ml-100k.yaml")
    parser.add_argument(
        "--only", nargs="+", choices=list(paths.NOTEBOOKS), help="run only these stages (efficiency runs only when named here)"
    )
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="papermill")
    started = time.monotonic()
    try:
        run(given.params, given.only)
    except CorecError as error:
        print(f"corec: {error}", file=sys.stderr)
        return 1
    print(f"all done in {(time.monotonic() - started) / 60:.1f} min", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
