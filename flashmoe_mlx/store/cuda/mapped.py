"""Expert files mapped into memory with pinned pages, so that an NVIDIA GPU can read them."""

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

PINNERS = 8  # threads that populate and pin pages
POPULATE_READ = 22  # MADV_POPULATE_READ of Linux's mman.h


class MappedFiles:
    """Files whose pages the GPU can read."""

    def __init__(self, driver: Driver, paths: Sequence[Path]) -> None:
        """Map files and pin their pages, which reads them into the page cache.

        Raises:
            FlashMoEError: a file cannot be mapped or pinned.
        """
        self._driver = driver
        self._maps: dict[Path, tuple[mmap.mmap, int]] = {}
        with ThreadPoolExecutor(PINNERS) as pool:
            jobs = [(path, pool.submit(self._pin, path)) for path in paths]
        try:
            self._maps = {path: job.result() for path, job in jobs if not job.exception()}
            for _, job in jobs:
                job.result()
        except BaseException:
            self.close()
            raise

    def _pin(self, path: Path) -> tuple[mmap.mmap, int]:
        """Return a file's mapping and its address on the GPU."""
        try:
            with path.open("rb") as file:  # the reader's descriptors turn read-ahead off
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise FlashMoEError(f"{path}: cannot be mapped ({error}).") from error
        # CUDA reads one page at a time; kernels without this advice leave it to CUDA.
        _libc().madvise(
            ctypes.c_void_p(_address(pages)), ctypes.c_size_t(len(pages)), POPULATE_READ
        )
        return pages, self._driver.pin(_address(pages), len(pages))

    def address(self, field: Field, experts: int) -> int:
        """Return the GPU address of expert 0's tensor, once the file is known to hold all experts.

        Raises:
            FlashMoEError: the file is shorter.
        """
        pages, address = self._maps[field.file]
        if field.offset + (experts - 1) * field.stride + field.nbytes > len(pages):
            raise FlashMoEError(f"{field.file}: ends in the middle of an expert.")
        return address + field.offset

    def close(self) -> None:
        """Wait for running copies, then unpin the pages."""
        self._driver.finish()
        for pages, _ in self._maps.values():
            self._driver.unpin(_address(pages))
            pages.close()
        self._maps = {}


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _address(pages: mmap.mmap) -> int:
    return int(np.frombuffer(pages, np.uint8).ctypes.data)
