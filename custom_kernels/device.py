"""Which executor runs an op: MLX's own ops, or on a CPU device the numba kernels."""

import functools
import os
import sys
from types import ModuleType

import mlx.core as mx

from ..errors import FlashMoEError
from . import launch

PROMPT_PART = 512  # tokens


def kernel_mode() -> str:
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
    if kernel_mode() == "stock" or _rejected:
        return None
    # Threads that spin for long while they wait are taken for busy, and put off for whole time
    # slices when another program runs: decoding slows down tenfold (docs/concepts/kernels.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        from .cpu import prefill
    except ImportError:
        print(
            "[flashmoe] numba is not installed, so experts are computed by MLX's own CPU ops, "
            "which are many times slower. Install it: pip install numba",
            file=sys.stderr,
        )
        return None
    return prefill


def on_gpu(x: mx.array) -> bool:
    """Say whether `x` is computed on a GPU that our kernels run on, and they are wanted."""
    gpu_dtype = x.dtype in (mx.bfloat16, mx.float16, mx.float32)
    return gpu_dtype and _gpu_is_default() and kernel_mode() != "stock"


def _gpu_is_default() -> bool:
    return mx.default_device() == mx.Device(mx.gpu) and launch.available()


def cpu_kernels(x: mx.array) -> ModuleType | None:
    """Return the module of CPU kernels if they can take `x`, else None.

    They compute at once, where MLX would build a graph, and take float32 on a CPU device.
    """
    if x.dtype != mx.float32 or mx.default_device() != mx.Device(mx.cpu):
        return None
    return _cpu_module()


def keep_pace(before: mx.array, h: mx.array) -> None:
    """Have a GPU compute a prompt's layer, from `before` to `h`, while the next is prepared.

    More than two layers at once would take more memory.
    """
    if on_gpu(h):
        mx.async_eval(h)
        mx.eval(before)


def tokens_at_once(h: mx.array) -> int | None:
    """Return how many tokens of a prompt to run through attention at a time, None for all.

    What CPU kernels make of 2,048 tokens takes 300 MB at 35B size, which the expert cache has more
    use for.
    """
    return PROMPT_PART if cpu_kernels(h) else None


def activation_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Return what to compute in: on a CPU float32, as MLX is slow and inexact there in bfloat16."""
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else dtype


def computes_at_once() -> bool:
    """Say whether CPU kernels compute float32, at once, where MLX would build a graph."""
    return cpu_kernels(mx.zeros(1)) is not None
