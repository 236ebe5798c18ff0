"""Write complete files or none: NAME.tmp, fsync, rename; safetensors piece by piece.

Each writer returns the file's manifest *entry*: name, size and checksum.
"""

import errno
import functools
import json
import math
import os
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from ...format.headers import ITEM_SIZE
from ..source.read import PAGE

SYNC_BYTES = 32 << 20  # between two fsync calls
PENDING, LARGE = 2, 8 << 20  # queued writes; of pieces of this size, one less
BLOCK_BYTES = 1 << 20
TEMPORARY = ".tmp"
OWN_CHECKSUM = "manifest_checksum"  # the manifest's entry of its own checksum
CHECKSUM = "crc32"  # at least 2 GB/s per core; blake2b reaches 0.8
_POLYNOMIAL = 0xEDB88320
_ONE, _BYTE = 1 << 31, 1 << 23  # x^0 and x^8: the highest bit is the lowest power

Buffer = bytes | memoryview
Entry = dict[str, Any]
Tensors = Iterable[tuple[str, str, tuple[int, ...]]]


class Header:
    """The header of a safetensors file to write.

    Attributes:
        data: its bytes, from the start of the file to the first tensor.
        names: the tensors, in the order of their bytes.
        starts: the offset of each after the header, and the end of the last.
    """

    def __init__(self, tensors: Tensors, alignment: int = 8) -> None:
        """Lay out tensors (name, dtype, shape); data starts on a multiple of `alignment` bytes."""
        content: dict[str, object] = {"__metadata__": {"format": "mlx"}}
        self.names: list[str] = []
        self.starts = [0]
        for name, dtype, shape in tensors:
            begin, end = self.starts[-1], self.starts[-1] + math.prod(shape) * ITEM_SIZE[dtype]
            content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            self.names.append(name)
            self.starts.append(end)
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % alignment)
        self.data = len(text).to_bytes(8, "little") + text

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return len(self.data) + self.starts[-1]


class TensorFile:
    """Writes a safetensors file of known tensors, each from front to back, within a `with` block.

    The file gets its name when the block succeeds; an exception removes it. A file written in
    several visits stays NAME.tmp until the last one.
    """

    def __init__(
        self, path: Path, tensors: Tensors, alignment: int = 8, written: Sequence[str] | None = None
    ) -> None:
        """Lay out the header.

        Args:
            path: of the finished file.
            tensors: (name, safetensors dtype, shape), in the order of their bytes.
            alignment: of the data, in bytes.
            written: for one of several visits, the checksums from the previous `begun` entry;
                empty on the first visit.
        """
        self.path = path
        self._temporary = path.with_name(path.name + TEMPORARY)
        self._header = Header(tensors, alignment)
        self._index = {name: index for index, name in enumerate(self._header.names)}
        self._ends = self._header.starts[:-1]  # of the written part of each tensor
        self._checksums = [0] * len(self._ends)
        self._visits, self._kept = written is not None, bool(written)
        for index, checksum in enumerate(written or ()):
            if checksum:
                self._checksums[index] = int(checksum, 16)
                self._ends[index] = self._header.starts[index + 1]
        self._pending: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1)
        self._unsynced = 0
        self._sync: Future[None] | None = None
        self._syncer = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        """Create the temporary file, or open it again."""
        self._file = _create(self._temporary, 0 if self._kept else os.O_TRUNC)
        self._direct = _open_direct(self._temporary)
        return self

    def write(self, name: str, data: Buffer, start: int = 0) -> None:
        """Write bytes from byte `start` of a tensor, across into the following tensors if long."""
        view = memoryview(data).cast("B")
        begin = self._header.starts[self._index[name]] + start
        self._pending.append(self._thread.submit(self._write, view, begin))
        self._wait(PENDING - (view.nbytes >= LARGE))

    def _wait(self, pending: int = 0) -> None:
        while len(self._pending) > pending:
            self._pending.popleft().result()

    def _write(self, view: memoryview, begin: int) -> None:
        """Write whole pages with direct I/O, other bytes through the page cache."""
        offset = len(self._header.data) + begin
        if self._direct is not None and _is_paged(view, offset):
            self._write_past(view, offset)
        else:
            self._write_at(self._file, view, offset)
            self._unsynced += view.nbytes
            if self._unsynced >= SYNC_BYTES and (self._sync is None or self._sync.done()):
                self._await_sync()
                self._sync = self._syncer.submit(os.fsync, self._file)
                self._unsynced = 0
        self._update_checksums(view, begin)

    def _await_sync(self) -> None:
        if self._sync:
            self._sync.result()  # the system reports a failed write only once

    def _write_past(self, view: memoryview, offset: int) -> None:
        assert self._direct is not None
        try:
            self._write_at(self._direct, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._write_at(self._file, view, offset)  # the disk's blocks are larger than a page

    def _write_at(self, file: int, data: Buffer, offset: int) -> None:
        try:
            write_at(file, data, offset)
        except OSError as error:
            place = f"{offset:,} of {self._header.file_bytes:,}"
            error.filename = f"{self._temporary}, byte {place}"
            raise

    def _update_checksums(self, view: memoryview, begin: int) -> None:
        starts = self._header.starts
        while view.nbytes:
            index = bisect_right(starts, begin) - 1
            piece = view[: starts[index + 1] - begin]
            assert self._ends[index] == begin, f"{self.path}: byte {begin} is out of order"
            self._checksums[index] = zlib.crc32(piece, self._checksums[index])
            self._ends[index] = begin = begin + piece.nbytes
            view = view[piece.nbytes :]

    def checksums(self, first: int = 0, count: int | None = None) -> list[tuple[int, int]]:
        """Return (CRC-32, bytes) of `count` (all) tensors from number `first` on."""
        self._wait()
        starts = self._header.starts
        last = len(self._checksums) if count is None else first + count
        return [(self._checksums[i], starts[i + 1] - starts[i]) for i in range(first, last)]

    @property
    def whole(self) -> bool:
        """Whether every tensor is written."""
        self._wait()
        return self._ends == self._header.starts[1:]

    def begun(self) -> Entry:
        """Return the entry of an incomplete file: `written` has "" for each missing tensor."""
        self._wait()
        triples = zip(self._checksums, self._ends, self._header.starts[1:], strict=True)
        written = [as_text(checksum) if end == full else "" for checksum, end, full in triples]
        return {"header": as_text(zlib.crc32(self._header.data)), "written": written}

    def entry(self) -> Entry:
        """Return name, size and checksums of the file and of its header."""
        header = zlib.crc32(self._header.data)
        parts = [(header, len(self._header.data)), *self.checksums()]
        whole = file_entry(self.path, self._header.file_bytes, joined(parts))
        return whole | {"header": as_text(header)}

    def tensors(self) -> dict[str, list[int | str]]:
        """Return [bytes, checksum] of every tensor."""
        pairs = zip(self._header.names, self.checksums(), strict=True)
        return {name: [nbytes, as_text(checksum)] for name, (checksum, nbytes) in pairs}

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Make the file durable and rename it, or remove it after an exception."""
        self._thread.shutdown()
        self._syncer.shutdown()
        try:
            if kind is None:
                self._wait()
                self._await_sync()
                self._finish()
        except OSError as failure:
            failure.filename = failure.filename or str(self._temporary)
            raise
        finally:
            os.close(self._file)
            if self._direct is not None:
                os.close(self._direct)
            if not self._kept:
                self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        assert self.whole or self._visits, f"{self.path}: bytes are missing"
        if self.whole:
            self._write_at(self._file, self._header.data, 0)
        os.fsync(self._file)
        self._kept = self._visits
        if self.whole:
            _publish(self._temporary, self.path)


def file_entry(path: Path, size: int, checksum: int) -> Entry:
    """Return a file's manifest entry."""
    return {"file": path.name, "size": size, "checksum": as_text(checksum)}


def write_file(path: Path, content: bytes | Path) -> Entry:
    """Write a file with these bytes, or a copy of a file."""
    size = checksum = 0
    with _durable(path) as file:
        for block in _blocks(content) if isinstance(content, Path) else (content,):
            write_at(file, block, size)
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return file_entry(path, size, checksum)


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def json_bytes(content: object) -> bytes:
    """Return JSON as mlx-lm writes it: four spaces, no line break at the end."""
    return json.dumps(content, indent=4).encode()


def write_json(path: Path, content: object) -> Entry:
    """Write a small JSON file."""
    return write_file(path, json_bytes(content))


def link_file(source: Path, target: Path) -> None:
    """Create the symlink `target`, or replace it."""
    temporary = target.with_name(target.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    os.symlink(source, temporary)
    _publish(temporary, target)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def _durable(path: Path) -> Iterator[int]:
    """Yield the descriptor of a new file, which gets its name when the block succeeds."""
    temporary = path.with_name(path.name + TEMPORARY)
    file = _create(temporary)
    try:
        yield file
        os.fsync(file)
        _publish(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(temporary)
        raise
    finally:
        os.close(file)
        temporary.unlink(missing_ok=True)


def _create(path: Path, truncate: int = os.O_TRUNC) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | truncate, 0o644)


def _open_direct(path: Path) -> int | None:
    """Open a file for direct I/O, or return None where the system has none.

    On Linux, writing through the page cache costs a third to three quarters of the speed, and
    evicts the pages of other programs.
    """
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | flag)
    except OSError:
        return None


def _is_paged(view: memoryview, offset: int) -> bool:
    """Whether bytes are whole pages, in memory and in the file."""
    place = np.frombuffer(view, np.uint8).ctypes.data if view.nbytes else 1
    return not (place % PAGE or view.nbytes % PAGE or offset % PAGE)


def _publish(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    sync_directory(path.parent)


def write_at(file: int, data: Buffer, offset: int) -> None:
    """Write all of `data` at a byte offset of an open file."""
    view = memoryview(data).cast("B")
    done = 0
    while done < view.nbytes:
        done += os.pwrite(file, view[done:], offset + done)


def as_text(checksum: int) -> str:
    """Return eight hexadecimal digits."""
    return f"{checksum:08x}"


def joined(parts: Iterable[tuple[int, int]]) -> int:
    """Return the CRC-32 of concatenated parts from the (CRC-32, bytes) of each.

    One pass over the data then gives the checksums of tensors, records and files, in any order.
    This is zlib's crc32_combine, which Python lacks.
    """
    total = 0
    for checksum, nbytes in parts:
        total = _multiply(_shift(nbytes), total) ^ checksum
    return total


@functools.lru_cache(256)
def _shift(nbytes: int) -> int:
    """Return x^(8 * nbytes) modulo the polynomial."""
    result, factor = _ONE, _BYTE
    while nbytes:
        if nbytes & 1:
            result = _multiply(result, factor)
        factor = _multiply(factor, factor)
        nbytes >>= 1
    return result


def _multiply(left: int, right: int) -> int:
    """Multiply two polynomials modulo CRC-32's."""
    product = 0
    while left:
        if left & _ONE:
            product ^= right
        left = left << 1 & 0xFFFFFFFF
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
    return product
