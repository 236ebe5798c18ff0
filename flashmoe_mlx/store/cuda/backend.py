"""The back-end of NVIDIA GPUs: rows in the GPU's memory, filled through pinned memory."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ...format.layout import ExpertLayout
from ..backend import AllocatedByMlx
from ..sizing import CachePlan
from . import mailbox, resident
from .pinned import GpuRow, gpu_reads, gpu_rows


class CudaBackend(AllocatedByMlx):
    """A GPU with its own memory."""

    visible = False
    shares_cores = False

    def __init__(self) -> None:
        """Open the CUDA driver.

        Raises:
            FlashMoEError: the driver returns an error.
        """
        self._reads = gpu_reads()
        self.bulk = self._reads if self._reads.at_once else None
        self.preadv = self._reads.preadv

    @property
    def free_bytes(self) -> int:
        """Free bytes of the GPU's memory."""
        return int(mx.device_info()["free_memory"])

    def rows(self, arrays: Sequence[mx.array]) -> list[GpuRow]:
        """Return the GPU addresses of arrays: see `gpu_rows`."""
        return gpu_rows(arrays)

    def to_host(self, ids: mx.array) -> np.ndarray:
        """Wait for a uint32 array without 2**32 - 1, and return its values."""
        return mailbox.to_host(ids)

    def to_device(self, slots: np.ndarray) -> mx.array:
        """Return uint32 values as an MLX array."""
        return mailbox.to_device(slots)

    def loader(
        self, layout: ExpertLayout, plan: CachePlan, arrays: Sequence[Sequence[mx.array]]
    ) -> resident.GpuLoader | None:
        """Return a loader from the page cache: see `map_files`."""
        return resident.map_files(layout, plan, arrays)
