"""Which executor runs an op: MLX's own ops, or on a CPU device the numba kernels."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import mlx.core as mx

from flashmoe_mlx.custom_kernels import gpu
from flashmoe_mlx.errors import FlashMoEError


def kernel_choice() -> str:
    """Return FLASHMOE_KERNELS: "auto" (the default), "stock" or "custom".

    Raises:
        FlashMoEError: it is anything else.
    """
    choice = os.environ.get("FLASHMOE_KERNELS", "auto")
    if choice not in ("auto", "stock", "custom"):
        raise FlashMoEError(
            f"FLASHMOE_KERNELS = {choice!r} is not a choice of kernels. "
            "Write auto, stock or custom."
        )
    return choice


_rejected: set[str] = set()


def reject_cpu_kernels(reason: str) -> None:
    """Use MLX's own ops on the CPU from now on in this process."""
    _rejected.add(reason)
    _cpu_module.cache_clear()


@functools.cache
def _cpu_module() -> ModuleType | None:
    if kernel_choice() == "stock" or _rejected:
        return None
    # Threads that spin for long while they wait are taken for busy, and put off for whole time
    # slices when another program runs: decoding then slows down tenfold. See docs/kernels.md.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        from flashmoe_mlx.custom_kernels import cpu
    except ImportError:
        print(
            "[flashmoe] numba is not installed, so experts are computed by MLX's own CPU ops, "
            "which are many times slower. Install it: pip install numba",
            file=sys.stderr,
        )
        return None
    return cpu


def on_gpu(x: mx.array) -> bool:
    """Say whether `x` is computed on a GPU that our kernels run on, and they are wanted."""
    gpu_dtype = x.dtype in (mx.bfloat16, mx.float16, mx.float32)
    return gpu_dtype and _gpu_is_default() and kernel_choice() != "stock"


def _gpu_is_default() -> bool:
    return mx.default_device() == mx.Device(mx.gpu) and gpu.available()


def cpu_kernels(x: mx.array) -> ModuleType | None:
    """Return the module of CPU kernels if they can take `x`, else None.

    They compute at once, where MLX would build a graph, and take float32 on a CPU device.
    """
    if x.dtype != mx.float32 or mx.default_device() != mx.Device(mx.cpu):
        return None
    return _cpu_module()


def cpu_steps(x: mx.array) -> ModuleType | None:
    """Return the module of whole CPU blocks for decoding if they can take `x`, else None."""
    if cpu_kernels(x) is None:
        return None
    from flashmoe_mlx.custom_kernels import cpu_block

    return cpu_block


def prepare(formats: Iterable[tuple[int, int, str]]) -> None:
    """Compile the CPU kernels that a model needs, before it takes memory; a no-op on a GPU.

    A machine's first use compiles in a process of its own, because the compiler keeps 130 MB;
    numba then finds the results on disk.

    Args:
        formats: (bits, group size, "float32" or "bfloat16" scales) of the model's matrices.
    """
    if cpu_kernels(mx.zeros(1)) is None:
        return
    wanted = json.dumps(sorted(formats))
    marker = _marker(wanted)
    if not marker.exists() and os.access(marker.parent, os.W_OK):
        print(
            "[flashmoe] compiling CPU kernels, once on this machine for models of these bits: "
            "a minute or two",
            file=sys.stderr,
            flush=True,
        )
        code = f"from {__name__} import compile_all; compile_all({wanted!r})"
        with contextlib.suppress(OSError):  # no other process, or a full disk: compiled here
            done = subprocess.run([sys.executable, "-c", code], capture_output=True)
            if done.returncode == 0:
                marker.touch()
    compile_all(wanted)


def compiled_folder() -> tuple[str | None, list[str]]:
    """Return where compiled CPU kernels are kept, None if nowhere; and what is wrong with that."""
    if cpu_kernels(mx.zeros(1)) is None:
        return None, []
    from flashmoe_mlx.custom_kernels import numba_cache

    folder = numba_cache.folder()
    return str(folder) if folder.is_dir() else None, numba_cache.complaints


def compile_all(formats: str) -> None:
    """Compile the kernels for a JSON list of formats, or load them from numba's cache."""
    from flashmoe_mlx.custom_kernels import cpu, cpu_block, cpu_delta

    for bits, group_size, dtype in json.loads(formats):
        cpu.prepare(bits, group_size, getattr(mx, dtype))
    cpu_delta.prepare()
    cpu_block.prepare()


def _marker(formats: str) -> Path:
    """Return the file that says that numba's cache, beside it, has kernels for these formats."""
    from flashmoe_mlx.custom_kernels import numba_cache

    sources = [(f.name, f.stat().st_mtime_ns) for f in sorted(Path(__file__).parent.glob("*.py"))]
    versions = sys.version, importlib.metadata.version("numba")
    mode = os.environ.get("FLASHMOE_DEBUG_BOUNDS")  # see bounds.py
    key = json.dumps([formats, sources, versions, mode, platform.node()])
    return numba_cache.folder() / f"compiled-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
