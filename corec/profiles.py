"""Where a run's parameters come from: a YAML profile, changes to it, and the cells of a notebook; and what can be checked early.

A profile may name another one with ``base: other.yaml`` (relative to the file itself) and list only what differs. Given values
win over ``changes``, which win over the profile, which wins over its base; a partial section keeps the rest of the section.
"""

import ast
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from corec import CorecError, paths, schemes
from corec.params import Params

CELL = ("profile", "changes")  # the names of the notebooks' parameters cell
BACKBONES = ("smollm2-135m", "tiny")  # names that corec.backbones knows by itself


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, section by section: a mapping changes what it names and keeps the rest."""
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def find(profile: str | Path) -> Path:
    """The file of a profile: an absolute path, or one relative to the project's folder, or else to the working directory."""
    path = paths.from_root(profile)
    return path if path.exists() or not Path(profile).exists() else Path(profile).resolve()


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a YAML file, merged into those of its base.

    Raises
    ------
    CorecError
        When the file cannot be read, is not YAML of ``name: value`` lines, or is its own base.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        named = f"{seen[-1]}: its base" if seen else "There is no parameter file"
        rest = " is missing" if seen else ""
        raise CorecError(f"{named} {path}{rest}: `ls params` lists those that come with COREC.") from None
    except (OSError, UnicodeDecodeError):
        raise CorecError(f"{path} is no readable text file: give one of the YAML files in params/.") from None
    except yaml.YAMLError as error:
        raise CorecError(f"{path} is not YAML ({str(error).splitlines()[0]}): correct that line.") from None
    if not isinstance(values, dict):
        raise CorecError(f"{path} holds no parameters: write `name: value` lines.")
    if (base := values.pop("base", None)) is None:
        return values
    parent = (path.parent / str(base)).resolve()
    if parent in (*seen, path.resolve()):
        raise CorecError(f"{path}: base {base!r} leads back to the file itself: name another file.")
    return merge(read(parent, (*seen, path.resolve())), values)


def load(path: str | Path, changes: Mapping[str, Any] | None = None) -> Params:
    """The parameters of a YAML file, with `changes`.

    Raises
    ------
    CorecError
        As :func:`read` and :meth:`corec.params.Model.checked` do, and for what :func:`check` finds.
    """
    params = Params.checked(merge(read(find(path)), changes or {}), str(path))
    check(params, str(path))
    return params


def injected(cells: list[str]) -> dict[str, Any]:
    """The values of the last cell that papermill injected (it begins with ``# Parameters``), from executed cells' sources."""
    for source in reversed(cells):
        if source.startswith("# Parameters\n"):
            found = {}
            for node in ast.parse(source).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    found[node.targets[0].id] = ast.literal_eval(node.value)
            return found
    return {}


def from_notebook(namespace: Mapping[str, Any]) -> Params:
    """The parameters of a notebook, from its ``globals()``.

    Two names of the tagged cell are read, ``profile`` and ``changes``, and the cell that papermill injects, which may set these
    or any parameter of a run. No other variable is looked at, so a notebook can be run again in the same kernel.

    Raises
    ------
    CorecError
        For a profile that cannot be read, an unknown name (with the nearest right one) or a value that does not fit.
    """
    given = injected([cell for cell in namespace.get("In", []) if isinstance(cell, str)])
    known = [*CELL, "base", *Params.model_fields]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise CorecError(f"this notebook: there is no parameter {name!r}: did you mean {near!r}?")
    profile = given.pop("profile", None) or namespace.get("profile", "params/tiny.yaml")
    if base := given.pop("base", None):  # papermill -f FILE, where FILE has a base; papermill does not say where FILE is
        beside = paths.root() / "params" / str(base)
        profile = beside if beside.exists() else base
    changes = given.pop("changes", None) or namespace.get("changes") or {}
    if not isinstance(profile, str | Path) or not isinstance(changes, Mapping):
        raise CorecError("this notebook: `profile` is the name of a YAML file, `changes` a mapping: correct the parameters cell.")
    values = merge(merge(read(find(profile)), changes), given)
    params = Params.checked(values, "this notebook" if changes or given else str(profile))
    check(params, "this notebook")
    return params


def check(params: Params, origin: str) -> None:
    """Find what would stop a later stage and can be known before the first.

    Raises
    ------
    CorecError
        For a scheme that is missing or malformed, an attribute that it lacks, more constraints than attributes, or a backbone
        that is neither known nor a folder nor looks like a name of the hub.
    """
    names = [attribute.name for attribute in schemes.choose(params.controls.scheme, params.controls.attributes)]
    if (most := max(params.controls.n_tokens)) > len(names):
        raise CorecError(
            f"{origin}: parameter 'controls.n_tokens' asks for {most} constraints, but only {len(names)} attributes are under "
            f"control ({', '.join(names)}): lower it."
        )
    for parameter, backbone in (("reranker.backbone", params.reranker.backbone), ("data.tagger", params.data.tagger)):
        if backbone is None or backbone in BACKBONES or (paths.from_root(backbone) / "config.json").exists():
            continue
        if backbone.startswith(("/", ".", "~")) or backbone.count("/") != 1:
            near = difflib.get_close_matches(backbone, BACKBONES, n=1, cutoff=0)[0]
            raise CorecError(
                f"{origin}: parameter {parameter!r}: there is no causal language model {backbone!r}: give a folder that holds "
                f"one, a name of the hub such as meta-llama/Meta-Llama-3-8B, or {' or '.join(BACKBONES)} (perhaps {near!r})."
            )
