"""Which module imports which: no circles, and layers that point one way.

Every import counts, also those inside functions.
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
    """Return every module of the package, by the name under which it is imported."""
    found = {}
    for folder, name in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            if "bundled" not in path.parts:
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                found[".".join([name, *parts]).removesuffix(".__init__")] = path
    return found


def imported(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of ours that one imports, however and wherever it does."""
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


def test_the_graph_sees_all_ways_to_import(graph):
    assert len(graph) > 150
    assert f"{KERNELS}.cpu.block" in graph[f"{KERNELS}.cpu.entry"]  # inside a function
    assert f"{PACKAGE}.errors" in graph[f"{PACKAGE}.convert.run"]
    assert f"{PACKAGE}.bench.model" in graph[f"{PACKAGE}.bench.throughput"]  # a module, as a name


def test_there_is_no_circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


# Rooms, and those that each may import besides itself.
GROUND = "errors commands requirements settings"
DIRECTIONS = {
    "format": "errors",
    "store": "errors format custom_kernels",
    "models": "errors format store custom_kernels",
    "profile": "errors settings format store models custom_kernels",
    "cli": f"{GROUND} loader format store models profile custom_kernels",
    "bench": f"{GROUND} loader format store models profile custom_kernels cli convert",
    "custom_kernels": "errors",
    "convert": f"{GROUND} loader format models custom_kernels",
}


@pytest.mark.parametrize("room", DIRECTIONS)
def test_imports_point_one_way(graph, room):
    start = f"{PACKAGE}.{room}"
    mine = {name for name in graph if name == start or name.startswith(f"{start}.")}
    found = {name.split(".")[1] for name in set().union(*(graph[n] for n in mine)) - mine}
    assert mine
    assert found <= set(DIRECTIONS[room].split())


def test_settings_know_no_room(graph):
    for name in GROUND.split():
        assert graph[f"{PACKAGE}.{name}"] <= {f"{PACKAGE}.errors", f"{PACKAGE}.commands"}


def reached(graph, start: str) -> set[str]:
    """Return all modules that importing one brings, itself included."""
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
