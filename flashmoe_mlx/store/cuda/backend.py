"""The back-end of NVIDIA GPUs: rows in the GPU's memory, filled through pinned memory."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ...format.layout import ExpertLayout
from ..sizing import CachePlan
from . import mailbox, resident
from .pinned import GpuRow, gpu_reads, gpu_rows


class CudaBackend:
    """A GPU with memory of its own."""

    visible = False
    shares_cores = False

    def __init__(self) -> None:
        """Find CUDA's driver.

        Raises:
            FlashMoEError: it is not there, or refuses.
        """
        self._reads = gpu_reads()
        self.bulk = self._reads if self._reads.at_once else None
        self.preadv = self._reads.preadv

    @property
    def free_bytes(self) -> int:
        """Free bytes of the GPU's own memory."""
        return int(mx.device_info()["free_memory"])

    def check_room(self, nbytes: int) -> None:
        """Leave it to MLX's allocator: the memory is the GPU's."""

    def allocate(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Return evaluated zeros."""
        array = mx.zeros(shape, dtype=dtype)
        mx.eval(array)
        return array

    def rows(self, arrays: Sequence[mx.array]) -> list[GpuRow]:
        """Return where arrays lie in the GPU's memory; nobody may take a view of them later."""
        return gpu_rows(arrays)

    def to_host(self, ids: mx.array) -> np.ndarray:
        """Return the values of a uint32 array, none of them 2**32 - 1, once it is computed."""
        return mailbox.to_host(ids)

    def to_device(self, slots: np.ndarray) -> mx.array:
        """Return uint32 values as an array."""
        return mailbox.to_device(slots)

    def loader(
        self, layout: ExpertLayout, plan: CachePlan, arrays: Sequence[Sequence[mx.array]]
    ) -> resident.GpuLoader | None:
        """Return what loads experts out of the page cache, None where that cannot be had."""
        return resident.map_files(layout, plan, arrays)
