"""Which module imports which: no circles, and layers that point one way.

Every import counts, also those inside functions.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "flashmoe_mlx"
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
    assert len(graph) > 130
    assert f"{PACKAGE}.custom_kernels.cpu_block" in graph[f"{PACKAGE}.custom_kernels.cpu_entry"]
    assert f"{PACKAGE}.errors" in graph[f"{PACKAGE}.convert.run"]
    assert f"{PACKAGE}.bench_figures" in graph[f"{PACKAGE}.bench_batch"]


def test_there_is_no_circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def beyond(graph, start: str, allowed: str) -> set[str]:
    """Return what modules whose names begin with `start` import, but for what may be."""
    mine = {name for name in graph if name.startswith(start)}
    found = set().union(*(graph[name] for name in mine)) - mine
    return {name for name in found if not name.startswith(tuple(allowed.split()))}


def test_kernels_know_only_errors(graph):
    assert beyond(graph, f"{PACKAGE}.custom_kernels", f"{PACKAGE}.errors") == set()


def test_nothing_but_benchmarks_and_conversion_imports_conversion(graph):
    users = {
        n for n, found in graph.items() if any(f.startswith(f"{PACKAGE}.convert") for f in found)
    }
    assert {n for n in users if not n.startswith(f"{PACKAGE}.convert")} <= {f"{PACKAGE}.synthetic"}
