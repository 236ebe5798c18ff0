"""In which order a conversion writes what, so that few files of the source are needed at once.

A *part* is what is written at once: a tensor of the trunk, or an expert. It needs one or a few
files of the source. Parts of one output file that need the same ones are one step; a file whose
source is spread over several others takes several steps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from ...format.names import FIELDS
from ..plan.parts import LayerPlan, Plan, TrunkFile
from ..source.checkpoint import Source
from .act import Visit
from .journal import Entries
from .output import place

File: TypeAlias = TrunkFile | LayerPlan
Files: TypeAlias = frozenset[Path]


@dataclass(frozen=True)
class Step:
    """One visit to a file of the output.

    Attributes:
        file: which.
        parts: indices of its tensors (trunk), or experts.
        whole: whether that is all of the file.
        needs: files of the source that must be fetched first.
        spent: those of them that no later step needs.
    """

    file: File
    parts: tuple[int, ...]
    whole: bool
    needs: Files = frozenset()
    spent: Files = frozenset()

    def visit(self, done: Entries) -> Visit | None:
        """Return what to write, given the entries so far; None for all of it at once."""
        if self.whole:
            return None
        return Visit(self.parts, done.get(place(self.file), {}).get("written", ()))


def plan_steps(
    source: Source, plan: Plan, done: Entries, remote: Files, held: Files = frozenset()
) -> list[Step]:
    """Order what is left to write.

    Args:
        source: where everything comes from.
        plan: what is to be written.
        done: the entries of what is written.
        remote: files of the source that must be fetched; without any, trunk and layers come in
            the order of the plan, each at once.
        held: those that were fetched already.
    """
    files: tuple[File, ...] = (*plan.trunk, *plan.layers)
    left = [file for file in files if "file" not in done.get(place(file), {})]
    groups = [step for file in left for step in _steps(source, file, done, remote)]
    return _last_needs(list(_ordered(groups, held)))


def _steps(source: Source, file: File, done: Entries, remote: Files) -> Iterator[Step]:
    """Group the parts of a file that are not written by what they need."""
    groups: dict[Files, list[int]] = {}
    count, widths = 0, _widths(file)
    written = done.get(place(file), {}).get("written") or [""] * sum(widths)
    for part, width in enumerate(widths):
        if not all(written[count : count + width]):
            groups.setdefault(_needs(source, file, part) & remote, []).append(part)
        count += width
    for needs, parts in groups.items():
        yield Step(file, tuple(parts), not any(written) and len(parts) == len(widths), needs)


def _widths(file: File) -> list[int]:
    """Return how many tensors each part of a file has."""
    if isinstance(file, TrunkFile):
        return [len(tensor.outputs) for tensor in file.tensors]
    return [len(FIELDS)] * file.experts


def _needs(source: Source, file: File, part: int) -> Files:
    """Return the files of the source that hold a part."""
    if isinstance(file, TrunkFile):
        return frozenset([file.tensors[part].source[0]])
    if source.layout:
        return frozenset(field.file for field in source.layout.layers[file.layer].fields)
    names = [projection.name for projection in file.projections]
    return frozenset(source.matrices[file.layer, part, name].file for name in names)


def _ordered(steps: list[Step], held: Files) -> Iterator[Step]:
    """Fetch next what completes a step with the fewest files, best with some that are held.

    Where layers follow one another through the files, two are held at once.
    """
    while steps:
        held &= frozenset().union(*(step.needs for step in steps))
        best = min(steps, key=lambda step: (len(step.needs - held), -len(step.needs & held)))
        oldest, held = held, held | best.needs
        ready = [step for step in steps if step.needs <= held]
        yield from sorted(ready, key=lambda step: -len(step.needs & oldest))
        steps = [step for step in steps if not step.needs <= held]


def _last_needs(steps: list[Step]) -> list[Step]:
    """Note with each step which files no later one needs."""
    later: Files = frozenset()
    result = []
    for step in reversed(steps):
        result.append(replace(step, spent=step.needs - later))
        later |= step.needs
    return result[::-1]


@dataclass(frozen=True)
class Fetched:
    """What steps have fetched: how many files and bytes in all, and on disk at once at most."""

    count: int
    nbytes: int
    most: int
    most_bytes: int


def fetched(steps: list[Step], sizes: Mapping[Path, int], held: Files) -> Fetched:
    """Add up what steps fetch.

    Args:
        steps: in their order.
        sizes: bytes by file.
        held: what is on disk at the start, and goes unless it is needed.
    """
    needed: Files = frozenset().union(*(step.needs for step in steps))
    new, held = needed - held, held & needed
    most = most_bytes = 0
    for step in steps:
        held |= step.needs
        most = max(most, len(held))
        most_bytes = max(most_bytes, sum(sizes[file] for file in held))
        held -= step.spent
    return Fetched(len(new), sum(sizes[file] for file in new), most, most_bytes)
