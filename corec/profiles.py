"""Parameters of a run from a YAML profile, changes to it, and the cells of a notebook, with checks before the first stage.

A profile may name another one with ``base: other.yaml`` (relative to the file itself) and list only what differs. Values given
directly override ``changes``, which override the profile, which overrides its base. A partial section keeps the rest of the
section.
"""

import ast
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from corec import CorecError, paths, schemes
from corec.params import Params

CELL = ("profile", "changes")  # names in the parameters cell of the notebooks
BACKBONES = ("smollm2-135m", "tiny")  # names defined in corec.backbones


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `base`, section by section; returns a new mapping."""
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def find(profile: str | Path) -> Path:
    """Return the path of a profile: absolute, or relative to the project's folder, or else to the working directory."""
    path = paths.from_root(profile)
    return path if path.exists() or not Path(profile).exists() else Path(profile).resolve()


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the values of a YAML file, merged into those of its base.

    Parameters
    ----------
    path
        The file.
    seen
        Files that lead to this one through ``base``.

    Raises
    ------
    CorecError
        If the file cannot be read, does not hold ``name: value`` lines, or is its own base.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        named = f"{seen[-1]}: its base" if seen else "There is no parameter file"
        rest = " is missing" if seen else ""
        raise CorecError(f"{named} {path}{rest}: `ls params` lists those that come with COREC.") from None
    except (OSError, UnicodeDecodeError):
        raise CorecError(f"{path} is not a readable text file: give one of the YAML files in params/.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise CorecError(f"{path} is not YAML ({str(error).splitlines()[0]}): correct that line.") from None
    if not isinstance(values, dict):
        raise CorecError(f"{path} contains no parameters: write `name: value` lines.")
    if (base := values.pop("base", None)) is None:
        return values
    parent = (path.parent / str(base)).resolve()
    if parent in (*seen, path.resolve()):
        raise CorecError(f"{path}: base {base!r} refers back to the file itself: name another file.")
    return merge(read(parent, (*seen, path.resolve())), values)


def load(path: str | Path, changes: Mapping[str, Any] | None = None) -> Params:
    """Load the parameters of a YAML file, with `changes`.

    Raises
    ------
    CorecError
        See :func:`read`, :meth:`corec.params.Model.checked` and :func:`check`.
    """
    params = Params.checked(merge(read(find(path)), changes or {}), str(path))
    check(params, str(path))
    return params


def injected(cells: list[str]) -> dict[str, Any]:
    """Return the values of the last cell that papermill injected (it begins with ``# Parameters``).

    Parameters
    ----------
    cells
        Source of the executed cells.
    """
    for source in reversed(cells):
        if source.startswith("# Parameters\n"):
            values = {}
            for node in ast.parse(source).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    try:
                        values[node.targets[0].id] = ast.literal_eval(node.value)
                    except ValueError:
                        written = ast.unparse(node.value)
                        raise CorecError(
                            f"this notebook: parameter {node.targets[0].id!r} is {written}: give finite numbers, text, lists and "
                            "mappings."
                        ) from None
            return values
    return {}


def from_notebook(namespace: Mapping[str, Any]) -> Params:
    """Return the parameters of a notebook.

    They come from the variables ``profile`` and ``changes`` of the tagged cell, and from the cell that papermill injects, which
    may set these or any parameter of a run. Other variables are not used, so a notebook can be run again in the same kernel.

    Parameters
    ----------
    namespace
        ``globals()`` of the notebook.

    Raises
    ------
    CorecError
        If the profile cannot be read, a name is unknown (the message gives the nearest known one), or a value does not fit.
    """
    overrides = injected([cell for cell in namespace.get("In", []) if isinstance(cell, str)])
    known = [*CELL, "base", *Params.model_fields]
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise CorecError(f"this notebook: there is no parameter {name!r}: did you mean {near!r}?")
    # From papermill -f FILE: what a whole file without a base leaves out has its default, whatever the cell's profile says.
    whole = "run" in overrides and not {"profile", "base"} & set(overrides)
    profile = overrides.pop("profile", None) or namespace.get("profile", "params/tiny.yaml")
    if base := overrides.pop("base", None):  # from papermill -f FILE; papermill does not give the path of FILE
        beside = paths.root() / "params" / str(base)
        profile = beside if beside.exists() else base
    changes = overrides.pop("changes", None) or namespace.get("changes") or {}
    if not isinstance(profile, str | Path) or not isinstance(changes, Mapping):
        raise CorecError("this notebook: `profile` is the name of a YAML file, `changes` a mapping: correct the parameters cell.")
    values = merge(merge({} if whole else read(find(profile)), changes), overrides)
    params = Params.checked(values, "this notebook" if changes or overrides else str(profile))
    check(params, "this notebook")
    return params


def check(params: Params, origin: str) -> None:
    """Check before the first stage what would stop a later one.

    Parameters
    ----------
    params
        Parameters of the run.
    origin
        Start of the error message.

    Raises
    ------
    CorecError
        If the scheme is missing or malformed, lacks an attribute, or has fewer attributes than a request has constraints; or if a
        backbone is not known, not a folder, and not of the form of a hub name.
    """
    names = [attribute.name for attribute in schemes.choose(params.controls.scheme, params.controls.attributes)]
    for parameter, lengths in (
        ("controls.n_tokens", params.controls.n_tokens),
        ("reranker.train_tokens", params.reranker.train_tokens or [0]),
    ):
        if (most := max(lengths)) <= len(names):
            continue
        raise CorecError(
            f"{origin}: parameter {parameter!r} asks for {most} constraints, but only {len(names)} attributes are under "
            f"control ({', '.join(names)}): lower it."
        )
    named = {"reranker.backbone": params.reranker, "data.tagger": params.data, "evidence.text": params.evidence}
    for parameter, backbone in ((name, getattr(part, name.split(".")[1])) for name, part in named.items()):
        encoder = parameter == "evidence.text" and backbone in ("minilm", "tf-idf")
        if backbone is None or encoder or backbone in BACKBONES or (paths.from_root(backbone) / "config.json").exists():
            continue
        if backbone.startswith(("/", ".", "~")) or backbone.count("/") != 1:
            near = difflib.get_close_matches(backbone, BACKBONES, n=1, cutoff=0)[0]
            raise CorecError(
                f"{origin}: parameter {parameter!r}: there is no causal language model {backbone!r}: give a folder that holds "
                f"one, a name of the hub such as meta-llama/Meta-Llama-3-8B, or {' or '.join(BACKBONES)} (perhaps {near!r})."
            )
