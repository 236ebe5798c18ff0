"""Find the modes that catch a wrong kernel; makes the table in README.md."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .bad_kernels import BAD, Bad
from .errors import BenchError
from .modes import MODES
from .patching import check_kernel, metal_on_cpu

Caught = dict[str, str]  # mode -> kind
STATIC = {"rules": "rules", "compile": "types"}  # kinds found without running, and their mode
RUNNING = {mode: mode for mode in MODES if mode not in STATIC.values()}


def caught(
    f: Callable[..., Any], arrays: Sequence[mx.array], reference: Any = None, first: bool = False
) -> Caught:
    """Run f in every mode; return the error kind of each mode that fails.

    Without a reference, skips comparing results. `first` stops at the first mode that fails. Errors
    found without running count for `rules` and `types` alone, and only these errors do, so the
    table shows each mode by itself.
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
    """Return the bad kernels' inputs: x, and a tiny one that Metal passes as `constant`."""
    return [mx.arange(64, dtype=mx.float32) + 0.25, mx.array([2.0, 1.0])]


def bad_table() -> dict[Bad, Caught]:
    """Run all bad kernels through all modes."""
    return {bad: caught(bad, bad_inputs()) for bad in BAD}


def markdown(table: dict[Bad, Caught]) -> str:
    """Format the table as in README.md."""
    lines = ["| Kernel | " + " | ".join(MODES) + " |", "|---" * (len(MODES) + 1) + "|"]
    for bad, found in table.items():
        lines.append(f"| {bad.name} | " + " | ".join(found.get(m, "") for m in MODES) + " |")
    return "\n".join(lines)
