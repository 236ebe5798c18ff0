"""The back-ends that use host memory: `preadv` writes directly into MLX arrays."""

import math
import mmap
import os
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import FlashMoEError
from ..format.layout import ExpertLayout
from .backend import AllocatedByMlx
from .io_mode import BLOCK as BLOCK
from .sizing import CachePlan


class UnifiedBackend(AllocatedByMlx):
    """A GPU that shares the host's memory."""

    visible = True
    shares_cores = False
    bulk = None
    free_bytes = None

    def rows(self, arrays: Sequence[mx.array]) -> list[memoryview]:
        """Return each array's bytes."""
        return [memoryview(a).cast("B") for a in arrays]  # type: ignore[arg-type]

    def preadv(self, descriptor: int, rows: Sequence[Any], offset: int) -> int:
        """Fill rows from a file, and return the bytes read."""
        return os.preadv(descriptor, rows, offset)

    def to_host(self, ids: mx.array) -> np.ndarray:
        """Wait for an array, and return its values."""
        return np.array(ids)

    def to_device(self, slots: np.ndarray) -> mx.array:
        """Return values as an MLX array."""
        return mx.array(slots)

    def loader(
        self, layout: ExpertLayout, plan: CachePlan, arrays: Sequence[Sequence[mx.array]]
    ) -> None:
        """Return None: the host reads the experts."""


class CpuBackend(UnifiedBackend):
    """CPU cores, which compute and read."""

    shares_cores = True

    def check_room(self, nbytes: int) -> None:
        """Reserve memory and release it: MLX aborts the process when an allocation fails.

        Raises:
            FlashMoEError: the system refuses it.
        """
        try:
            mmap.mmap(-1, nbytes).close()
        except (OSError, OverflowError) as error:
            raise FlashMoEError(
                f"the expert cache takes {nbytes} bytes, which this system refuses "
                f"({getattr(error, 'strerror', None) or error}). Give a smaller expert_cache, or "
                "raise its limit (ulimit -v)."
            ) from error

    def allocate_together(self, shapes: Sequence[tuple[tuple[int, ...], mx.Dtype]]) -> None:
        """Return None: each array begins a block."""

    def allocate(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Return evaluated zeros aligned to a block.

        MLX's own arrays start 8 or 24 bytes after a block, where copies from the page cache run at
        a third of the speed.
        """
        flat = mx.zeros(math.prod(shape) + BLOCK // dtype.size, dtype=dtype)
        start = -_address(flat) % BLOCK // dtype.size
        array = flat[start : start + math.prod(shape)].reshape(shape)
        mx.eval(array)
        return array


def _address(array: mx.array) -> int:
    """Return an array's address."""
    mx.eval(array)
    return np.frombuffer(memoryview(array).cast("B"), np.uint8).ctypes.data  # type: ignore[arg-type]
