"""Parallel file reads on all cores, without the GIL: `pread` called from compiled code."""

import numpy as np
from numba import prange, types

from ..shapes import expect
from .bounds import jit
from .numba_cache import make_cache_safe

make_cache_safe()

_pread = types.ExternalFunction(
    "pread", types.intp(types.int32, types.uintp, types.uintp, types.int64)
)


@jit(parallel=True)
def _read(files, offsets, places, sizes, came):  # type: ignore[no-untyped-def]
    for i in prange(len(files)):
        done = 0
        while done < sizes[i]:
            count = _pread(files[i], places[i] + done, sizes[i] - done, offsets[i] + done)
            if count <= 0:
                break
            done += count
        came[i] = done


def pread_all(
    files: np.ndarray, offsets: np.ndarray, places: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Read byte ranges of files into memory.

    Args:
        files: `[N]` int32 descriptors.
        offsets: `[N]` int64, start of each range in its file.
        places: `[N]` uint64 target addresses.
        sizes: `[N]` int64 bytes.

    Returns:
        `[N]` int64 bytes read; fewer than `sizes` at a file's end or on a read error.
    """
    ranges = zip(("offsets", "places", "sizes"), (offsets, places, sizes), strict=True)
    for name, array in ranges:
        expect(f"reads: {name}", array, files.shape)
    came = np.zeros(len(files), np.int64)
    _read(files, offsets, places, sizes, came)
    return came
