"""The one door for devices: where experts' bytes lie, and how small arrays cross.

A store is given a back-end when it is opened, and asks nothing else about the device.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..format.layout import ExpertLayout
from .sizing import CachePlan


class Row(Protocol):
    """Some bytes of a slot: a memoryview, or an address in a GPU's memory."""

    def __len__(self) -> int:
        """Return how many bytes these are."""
        ...

    def __getitem__(self, part: slice, /) -> "Row":
        """Return a slice in steps of one."""
        ...


class BulkReads(Protocol):
    """Reads of many pieces by one call, for back-ends whose threads are better left alone."""

    @property
    def width(self) -> int:
        """How many pieces are read at a time."""
        ...

    def takes(self, piece: Any) -> bool:
        """Say whether `read` has room for a piece, and the piece for its bytes."""
        ...

    def read(self, pieces: Sequence[Any]) -> list[int]:
        """Fill the rows of pieces, and return how many bytes of each came."""
        ...


class DeviceTable(Protocol):
    """Which expert lies in which slot of a layer, as the device knows it.

    Attributes:
        leads: whether the device's table is newer than the host's.
        thread: the one that asked for experts last.
    """

    leads: bool
    thread: int

    def take(self, slot_of: np.ndarray, demand: np.ndarray) -> None:
        """Go on from a table of the host's: `[experts]` uint32 slots or NONE, float32 log2 uses."""
        ...

    def give(self) -> tuple[np.ndarray, np.ndarray]:
        """Wait for all that was begun, and return the table; now the host may change it."""
        ...

    def load(self, ids: mx.array, earlier: mx.array) -> mx.array:
        """Return the slots of experts `[..., K]`, whose bytes are there when they are computed."""
        ...

    def hold(self, consumer: mx.array) -> None:
        """Load nothing more before `consumer`, which reads the slots, is computed."""
        ...


class DeviceLoader(Protocol):
    """Loads experts on the device itself; `of_layer` has each layer's table."""

    @property
    def of_layer(self) -> Sequence[DeviceTable]: ...  # noqa: D102

    def copy(
        self,
        layer: int,
        experts: Sequence[int],
        slots: Sequence[int],
        earlier: Sequence[mx.array],
    ) -> Sequence[Any]:
        """Begin to load experts into slots that the host chose; return the arrival of each.

        Args:
            layer: decoder layer.
            experts: ids.
            slots: of the layer, as many.
            earlier: what reads these slots, and is computed before.
        """
        ...

    def counted(self) -> np.ndarray:
        """Return experts asked for, experts loaded and nanoseconds, `[layers, 3]`, since last."""
        ...

    def close(self) -> None:
        """Wait for what is under way, and give the files back."""
        ...


class Backend(Protocol):
    """What a store asks of a device.

    Attributes:
        visible: whether the host sees the bytes in the rows, so that they can be checked.
        shares_cores: whether computing and reading take the same cores' time.
        bulk: how to read many pieces at once, None to leave all to the reader threads.
        free_bytes: of a memory that only the device has, None if it uses the host's.
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
            FlashMoEError: the system refuses so much.
        """
        ...

    def allocate(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Return evaluated, row-contiguous zeros."""
        ...

    def rows(self, arrays: Sequence[mx.array]) -> Sequence[Row]:
        """Return each array's bytes, to be written to by `preadv`."""
        ...

    def preadv(self, descriptor: int, rows: Sequence[Any], offset: int) -> int:
        """Fill rows from a file, as `os.preadv` does, and return how many bytes came."""
        ...

    def to_host(self, ids: mx.array) -> np.ndarray:
        """Return the values of a uint32 array, none of them 2**32 - 1, once it is computed."""
        ...

    def to_device(self, slots: np.ndarray) -> mx.array:
        """Return uint32 values as an array."""
        ...

    def loader(
        self, layout: ExpertLayout, plan: CachePlan, arrays: Sequence[Sequence[mx.array]]
    ) -> DeviceLoader | None:
        """Return what loads experts on the device itself, None if the host has to.

        Args:
            layout: where the experts lie.
            plan: how many slots each layer has.
            arrays: of each layer, nine with a row per slot.
        """
        ...
