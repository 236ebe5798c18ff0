"""The back-end for the device that MLX computes on."""

import mlx.core as mx

from .backend import Backend
from .host import CpuBackend, UnifiedBackend


def choose() -> Backend:
    """Return the back-end of MLX's default device."""
    if mx.default_device() == mx.Device(mx.cpu):
        return CpuBackend()
    if mx.cuda.is_available():
        from .cuda.backend import CudaBackend

        return CudaBackend()
    return UnifiedBackend()
