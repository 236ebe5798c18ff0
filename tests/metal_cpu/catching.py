"""Which mode sees what is wrong with a kernel: the table in README.md is made here."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .bad_kernels import BAD, Bad
from .errors import BenchError
from .modes import MODES
from .patching import check_kernel, metal_on_cpu

Caught = dict[str, str]  # mode -> kind
STATIC = {"rules": "rules", "compile": "types"}  # kinds that are found without running, and by whom
RUNNING = {mode: mode for mode in MODES if mode not in STATIC.values()}


def caught(
    f: Callable[..., Any], arrays: Sequence[mx.array], reference: Any = None, first: bool = False
) -> Caught:
    """Run f in every mode; return the kind of error of each mode that found one.

    Without a reference, results are not compared. `first` stops at the first mode that found one.
    `rules` and `types` are credited only with what they find without running, and alone with it,
    so that every mode is seen to work alone.
    """
    found: Caught = {}
    for mode in MODES:
        kind = _kind(f, arrays, reference, mode, strict="types" not in found)
        if kind and STATIC.get(kind, RUNNING.get(mode)) == mode:
            found[mode] = kind
            if first:
                break
    return found


def _kind(
    f: Callable[..., Any], arrays: Sequence[mx.array], reference: Any, mode: str, strict: bool
) -> str | None:
    try:
        if reference is None:
            with metal_on_cpu(mode, strict):
                f(*arrays)
        else:
            check_kernel(f, arrays, reference, rtol=1e-4, atol=1e-4, modes=[mode], strict=strict)
    except BenchError as error:
        return error.kind
    return None


def bad_inputs() -> list[mx.array]:
    """Return the inputs of the bad kernels: x, and a tiny one that arrives as `constant`."""
    return [mx.arange(64, dtype=mx.float32) + 0.25, mx.array([2.0, 1.0])]


def bad_table() -> dict[Bad, Caught]:
    """Run all bad kernels through all modes."""
    return {bad: caught(bad, bad_inputs()) for bad in BAD}


def markdown(table: dict[Bad, Caught]) -> str:
    """Write the table as README.md has it."""
    lines = ["| Kernel | " + " | ".join(MODES) + " |", "|---" * (len(MODES) + 1) + "|"]
    for bad, found in table.items():
        lines.append(f"| {bad.name} | " + " | ".join(found.get(m, "") for m in MODES) + " |")
    return "\n".join(lines)
