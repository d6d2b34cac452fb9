"""Digest of the code of a notebook, and of the modules of the package that it imports, directly or not.

Comments, docstrings, outputs, Markdown and the cell tagged ``parameters`` do not count.
"""

import ast
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from corec import CorecError, files, paths

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


def cell_tree(source: str) -> ast.Module | None:
    """Syntax tree of a cell; None if it is no plain Python, for example because of an IPython magic."""
    try:
        return ast.parse(source)
    except SyntaxError:
        return None


def of_notebook(name: str) -> str:
    """Digest of the code cells of a notebook, by its name without suffix, and of the modules that it uses.

    Raises
    ------
    CorecError
        If the notebook is missing or damaged.
    """
    path = paths.root() / "notebooks" / f"{name}.ipynb"
    try:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in cells if "parameters" not in cell["metadata"].get("tags", [])]
    except (OSError, ValueError, KeyError, TypeError):
        raise CorecError(f"{path} is no notebook: run in the project's folder, or set COREC_ROOT to it.") from None
    trees = [cell_tree(source) for source in sources]
    modules = closure({path for tree in trees if tree for path in imported(tree)})
    cells = [source if tree is None else ast.dump(tree) for source, tree in zip(sources, trees, strict=True)]
    return files.digest(cells + [module(path)[0] for path in modules])
