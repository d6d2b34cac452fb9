"""The manifest of a run: parameters, versions, commit, and the records of its stages."""

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corec import files, paths, stages
from corec.params import Params

PACKAGES = (
    "accelerate datasets duckdb lightgbm matplotlib numpy pandas papermill peft pyarrow pydantic safetensors scikit-learn scipy "
    "seaborn tokenizers torch transformers"
).split()


def git_state() -> dict[str, Any]:
    """Commit of the checkout, and whether tracked files outside ``figures`` differ from it (None outside a repository)."""
    try:
        changes = ["status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)figures"]  # to which runs write
        commands = (["rev-parse", "HEAD"], changes)
        commit, changed = (
            subprocess.run(["git", "-C", str(paths.root()), *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changed)}


def without_secrets(value: Any) -> Any:
    """Copy of nested values: the home folder is ``~``, the project's folder is omitted, and addresses have no password."""
    if isinstance(value, dict):
        return {name: without_secrets(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_secrets(each) for each in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"^(\w+://)[^/@]*@", r"\1", value)
    return value.replace(f"{paths.root()}/", "").replace(str(Path.home()), "~") if value.startswith("/") else value


def collect(params: Params, of: Sequence[str]) -> dict[str, Any]:
    """Return what produced a run: parameters, versions, commit, and the records of the stages `of`, without their parameters."""
    installed = {entry.name.lower(): entry.version for entry in importlib.metadata.distributions()}
    records = {}
    for stage in of:
        record = stages.require(params.run, stage, params)
        records[stage] = {name: value for name, value in record.items() if name not in ("stage", "params")}
        records[stage]["outputs"] = {name: facts["sha256"] for name, facts in record["outputs"].items()}
    return {
        "run": params.run,
        "seed": params.seed,
        **git_state(),
        "params": without_secrets(params.model_dump(mode="json")),
        "python": platform.python_version(),
        "packages": {name: installed.get(name.lower()) for name in PACKAGES},
        "stages": records,
    }


def write(params: Params, stage: str) -> None:
    """Write the manifest of a study or timing (`stage` and all stages before it) to the folder of the run's figures."""
    of = [*stages.ancestors(stage, params), stage]
    files.write_json(paths.figures_dir(params.run) / f"manifest-{stage}.json", collect(params, of))
