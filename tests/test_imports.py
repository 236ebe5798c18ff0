"""Imports between modules: without cycles, and in the directions of the layers.

Imports inside functions count too.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "flashmoe_mlx"
KERNELS = f"{PACKAGE}.custom_kernels"
FOLDERS = {
    PACKAGE: PACKAGE,
    "custom_kernels": f"{PACKAGE}.custom_kernels",
    "convert": f"{PACKAGE}.convert",
}


def modules() -> dict[str, Path]:
    """Return the path of every module of the package, by its import name."""
    found = {}
    for folder, name in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            if "bundled" not in path.parts:
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                found[".".join([name, *parts]).removesuffix(".__init__")] = path
    return found


def imported(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of the package that one module imports anywhere in its source."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names |= {n if n in known else base for n in (f"{base}.{a.name}" for a in node.names)}
    return (names & known.keys()) - {module}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(name, path, known) for name, path in known.items()}


def test_the_graph_has_all_kinds_of_imports(graph):
    assert len(graph) > 150
    assert f"{KERNELS}.cpu.block" in graph[f"{KERNELS}.cpu.entry"]  # inside a function
    assert f"{PACKAGE}.errors" in graph[f"{PACKAGE}.convert.run"]
    assert f"{PACKAGE}.bench.model" in graph[f"{PACKAGE}.bench.throughput"]  # a module, as a name


def test_imports_have_no_cycle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


# Layers, and the layers that each may import besides itself.
GROUND = "errors commands progress requirements settings"
DIRECTIONS = {
    "format": "errors",
    "store": "errors progress format custom_kernels",
    "distributed": "errors format",
    "models": "errors format store distributed custom_kernels",
    "profile": "errors progress settings format store models custom_kernels",
    "cli": f"{GROUND} loader binding format store distributed models profile custom_kernels",
    "bench": f"{GROUND} loader format store models profile custom_kernels cli convert",
    "custom_kernels": "errors progress",
    "convert": f"{GROUND} loader format models custom_kernels",
}


@pytest.mark.parametrize("layer", DIRECTIONS)
def test_imports_point_one_way(graph, layer):
    start = f"{PACKAGE}.{layer}"
    mine = {name for name in graph if name == start or name.startswith(f"{start}.")}
    found = {name.split(".")[1] for name in set().union(*(graph[n] for n in mine)) - mine}
    assert mine
    assert found <= set(DIRECTIONS[layer].split())


def test_ground_modules_import_no_layer(graph):
    for name in GROUND.split():
        assert graph[f"{PACKAGE}.{name}"] <= {f"{PACKAGE}.errors", f"{PACKAGE}.commands"}


def reached(graph, start: str) -> set[str]:
    """Return a module and all modules that it imports, directly or not."""
    found, left = set(), [start]
    while left:
        if (name := left.pop()) not in found:
            found.add(name)
            left += graph[name]
    return found


def test_generating_imports_neither_conversion_nor_benchmarks(graph):
    found = reached(graph, f"{PACKAGE}.cli.generate")
    assert not {name for name in found if name.split(".")[1:2] in (["convert"], ["bench"])}
    assert f"{PACKAGE}.cli.full_check" not in found
