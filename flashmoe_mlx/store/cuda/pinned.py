"""Banks in the memory of an NVIDIA GPU: read into page-locked memory, and copied from there.

MLX moves an array into managed memory, whose pages travel between host and card, as soon as a
program asks for a view of it. So no view is taken of these banks: a kernel tells where they lie,
and CUDA's driver copies.
"""

import ctypes
import functools
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import FlashMoEError

# CU_MEMHOSTALLOC_PORTABLE, CU_STREAM_NON_BLOCKING, CU_MEMHOSTREGISTER_READ_ONLY of cuda.h
PORTABLE, NON_BLOCKING, READ_ONLY = 1, 1, 8
STAGE = 32 << 20  # bytes of page-locked memory, twice
TURN = 4 << 20  # bytes to read before their copy begins


class GpuRow:
    """Some bytes in the card's memory; it has a length and slices, as a memoryview does."""

    __slots__ = ("address", "nbytes")

    def __init__(self, address: int, nbytes: int) -> None:
        """Name the bytes from `address` on."""
        self.address, self.nbytes = address, nbytes

    def __len__(self) -> int:
        """Return how many bytes these are."""
        return self.nbytes

    def __getitem__(self, part: slice) -> "GpuRow":
        """Return a slice in steps of one."""
        start, stop, _ = part.indices(self.nbytes)
        return GpuRow(self.address + start, max(0, stop - start))


class Driver:
    """The calls of CUDA's driver that are needed here, in the context that MLX uses."""

    def __init__(self) -> None:
        """Find the driver, which MLX has loaded already.

        Raises:
            FlashMoEError: it is not there, or refuses.
        """
        self._library = ctypes.CDLL("libcuda.so.1")
        # To begin a copy takes less time than to hand Python's lock to another thread and back.
        self._copy = ctypes.PyDLL("libcuda.so.1").cuMemcpyHtoDAsync_v2
        self._copy.argtypes = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def _call(self, name: str, *arguments: Any) -> None:
        _check(name, getattr(self._library, name)(*arguments))

    def allocate(self, nbytes: int) -> tuple[int, ctypes.c_void_p]:
        """Return the address of page-locked host memory, and a stream, for the calling thread."""
        address, stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(nbytes), PORTABLE)
        self._call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        return address.value or 0, stream

    def free(self, address: int, stream: ctypes.c_void_p) -> None:
        """Give back what `allocate` returned."""
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuStreamDestroy_v2", stream)
        self._call("cuMemFreeHost", ctypes.c_void_p(address))

    def lock(self, address: int, nbytes: int) -> int:
        """Lock pages of memory that is only read, and return their address for the card."""
        here, there = ctypes.c_void_p(address), ctypes.c_uint64()
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuMemHostRegister_v2", here, ctypes.c_size_t(nbytes), PORTABLE | READ_ONLY)
        self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(there), here, 0)
        return there.value

    def unlock(self, address: int) -> None:
        """Give back pages that `lock` locked."""
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    def finish(self) -> None:
        """Return when the card has done all that it was given."""
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuCtxSynchronize")

    def copy(self, to: int, source: int, nbytes: int, stream: ctypes.c_void_p) -> None:
        """Begin to copy page-locked memory to the card."""
        _check("cuMemcpyHtoDAsync", self._copy(to, source, nbytes, stream))

    def wait(self, stream: ctypes.c_void_p) -> None:
        """Return when all copies of a stream are done."""
        self._call("cuStreamSynchronize", stream)


def _check(name: str, code: int) -> None:
    if code:
        raise FlashMoEError(f"CUDA's driver: {name} failed with error {code} of cuda.h.")


class Staging:
    """Page-locked memory and a stream to copy it by."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        """Take memory; it is given back with this object."""
        self.address, self.stream = driver.allocate(nbytes)
        self.view = memoryview((ctypes.c_ubyte * nbytes).from_address(self.address)).cast("B")
        weakref.finalize(self, driver.free, self.address, self.stream).atexit = False


class GpuReads:
    """Reads whose rows lie in the card's memory."""

    def __init__(self, driver: Driver) -> None:
        """Begin without any memory."""
        self._driver, self._local = driver, threading.local()
        self._lock = threading.Lock()
        self._halves: list[Staging] = []
        self._pread_all: Any = None
        try:
            from ...custom_kernels.cpu.pread import pread_all
        except ImportError:  # without numba, Python's threads read
            return
        self._pread_all = pread_all

    @property
    def at_once(self) -> bool:
        """Say whether `read` is there: it needs numba."""
        return self._pread_all is not None

    @property
    def width(self) -> int:
        """How many pieces `read` reads at a time."""
        return len(os.sched_getaffinity(0))

    def takes(self, piece: Any) -> bool:
        """Say whether `read` has room for a piece, and the piece for its bytes."""
        return piece[2] <= STAGE and piece[2] == sum(map(len, piece[3]))

    def read(self, pieces: Sequence[Any]) -> list[int]:
        """Fill the rows of pieces on all cores, and return how many bytes of each came.

        Python's threads take turns; for records that the page cache holds they spend more on that
        than on reading. While one half of the page-locked memory is copied, the other is filled.
        """
        came: list[int] = []
        with self._lock:
            self._halves = self._halves or [Staging(self._driver, STAGE) for _ in range(2)]
            for number, turn in enumerate(_turns(pieces)):
                half = self._halves[number % 2]
                self._driver.wait(half.stream)
                came += self._read_turn(half, turn)
            for half in self._halves:
                self._driver.wait(half.stream)
        return came

    def _read_turn(self, half: Staging, pieces: Sequence[Any]) -> list[int]:
        """Read pieces into page-locked memory, and begin to copy those that are whole."""
        sizes = np.array([piece[2] for piece in pieces], np.int64)
        if sizes.sum() > len(half.view):
            raise FlashMoEError(
                f"{sizes.sum()} bytes of experts do not fit into {len(half.view)} bytes of "
                "page-locked memory."
            )
        places = half.address + np.cumsum(sizes) - sizes
        files = np.array([piece[0] for piece in pieces], np.int32)
        offsets = np.array([piece[1] for piece in pieces], np.int64)
        came = self._pread_all(files, offsets, places.astype(np.uint64), sizes).tolist()
        for piece, place, count in zip(pieces, places.tolist(), came, strict=True):
            if count == piece[2]:
                for row in piece[3]:
                    self._driver.copy(row.address, place, row.nbytes, half.stream)
                    place += row.nbytes
        return came

    def preadv(self, descriptor: int, rows: Sequence[GpuRow], offset: int) -> int:
        """Fill rows from a file, as `os.preadv` does, and return how many bytes came."""
        staging = self._staging(wanted := sum(map(len, rows)))
        count = left = os.preadv(descriptor, [staging.view[:wanted]], offset)
        for row in rows:
            if nbytes := min(left, len(row)):
                source = staging.address + count - left
                self._driver.copy(row.address, source, nbytes, staging.stream)
                left -= nbytes
        self._driver.wait(staging.stream)
        return count

    def _staging(self, nbytes: int) -> Staging:
        """Return the calling thread's own."""
        staging: Staging | None = getattr(self._local, "staging", None)
        if staging is None or len(staging.view) < nbytes:
            staging = self._local.staging = Staging(self._driver, nbytes)
        return staging


def _turns(pieces: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Split pieces into groups of about TURN bytes, at most STAGE."""
    first = size = 0
    for index, piece in enumerate(pieces):
        if index > first and (size >= TURN or size + piece[2] > STAGE):
            yield pieces[first:index]
            first, size = index, 0
        size += piece[2]
    yield pieces[first:]


@functools.cache
def gpu_reads() -> GpuReads:
    """Return how to read into rows of this process's GPU."""
    return GpuReads(Driver())


def gpu_rows(arrays: Sequence[mx.array]) -> list[GpuRow]:
    """Return where arrays lie in the card's memory. Nobody may take a view of them after that."""
    names = [f"a{index}" for index in range(len(arrays))]
    places = "\n".join(
        f"out[{index}] = reinterpret_cast<uint64_t>({name});" for index, name in enumerate(names)
    )
    kernel: Any = mx.fast.cuda_kernel(
        name=f"flashmoe_places_{len(arrays)}",
        input_names=names,
        output_names=["out"],
        source=f"if (threadIdx.x == 0) {{ {places} }}",
    )
    (out,) = kernel(
        inputs=list(arrays),
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(len(arrays),)],
        output_dtypes=[mx.uint64],
    )
    return [GpuRow(a, x.nbytes) for a, x in zip(np.array(out).tolist(), arrays, strict=True)]
