"""The interface of a device: memory for experts, and transfers of small arrays.

A store receives a back-end when it opens, and asks nothing else about the device.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..custom_kernels.packed import Part, parts_of, room
from ..format.layout import ExpertLayout
from .sizing import CachePlan


class Row(Protocol):
    """A byte range of a slot: a memoryview, or an address in GPU memory."""

    def __len__(self) -> int:
        """Return the number of bytes."""
        ...

    def __getitem__(self, part: slice, /) -> "Row":
        """Return a slice with step 1."""
        ...


class BulkReads(Protocol):
    """Reads of many pieces in one call, for back-ends where that is faster than threads."""

    @property
    def width(self) -> int:
        """How many pieces are read concurrently."""
        ...

    def takes(self, piece: Any) -> bool:
        """Say whether `read` can take a piece."""
        ...

    def read(self, pieces: Sequence[Any]) -> list[int]:
        """Fill the rows of pieces, and return the bytes read of each."""
        ...


class DeviceTable(Protocol):
    """The device's table of which expert lies in which slot of a layer.

    Attributes:
        is_newer: whether this table is newer than the host's.
        thread: the thread that loaded last.
    """

    is_newer: bool
    thread: int

    def take_from_host(self, slot_of: np.ndarray, scores: np.ndarray) -> None:
        """Continue from the host's table: `[experts]` uint32 slots or NONE, float32 log2 uses."""
        ...

    def give_to_host(self) -> tuple[np.ndarray, np.ndarray]:
        """Wait for running loads, and return the table, which the host may then change."""
        ...

    def load(self, ids: mx.array, after: mx.array) -> mx.array:
        """Return the slots of experts `[..., K]`; evaluating them loads the bytes."""
        ...

    def hold(self, consumer: mx.array) -> None:
        """Start the next load only when `consumer`, which reads the slots, is computed."""
        ...


class DeviceLoader(Protocol):
    """Loads experts from the device; `of_layer` has each layer's table."""

    @property
    def of_layer(self) -> Sequence[DeviceTable]: ...  # noqa: D102

    def copy(
        self,
        layer: int,
        experts: Sequence[int],
        slots: Sequence[int],
        after: Sequence[mx.array],
    ) -> Sequence[Any]:
        """Start to copy experts into slots that the host chose; return the arrival of each.

        Args:
            layer: decoder layer.
            experts: expert ids.
            slots: one for each expert.
            after: arrays that read these slots; copies start when they are computed.
        """
        ...

    def counted(self) -> np.ndarray:
        """Return `[layers, 3]` since the last call: experts requested, loaded, nanoseconds."""
        ...

    def close(self) -> None:
        """Wait for running loads, and release the files."""
        ...


class AllocatedByMlx:
    """What back-ends share where MLX allocates the memory and checks it."""

    def check_room(self, nbytes: int) -> None:
        """Do nothing: an MLX allocation that fails on a GPU raises."""

    def allocate(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Return evaluated zeros."""
        array = mx.zeros(shape, dtype=dtype)
        mx.eval(array)
        return array

    def allocate_together(
        self, shapes: Sequence[tuple[tuple[int, ...], mx.Dtype]]
    ) -> list[Part] | None:
        """Return zeros in one buffer."""
        return parts_of(self.allocate((room(shapes),), mx.uint32), shapes)


class Backend(Protocol):
    """What a store needs from a device.

    Attributes:
        visible: whether the host can read the rows, so that checksums work.
        shares_cores: whether the cores that compute also read.
        bulk: reads of many pieces in one call, None to use the reader threads alone.
        free_bytes: free bytes of the device's memory, None if it uses the host's.
    """

    @property
    def visible(self) -> bool: ...  # noqa: D102
    @property
    def shares_cores(self) -> bool: ...  # noqa: D102
    @property
    def bulk(self) -> BulkReads | None: ...  # noqa: D102
    @property
    def free_bytes(self) -> int | None: ...  # noqa: D102

    def check_room(self, nbytes: int) -> None:
        """Reserve memory and release it: MLX aborts the process when an allocation fails.

        Raises:
            FlashMoEError: the system refuses it.
        """
        ...

    def allocate(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Return evaluated, row-contiguous zeros."""
        ...

    def allocate_together(
        self, shapes: Sequence[tuple[tuple[int, ...], mx.Dtype]]
    ) -> list[Part] | None:
        """Return zeros in one buffer, which GPU kernels bind faster; None on a CPU."""
        ...

    def rows(self, arrays: Sequence[mx.array]) -> Sequence[Row]:
        """Return each array's bytes, for `preadv` to fill."""
        ...

    def preadv(self, descriptor: int, rows: Sequence[Any], offset: int) -> int:
        """Fill rows from a file as `os.preadv` does, and return the bytes read."""
        ...

    def to_host(self, ids: mx.array) -> np.ndarray:
        """Wait for a uint32 array without 2**32 - 1, and return its values."""
        ...

    def to_device(self, slots: np.ndarray) -> mx.array:
        """Return uint32 values as an MLX array."""
        ...

    def loader(
        self, layout: ExpertLayout, plan: CachePlan, arrays: Sequence[Sequence[mx.array]]
    ) -> DeviceLoader | None:
        """Return a loader into nine arrays per layer, None if the host must read the experts."""
        ...
