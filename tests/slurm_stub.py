"""Stands in for the programs of Slurm in tests: sbatch runs the job here and now, sacct says that it has completed."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

program, arguments = Path(sys.argv[0]).name, sys.argv[1:]
folder = Path(os.environ["STUB_FOLDER"])
folder.mkdir(parents=True, exist_ok=True)
states = folder / "states"
if program == "sbatch":
    with (folder / "submitted.jsonl").open("a") as file:
        file.write(json.dumps(arguments) + "\n")
    number = 100 + len((folder / "submitted.jsonl").read_text().splitlines())
    wrapped = next(each for each in arguments if each.startswith("--wrap="))[len("--wrap=") :]
    environment = os.environ | {"SLURM_JOB_ID": str(number), "SLURM_CPUS_PER_TASK": "1"}
    output = Path(re.sub("%j", str(number), arguments[arguments.index("--output") + 1]))
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w") as log:
        status = subprocess.run(["sh", "-c", wrapped], env=environment, stdout=log, stderr=log, check=False).returncode
    with states.open("a") as file:
        file.write(f"{number}|{'FAILED' if status else 'COMPLETED'}\n")
    print(number)
elif program in ("sacct", "squeue"):
    print(states.read_text() if states.exists() else "", end="")
elif program == "srun":
    words = list(itertools.dropwhile(lambda each: each.startswith("-"), arguments))
    sys.exit(subprocess.run(["sh", "-c", words[0] if len(words) == 1 else shlex.join(words)], check=False).returncode)
