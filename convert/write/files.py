"""Write files whole or not at all: NAME.tmp, fsync, rename; safetensors piece by piece.

Every writer returns or keeps an *entry*: name, size and checksum of what it wrote, as the manifest
has it.
"""

import errno
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
from types import TracebackType
from typing import Any, Self

import numpy as np

from ...format.headers import ITEM_SIZE
from ..source.read import PAGE
from .checksum import as_text, joined

SYNC_BYTES = 32 << 20  # sent to the disk while the next ones are made
PENDING = 2  # writes that wait for their turn
BLOCK_BYTES = 1 << 20
TEMPORARY = ".tmp"

Buffer = bytes | memoryview
Entry = dict[str, Any]
Tensors = Iterable[tuple[str, str, tuple[int, ...]]]


class Header:
    """The header of a safetensors file to write.

    Attributes:
        data: its bytes, from the start of the file to the first tensor.
        names: the tensors, in the order of their bytes.
        starts: where each begins, in bytes after the header, and where the last one ends.
    """

    def __init__(self, tensors: Tensors, alignment: int = 8) -> None:
        """Lay out tensors, (name, dtype, shape), from a multiple of `alignment` bytes on."""
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
        """Bytes of the whole file."""
        return len(self.data) + self.starts[-1]


class TensorFile:
    """A safetensors file whose tensors are known beforehand; each is written from front to back.

    Used as a context manager: the file appears under its name when the block ends well, and
    leaves nothing behind when it does not. A file that is written in several visits stays NAME.tmp
    until the last of them.
    """

    def __init__(
        self,
        path: Path,
        tensors: Tensors,
        alignment: int = 8,
        written: Sequence[str] | None = None,
    ) -> None:
        """Prepare the header.

        Args:
            path: where the finished file goes.
            tensors: (name, safetensors dtype, shape), in the order of their bytes.
            alignment: the data starts on a multiple of this many bytes.
            written: if this is one of several visits, what `written()` returned at the end of the
                one before; nothing if it is the first.
        """
        self.path = path
        self._temporary = path.with_name(path.name + TEMPORARY)
        self._header = Header(tensors, alignment)
        self._index = {name: index for index, name in enumerate(self._header.names)}
        self._ends = self._header.starts[:-1]  # of what is written, by tensor
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
        """Write bytes from byte `start` of a tensor; they may run on into those that follow."""
        view = memoryview(data).cast("B")
        begin = self._header.starts[self._index[name]] + start
        self._pending.append(self._thread.submit(self._take, view, begin))
        while len(self._pending) > PENDING:
            self._pending.popleft().result()

    def _take(self, view: memoryview, begin: int) -> None:
        """Write, in a thread: whole pages past the page cache, where that is to be had.

        Other bytes are for the page cache, whose content is sent to the disk from time to time.
        """
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
        self._account(view, begin)

    def _await_sync(self) -> None:
        if self._sync:
            self._sync.result()  # the system reports a failed write only once

    def _settle(self) -> None:
        """Wait until all that was given is written."""
        while self._pending:
            self._pending.popleft().result()

    def _write_past(self, view: memoryview, offset: int) -> None:
        assert self._direct is not None
        try:
            self._write_at(self._direct, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._write_at(self._file, view, offset)  # a disk with blocks larger than a page

    def _write_at(self, file: int, data: Buffer, offset: int) -> None:
        try:
            write_at(file, data, offset)
        except OSError as error:  # which knows a descriptor only
            place = f"{offset:,} of {self._header.file_bytes:,}"
            error.filename = f"{self._temporary}, byte {place}"
            raise

    def _account(self, view: memoryview, begin: int) -> None:
        """Carry on the checksums of the tensors that these bytes belong to."""
        starts = self._header.starts
        while view.nbytes:
            index = bisect_right(starts, begin) - 1
            piece = view[: starts[index + 1] - begin]
            assert self._ends[index] == begin, f"{self.path}: byte {begin} is out of turn"
            self._checksums[index] = zlib.crc32(piece, self._checksums[index])
            self._ends[index] = begin = begin + piece.nbytes
            view = view[piece.nbytes :]

    def checksums(self, first: str, count: int) -> list[tuple[int, int]]:
        """Return (CRC-32, bytes) of some tensors that follow one another, from `first` on."""
        self._settle()
        index, starts = self._index[first], self._header.starts
        return [
            (self._checksums[i], starts[i + 1] - starts[i]) for i in range(index, index + count)
        ]

    @property
    def whole(self) -> bool:
        """Whether every tensor is written."""
        self._settle()
        return self._ends == self._header.starts[1:]

    def written(self) -> list[str]:
        """Return the checksum of every tensor that is written, and "" for the others."""
        self._settle()
        starts = self._header.starts
        return [
            as_text(checksum) if end == starts[index + 1] else ""
            for index, (checksum, end) in enumerate(zip(self._checksums, self._ends, strict=True))
        ]

    def begun(self) -> Entry:
        """Return the entry of a file that is not whole yet."""
        return {"header": as_text(zlib.crc32(self._header.data)), "written": self.written()}

    def entry(self) -> Entry:
        """Return name, size and checksums of the file and of its header."""
        header = zlib.crc32(self._header.data)
        parts = [(header, len(self._header.data))]
        if self._header.names:
            parts += self.checksums(self._header.names[0], len(self._header.names))
        whole = file_entry(self.path, self._header.file_bytes, joined(parts))
        return whole | {"header": as_text(header)}

    def tensors(self) -> dict[str, list[int | str]]:
        """Return [bytes, checksum] of every tensor."""
        found = self.checksums(self._header.names[0], len(self._header.names))
        return {
            name: [nbytes, as_text(checksum)]
            for name, (checksum, nbytes) in zip(self._header.names, found, strict=True)
        }

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Make the file durable and give it its name, or remove it after an error."""
        self._thread.shutdown()
        self._syncer.shutdown()
        try:
            if error is None:
                self._settle()
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
    """Return a file's entry of the manifest."""
    return {"file": path.name, "size": size, "checksum": as_text(checksum)}


def write_file(path: Path, content: bytes) -> Entry:
    """Write a small file."""
    with _durable(path) as file:
        write_at(file, content, 0)
    return file_entry(path, len(content), zlib.crc32(content))


def json_bytes(content: object) -> bytes:
    """Return JSON as mlx-lm writes it: four spaces, and no line break at the end."""
    return json.dumps(content, indent=4).encode()


def write_json(path: Path, content: object) -> Entry:
    """Write a small JSON file."""
    return write_file(path, json_bytes(content))


def copy_file(source: Path, target: Path) -> Entry:
    """Copy a file's bytes."""
    size = checksum = 0
    with open(source, "rb") as old, _durable(target) as new:
        while block := old.read(BLOCK_BYTES):
            write_at(new, block, size)
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return file_entry(target, size, checksum)


def link_file(source: Path, target: Path) -> None:
    """Make the symlink `target`, in place of one that may be there."""
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
    """Yield the descriptor of a new file that gets its name when the block ends well."""
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
    """Open a file for writing past the page cache, or return None where that is not to be had.

    On Linux the page cache costs a conversion a third to three quarters of its speed, and pushes
    out what others keep there.
    """
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | flag)
    except OSError:
        return None


def _is_paged(view: memoryview, offset: int) -> bool:
    """Whether bytes are whole pages, in memory as in the file."""
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
