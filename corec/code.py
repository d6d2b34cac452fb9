"""Digest of the code of a stage: its notebook, and the modules of the package that the notebook imports, directly or not.

Comments, docstrings, outputs and Markdown do not count.
"""

import ast
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from corec import CorecError, files, paths
from corec.stages import NOTEBOOKS

PACKAGE = Path(__file__).parent


def imported(tree: ast.AST) -> Iterator[Path]:
    """Files of this package that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "corec":
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "corec"]
        else:
            continue
        for name in names:
            parts = name.split(".")[1:]
            places = [PACKAGE.joinpath(*parts[:depth], "__init__.py") for depth in range(len(parts) + 1)]
            yield from (path for path in [*places, PACKAGE.joinpath(*parts).with_suffix(".py")] if path.is_file())


def without_docstrings(tree: ast.Module) -> str:
    """Text of the syntax tree, which has no comments, without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


@functools.cache
def module(path: Path) -> tuple[str, frozenset[Path]]:
    """Digest of a module of the package, and the files that it imports."""
    tree = ast.parse(path.read_text())
    return files.digest(without_docstrings(tree)), frozenset(imported(tree))


def closure(first: Iterable[Path]) -> list[Path]:
    """Files and all that they import, sorted."""
    found, waiting = set(first), list(first)
    while waiting:
        for path in module(waiting.pop())[1] - found:
            found.add(path)
            waiting.append(path)
    return sorted(found)


def of_stage(stage: str) -> str:
    """Digest of the code cells of the notebook of a stage and of the modules that it uses.

    Raises
    ------
    CorecError
        If the notebook is missing or damaged.
    """
    path = paths.root() / "notebooks" / f"{NOTEBOOKS[stage]}.ipynb"
    try:
        notebook = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        raise CorecError(f"{path} is no notebook: run in the project's folder, or set COREC_ROOT to it.") from None
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    trees = [ast.parse(cell) for cell in cells]
    modules = closure({path for tree in trees for path in imported(tree)})
    parts = [ast.dump(tree) for tree in trees] + [module(path)[0] for path in modules]
    return files.digest(parts + [path.read_text() for path in sorted((PACKAGE / "schemes").glob("*.yaml"))])
