"""The back-end that runs an op: MLX's own ops, GPU kernels, or numba kernels on a CPU."""

import functools
import os
import sys
from types import ModuleType

import mlx.core as mx

from ..errors import FlashMoEError
from . import launch

PROMPT_CHUNK = 512  # tokens
BLOCK = 64  # tokens; a multiple of all kernels' blocks


def kernel_mode() -> str:
    """Return FLASHMOE_KERNELS: "auto" (the default), "stock" or "custom".

    Raises:
        FlashMoEError: any other value.
    """
    mode = os.environ.get("FLASHMOE_KERNELS", "auto")
    if mode not in ("auto", "stock", "custom"):
        raise FlashMoEError(
            f"FLASHMOE_KERNELS = {mode!r} is not valid. Set it to auto, stock or custom."
        )
    return mode


_rejected: set[str] = set()


def reject_cpu_kernels(reason: str) -> None:
    """Use MLX's own ops on the CPU for the rest of this process."""
    _rejected.add(reason)
    _cpu_module.cache_clear()


@functools.cache
def _cpu_module() -> ModuleType | None:
    if kernel_mode() == "stock" or _rejected:
        return None
    # Threads that spin for long while waiting are preempted for whole time slices when another
    # program runs: decode slows down tenfold (docs/concepts/kernels.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        from .cpu import prefill
    except ImportError:
        print(
            "[flashmoe] numba is not installed: MLX's own CPU ops compute the experts, many times "
            "slower. Install it: pip install numba",
            file=sys.stderr,
        )
        return None
    return prefill


def on_gpu(x: mx.array) -> bool:
    """Return whether our GPU kernels may compute `x`: device, dtype and FLASHMOE_KERNELS."""
    gpu_dtype = x.dtype in (mx.bfloat16, mx.float16, mx.float32)
    return gpu_dtype and _gpu_is_default() and kernel_mode() != "stock"


def _gpu_is_default() -> bool:
    return mx.default_device() == mx.Device(mx.gpu) and launch.available()


def cpu_kernels(x: mx.array) -> ModuleType | None:
    """Return the module of CPU kernels if they support `x` (float32 on a CPU), else None.

    They compute eagerly, where MLX would build a graph.
    """
    if x.dtype != mx.float32 or mx.default_device() != mx.Device(mx.cpu):
        return None
    return _cpu_module()


def keep_pace(before: mx.array, h: mx.array) -> None:
    """Start a prompt's layer, from `before` to `h`, on a GPU while the host prepares the next one.

    Waiting for `before` limits memory to two layers.
    """
    if on_gpu(h):
        mx.async_eval(h)
        mx.eval(before)


def tokens_at_once(h: mx.array) -> int | None:
    """Return the number of tokens per row of `[B, T, H]` and pass through attention, None for all.

    On a CPU, temporaries of 2,048 tokens take 300 MB at 35B size, better spent on cached experts.
    """
    return tokens_per_row(PROMPT_CHUNK, len(h)) if cpu_kernels(h) else None


def tokens_per_row(tokens: int, rows: int) -> int:
    """Return each row's part of a number of tokens, at least one.

    A part consists of whole blocks if it can: then kernels round its rows as they do in the whole.
    """
    each = tokens // rows
    return each // BLOCK * BLOCK or max(1, each)


def activation_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Return the dtype to compute in: float32 on a CPU: MLX's bfloat16 is slow and inexact."""
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else dtype


def computes_at_once() -> bool:
    """Return whether CPU kernels compute float32 eagerly, where MLX would build a graph."""
    return cpu_kernels(mx.zeros(1)) is not None
