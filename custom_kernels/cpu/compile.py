"""Compile a model's CPU kernels, once per machine, and check them."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx

from ...progress import first_use
from ..autotune import report, verdict
from ..device import computes_at_once, reject_cpu_kernels
from ..linear.cases import MatvecCase
from ..linear.matvec import supports


def prepare(formats: Iterable[tuple[int, int, str]]) -> None:
    """Compile a model's CPU kernels before its weights take memory; does nothing on a GPU.

    First use on a machine compiles in a child process, because the compiler keeps 130 MB; numba
    then loads the results from disk.

    Args:
        formats: (bits, group size, "float32" or "bfloat16" scales) of the model's matrices.
    """
    if not computes_at_once():
        return
    wanted = json.dumps(sorted(formats))
    marker = _marker(wanted)
    if not marker.exists() and os.access(marker.parent, os.W_OK):
        code = f"from {__name__} import compile_all; compile_all({wanted!r})"
        # OSError: cannot start a process, or the disk is full. Then compile here.
        with first_use("compiling kernels", everywhere=True), contextlib.suppress(OSError):
            done = subprocess.run([sys.executable, "-c", code], capture_output=True)
            if done.returncode == 0:
                marker.touch()
    compile_all(wanted)


def compiled_folder() -> tuple[str | None, list[str]]:
    """Return the folder of compiled CPU kernels (None if not on disk) and its problems."""
    if not computes_at_once():
        return None, []
    from . import numba_cache

    folder = numba_cache.folder()
    return str(folder) if folder.is_dir() else None, numba_cache.complaints


def compile_all(formats: str) -> None:
    """Compile the kernels for a JSON list of formats, or load them from numba's cache."""
    from . import block, gated_delta, prefill

    for bits, group_size, dtype in json.loads(formats):
        prefill.prepare(bits, group_size, getattr(mx, dtype))
    gated_delta.prepare()
    block.prepare()


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
