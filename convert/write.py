"""Write files whole or not at all: NAME.tmp, fsync, rename; safetensors piece by piece."""

import json
import math
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from flashmoe_mlx.layout import ITEM_SIZE

SYNC_BYTES = 32 << 20  # sent to the disk while the next ones are made
Buffer = bytes | memoryview


class TensorFile:
    """A safetensors file whose tensors are known beforehand and written in any order.

    Used as a context manager: the file appears under its name when the block ends well, and
    leaves nothing behind when it does not.
    """

    def __init__(
        self, path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], alignment: int = 8
    ) -> None:
        """Prepare the header.

        Args:
            path: where the finished file goes.
            tensors: (name, safetensors dtype, shape), in the order of their bytes.
            alignment: the data starts on a multiple of this many bytes.
        """
        self.path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
        end = 0
        for name, dtype, shape in tensors:
            begin, end = end, end + math.prod(shape) * ITEM_SIZE[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            self._offsets[name] = begin
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % alignment)
        self._header = len(text).to_bytes(8, "little") + text
        self._missing = end
        self._unsynced = 0
        self._syncs: list[Future[None]] = []
        self._syncer = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        """Create the temporary file."""
        self._file = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        return self

    def write(self, name: str, data: Buffer, start: int = 0) -> None:
        """Write bytes from byte `start` of a tensor; they may run on into those that follow."""
        view = memoryview(data).cast("B")
        _write(self._file, view, len(self._header) + self._offsets[name] + start)
        self._missing -= view.nbytes
        self._unsynced += view.nbytes
        if self._unsynced >= SYNC_BYTES and all(sync.done() for sync in self._syncs):
            self._syncs.append(self._syncer.submit(os.fsync, self._file))
            self._unsynced = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Make the file durable and give it its name, or remove it after an error."""
        self._syncer.shutdown()
        try:
            if error is None:
                for sync in self._syncs:
                    sync.result()  # the system reports a failed write only once
                assert self._missing == 0, f"{self.path}: {self._missing} bytes were not written"
                _write(self._file, self._header, 0)
                os.fsync(self._file)
                os.replace(self._temporary, self.path)
        finally:
            os.close(self._file)
            self._temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            _sync(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write JSON as mlx-lm does: four spaces, and no line break at the end."""
    write_file(path, json.dumps(content, indent=4).encode())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes."""
    temporary = target.with_name(target.name + ".tmp")
    try:
        with open(source, "rb") as old, open(temporary, "wb") as new:
            shutil.copyfileobj(old, new, 1 << 20)
            _sync(new)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write(file: int, data: Buffer, offset: int) -> None:
    view = memoryview(data).cast("B")
    done = 0
    while done < view.nbytes:
        done += os.pwrite(file, view[done:], offset + done)
