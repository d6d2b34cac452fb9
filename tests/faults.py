"""Faults during a small reproduction: ``python -m tests.faults`` (about half an hour); ``--kills 2 --rounds 1`` is a short form.

Every fault is followed by the plain command. Its outcome is one of: the metrics equal those of an undisturbed run bit for bit; an
error of one sentence, and equal metrics once its cause is gone; or a failure. The table goes to ``docs/reliability.md``.
"""

import argparse
import contextlib
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml

from corec import files, machine, stages
from tests.conftest import write_atomic
from tests.test_workflow import SMALL

ROOT = Path(__file__).parents[1]
CHAIN = [*stages.ancestors("figures"), "figures"]
EQUAL, SENTENCE, FAILED = "metrics equal bit for bit", "one sentence, then metrics equal", "FAILED"


class Outcome(NamedTuple):
    """What was tried and what came out."""

    kind: str
    detail: str
    outcome: str
    said: str = ""  # the sentence, or the end of the output of a failure


class Project:
    """A folder with a small run, and the commands on it."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.cache = root, root / "cache"
        root.mkdir(parents=True, exist_ok=True)
        for name in ("notebooks", "params"):
            if not (root / name).exists():
                (root / name).symlink_to(ROOT / name)
        (root / "small.yaml").write_text(yaml.safe_dump(SMALL | {"data": SMALL["data"] | {"path": str(data)}}))

    def environment(self) -> dict[str, str]:
        """Environment of the commands."""
        own = {"COREC_ROOT": str(self.root), "COREC_CACHE": str(self.cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return os.environ | own

    def start(self) -> "subprocess.Popen[str]":
        """Start the reproduction."""
        command = [sys.executable, "-m", "corec", "run", str(self.root / "small.yaml")]
        return subprocess.Popen(
            command, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def run(self) -> tuple[int, str]:
        """Run the reproduction to its end; returns exit status and output."""
        with self.start() as process:
            output, _ = process.communicate()
            return process.returncode, output

    def digest(self) -> str:
        """Digest of all results as numbers."""
        figures = self.root / "figures" / "small"
        return files.digest([files.sha256(figures / name) for name in ("metrics.csv", "per_user.parquet", "comparisons.csv")])

    def half_written(self) -> list[str]:
        """Faults of the files of finished stages."""
        faults = []
        for folder in (self.root / "runs" / ".store").glob("*"):
            record = stages.record_in(folder)
            faults += [fault for fault in (stages.changed_files(folder, record, digests=True) if record else ())]
        return faults


def kill_all(process: "subprocess.Popen[str]") -> None:
    """Kill a reproduction with all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        whole = psutil.Process(process.pid)
        for each in [*whole.children(recursive=True), whole]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def sentence(output: str) -> str | None:
    """The sentences that an error ended in; None if there is a traceback or a message of the engine, or none."""
    lines = [line for line in output.splitlines() if line.startswith("corec: ")]
    bad = "Traceback" in output or "Error in rule" in output or not lines
    return None if bad else lines[0].removeprefix("corec: ")


def settle(project: Project, wanted: str, kind: str, detail: str, earlier: str = "") -> Outcome:
    """Give the plain command, until no process of before works in the folder; compare the metrics."""
    for _ in range(30):
        status, output = project.run()
        if "Another process is working" not in output:
            break
        time.sleep(1)
    if status or project.digest() != wanted or project.half_written():
        return Outcome(kind, detail, FAILED, output[-1500:] or "other metrics")
    return Outcome(kind, detail, SENTENCE if earlier else EQUAL, earlier)


def durations(project: Project) -> dict[str, float]:
    """Seconds of each stage of an undisturbed run."""
    with project.start() as process:
        assert process.stdout
        found, begun = {}, time.monotonic()
        for line in process.stdout:
            if match := re.match(r"== small: (\w+)$", line):
                begun = time.monotonic()
            elif match := re.match(r"== small: (\w+): \d+ s", line):
                found[next(stage for stage, name in stages.NOTEBOOKS.items() if name == match[1])] = time.monotonic() - begun
        assert process.wait() == 0
    return found


def kills(project: Project, seconds: dict[str, float], wanted: str, count: int, rng: random.Random) -> Iterator[Outcome]:
    """Kill the reproduction at random moments of each stage in turn, `count` in all; then let it end."""
    for number in range(count):
        stage = CHAIN[number * len(CHAIN) // count]
        later = {record for name in CHAIN[CHAIN.index(stage) :] for record in project.root.glob(f"runs/*/{name}*/stage.json")}
        later |= {
            record for name in CHAIN[CHAIN.index(stage) :] for record in project.root.glob(f"runs/.store/{name}-*/stage.json")
        }
        for record in later:
            record.unlink(missing_ok=True)
        after = rng.uniform(0, seconds[stage])
        with project.start() as process:
            assert process.stdout
            for line in process.stdout:
                if line.startswith(f"== small: {stages.NOTEBOOKS[stage]}"):
                    break
            time.sleep(after)
            kill_all(process)
        detail = f"{stages.NOTEBOOKS[stage]}, {after:.1f} s after its start"
        if faults := project.half_written():
            yield Outcome("SIGKILL", detail, FAILED, "; ".join(faults))
        else:
            yield settle(project, wanted, "SIGKILL", detail)


def damage(path: Path, how: str, rng: random.Random) -> str:
    """Cut a file short or flip one of its bytes, keeping its time of modification; returns a description."""
    content, status = bytearray(path.read_bytes()), path.stat()
    place = rng.randrange(len(content))
    if how == "cut short":
        content = content[:place]
    else:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return f"{path.name} at byte {place:,}"


def damages(project: Project, wanted: str, rounds: int, rng: random.Random) -> Iterator[Outcome]:
    """Damage one file of each stage at once, `rounds` times each way, each time other files."""
    for number in range(rounds):
        for how in ("cut short", "byte flipped"):
            details = []
            for stage in CHAIN[:-1]:
                folder = (project.root / "runs" / "small" / stage).resolve()
                record = stages.record_in(folder) or {"outputs": {}}
                names = ["stage.json", *sorted(record["outputs"])]
                details.append(f"{stage}/{damage(folder / names[number % len(names)], how, rng)}")
            yield settle(project, wanted, f"files {how}", ", ".join(details))


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: float, more: str = "") -> Iterator[None]:
    """Mount a file system in memory of a given size on a folder; needs the rights to mount."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={int(megabytes * 1024)}k{more}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def full_disks(scratch: Path, data: Path, wanted: str, sizes: Sequence[float]) -> Iterator[Outcome]:
    """Run on a disk that gets full, then give it space."""
    for size in sizes:
        folder = scratch / f"disk-{size:g}"
        with small_disk(folder, size):
            project = Project(folder, data)
            status, output = project.run()
            said = sentence(output)
            if status == 0:  # the disk was large enough
                yield Outcome("disk full", f"{size:g} MB", EQUAL if project.digest() == wanted else FAILED)
                continue
            if said is None:
                yield Outcome("disk full", f"{size:g} MB", FAILED, output[-1500:])
                continue
            subprocess.run(["mount", "-o", "remount,size=400m", str(folder)], check=True)
            yield settle(project, wanted, "disk full", f"{size:g} MB", said)


def read_only_cache(scratch: Path, data: Path, wanted: str) -> Iterator[Outcome]:
    """Run with a cache that cannot be written, then with one that can."""
    folder = scratch / "read-only"
    project = Project(folder, data)
    with small_disk(project.cache, 1, ",ro"):
        status, output = project.run()
    if status == 0:
        yield Outcome("cache read-only", "empty", EQUAL if project.digest() == wanted else FAILED)
    elif (said := sentence(output)) is None:
        yield Outcome("cache read-only", "empty", FAILED, output[-1500:])
    else:
        yield settle(project, wanted, "cache read-only", "empty", said)


def two_at_once(scratch: Path, data: Path, wanted: str, times: int, rng: random.Random) -> Iterator[Outcome]:
    """Start two reproductions in one folder."""
    for number in range(times):
        project, wait = Project(scratch / f"two-{number}", data), rng.uniform(0, 8)
        with project.start() as first:
            time.sleep(wait)
            status, output = project.run()
            assert first.stdout
            others = first.stdout.read()
            state = first.wait()
        detail, said = f"the second {wait:.1f} s after the first", ""
        failed = [text for code, text in ((status, output), (state, others)) if code]
        if any(sentence(text) is None for text in failed):
            yield Outcome("two at once", detail, FAILED, "\n".join(failed)[-1500:])
            continue
        said = sentence(failed[0]) or "" if failed else ""
        yield settle(project, wanted, "two at once", detail, said)


def page(found: Sequence[Outcome], seconds: float) -> str:
    """The table as a page of the documentation."""
    kinds = list(dict.fromkeys(each.kind for each in found))
    lines = [
        "# Reliability: what was tried, and what came out",
        "",
        "`python -m tests.faults` makes this page. It disturbs a small reproduction (notebooks 01 to 06, made-up data, the tiny",
        "language model) and then gives the plain command again. The metrics of every fault are compared with those of an undisturbed",
        "run, bit for bit.",
        "",
        f"{len(found)} faults in {seconds / 60:.0f} minutes, {machine.processor()}, Python {platform.python_version()}.",
        "",
        "| Fault | Number | Metrics equal bit for bit | One sentence, then metrics equal | Failed |",
        "|---|---|---|---|---|",
    ]
    for kind in kinds:
        some = [each.outcome for each in found if each.kind == kind]
        lines.append(
            f"| {kind} | {len(some)} | " + " | ".join(str(some.count(name)) for name in (EQUAL, SENTENCE, FAILED)) + " |"
        )
    lines += ["", "| Fault | Where | Outcome | Message |", "|---|---|---|---|"]
    for each in found:
        said = re.sub(r"/\S*/", "…/", " ".join(each.said.split())).replace("|", "\\|")
        lines.append(f"| {each.kind} | {each.detail} | {each.outcome} | {said[:300]} |")
    return "\n".join(lines) + "\n"


def try_all(scratch: Path, count: int, rounds: int, sizes: Sequence[float], times: int, seed: int) -> Iterator[Outcome]:
    """All faults, in order; `sizes` of the full disks in megabytes, and `times` two reproductions at once."""
    rng = random.Random(seed)
    data = write_atomic(scratch / "raw")
    project = Project(scratch / "project", data)
    seconds = durations(project)
    wanted = project.digest()
    yield from kills(project, seconds, wanted, count, rng)
    yield from damages(project, wanted, rounds, rng)
    yield from two_at_once(scratch, data, wanted, times, rng)
    if sizes:
        yield from full_disks(scratch, data, wanted, sizes)
        yield from read_only_cache(scratch, data, wanted)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the number of failures."""
    parser = argparse.ArgumentParser(description="Disturb a small reproduction and compare the metrics.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=6, help="rounds of damaged files, one of each stage at once, two ways")
    parser.add_argument("--disks", type=float, nargs="*", default=[0.3, 1, 2, 3, 4, 6], help="sizes of full disks, in MB")
    parser.add_argument("--times", type=int, default=3, help="two reproductions at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.md")
    given = parser.parse_args(arguments)
    begun, found = time.monotonic(), []
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        for outcome in try_all(scratch, given.kills, given.rounds, given.disks, given.times, given.seed):
            found.append(outcome)
            print(f"{len(found):3} {outcome.kind}: {outcome.detail}: {outcome.outcome}", flush=True)
            if outcome.outcome == FAILED:
                print(outcome.said, flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    files.write_text(given.out, page(found, time.monotonic() - begun))
    return sum(each.outcome == FAILED for each in found)


if __name__ == "__main__":
    sys.exit(main())
