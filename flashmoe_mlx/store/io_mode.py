"""How expert files are read: through the page cache (buffered), or past it (direct).

Measured on Linux with records of 1.8 and 7 MB: direct reads arrive 1.3 to 2 times as fast as
buffered ones that the page cache does not have, and a third to a half as fast as those that it has.
So direct reads pay where the page cache could hold few of the experts, and the banks then get the
memory that it would have had. On macOS nobody here could measure; there the page cache is kept.
"""

import contextlib
import mmap
import os
import random
import sys
from pathlib import Path

from ..errors import FlashMoEError
from ..format.layout import ExpertLayout
from .host import BLOCK
from .sizing import IoPlan

USEFUL_CACHE = 0.8  # share of the experts that the page cache must have room for
PROBES = 16  # bytes of each layer that the page cache is asked for
F_RDAHEAD, F_NOCACHE = 45, 48  # of macOS's fcntl.h; Python's fcntl module has them only there


def plan_io(mode: str, layout: ExpertLayout, room: int) -> IoPlan:
    """Choose between buffered and direct reads.

    Args:
        mode: "buffered", "direct" or "auto".
        layout: where the experts lie.
        room: bytes of memory that could hold experts, in banks or page cache.

    Raises:
        FlashMoEError: direct reads were asked for, but cannot be had here.
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
    """Choose how to read all experts at once into banks that have room for them.

    Each is read once, so the page cache helps only with what it holds already. Measured on Linux
    with 3.6 GB of experts, of which it held none: 2.7 s directly, 6.4 to 11 s through it.

    Args:
        mode: "buffered", "direct" or "auto".
        layout: where the experts lie.
        io: what `plan_io` chose for experts that come one by one.
    """
    if mode != "auto" or io.direct or sys.platform == "darwin" or obstacle(layout):
        return io
    share = cached_share(layout)
    if share is None or share >= USEFUL_CACHE:
        return io
    return IoPlan(True, f"the page cache holds {share:.0%} of the experts")


def cached_share(layout: ExpertLayout) -> float | None:
    """Estimate which share of the experts the page cache holds, or return None if it cannot be.

    Bytes at random places are asked for, since some are brought in by being asked for.
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
    """Return why a model's experts cannot be read directly into banks, or None."""
    if sys.platform == "darwin":
        return None
    if not hasattr(os, "O_DIRECT"):
        return "this system cannot read past its page cache"
    for field in (field for layer in layout.layers for field in layer.fields):
        if (field.offset | field.stride | field.nbytes) % BLOCK:
            return f"{field.file} was not written in blocks of {BLOCK} bytes"
    first = layout.layers[0].fields[0]
    try:
        descriptor = open_expert_file(first.file, direct=True)
    except OSError as error:
        return f"{first.file} cannot be opened so ({error.strerror})"
    try:
        os.preadv(descriptor, [mmap.mmap(-1, BLOCK)], first.offset)
    except OSError as error:
        return f"{first.file} cannot be read so ({error.strerror})"
    finally:
        os.close(descriptor)
    return None


def open_expert_file(path: Path, direct: bool) -> int:
    """Open a file for reads of whole experts in no order, and return its descriptor.

    Read-ahead is turned off: it delays the bytes that were asked for.

    Raises:
        OSError: it cannot be opened, or not so.
    """
    unbuffered = getattr(os, "O_DIRECT", 0) if direct else 0
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | unbuffered)
    with contextlib.suppress(OSError):  # a file system without such settings reads as it does
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        elif sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(descriptor, F_RDAHEAD, 0)
            fcntl.fcntl(descriptor, F_NOCACHE, int(direct))
    return descriptor
