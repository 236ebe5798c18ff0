"""Expert files mapped into memory, with their pages pinned, so that an NVIDIA GPU reads them."""

import ctypes
import functools
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...errors import FlashMoEError
from ...format.layout import Field
from .pinned import Driver

PINNERS = 8  # threads that bring pages into memory and pin them
POPULATE_READ = 22  # MADV_POPULATE_READ of Linux's mman.h


class MappedFiles:
    """Files whose pages the card can read."""

    def __init__(self, driver: Driver, paths: Sequence[Path]) -> None:
        """Map files and lock their pages, which brings them into the page cache.

        Raises:
            FlashMoEError: one cannot be mapped, or not be locked.
        """
        self._driver = driver
        self._maps: dict[Path, tuple[mmap.mmap, int]] = {}
        with ThreadPoolExecutor(PINNERS) as pool:
            jobs = [(path, pool.submit(self._lock, path)) for path in paths]
        try:
            self._maps = {path: job.result() for path, job in jobs if not job.exception()}
            for _, job in jobs:
                job.result()
        except BaseException:
            self.close()
            raise

    def _lock(self, path: Path) -> tuple[mmap.mmap, int]:
        """Return a file's pages in memory, and the address that they have for the card."""
        try:
            with path.open("rb") as file:  # apart: the reader's own are set to read nothing ahead
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise FlashMoEError(f"{path}: cannot be mapped ({error}).") from error
        # CUDA would fetch page after page. A system that does not know this leaves it to CUDA.
        _libc().madvise(
            ctypes.c_void_p(_address(pages)), ctypes.c_size_t(len(pages)), POPULATE_READ
        )
        return pages, self._driver.lock(_address(pages), len(pages))

    def address(self, field: Field, experts: int) -> int:
        """Return where the card finds a tensor of expert 0, all experts of which are there.

        Raises:
            FlashMoEError: the file is shorter.
        """
        pages, address = self._maps[field.file]
        if field.offset + (experts - 1) * field.stride + field.nbytes > len(pages):
            raise FlashMoEError(f"{field.file}: ends in the middle of an expert.")
        return address + field.offset

    def close(self) -> None:
        """Wait for copies under way, and unlock the pages."""
        self._driver.finish()
        for pages, _ in self._maps.values():
            self._driver.unlock(_address(pages))
            pages.close()
        self._maps = {}


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _address(pages: mmap.mmap) -> int:
    return int(np.frombuffer(pages, np.uint8).ctypes.data)
