"""Whole layers of a decoding step on a CPU, where its kernels can take them."""

from types import ModuleType

import mlx.core as mx

from ..device import cpu_kernels


def cpu_steps(x: mx.array) -> ModuleType | None:
    """Return the module of whole CPU blocks for decoding if they can take `x`, else None."""
    if cpu_kernels(x) is None:
        return None
    from . import block  # needs numba

    return block
