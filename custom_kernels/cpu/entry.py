"""Access to the CPU blocks that decode whole layers."""

from types import ModuleType

import mlx.core as mx

from ..device import cpu_kernels


def cpu_steps(x: mx.array) -> ModuleType | None:
    """Return the module of CPU blocks if they support `x`, else None."""
    if cpu_kernels(x) is None:
        return None
    from . import block  # needs numba

    return block
