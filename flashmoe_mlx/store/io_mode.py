"""How expert files are read: through the page cache (buffered), or past it (direct).

On Linux, with records of 1.8 and 7 MB, direct reads are 1.3 to 2 times as fast as buffered reads
that miss the page cache, and a third to half as fast as those that hit it. So direct reads pay if
the page cache could hold few of the experts; the slots then get its memory. macOS is not measured
and uses the page cache.
"""

import contextlib
import mmap
import os
import random
import sys
from pathlib import Path

from ..errors import FlashMoEError
from ..format.layout import ExpertLayout
from .sizing import IoPlan

BLOCK = 4096  # bytes; direct reads need addresses, offsets and lengths in whole blocks
USEFUL_CACHE = 0.8  # share of the experts that the page cache must have room for
PROBES = 16  # bytes per layer to look up in the page cache
F_RDAHEAD, F_NOCACHE = 45, 48  # of macOS's fcntl.h; Python's fcntl has them only on macOS


def plan_io(mode: str, layout: ExpertLayout, room: int) -> IoPlan:
    """Choose between buffered and direct reads, by the mode "buffered", "direct" or "auto".

    `room` is memory that can hold experts, in slots or page cache, in bytes.

    Raises:
        FlashMoEError: direct reads are requested but not possible here.
    """
    if mode == "buffered":
        return IoPlan(False, "as asked")
    why_not = obstacle(layout)
    if mode == "direct":
        if why_not:
            raise FlashMoEError(f"io_mode = 'direct': {why_not}. Choose buffered, or auto.")
        return IoPlan(True, "as asked")
    if sys.platform == "darwin":
        return IoPlan(False, "macOS")
    share = min(1.0, max(0, room) / layout.total_bytes)
    if share >= USEFUL_CACHE:
        return IoPlan(False, f"memory has room for {share:.0%} of the experts")
    if why_not:
        return IoPlan(False, why_not)
    return IoPlan(True, f"memory has room for only {share:.0%} of the experts")


def plan_load(mode: str, layout: ExpertLayout, io: IoPlan) -> IoPlan:
    """Choose how to preload all experts.

    Each is read once, so the page cache helps only with what it already holds. On Linux, 3.6 GB of
    uncached experts take 2.7 s direct and 6.4 to 11 s buffered. `io` is the choice of `plan_io`.
    """
    if mode != "auto" or io.direct or sys.platform == "darwin" or obstacle(layout):
        return io
    share = cached_share(layout)
    if share is None or share >= USEFUL_CACHE:
        return io
    return IoPlan(True, f"the page cache holds {share:.0%} of the experts")


def cached_share(layout: ExpertLayout) -> float | None:
    """Estimate the share of the experts in the page cache, None if the system cannot tell.

    It samples random bytes, because a lookup itself can start to cache its page.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    buffer, found = [bytearray(1)], []
    for layer in layout.layers:
        field = layer.fields[0]
        descriptor = open_expert_file(field.file, direct=False)
        try:
            for _ in range(PROBES):
                expert, byte = random.randrange(layer.num_experts), random.randrange(field.nbytes)
                place = field.offset + expert * field.stride + byte
                found.append(_is_cached(descriptor, buffer, place))
        finally:
            os.close(descriptor)
    return None if None in found else sum(map(bool, found)) / len(found)


def _is_cached(descriptor: int, buffer: list[bytearray], place: int) -> bool | None:
    try:
        return os.preadv(descriptor, buffer, place, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError:  # a file system that cannot tell
        return None


def obstacle(layout: ExpertLayout) -> str | None:
    """Return why a model's experts cannot be read with direct reads, or None."""
    if sys.platform == "darwin":
        return None
    if not hasattr(os, "O_DIRECT"):
        return "this system has no direct reads (O_DIRECT)"
    for field in (field for layer in layout.layers for field in layer.fields):
        if (field.offset | field.stride | field.nbytes) % BLOCK:
            return f"{field.file} is not laid out in blocks of {BLOCK} bytes"
    first = layout.layers[0].fields[0]
    try:
        descriptor = open_expert_file(first.file, direct=True)
    except OSError as error:
        return f"{first.file} cannot be opened for direct reads ({error.strerror})"
    try:
        os.preadv(descriptor, [mmap.mmap(-1, BLOCK)], first.offset)
    except OSError as error:
        return f"{first.file} does not support direct reads ({error.strerror})"
    finally:
        os.close(descriptor)
    return None


def open_expert_file(path: Path, direct: bool) -> int:
    """Open a file for reads of experts in random order, and return its descriptor.

    Read-ahead is off: it delays the requested bytes.

    Raises:
        OSError: the file cannot be opened, or not for direct reads.
    """
    unbuffered = getattr(os, "O_DIRECT", 0) if direct else 0
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | unbuffered)
    with contextlib.suppress(OSError):  # some file systems have no such settings
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        elif sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(descriptor, F_RDAHEAD, 0)
            fcntl.fcntl(descriptor, F_NOCACHE, int(direct))
    return descriptor
