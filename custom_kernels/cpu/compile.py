"""Compile a model's CPU kernels, once per machine, and check them."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import mlx.core as mx

from ...progress import first_use
from ..autotune import report, verdict
from ..device import computes_at_once, reject_cpu_kernels
from ..linear.cases import MatvecCase
from ..linear.matvec import supports

PARTS = 2  # compiled by as many processes


def prepare(formats: Iterable[tuple[int, int, str]]) -> None:
    """Compile a model's CPU kernels before its weights take memory; does nothing on a GPU.

    First use on a machine compiles in child processes: two cores take half the time, and the
    compiler keeps 130 MB; numba then loads the results from disk.

    Args:
        formats: (bits, group size, "float32" or "bfloat16" scales) of the model's matrices.
    """
    if not computes_at_once():
        return
    wanted = json.dumps(sorted(formats))
    marker = _marker(wanted)
    if not marker.exists() and os.access(marker.parent, os.W_OK):
        code = f"from {__name__} import compile_part; compile_part({wanted!r}, %d)"
        # OSError: cannot start a process, or the disk is full. Then compile here.
        with first_use("compiling kernels", everywhere=True), contextlib.suppress(OSError):
            if _run([[sys.executable, "-c", code % part] for part in range(PARTS)]):
                marker.touch()
    compile_all(wanted)


def compiled_folder() -> tuple[str | None, list[str]]:
    """Return the folder of compiled CPU kernels (None if not on disk) and its problems."""
    if not computes_at_once():
        return None, []
    from . import numba_cache

    folder = numba_cache.folder()
    return str(folder) if folder.is_dir() else None, numba_cache.complaints


def _run(commands: Sequence[Sequence[str]]) -> bool:
    """Run commands at once; return whether all succeeded."""
    children: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            quiet = subprocess.DEVNULL
            children.append(subprocess.Popen(command, stdout=quiet, stderr=quiet))
    finally:
        codes = [child.wait() for child in children]
    return not any(codes)


def compile_all(formats: str) -> None:
    """Compile the kernels for a JSON list of formats, or load them from numba's cache."""
    for part in range(PARTS):
        compile_part(formats, part)


def compile_part(formats: str, part: int) -> None:
    """Compile attention and prompts' kernels (part 0), or the rest (1), which take as long."""
    from . import attention_step, block, decode, gated_delta, prefill

    known = json.loads(formats)
    taken = [(b, g) for b, g, _ in known if b in prefill.BITS and g in prefill.GROUP_SIZES]
    if part == 1:
        block.prepare(*(taken or [(4, 64)])[0])
        return
    attention_step.compile_kernels()
    for bits, group_size, dtype in known:
        prefill.prepare(bits, group_size, getattr(mx, dtype))
    for bits, group_size in taken[1:]:
        _ = decode.product_of(bits, group_size).address
    gated_delta.prepare()


def _marker(formats: str) -> Path:
    """Return the marker file: it exists once numba's cache beside it has these formats."""
    from . import numba_cache

    sources = [(f.name, f.stat().st_mtime_ns) for f in sorted(Path(__file__).parent.glob("*.py"))]
    versions = sys.version, importlib.metadata.version("numba")
    mode = os.environ.get("FLASHMOE_DEBUG_BOUNDS")  # see bounds.py
    key = json.dumps([formats, sources, versions, mode, platform.node()])
    return numba_cache.folder() / f"compiled-{hashlib.sha256(key.encode()).hexdigest()[:24]}"


def check_cpu_kernels(formats: Iterable[tuple[int, int, str]]) -> None:
    """Check the CPU kernels against the reference; if one is wrong, reject all of them.

    They share their code, unlike GPU kernels, which are checked one by one at first use.

    Args:
        formats: (bits, group size, dtype of the scales) of a model's matrices.
    """
    if not computes_at_once():
        return
    for bits, group_size, dtype in sorted(formats):
        if supports(bits, group_size):
            case = MatvecCase(67, 2 * group_size, bits, group_size, "float32", dtype, 3)
            found = verdict(case, timed=False)
            if not found.ok:
                report(case, found)
                reject_cpu_kernels(found.message)
