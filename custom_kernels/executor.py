"""Which executor runs an op: MLX's own ops, or on a CPU device the numba kernels."""

import functools
import os
import sys
from types import ModuleType

import mlx.core as mx


@functools.cache
def _cpu_module() -> ModuleType | None:
    choice = os.environ.get("FLASHMOE_KERNELS", "auto")
    if choice not in ("auto", "custom", "stock"):
        raise ValueError(
            f"FLASHMOE_KERNELS = {choice!r} is not a choice of kernels. "
            "Write auto, custom or stock."
        )
    if choice == "stock":
        return None
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


def cpu_kernels(x: mx.array) -> ModuleType | None:
    """Return the module of CPU kernels if they can take `x`, else None.

    They compute at once, where MLX would build a graph, and take float32 on a CPU device.
    """
    if x.dtype != mx.float32 or mx.default_device() != mx.Device(mx.cpu):
        return None
    return _cpu_module()
