"""Experts that an NVIDIA GPU copies into its banks by itself, from where the page cache has them.

The expert files are mapped and their pages locked, so that the card reads them over the bus. No
thread of the host touches the bytes, and no memory is taken but the page cache's. Decoding does
that; the waves of a prompt are read by the host (`cuda_memory`).
"""

import ctypes
import functools
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .config import CachePlan
from .cuda_letters import to_device
from .cuda_memory import CardRow, Driver, card_rows, uses_cuda
from .errors import FlashMoEError
from .layout import ExpertLayout
from .memory import available_bytes

USEFUL_MEMORY = 0.7  # of what is available, at most; the pages of other programs have to leave
LANES, GROUPS = 256, 4  # threads of a group, groups for each row of a bank
TRIED = 1 << 16  # bytes that are copied and compared before it is relied on
LOCKERS = 8  # threads that bring pages into memory and lock them
POPULATE_READ = 22  # MADV_POPULATE_READ of Linux's mman.h

COPY = """
const uint64_t* task = reinterpret_cast<const uint64_t*>(tasks) + 3 * blockIdx.y;
const uint64_t from = task[0], to = task[1], bytes = task[2];
const int step = gridDim.x * blockDim.x;
int i = blockIdx.x * blockDim.x + threadIdx.x;
if ((from | to | bytes) % 16 == 0) {
  const uint4* source = reinterpret_cast<const uint4*>(from);
  uint4* place = reinterpret_cast<uint4*>(to);
  const int count = bytes / 16;
  for (; i + 7 * step < count; i += 8 * step) {
    uint4 held[8];
    _Pragma("unroll") for (int u = 0; u < 8; u++) held[u] = __ldcs(source + i + u * step);
    _Pragma("unroll") for (int u = 0; u < 8; u++) place[i + u * step] = held[u];
  }
  for (; i < count; i += step) place[i] = __ldcs(source + i);
} else {
  const uint8_t* source = reinterpret_cast<const uint8_t*>(from);
  uint8_t* place = reinterpret_cast<uint8_t*>(to);
  for (; i < static_cast<int>(bytes); i += step) place[i] = source[i];
}
if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) out[0] = 1;
"""


class MappedFiles:
    """Files whose pages the card can read; what is copied out of them keeps MLX's order."""

    width = 1  # pieces at a time: the card takes them all at once, whole ones best

    def __init__(self, driver: Driver, files: dict[Path, int]) -> None:
        """Map files and lock their pages, which brings them into the page cache.

        Args:
            driver: CUDA's.
            files: paths, and the descriptors by which pieces will name them.

        Raises:
            FlashMoEError: one cannot be mapped, or not be locked.
        """
        self._driver, self._stream = driver, None
        self._last: mx.array | None = None
        self._maps: dict[int, tuple[mmap.mmap, int]] = {}
        self._known: dict[tuple[int, int], np.ndarray] = {}
        with ThreadPoolExecutor(LOCKERS) as pool:
            jobs = [(number, pool.submit(self._lock, path)) for path, number in files.items()]
        try:
            self._maps = {n: job.result() for n, job in jobs if not job.exception()}
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

    def read(self, pieces: Sequence[Any]) -> list[int]:
        """Have the card copy pieces into their rows, and return how many bytes of each will come.

        What is evaluated later in the same stream finds them there.
        """
        came, tasks = [], []
        for number, offset, nbytes, rows, _ in pieces:
            pages, address = self._maps[number]
            whole = offset + nbytes <= len(pages)
            came.append(nbytes if whole else 0)
            if whole:
                tasks.append(
                    self._tasks(rows, nbytes) + np.array([address + offset, 0, 0], np.uint64)
                )
        if tasks:
            self._last = _copy(np.concatenate(tasks))
            mx.async_eval(self._last)
        return came

    def _tasks(self, rows: Sequence[CardRow], nbytes: int) -> np.ndarray:
        """Return what to copy into rows of together `nbytes`, from address 0: `[rows, 3]`."""
        key = rows[0].address, nbytes  # a slot has the same rows each time
        if key not in self._known:
            sizes = np.array([len(row) for row in rows], np.uint64)
            places = np.array([row.address for row in rows], np.uint64)
            self._known[key] = np.stack([np.cumsum(sizes) - sizes, places, sizes], axis=1)
        return self._known[key]

    def wait(self) -> None:
        """Return when the card has copied all that it was told to."""
        if self._last is not None:
            mx.eval(self._last)
            self._last = None

    def copies_right(self, path: Path, number: int) -> bool:
        """Try it: have the card copy the beginning of a file, and look at what came."""
        there = mx.zeros(min(TRIED, len(self._maps[number][0])), dtype=mx.uint8)
        mx.eval(there)
        self.read([(number, 0, there.size, card_rows([there]), None)])
        self.wait()
        with path.open("rb") as file:
            return np.array(there).tobytes() == file.read(there.size)

    def follow(self) -> None:
        """Have what is computed from now on find all copies done, be it in another stream."""
        here: Any = mx.default_stream(mx.default_device())
        if self._stream is not None and here != self._stream:
            self._driver.finish()
        self._stream = here

    def close(self) -> None:
        """Wait for copies under way, and unlock the pages."""
        self._driver.finish()
        for pages, _ in self._maps.values():
            self._driver.unlock(_address(pages))
            pages.close()
        self._maps = {}


def map_files(layout: ExpertLayout, plan: CachePlan, files: dict[Path, int]) -> MappedFiles | None:
    """Return expert files as the card can read them, or None where that is no gain or no way.

    Args:
        layout: where the experts lie.
        plan: how large banks are. Those with room for all experts read each once.
        files: paths, and descriptors.
    """
    if not uses_cuda() or plan.io.direct or plan.slots == layout.layers[0].num_experts:
        return None
    if layout.total_bytes > USEFUL_MEMORY * available_bytes():
        return None
    try:
        mapped = MappedFiles(_driver(), files)
    except FlashMoEError:  # a driver, a file system or a limit that does not allow it
        return None
    try:
        if files and mapped.copies_right(*next(iter(files.items()))):
            return mapped
    except RuntimeError:  # CUDA's compiler
        pass
    mapped.close()
    return None


@functools.cache
def _driver() -> Driver:
    return Driver()


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _address(pages: mmap.mmap) -> int:
    return int(np.frombuffer(pages, np.uint8).ctypes.data)


def _copy(tasks: np.ndarray) -> mx.array:
    """Return what is there once all bytes of `tasks` `[N, 3]` (from, to, bytes) are copied."""
    (done,) = _kernel()(
        inputs=[to_device(tasks.view(np.uint32))],
        grid=(LANES * GROUPS, len(tasks), 1),
        threadgroup=(LANES, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.uint32],
    )
    return done


@functools.cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="flashmoe_copy", input_names=["tasks"], output_names=["out"], source=COPY
    )
