"""Read speed of a disk: random reads of expert size by several threads."""

import contextlib
import errno
import mmap
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import FlashMoEError
from ..format.layout import ExpertLayout, LayerLayout
from ..settings import StreamConfig
from ..store.io_mode import BLOCK, open_expert_file

SAMPLE = 256 << 20  # bytes read
RECORD = 1_769_472  # bytes of an expert of 35B-A3B at 4 bits
BUFFERS = 16  # records of memory that reads rotate through, like slots
COLD_BY = (
    "cold (posix_fadvise DONTNEED)"
    if hasattr(os, "posix_fadvise")
    else "uncached (F_NOCACHE), except pages that the page cache already held"
)
Range = tuple[Path, int, int]  # file, offset, bytes


@dataclass(frozen=True)
class ReadSpeed:
    """A measured read speed.

    Attributes:
        nbytes: bytes read, in `reads` ranges, by `threads` readers.
        seconds: from the first read to the last.
        cold: description of how the page cache was emptied.
        source: description of the files.
        direct: whether reads bypassed the page cache.
    """

    nbytes: int
    reads: int
    threads: int
    seconds: float
    cold: str
    source: str
    direct: bool = False

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second of all threads."""
        return self.nbytes / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the speed as plain JSON values."""
        return {**asdict(self), "bytes_per_s": self.bytes_per_s}

    def __str__(self) -> str:
        """Return one readable line."""
        return (
            f"{self.bytes_per_s / 1e9:.2f} GB/s: {self.reads} random reads of "
            f"{self.nbytes / self.reads / 1e6:.3g} MB, {self.threads} threads, {self.cold}; "
            f"{self.source}"
        )


def expert_ranges(layout: ExpertLayout, sample: int = SAMPLE) -> list[Range]:
    """Choose random distinct experts of a model, of at most `sample` bytes."""
    experts = [(layer, expert) for layer in layout.layers for expert in range(layer.num_experts)]
    count = max(1, sample // layout.record_bytes)
    return ranges_of(random.sample(experts, min(count, len(experts))))


def ranges_of(experts: Iterable[tuple[LayerLayout, int]]) -> list[Range]:
    """Return the byte ranges of experts."""
    return [
        (span.file, span.offset, sum(f.nbytes for f in layer.fields[span.first : span.last]))
        for layer, expert in experts
        for span in layer.spans(expert)
    ]


@contextlib.contextmanager
def scratch_ranges(
    directory: Path, sample: int = SAMPLE, record: int = RECORD
) -> Iterator[list[Range]]:
    """Write a temporary file of random bytes and cut it into records, in random order.

    Raises:
        OSError: the directory cannot be written, or `sample` exceeds half of its free space.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if sample > (free := shutil.disk_usage(directory).free) / 2:
        text = f"{sample >> 20} MiB are needed, and {free >> 20} are free"
        raise OSError(errno.ENOSPC, text, str(directory))
    block = os.urandom(record)
    offsets = list(range(0, sample // record * record, record))
    with tempfile.NamedTemporaryFile(dir=directory, prefix="read-speed-") as file:
        _bypass_cache(file.fileno())
        for _ in offsets:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        random.shuffle(offsets)
        yield [(Path(file.name), offset, record) for offset in offsets]


def time_reads(
    ranges: Sequence[Range],
    source: str,
    threads: int = StreamConfig.io_threads,
    direct: bool = False,
    warm: bool = False,
) -> ReadSpeed:
    """Read byte ranges once, cold, in the order given, by several threads without read-ahead.

    Direct reads bypass the page cache and need ranges of whole blocks. `warm` leaves the page cache
    as it is.

    Raises:
        FlashMoEError: a file cannot be read, or ends early.
    """
    buffers = record_buffers(max(nbytes for _, _, nbytes in ranges))
    with opened(ranges, direct) as files:
        for place in () if warm else ranges:
            forget(files[place[0]], place)
        seconds = in_threads(reads_into(buffers, ranges, files), len(ranges), threads)
    total = sum(nbytes for _, _, nbytes in ranges)
    how = "as the page cache was" if warm else f"direct, {COLD_BY}" if direct else COLD_BY
    return ReadSpeed(total, len(ranges), threads, seconds, how, source, direct)


def record_buffers(nbytes: int) -> list[memoryview]:
    """Return memory for BUFFERS records, aligned to blocks and already mapped."""
    stride = -(-nbytes // BLOCK) * BLOCK
    memory = memoryview(mmap.mmap(-1, stride * BUFFERS))
    for start in range(0, len(memory), BLOCK):
        memory[start] = 1
    return [memory[i * stride : i * stride + nbytes] for i in range(BUFFERS)]


def reads_into(
    buffers: Sequence[memoryview], ranges: Sequence[Range], files: Mapping[Path, int]
) -> Callable[[int], None]:
    """Return a function that reads a range by its number, into the buffers in rotation.

    It raises FlashMoEError if the file cannot be read, or ends early.
    """

    def read(number: int) -> None:
        path, offset, nbytes = ranges[number]
        view = buffers[number % len(buffers)][:nbytes]
        while len(view):
            try:
                count = os.preadv(files[path], [view], offset)
            except OSError as error:
                raise FlashMoEError(f"{path}: cannot be read ({error.strerror}).") from error
            if count == 0:
                raise FlashMoEError(f"{path}: ends at byte {offset}. Download or convert it again.")
            offset, view = offset + count, view[count:]

    return read


def in_threads(work: Callable[[int], None], count: int, threads: int) -> float:
    """Call `work(0)` to `work(count - 1)` in threads; return the seconds without their start.

    An exception of a call is raised again.
    """
    numbers, ready = iter(range(count)), threading.Barrier(threads + 1)

    def loop() -> None:
        ready.wait()
        for number in numbers:
            work(number)

    with ThreadPoolExecutor(threads) as pool:
        loops = [pool.submit(loop) for _ in range(threads)]
        ready.wait()
        start = time.perf_counter()
        wait(loops)
        seconds = time.perf_counter() - start
    for each in loops:
        each.result()
    return seconds


@contextlib.contextmanager
def opened(
    ranges: Sequence[Range], direct: bool = False, read_ahead: bool = False
) -> Iterator[dict[Path, int]]:
    """Open each file once and yield the descriptors.

    Raises:
        FlashMoEError: a file cannot be opened.
    """
    plain = read_ahead and not direct
    with contextlib.ExitStack() as stack:
        files: dict[Path, int] = {}
        for path in sorted({path for path, _, _ in ranges}):
            try:
                file = os.open(path, os.O_RDONLY) if plain else open_expert_file(path, direct)
            except OSError as error:
                raise FlashMoEError(f"{path}: cannot be read ({error.strerror}).") from error
            stack.callback(os.close, file)
            files[path] = file
        yield files


def _bypass_cache(descriptor: int) -> None:
    """Keep a file out of macOS's page cache."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)


def forget(descriptor: int, place: Range) -> None:
    """Drop a range from the page cache if the system can: see COLD_BY."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, place[1], place[2], os.POSIX_FADV_DONTNEED)
    else:
        _bypass_cache(descriptor)
