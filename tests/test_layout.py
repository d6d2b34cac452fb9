"""The layout of the package: imports go one way, modules and functions stay short, private names stay private."""

import ast
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from corec import code

PACKAGE = Path(__file__).parents[1] / "corec"
# From the bottom to the top: a module imports only what is further down, or its own package.
LAYERS = [
    ["checked", "conflicts"],
    ["params"],
    ["paths"],
    ["files", "machine", "schemes", "style"],
    ["code"],
    ["stages", "checkpoint", "download", "profiles"],
    ["store", "manifest"],
    ["backbones", "intervals"],
    ["data"],
    ["sasrec"],
    ["controls"],
    ["scores"],
    ["evidence"],
    ["reranker"],
    ["evaluation"],
    ["rankers", "claims"],
    ["frontier", "diagnose"],
    ["figures", "pictures"],
    ["sections_beyond"],
    ["sections"],
    ["pages"],
    ["scale"],
    ["studies", "steering"],
    ["compare"],
    ["workflow"],
    ["grid"],
    ["verify"],
    ["bench"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for path in MODULES}
KNOWN = {name: path for path, name in NAMES.items()}


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The modules of the package that a module imports anywhere in its text, each with the names that are taken from it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "corec":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, []) if whole in KNOWN else (node.module, [alias.name])
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names if alias.name.split(".")[0] == "corec")


def layer(name: str) -> str:
    """The first part of a module's name below the package; empty for the package itself."""
    return name.split(".")[1] if "." in name else ""


def test_every_module_has_a_layer() -> None:
    assert {layer(name) for name in NAMES.values()} - {""} == set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=NAMES.__getitem__)
def test_imports_go_one_way(path: Path) -> None:
    own = layer(NAMES[path])
    for name, _ in imports(path):
        if layer(name) and own and layer(name) != own:
            assert RANK[layer(name)] < RANK[own], f"{NAMES[path]} imports {name}, which is not below it"
        assert own or not layer(name), "the package itself imports nothing of it"


@pytest.mark.parametrize("path", MODULES, ids=NAMES.__getitem__)
def test_private_names_stay_in_their_module(path: Path) -> None:
    taken = {name for _, names in imports(path) for name in names}
    modules = {alias.asname or alias.name for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("corec") for alias in node.names}  # fmt: skip
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
    }
    public = {"_fields", "_asdict", "_replace"}  # of named tuples
    assert not [name for name in (taken | used) - public if name.startswith("_") and not name.startswith("__")]


def test_no_import_goes_round_in_a_circle() -> None:
    edges = {
        name: {target for target, _ in imports(path) if target in KNOWN and not is_package_of(target, name)}
        for path, name in NAMES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in edges.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def is_package_of(package: str, module: str) -> bool:
    """Whether `package` is the package that holds `module`, whose own ``__init__`` imports it."""
    return module.startswith(f"{package}.")


@pytest.mark.parametrize("path", MODULES, ids=NAMES.__getitem__)
def test_modules_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            reason = "is long because" in (ast.get_docstring(node) or "").replace("\n", " ")
            assert length <= 60 or reason, f"{NAMES[path]}.{node.name} has {length} lines and gives no reason"


def test_stages_that_need_no_language_model_import_none() -> None:
    """Notebooks 1, 5 and 6 start without torch."""
    import subprocess
    import sys

    code = (
        "import sys; from corec import controls, data, evaluation, figures, profiles, stages; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "later"),
    [("01_data", "sasrec controls evidence reranker"), ("02_sasrec", "evidence reranker"), ("05_evaluation", "reranker")],
)
def test_the_code_of_a_later_stage_is_no_reason_to_run_an_earlier_one_again(name: str, later: str) -> None:
    cells = nbformat.read(PACKAGE.parent / "notebooks" / f"{name}.ipynb", 4).cells
    trees = [ast.parse(cell.source) for cell in cells if cell.cell_type == "code"]
    used = code.closure({path for tree in trees for path in code.imported(tree)})
    assert not {path.relative_to(PACKAGE).parts[0] for path in used} & set(later.split())
