"""Read byte ranges of checkpoint files. Works without MLX, for `verify`."""

import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from ...errors import FlashMoEError
from ...format.headers import ITEM_SIZE
from ...format.json_file import unreadable

T = TypeVar("T")
R = TypeVar("R")
Bytes = npt.NDArray[np.uint8]

# The smallest non-finite bit pattern, sign aside, and the integer types of the dtype's size.
_NOT_FINITE: dict[str, tuple[int, npt.DTypeLike, npt.DTypeLike]] = {
    "BF16": (0x7F80, np.int16, np.uint16),
    "F16": (0x7C00, np.int16, np.uint16),
    "F32": (0x7F800000, np.int32, np.uint32),
}
PAGE = 4096  # direct I/O needs multiples of it
_PROBES = 16  # bytes to look up in the page cache
_READ_LIMIT = 1 << 30  # Linux and macOS stop a single read short of 2 GiB


class Reader:
    """Reads byte ranges of files, which stay open until `close` or the end of the block."""

    def __init__(self, find: Callable[[Path], Path] | None = None) -> None:
        """Open nothing yet. `find` maps a file to the path of its data."""
        self._find = find or (lambda file: file)
        self._files: dict[Path, tuple[int, bool]] = {}  # descriptor, and whether it is direct
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        """Return the reader."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close every file."""
        for file in list(self._files):
            self.close(file)

    def close(self, file: Path) -> None:
        """Close one file, if it is open."""
        if file in self._files:
            os.close(self._files.pop(file)[0])

    def read(self, file: Path, offset: int, nbytes: int) -> Bytes:
        """Return `nbytes` bytes from `offset`, as uint8 `[nbytes]`."""
        buffer = self.buffer(nbytes)
        self.read_into(file, offset, buffer)
        return buffer

    @staticmethod
    def buffer(nbytes: int) -> Bytes:
        """Return page-aligned memory, uint8 `[nbytes]`; freed, it goes back to the system."""
        return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)[:nbytes]

    def read_into(self, file: Path, offset: int, buffer: Bytes) -> None:
        """Fill `buffer` (uint8, contiguous) from `offset`.

        Raises:
            FlashMoEError: the file ends before the buffer is full, or cannot be read.
        """
        descriptor, direct = self._open(file)
        first = offset - offset % PAGE if direct else offset
        nbytes = offset + buffer.size - first
        memory = buffer
        if direct and (first < offset or (buffer.ctypes.data | buffer.size) % PAGE):
            memory = self.buffer(-(-nbytes // PAGE) * PAGE)
        done = 0
        while done < nbytes:
            piece = memory.data[done : done + _READ_LIMIT]
            try:
                count = os.preadv(descriptor, [piece], first + done)
            except OSError as error:
                raise unreadable(file, error) from error
            done += count
            if done < nbytes and (count == 0 or (direct and done % PAGE)):
                raise FlashMoEError(
                    f"{file}: ends at byte {first + done}, but its header promises "
                    f"{nbytes - done} more. Download it again."
                )
        if memory is not buffer:
            buffer[:] = memory[offset - first : nbytes]

    def _open(self, file: Path) -> tuple[int, bool]:
        with self._lock:
            if file not in self._files:
                try:
                    self._files[file] = _open_source(self._find(file))
                except OSError as error:
                    raise unreadable(file, error) from error
            return self._files[file]


def _open_source(path: Path) -> tuple[int, bool]:
    """Open a file, for direct I/O unless the page cache holds most of it.

    On Linux, buffered reads of a large checkpoint reach a third of a disk's speed.

    Returns:
        The descriptor, and whether it is direct (reads whole pages into whole pages).
    """
    buffered = os.open(path, os.O_RDONLY)
    if not hasattr(os, "O_DIRECT") or _is_cached(buffered):
        return buffered, False
    try:
        direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return buffered, False
    try:
        os.preadv(direct, [Reader.buffer(PAGE).data], 0)
    except OSError:
        os.close(direct)
        return buffered, False
    os.close(buffered)
    return direct, True


def _is_cached(descriptor: int) -> bool:
    """Whether the page cache seems to hold half of a file, or the system cannot tell."""
    size, found = os.fstat(descriptor).st_size, 0
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    for number in range(_PROBES):
        try:
            found += os.preadv(descriptor, [bytearray(1)], size * number // _PROBES, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except OSError:  # the file system cannot tell
            return True
    return 2 * found >= _PROBES


def check_finite(data: Bytes, dtype: str, place: str) -> None:
    """Refuse NaN and infinity, which `mx.quantize` would hide (12 GB/s). `place` names the data."""
    if dtype not in _NOT_FINITE or not data.size:
        return
    limit, signed, unsigned = _NOT_FINITE[dtype]
    sign = 1 << (8 * ITEM_SIZE[dtype] - 1)
    if data.view(signed).max() >= limit or data.view(unsigned).max() >= limit | sign:
        raise FlashMoEError(
            f"{place} holds NaN or infinity ({dtype}). "
            "Download the checkpoint again, or use another one."
        )


def read_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield `function(item)` in order, computing the next one in a thread.

    At most three results are alive at once. `function` must not use MLX, whose streams belong to
    the thread that created them.
    """
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for item in items:
            following = pool.submit(function, item)
            if pending:
                yield pending.result()
            pending = following
        if pending:
            yield pending.result()
