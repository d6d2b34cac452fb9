"""Runs and grids as one graph of stages, executed by Snakemake: ``corec run params/ml-100k.yaml``.

The ``Snakefile`` has one rule for each stage, and takes the graph of a command from :func:`plan`. A job is a stage with its
parameters; it executes the notebook of the stage by papermill (:func:`execute`). Its output is the record ``stage.json``, which
is written last and lists the files of the stage. Runs with the same parameters share the job.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from corec import CorecError, conflicts, files, paths, profiles, stages
from corec.params import Params

SPINS = 5_000  # spins of a waiting OpenMP thread before it sleeps: see docs/engine.md, "A busy neighbour"
PROFILE = "profiles/local"
# Environment variables that Snakemake sets to the number of threads of a rule.
THREADS = tuple(
    f"{name}_THREADS" for name in ("OMP_NUM", "GOTO_NUM", "OPENBLAS_NUM", "MKL_NUM", "VECLIB_MAXIMUM", "NUMEXPR_NUM", "NUMBA_NUM")
)


class Target(NamedTuple):
    """A run to make."""

    profile: str  # YAML file
    changes: Mapping[str, Any] = {}  # what differs from it
    stages: Sequence[str] | None = None  # stages to make, with those before them; None: those that the profile names

    def settings(self) -> Params:
        """Parameters of the run (raises CorecError, see :func:`corec.profiles.load`)."""
        return profiles.load(self.profile, self.changes)


class Job(NamedTuple):
    """A stage to make."""

    stage: str
    target: Target  # a run that uses it
    needs: tuple[str, ...]  # records of other stages
    digest: str  # see :func:`corec.stages.fingerprint`


def pattern(stage: str) -> str:
    """Path of the record of a stage relative to the project's folder, with the wildcard ``key`` or ``run``."""
    return f"runs/{{run}}/{stage}/stage.json" if stage in stages.OF_ONE_RUN else f"runs/.store/{stage}-{{key}}/stage.json"


def record(settings: Params, stage: str) -> str:
    """Path of the record of a stage relative to the project's folder."""
    return pattern(stage).format(run=settings.run, key=stages.key(settings, stage))


def plan(targets: Sequence[Target]) -> dict[str, Job]:
    """All jobs of the targets and of the stages before them, by record, in an order in which they can run.

    Raises
    ------
    CorecError
        If a parameter is wrong, two targets have the same name and other parameters, or the run `study.source` of a transfer is
        missing.
    """
    jobs: dict[str, Job] = {}
    runs: dict[str, Params] = {}
    for target in targets:
        settings = target.settings()
        if runs.setdefault(settings.run, settings) != settings:
            raise CorecError(f"{target.profile}: another run of this command is also named {settings.run!r}: change its `run`.")
        for stage in target.stages or settings.stages:
            if fault := conflicts.of_stage(settings, stage):
                raise CorecError(f"{target.profile}: {fault}")
        for stage in needed(target, settings):
            if (path := record(settings, stage)) not in jobs:
                needs = tuple(record(settings, need) for need in stages.needs(stage, settings))
                jobs[path] = Job(stage, target, needs, stages.fingerprint(settings, stage))
    for path, job in [each for each in jobs.items() if each[1].stage == "transfer"]:
        settings = job.target.settings()
        if (source := settings.study.source) not in (None, settings.run):
            made = record(runs[source], "reranker") if source in runs else None
            jobs[path] = job._replace(needs=(*job.needs, made if made in jobs else finished_record(str(source), "reranker")))
    return jobs


def needed(target: Target, settings: Params) -> list[str]:
    """Stages of a target and those before them, in the order of the notebooks."""
    names = {name for stage in target.stages or settings.stages for name in (stage, *stages.ancestors(stage, settings))}
    return [name for name in stages.NOTEBOOKS if name in names]


def finished_record(run: str, stage: str) -> str:
    """Path of the record of a finished stage of another run, links resolved (raises CorecError if it has not finished)."""
    stages.require(run, stage)
    return str((paths.stage_dir(run, stage) / "stage.json").resolve())


def read_config(config: Mapping[str, Any]) -> list[Target]:
    """Targets from the configuration of Snakemake: ``runs``, a list of targets, or ``params``, the path of one profile.

    Raises
    ------
    CorecError
        If it has neither.
    """
    if "runs" in config:
        return [Target(*each) for each in config["runs"]]
    if "params" in config:
        return [Target(str(config["params"]))]
    raise CorecError("Snakemake needs a run: give --config params=params/ml-100k.yaml, or use `corec run`.")


def discard_outdated(jobs: Mapping[str, Job]) -> Iterator[str]:
    """Delete the records of stages whose parameters, code or files have changed, so that they run again; a sentence for each.

    The stages after a stage that has not finished, or whose record is deleted, lose their records too: Snakemake would not make
    a missing file again from which nothing is to be made.
    """
    unfinished: set[str] = set()
    for path, job in jobs.items():
        place = paths.root() / path
        if not place.exists() or unfinished & set(job.needs):
            unfinished.add(path)
            place.unlink(missing_ok=True)
            continue
        found = stages.record_in(place.parent)
        if found is None:
            fault: str | None = f"{place} is damaged"
        elif found.get("fingerprint") != job.digest:
            fault = f"Parameters, code or files of stage {job.stage!r} have changed"
        else:
            fault = next(stages.changed_files(place.parent, found, digests=True), None)
        if fault:
            unfinished.add(path)
            place.unlink()
            yield f"{fault}: stage {job.stage!r} is run again"


def finished(jobs: Mapping[str, Job]) -> dict[str, int]:
    """Modification times of the records that exist, by path."""
    places = {path: paths.root() / path for path in jobs}
    return {path: place.stat().st_mtime_ns for path, place in places.items() if place.exists()}


def command(targets: Sequence[Target], profile: str, grid: Path | None = None, more: Sequence[str] = ()) -> list[str]:
    """Command line of Snakemake for the targets and the table of a grid, with a profile and `more` options."""
    checkout = paths.checkout()
    given: dict[str, Any] = {"runs": [[str(profiles.find(each.profile)), dict(each.changes), each.stages] for each in targets]}
    given |= {"grid": str(grid.resolve())} if grid else {}
    config = paths.root() / "runs" / ".plans" / f"{files.digest(given)}.json"
    files.write_json(config, given)
    line = [sys.executable, "-m", "snakemake", "--snakefile", str(checkout / "Snakefile"), "--directory", str(paths.root())]
    return [*line, "--profile", str(folder_of(profile)), "--workflow-profile", "none", *more, "--configfile", str(config)]


def folder_of(profile: str) -> Path:
    """Folder of a profile of Snakemake: a path, or relative to the checkout (raises CorecError if it is none)."""
    for folder in (Path(profile).expanduser().resolve(), paths.checkout() / profile):
        if list(folder.glob("config*.yaml")):
            return folder
    raise CorecError(f"There is no profile of Snakemake in {profile!r}: name a folder such as profiles/slurm.")


def run(targets: Sequence[Target], profile: str = PROFILE, force: bool = False, grid: Path | None = None) -> str:
    """Make the targets: run what is missing or outdated.

    Parameters
    ----------
    targets
        The runs.
    profile
        Folder of a profile of Snakemake, e.g. ``profiles/slurm``.
    force
        Run the stages that the targets name again, even if they are up to date.
    grid
        File of the grid of which the targets are the runs, to make its table too.

    Returns
    -------
    A sentence: how many stages ran.

    Raises
    ------
    CorecError
        See :func:`plan`; or if a stage stops: the reason is printed before.
    """
    if "GOMP_SPINCOUNT" not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
        print(f"GOMP_SPINCOUNT={SPINS}: waiting threads sleep soon, so that other programs slow the run less", flush=True)
    jobs = plan(targets)
    for fault in discard_outdated(jobs):
        print(fault, flush=True)
    for target in targets:
        link(target)
    before = finished(jobs)
    again = sorted({stage for target in targets for stage in target.stages or target.settings().stages}) if force else []
    forced = ["--forcerun", *again] if again else []
    if call(command(targets, profile, grid, forced)):
        dry = command(targets, profile, grid, ["--dry-run", "--quiet", "rules"])
        tried = subprocess.run(dry, capture_output=True, text=True, check=False)
        if tried.returncode:
            raise CorecError(f"Snakemake cannot start: {' '.join(tried.stderr.split())}")
        raise CorecError("the run stopped: correct the fault named above; the same command goes on with that stage.")
    ran = sum(before.get(path) != time_now for path, time_now in finished(jobs).items())
    return f"{ran} stages ran, {len(jobs) - ran} were up to date"


def dag(targets: Sequence[Target], grid: Path | None = None) -> str:
    """Graph of the jobs in the language DOT: solid boxes are to run, dashed ones are up to date.

    Raises
    ------
    CorecError
        See :func:`plan`.
    """
    plan(targets)
    made = subprocess.run(command(targets, PROFILE, grid, ["--dag", "dot"]), capture_output=True, text=True, check=False)
    if made.returncode:
        raise CorecError(f"Snakemake cannot make the graph: {' '.join(made.stderr.split())}")
    return made.stdout


def link(target: Target) -> None:
    """Link the stages of a run, finished or not, and their executed notebooks, from the folder of the run."""
    settings = target.settings()
    notebooks = paths.root() / "runs" / settings.run / "notebooks"
    notebooks.mkdir(parents=True, exist_ok=True)
    for stage in needed(target, settings):
        stages.attach(settings, stage)
        place = notebooks / f"{stages.NOTEBOOKS[stage]}.ipynb"
        new = place.with_name(f".{place.name}.{os.getpid()}")
        new.symlink_to(Path("..", stage, place.name))
        new.replace(place)


def call(line: Sequence[str]) -> int:
    """Run a command in a process group of its own, to which an interrupt is passed on once; returns the exit status."""
    threads = {f"COREC_{name}": os.environ[name] for name in THREADS if name in os.environ}
    with subprocess.Popen(line, start_new_session=True, env=os.environ | threads | {"PYTHONPATH": search_path()}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)
            process.terminate()  # Snakemake starts no further job
            process.wait()
            raise


def restore_threads() -> None:
    """Undo Snakemake's limits of threads, which would leave one thread to the only job; the user's own limit stays."""
    for name in THREADS:
        os.environ.pop(name, None)
        if (given := os.environ.get(f"COREC_{name}")) is not None:
            os.environ[name] = given


def take_interrupts() -> None:
    """Raise KeyboardInterrupt at SIGINT, also if it was ignored as under nohup, and at SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def search_path() -> str:
    """``PYTHONPATH`` under which the jobs find this package first."""
    return os.pathsep.join(filter(None, [str(paths.checkout()), os.environ.get("PYTHONPATH")]))


def execute(job: Job) -> None:
    """Execute the notebook of a job; the executed copy is saved in the folder of the stage.

    Raises
    ------
    CorecError
        If the notebook stops; the message names the notebook and the reason.
    """
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    settings, notebook = job.target.settings(), stages.NOTEBOOKS[job.stage]
    source = paths.root() / "notebooks" / f"{notebook}.ipynb"
    output = stages.attach(settings, job.stage).resolve() / source.name
    for left in output.parent.glob(f".{output.name}.*"):  # of a process that was killed
        left.unlink(missing_ok=True)
    part = output.with_name(f".{output.name}.{os.getpid()}.ipynb")
    started = time.monotonic()
    print(f"== {settings.run}: {notebook}", flush=True)
    try:
        papermill.execute_notebook(
            str(source),
            str(part),
            parameters={"profile": str(profiles.find(job.target.profile)), "changes": dict(job.target.changes)},
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
    except OSError as error:
        reason = f"{error.filename or output} could not be written ({error.strerror or error})"
        raise CorecError(f"{notebook} stopped: {reason}: free disk space, or make the folder writable.") from None
    except NoSuchKernel:
        raise CorecError("There is no Jupyter kernel `python3`: `python -m pip install ipykernel` brings it.") from None
    except PapermillExecutionError as error:
        if error.ename == "CorecError":
            raise CorecError(f"{notebook} stopped: {error.evalue}") from None
        raise CorecError(f"{notebook} stopped with {error.ename}: {error.evalue} (the whole trace is in {output}).") from None
    finally:
        with contextlib.suppress(OSError):
            part.replace(output)
    print(f"== {settings.run}: {notebook}: {time.monotonic() - started:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute one job: ``python -m corec.workflow RECORD CONFIG``, as the rules of the Snakefile do; returns the exit status."""
    path, config = arguments if arguments is not None else sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for name in ("papermill", "nbclient", "traitlets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it logs the trace of a kernel that ends while it is interrupted
    warnings.filterwarnings("ignore", module="papermill")
    take_interrupts()
    try:
        targets = read_config(json.loads(config))
        if (job := plan(targets).get(path)) is None:
            names = ", ".join(target.profile for target in targets)
            raise CorecError(f"{names} was changed during the run: give the command again.")
        restore_threads()
        execute(job)
    except CorecError as error:
        print(f"corec: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
