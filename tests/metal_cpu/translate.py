"""Translate MLX's generated text to C++: three edits, and an entry that each lane calls."""

import re

from .errors import BenchError
from .recording import Launch
from .toolchain import HEADERS

PREAMBLE = f"""{HEADERS}#pragma clang poison double
#line 1 "kernel.metal"
"""
MODULE = """
#line 1 "entry"
extern "C" {
__attribute__((visibility("hidden"))) extern const char __ehdr_start[], _end[];
void bench_module(const char** range) { range[0] = __ehdr_start; range[1] = _end; }
}
inline uint3 bench_triple(const unsigned* x) { return uint3{x[0], x[1], x[2]}; }
"""
TRIPLES = {
    "thread_position_in_grid": "position_in_grid",
    "thread_position_in_threadgroup": "position_in_group",
    "threadgroup_position_in_grid": "group_position",
    "threadgroups_per_grid": "groups_per_grid",
    "threads_per_grid": "threads_per_grid",
    "threads_per_threadgroup": "threads_per_group",
    "dispatch_threads_per_threadgroup": "dispatch_per_group",
}
SCALARS = {
    "thread_index_in_threadgroup": "lane->index_in_group",
    "thread_index_in_simdgroup": "lane->index_in_simdgroup",
    "simdgroup_index_in_threadgroup": "lane->simdgroup",
    "simdgroups_per_threadgroup": "lane->simdgroups",
    "threads_per_simdgroup": "BENCH_SIMD",
    "thread_execution_width": "BENCH_SIMD",
    "thread_index_in_quadgroup": "(lane->index_in_group % 4)",
    "quadgroup_index_in_threadgroup": "(lane->index_in_group / 4)",
}
DECLARATOR = r"\w+(?:\s*\[[^\];]*\])*"
THREADGROUP = re.compile(
    rf"\bthreadgroup\s+([A-Za-z_][\w:]*(?:\s*<[^;<>]*>)?)\s+({DECLARATOR}(?:\s*,\s*{DECLARATOR})*)\s*;"
)
PARAMETER = re.compile(
    r"^(?P<type>.*?)(?P<ref>[*&]?)\s*(?P<name>\w+)\s*\[\[(?P<attribute>.*?)\]\]$"
)


def _threadgroup_variables(match: re.Match[str]) -> str:
    """`threadgroup T x[N];` becomes a reference into memory that the threadgroup's lanes share."""
    kind, declarators = match.groups()
    lines: list[str] = []
    for declarator in declarators.split(","):
        name, dimensions = re.fullmatch(r"\s*(\w+)\s*(.*?)\s*", declarator, re.S).groups()  # type: ignore[union-attr]
        array = f"{kind} {dimensions}"
        # The offset distinguishes variables of one name in different blocks.
        memory = f'bench_threadgroup("{name}", {match.start() + len(lines)}, sizeof({array}))'
        pointer = f"(threadgroup {kind} (*){dimensions}){memory}"
        lines.append(f"threadgroup {kind} (&{name}){dimensions} = *{pointer};")
    newlines = "\n" * match.group(0).count("\n")
    return " ".join(line.replace("\n", " ") for line in lines) + newlines


def parameters(launch: Launch) -> list[re.Match[str]]:
    """Return the kernel's parameters: type, ref ('*', '&' or ''), name, attribute."""
    start = launch.source.find(f"[[kernel]] void {launch.name}(")
    end = launch.source.find(") {", start)
    if start < 0 or end < 0:
        raise BenchError("record", f"the text has no kernel {launch.name}:\n{launch.source}")
    text = launch.source[launch.source.index("(", start) + 1 : end]
    found = [PARAMETER.match(item.strip()) for item in text.split(",\n") if item.strip()]
    if None in found:
        raise BenchError("record", f"a parameter has an unknown form:\n{text}")
    return [match for match in found if match]


def _argument(parameter: re.Match[str]) -> str:
    kind, ref, _, attribute = parameter.groups()
    if buffer := re.fullmatch(r"buffer\((\d+)\)", attribute):
        return f"{'*' if ref == '&' else ''}({kind.strip()}*)buffers[{buffer.group(1)}]"
    if attribute in TRIPLES:
        return f"bench_triple(lane->{TRIPLES[attribute]})"
    if attribute in SCALARS:
        return SCALARS[attribute]
    raise BenchError("bench", f"the attribute {attribute} is not supported")


def to_cpp(launch: Launch) -> str:
    """Return the text to compile, with the recorded source's line numbers."""
    name = launch.name
    instance = re.compile(
        rf"^template \[\[host_name.*?decltype\({name}<(.*?)>\) {name}<.*?>;$", re.M | re.S
    )
    found = instance.search(launch.source)
    template = f"<{found.group(1)}>" if found else ""
    text = instance.sub("", launch.source)
    text = THREADGROUP.sub(_threadgroup_variables, text)
    arguments = ", ".join(_argument(p) for p in parameters(launch))
    entry = 'extern "C" void bench_entry(void** buffers, const BenchLane* lane) {\n'
    return f"{PREAMBLE}{text}{MODULE}{entry}  {name}{template}({arguments});\n}}\n"
