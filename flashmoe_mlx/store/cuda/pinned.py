"""Expert slots in an NVIDIA GPU's memory: reads go to pinned host memory and are copied from there.

MLX moves an array into managed memory, whose pages migrate between host and GPU, when Python takes
a view of it. So the slots' addresses come from a kernel, and the CUDA driver copies into them.
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

from ...custom_kernels.launch import SIMD, Kernel
from ...errors import FlashMoEError

# CU_MEMHOSTALLOC_PORTABLE, CU_STREAM_NON_BLOCKING, CU_MEMHOSTREGISTER_READ_ONLY of cuda.h
PORTABLE, NON_BLOCKING, READ_ONLY = 1, 1, 8
BUFFER = 32 << 20  # bytes of each of the two pinned buffers
CHUNK = 4 << 20  # bytes to read before their copy begins


class GpuRow:
    """A byte range in GPU memory, with the length and slices of a memoryview."""

    __slots__ = ("address", "nbytes")

    def __init__(self, address: int, nbytes: int) -> None:
        """Refer to `nbytes` bytes at `address`."""
        self.address, self.nbytes = address, nbytes

    def __len__(self) -> int:
        """Return the number of bytes."""
        return self.nbytes

    def __getitem__(self, part: slice) -> "GpuRow":
        """Return a slice with step 1."""
        start, stop, _ = part.indices(self.nbytes)
        return GpuRow(self.address + start, max(0, stop - start))


class Driver:
    """CUDA driver calls in the context that MLX uses; a call that fails raises FlashMoEError."""

    def __init__(self) -> None:
        """Open the driver library, which MLX has already loaded.

        Raises:
            FlashMoEError: the driver returns an error.
        """
        self._library = ctypes.CDLL("libcuda.so.1")
        # PyDLL keeps the GIL: starting a copy takes less time than releasing and taking it.
        self._copy = ctypes.PyDLL("libcuda.so.1").cuMemcpyHtoDAsync_v2
        self._copy.argtypes = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code:
            words = [ctypes.c_char_p(), ctypes.c_char_p()]
            self._library.cuGetErrorName(code, ctypes.byref(words[0]))
            self._library.cuGetErrorString(code, ctypes.byref(words[1]))
            error = ": ".join(word.value.decode() for word in words if word.value)
            raise FlashMoEError(
                f"CUDA driver: {name} failed with error {code} ({error}). Check the GPU with "
                "nvidia-smi, and load the model again."
            )

    def allocate(self, nbytes: int) -> tuple[int, ctypes.c_void_p]:
        """Return the address of pinned host memory, and a stream, for the calling thread."""
        address, stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(nbytes), PORTABLE)
        self._call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        return address.value or 0, stream

    def free(self, address: int, stream: ctypes.c_void_p) -> None:
        """Free what `allocate` returned."""
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuStreamDestroy_v2", stream)
        self._call("cuMemFreeHost", ctypes.c_void_p(address))

    def pin(self, address: int, nbytes: int) -> int:
        """Pin pages of read-only memory, and return their address on the GPU."""
        pages, device = ctypes.c_void_p(address), ctypes.c_uint64()
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuMemHostRegister_v2", pages, ctypes.c_size_t(nbytes), PORTABLE | READ_ONLY)
        self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(device), pages, 0)
        return device.value

    def unpin(self, address: int) -> None:
        """Unpin pages that `pin` pinned."""
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    def finish(self) -> None:
        """Wait until the GPU has finished all its work."""
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuCtxSynchronize")

    def copy(self, to: int, source: int, nbytes: int, stream: ctypes.c_void_p) -> None:
        """Start a copy from pinned memory to the GPU."""
        self._check("cuMemcpyHtoDAsync", self._copy(to, source, nbytes, stream))

    def wait(self, stream: ctypes.c_void_p) -> None:
        """Wait for all copies of a stream."""
        self._call("cuStreamSynchronize", stream)


class PinnedBuffer:
    """Pinned host memory, freed with this object, and a stream for copies from it."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        """Allocate it."""
        self.address, self.stream = driver.allocate(nbytes)
        self.view = memoryview((ctypes.c_ubyte * nbytes).from_address(self.address)).cast("B")
        weakref.finalize(self, driver.free, self.address, self.stream).atexit = False


class GpuReads:
    """Reads from files into rows in GPU memory."""

    def __init__(self, driver: Driver) -> None:
        """Allocate nothing yet."""
        self._driver, self._local = driver, threading.local()
        self._lock = threading.Lock()
        self._buffers: list[PinnedBuffer] = []
        self._pread_all: Any = None
        try:
            from ...custom_kernels.cpu.pread import pread_all
        except ImportError:  # without numba, the reader's Python threads read
            return
        self._pread_all = pread_all

    @property
    def at_once(self) -> bool:
        """Say whether `read` is available: it needs numba."""
        return self._pread_all is not None

    @property
    def width(self) -> int:
        """How many pieces `read` reads concurrently."""
        return len(os.sched_getaffinity(0))

    def takes(self, piece: Any) -> bool:
        """Say whether a piece fits a buffer, and its bytes fit its rows."""
        return piece[2] <= BUFFER and piece[2] == sum(map(len, piece[3]))

    def read(self, pieces: Sequence[Any]) -> list[int]:
        """Fill the rows of pieces on all cores, and return the bytes read of each.

        Python threads compete for the GIL, which costs more than reading records from the page
        cache. One buffer fills while the other is copied.
        """
        counts: list[int] = []
        with self._lock:
            self._buffers = self._buffers or [PinnedBuffer(self._driver, BUFFER) for _ in range(2)]
            for number, chunk in enumerate(_chunks(pieces)):
                buffer = self._buffers[number % 2]
                self._driver.wait(buffer.stream)
                counts += self._read_chunk(buffer, chunk)
            for buffer in self._buffers:
                self._driver.wait(buffer.stream)
        return counts

    def _read_chunk(self, buffer: PinnedBuffer, pieces: Sequence[Any]) -> list[int]:
        """Read pieces into pinned memory, and start copies of those that are complete."""
        sizes = np.array([piece[2] for piece in pieces], np.int64)
        if sizes.sum() > len(buffer.view):
            raise FlashMoEError(
                f"{sizes.sum()} bytes of experts do not fit into {len(buffer.view)} bytes of "
                "pinned memory."
            )
        places = buffer.address + np.cumsum(sizes) - sizes
        files = np.array([piece[0] for piece in pieces], np.int32)
        offsets = np.array([piece[1] for piece in pieces], np.int64)
        counts = self._pread_all(files, offsets, places.astype(np.uint64), sizes).tolist()
        for piece, place, count in zip(pieces, places.tolist(), counts, strict=True):
            if count == piece[2]:
                for row in piece[3]:
                    self._driver.copy(row.address, place, row.nbytes, buffer.stream)
                    place += row.nbytes
        return counts

    def preadv(self, descriptor: int, rows: Sequence[GpuRow], offset: int) -> int:
        """Fill rows from a file as `os.preadv` does, and return the bytes read."""
        buffer = self._thread_buffer(wanted := sum(map(len, rows)))
        count = left = os.preadv(descriptor, [buffer.view[:wanted]], offset)
        for row in rows:
            if nbytes := min(left, len(row)):
                source = buffer.address + count - left
                self._driver.copy(row.address, source, nbytes, buffer.stream)
                left -= nbytes
        self._driver.wait(buffer.stream)
        return count

    def _thread_buffer(self, nbytes: int) -> PinnedBuffer:
        """Return the calling thread's buffer, of at least `nbytes`."""
        buffer: PinnedBuffer | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer.view) < nbytes:
            buffer = self._local.buffer = PinnedBuffer(self._driver, nbytes)
        return buffer


def _chunks(pieces: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Split pieces into groups of about CHUNK bytes, at most BUFFER."""
    first = size = 0
    for index, piece in enumerate(pieces):
        if index > first and (size >= CHUNK or size + piece[2] > BUFFER):
            yield pieces[first:index]
            first, size = index, 0
        size += piece[2]
    yield pieces[first:]


@functools.cache
def gpu_reads() -> GpuReads:
    """Return the reads into this process's GPU."""
    return GpuReads(Driver())


def gpu_rows(arrays: Sequence[mx.array]) -> list[GpuRow]:
    """Return the GPU addresses of arrays. A memoryview of one would move it: never take one."""
    names = [f"a{index}" for index in range(len(arrays))]
    addresses = "\n".join(
        f"out[{index}] = reinterpret_cast<uint64_t>({name});" for index, name in enumerate(names)
    )
    kernel = Kernel(
        "addresses", tuple(names), ("out",), source=f"if (threadIdx.x == 0) {{ {addresses} }}"
    )
    (out,) = kernel(arrays, [((len(arrays),), mx.uint64)], (1, 1, 1), SIMD)
    return [GpuRow(a, x.nbytes) for a, x in zip(np.array(out).tolist(), arrays, strict=True)]
