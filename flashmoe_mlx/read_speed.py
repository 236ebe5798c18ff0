"""How fast experts come from a disk: record-sized random reads by several threads, read cold."""

import contextlib
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import StreamConfig
from .errors import FlashMoEError
from .layout import ExpertLayout

SAMPLE = 256 << 20  # bytes read
RECORD = 1_769_472  # bytes of an expert of 35B-A3B at 4 bits
Range = tuple[Path, int, int]  # file, offset, bytes


@dataclass(frozen=True)
class ReadSpeed:
    """What reading took.

    Attributes:
        nbytes: bytes read.
        reads: `preadv` calls that were asked for.
        threads: readers.
        seconds: from the first read to the last.
        cold: how the page cache was kept out, in words.
        source: what was read, in words.
    """

    nbytes: int
    reads: int
    threads: int
    seconds: float
    cold: str
    source: str

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second, all threads together."""
        return self.nbytes / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the speed as plain JSON values."""
        return {**asdict(self), "bytes_per_s": self.bytes_per_s}

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{self.bytes_per_s / 1e9:.2f} GB/s: {self.reads} random reads of "
            f"{self.nbytes / self.reads / 1e6:.3g} MB, {self.threads} threads, {self.cold}; "
            f"{self.source}"
        )


def expert_ranges(layout: ExpertLayout, sample: int = SAMPLE) -> list[Range]:
    """Pick random experts of a model, at most `sample` bytes or each expert once."""
    experts = [(layer, expert) for layer in layout.layers for expert in range(layer.num_experts)]
    count = max(1, sample // layout.record_bytes)
    picked = random.sample(experts, min(count, len(experts)))
    return [
        (span.file, span.offset, sum(f.nbytes for f in layer.fields[span.first : span.last]))
        for layer, expert in picked
        for span in layer.spans(expert)
    ]


@contextlib.contextmanager
def scratch_ranges(
    directory: Path, sample: int = SAMPLE, record: int = RECORD
) -> Iterator[list[Range]]:
    """Write a temporary file of random bytes and cut it into records, in random order.

    Raises:
        OSError: the directory cannot be written, or is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    block = os.urandom(record)
    offsets = list(range(0, sample // record * record, record))
    with tempfile.NamedTemporaryFile(dir=directory, prefix="read-speed-") as file:
        _keep_out(file.fileno())
        for _ in offsets:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        random.shuffle(offsets)
        yield [(Path(file.name), offset, record) for offset in offsets]


def time_reads(
    ranges: Sequence[Range], source: str, threads: int = StreamConfig.io_threads
) -> ReadSpeed:
    """Read byte ranges once, in the order given, by a pool of threads.

    Args:
        ranges: what to read.
        source: of it, in words.
        threads: readers.

    Raises:
        FlashMoEError: a file cannot be read, or ends early.
    """
    buffers = threading.local()
    largest = max(nbytes for _, _, nbytes in ranges)

    def read(place: tuple[int, Range]) -> None:
        if not hasattr(buffers, "view"):
            buffers.view = memoryview(bytearray(largest))
        descriptor, (path, offset, left) = place
        while left:
            count = os.preadv(descriptor, [buffers.view[:left]], offset)
            if count == 0:
                raise FlashMoEError(f"{path}: ends at byte {offset}. Download or convert it again.")
            left, offset = left - count, offset + count

    with _opened(ranges) as places, ThreadPoolExecutor(threads) as pool:
        for descriptor, place in places:
            cold = _forget(descriptor, place)
        start = time.perf_counter()
        list(pool.map(read, places))
        seconds = time.perf_counter() - start
    total = sum(nbytes for _, _, nbytes in ranges)
    return ReadSpeed(total, len(ranges), threads, seconds, cold, source)


@contextlib.contextmanager
def _opened(ranges: Sequence[Range]) -> Iterator[list[tuple[int, Range]]]:
    """Open each range's file once."""
    with contextlib.ExitStack() as stack:
        files: dict[Path, int] = {}
        for path in sorted({path for path, _, _ in ranges}):
            try:
                files[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise FlashMoEError(f"{path}: cannot be read ({error.strerror}).") from error
            stack.callback(os.close, files[path])
        yield [(files[place[0]], place) for place in ranges]


def _keep_out(descriptor: int) -> None:
    """Keep a file's bytes out of macOS's page cache."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)


def _forget(descriptor: int, place: Range) -> str:
    """Drop a range from the page cache where the system lets us; say in words what was done."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, place[1], place[2], os.POSIX_FADV_DONTNEED)
        return "cold (posix_fadvise DONTNEED)"
    _keep_out(descriptor)
    return "uncached (F_NOCACHE), but what the page cache held already came from there"
