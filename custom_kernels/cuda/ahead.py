"""Compile MLX's own kernels in child processes, all at once.

MLX compiles one kernel at a time, the largest for half a minute, and keeps the results on disk for
all processes.
"""

import atexit
import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...progress import first_use
from ..case import KernelCase

_awaited: list[tuple[subprocess.Popen[bytes], Path]] = []


def start(cases: Sequence[KernelCase], later: Sequence[KernelCase] = ()) -> None:
    """Start to compile what these cases and OPS need, unless that is done.

    Args:
        cases: `wait` waits for them.
        later: for long prompts; nothing waits.
    """
    jobs = [*map(json.dumps, OPS), *map(_as_json, cases)]
    _awaited.extend(filter(None, map(_child, jobs)))
    for job in map(_as_json, later):
        _child(job)


def wait() -> None:
    """Wait for the children. What one could not compile, this process will."""
    if not _awaited:
        return
    with first_use("compiling MLX's kernels"):
        while _awaited:
            child, mark = _awaited.pop()
            if child.wait() == 0:
                with contextlib.suppress(OSError):
                    mark.touch()


def _as_json(case: Any) -> str:
    return json.dumps([type(case).__module__, type(case).__name__, asdict(case)])


def _child(job: str) -> tuple[subprocess.Popen[bytes], Path] | None:
    """Start a child, unless a mark beside MLX's compiled kernels says that one has succeeded."""
    digest = hashlib.sha256(f"{job}{mx.device_info().get('architecture')}".encode()).hexdigest()
    mark = _folder() / f"flashmoe-{digest[:24]}"
    if mark.exists():
        return None
    command = [sys.executable, "-m", __name__, job]
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    try:
        child = subprocess.Popen(command, **quiet, env={**os.environ, "FLASHMOE_KERNELS": "custom"})
    except OSError:
        return None
    atexit.register(child.kill)
    return child, mark


def _folder() -> Path:
    """Return where MLX keeps compiled kernels."""
    given = os.environ.get("MLX_PTX_CACHE_DIR")
    return (
        Path(given)
        if given
        else Path(tempfile.gettempdir(), "mlx", importlib.metadata.version("mlx"), "ptx")
    )


def _look_up() -> None:
    """Take rows of tables, as embeddings do."""
    for table in (mx.bfloat16, mx.float16, mx.uint32):
        for index in (mx.uint32, mx.int32):
            mx.eval(mx.zeros((4, 8), table)[mx.zeros(4, index)])


def _write() -> None:
    """Write a token's keys into a cache, as a decode step does."""
    mx.eval(mx.put_along_axis(mx.zeros((1, 4, 8), mx.bfloat16), mx.zeros((1, 1, 8), mx.int32),
                              mx.zeros((1, 1, 8), mx.bfloat16), axis=1))  # fmt: skip


OPS = {"look up": _look_up, "write": _write}


def _run(job: str) -> None:
    """Compile in this process what a job needs."""
    described = json.loads(job)
    if isinstance(described, str):
        OPS[described]()
        return
    module, name, fields = described
    case = getattr(importlib.import_module(module), name)(**fields)
    mx.eval(case.custom(*case.inputs()))


if __name__ == "__main__":
    _run(sys.argv[1])
