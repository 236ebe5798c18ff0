"""The order of writing, chosen so that few source files are needed at once.

A *part* is a tensor of the trunk, or an expert. The parts of an output file that need the same
source files are one step.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from ..plan.parts import File, Plan, TrunkFile
from ..source.checkpoint import Source
from .execute import Visit
from .journal import Entries
from .output import place

Files: TypeAlias = frozenset[Path]


@dataclass(frozen=True)
class Step:
    """One visit to an output file.

    Attributes:
        file: the output file.
        parts: indices of its tensors (trunk), or experts by their ids in the model.
        whole: whether these are all of its parts.
        needs: source files to download first.
        spent: those of them that no later step needs.
    """

    file: File
    parts: tuple[int, ...]
    whole: bool
    needs: Files = frozenset()
    spent: Files = frozenset()

    def visit(self, done: Entries) -> Visit | None:
        """Return what to write, given the entries so far; None for the whole file."""
        if self.whole:
            return None
        return Visit(self.parts, done.get(place(self.file), {}).get("written", ()))


def plan_steps(
    source: Source, plan: Plan, done: Entries, remote: Files, held: Files = frozenset()
) -> list[Step]:
    """Order what is left to write; without remote files, in the plan's order.

    Args:
        source: the checkpoint.
        plan: the conversion.
        done: the entries of what is written.
        remote: source files to download.
        held: those already downloaded.
    """
    left = [file for file in plan.weight_files if "file" not in done.get(place(file), {})]
    steps = [step for file in left for step in _steps(source, file, done, remote)]
    later: Files = frozenset()
    result = []
    for step in reversed(list(_ordered(steps, held))):
        result.append(replace(step, spent=step.needs - later))
        later |= step.needs
    return result[::-1]


def _steps(source: Source, file: File, done: Entries, remote: Files) -> Iterator[Step]:
    """Group the unwritten parts of a file by the source files that they need."""
    if isinstance(file, TrunkFile):
        widths = {n: len(tensor.outputs) for n, tensor in enumerate(file.tensors)}
    else:
        widths = dict.fromkeys(file.numbers, len(file.record))
    groups: dict[Files, list[int]] = {}
    count = 0
    written = done.get(place(file), {}).get("written") or [""] * sum(widths.values())
    for part, width in widths.items():
        if not all(written[count : count + width]):
            groups.setdefault(_needs(source, file, part) & remote, []).append(part)
        count += width
    for needs, parts in groups.items():
        yield Step(file, tuple(parts), not any(written) and len(parts) == len(widths), needs)


def _needs(source: Source, file: File, part: int) -> Files:
    if isinstance(file, TrunkFile):
        return file.tensors[part].files
    return frozenset(path for path, _, _ in source.places(file.layer, part))


def other_ranks(source: Source, plan: Plan) -> dict[Path, list[tuple[int, int]]]:
    """Return the byte ranges (begin, end) of experts that the plan leaves out, by source file."""
    found: dict[Path, list[tuple[int, int]]] = {}
    for layer, module in zip(plan.layers, source.modules, strict=True):
        for expert in set(range(module.num_experts)).difference(layer.numbers):
            for path, offset, nbytes in source.places(layer.layer, expert):
                found.setdefault(path, []).append((offset, offset + nbytes))
    return found


def _ordered(steps: list[Step], held: Files) -> Iterator[Step]:
    """Choose greedily the step that needs the fewest new files, and the most held ones.

    Two files are held at once if layers follow one another through the files.
    """
    while steps:
        held &= frozenset().union(*(step.needs for step in steps))
        best = min(steps, key=lambda step: (len(step.needs - held), -len(step.needs & held)))
        oldest, held = held, held | best.needs
        ready = [step for step in steps if step.needs <= held]
        yield from sorted(ready, key=lambda step: -len(step.needs & oldest))
        steps = [step for step in steps if not step.needs <= held]


@dataclass(frozen=True)
class Fetched:
    """Downloads: files and bytes in total, and the most files and bytes on disk at once."""

    count: int
    nbytes: int
    most: int
    most_bytes: int


def fetched(steps: list[Step], sizes: Mapping[Path, int], held: Files) -> Fetched:
    """Sum up the downloads of ordered steps; `held` files are on disk at the start."""
    needed: Files = frozenset().union(*(step.needs for step in steps))
    new, held = needed - held, held & needed
    most = most_bytes = 0
    for step in steps:
        held |= step.needs
        most = max(most, len(held))
        most_bytes = max(most_bytes, sum(sizes[file] for file in held))
        held -= step.spent
    return Fetched(len(new), sum(sizes[file] for file in new), most, most_bytes)
