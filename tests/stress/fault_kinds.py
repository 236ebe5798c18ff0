"""Faults while reading experts; each occurs at a given read.

They replace `os.preadv`, through which all reads go. A failing read first fills its buffers with
other bytes, so that using such an expert gives wrong tokens.
"""

import errno
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from flashmoe_mlx.store import host

preadv = os.preadv
Rows = Sequence[memoryview]
# Replaces a read: takes (descriptor, rows, offset), returns the bytes read.
Answer = Callable[[int, Rows, int], int]


@dataclass
class Files:
    """The expert files, with copies to restore them.

    Attributes:
        paths: paths of the files.
        kept: hard links to the files.
        data: their bytes.
    """

    paths: list[Path]
    kept: list[Path]
    data: list[bytes]

    @classmethod
    def of(cls, paths: Sequence[Path], folder: Path) -> "Files":
        """Link the files at `paths` into `folder`."""
        folder.mkdir()
        kept = [folder / path.name for path in paths]
        for path, link in zip(paths, kept, strict=True):
            os.link(path, link)
        return cls(list(paths), kept, [path.read_bytes() for path in paths])

    def named(self, descriptor: int) -> Path:
        """Return the path of an open file."""
        found = os.fstat(descriptor)
        return next(path for path in self.kept if os.path.samestat(path.stat(), found))

    def restore(self) -> None:
        """Restore every file: name, length and bytes."""
        for path, link, data in zip(self.paths, self.kept, self.data, strict=True):
            if not path.exists() or not path.samefile(link):
                path.unlink(missing_ok=True)
                os.link(link, path)
            if link.stat().st_size != len(data):
                link.write_bytes(data)  # in place


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes:
        name: name of the row.
        error: pattern of the expected message; None if the request must succeed.
        plant: returns a context in which the fault occurs at a read, given by its number.
        loads: whether the request loads a model with all experts, instead of running one.
        kind: name of the expected exception's type.
    """

    name: str
    error: str | None
    plant: Callable[["Files", int, random.Random], "Planted"]
    loads: bool = False
    kind: str = "FlashMoEError"


class Planted:
    """A context with a fault; `struck` is true after the fault has occurred."""

    def __init__(self, answer: Answer, moment: int, lasting: bool = False) -> None:
        self.struck = False
        self._answer, self._moment, self._lasting = answer, moment, lasting
        self._lock, self._count = threading.Lock(), 0

    def preadv(self, descriptor: int, rows: Rows, offset: int, *flags: int) -> int:
        """Read, or cause the fault."""
        with self._lock:
            self._count += 1
            now = self._count > self._moment and (self._lasting or not self.struck)
            self.struck |= now
        return (self._answer if now else preadv)(descriptor, rows, offset, *flags)

    def __enter__(self) -> "Planted":
        """Replace `os.preadv`."""
        os.preadv = self.preadv  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        """Restore `os.preadv`."""
        os.preadv = preadv


def spoil(rows: Rows) -> None:
    """Fill buffers with bytes that belong to no expert."""
    for row in rows:
        row[:] = b"\xa5" * len(row)


def failing(reason: Callable[[], BaseException]) -> Answer:
    """Return a read that fills its buffers with wrong bytes and raises a new exception."""

    def answer(descriptor: int, rows: Rows, offset: int) -> int:
        spoil(rows)
        raise reason()

    return answer


def disk_error(code: int, lasting: bool = False) -> Callable[..., Planted]:
    """Return a planter of one failing read or, if lasting, of failing reads from then on."""
    answer = failing(lambda: OSError(code, os.strerror(code)))
    return lambda files, moment, rng: Planted(answer, moment, lasting)


def raised(reason: Callable[[], BaseException]) -> Callable[..., Planted]:
    """Return a planter of a read that raises `reason()`."""
    return lambda files, moment, rng: Planted(failing(reason), moment)


def half_then_error(files: Files, moment: int, rng: random.Random) -> Planted:
    """Plant a read that returns a part, and fails on the rest."""
    part, fail = [], failing(lambda: OSError(errno.EIO, os.strerror(errno.EIO)))

    def answer(descriptor: int, rows: Rows, offset: int) -> int:
        if not part:
            part.append(first_half(rows))
            return preadv(descriptor, part, offset)
        return fail(descriptor, rows, offset)

    return Planted(answer, moment, lasting=True)


def first_half(rows: Rows) -> memoryview:
    """Return half of the first buffer, at least one byte."""
    return rows[0][: max(1, len(rows[0]) // 2)]


def stuttering(files: Files, moment: int, rng: random.Random) -> Planted:
    """Plant short reads, and reads that a signal interrupts."""

    def answer(descriptor: int, rows: Rows, offset: int) -> int:
        if rng.random() < 0.3:
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        row = rows[0]
        return preadv(descriptor, [row[: rng.randint(1, len(row))]], offset)

    return Planted(answer, moment, lasting=True)


def late(files: Files, moment: int, rng: random.Random) -> Planted:
    """Plant delays of up to two milliseconds, so that reads complete in another order."""

    def answer(descriptor: int, rows: Rows, offset: int) -> int:
        time.sleep(rng.uniform(0, 2e-3))
        return preadv(descriptor, rows, offset)

    return Planted(answer, moment, lasting=True)


def end_of_file(files: Files, moment: int, rng: random.Random) -> Planted:
    """Plant a read that returns the end of the file."""

    def answer(descriptor: int, rows: Rows, offset: int) -> int:
        spoil(rows)
        return 0

    return Planted(answer, moment)


def truncated(files: Files, moment: int, rng: random.Random) -> Planted:
    """Plant a truncation of the file, in the middle of the bytes to read."""

    def answer(descriptor: int, rows: Rows, offset: int) -> int:
        spoil(rows)
        os.truncate(files.named(descriptor), offset + rng.randrange(sum(map(len, rows))))
        return preadv(descriptor, rows, offset)

    return Planted(answer, moment)


def replaced(files: Files, moment: int, rng: random.Random) -> Planted:
    """Plant the replacement of all expert files by others of the same size."""

    def answer(descriptor: int, rows: Rows, offset: int) -> int:
        for path, data in zip(files.paths, files.data, strict=True):
            other = path.with_suffix(".other")
            other.write_bytes(rng.randbytes(len(data)))
            os.replace(other, path)
        return preadv(descriptor, rows, offset)

    return Planted(answer, moment)


def deleted(files: Files, moment: int, rng: random.Random) -> Planted:
    """Plant the deletion of all expert files."""

    def answer(descriptor: int, rows: Rows, offset: int) -> int:
        for path in files.paths:
            path.unlink()
        return preadv(descriptor, rows, offset)

    return Planted(answer, moment)


def thread_killed(files: Files, moment: int, rng: random.Random) -> Planted:
    """Plant an exception that ends a reader thread."""

    def answer(descriptor: int, rows: Rows, offset: int) -> int:
        if threading.current_thread() is threading.main_thread():
            planted.struck = False  # choose another read
            return preadv(descriptor, rows, offset)
        return failing(lambda: SystemExit("ended"))(descriptor, rows, offset)

    planted = Planted(answer, moment)
    return planted


class Signal(Planted):
    """A signal to this process, at most some milliseconds after a read."""

    def __init__(self, number: int, handler: Callable[..., object], moment: int, delay: float):
        super().__init__(self._strike, moment)
        self._number, self._handler, self._delay = number, handler, delay

    def _strike(self, descriptor: int, rows: Rows, offset: int) -> int:
        self.struck = False  # not yet
        if not self._armed:
            self._armed = True
            signal.setitimer(signal.ITIMER_REAL, self._delay)
        return preadv(descriptor, rows, offset)

    def _alarm(self, *_: object) -> None:
        self._moment, self.struck = 1 << 60, True
        os.kill(os.getpid(), self._number)

    def __enter__(self) -> Planted:
        """Set the alarm and the handler."""
        self._armed = False
        self._before = [
            (n, signal.signal(n, h))
            for n, h in ((self._number, self._handler), (signal.SIGALRM, self._alarm))
        ]
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        """Restore the alarm and the handler."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        super().__exit__()
        for number, handler in self._before:
            signal.signal(number, handler)


def leave(number: int, frame: object) -> None:
    """Raise SystemExit, as many programs do on SIGTERM."""
    raise SystemExit(f"signal {number}")


def interrupt(files: Files, moment: int, rng: random.Random) -> Planted:
    """Plant Ctrl-C."""
    return Signal(signal.SIGINT, signal.default_int_handler, moment, rng.uniform(1e-6, 5e-3))


def terminate(files: Files, moment: int, rng: random.Random) -> Planted:
    """Plant SIGTERM with a handler that raises SystemExit."""
    return Signal(signal.SIGTERM, leave, moment, rng.uniform(1e-6, 5e-3))


class Instead(Planted):
    """A function of a module, which fails once, at its nth call."""

    def __init__(self, owner: object, name: str, reason: Exception, call: int) -> None:
        super().__init__(preadv, 1 << 60)
        self._place, self._reason, self._call = (owner, name), reason, call
        self._real = getattr(owner, name)

    def _fail(self, *args: object, **kwargs: object) -> object:
        self._call -= 1
        if self._call < 0 and not self.struck:
            self.struck = True
            raise self._reason
        return self._real(*args, **kwargs)

    def __enter__(self) -> Planted:
        """Replace the function."""
        setattr(*self._place, lambda *args, **kwargs: self._fail(*args, **kwargs))
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the function."""
        setattr(*self._place, self._real)


def no_memory_to_compute(files: Files, moment: int, rng: random.Random) -> Planted:
    """Plant MLX's error when it cannot allocate a result."""
    reason = RuntimeError("[malloc] Unable to allocate 1048576 bytes.")
    return Instead(mx, "async_eval", reason, rng.randrange(8))


def no_memory_to_load(files: Files, moment: int, rng: random.Random) -> Planted:
    """Plant the system's error when it cannot allocate the expert cache."""
    reason = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    return Instead(host.mmap, "mmap", reason, 0)


def no_thread(files: Files, moment: int, rng: random.Random) -> Planted:
    """Plant the system's error when it cannot start a reader thread."""
    reason = RuntimeError("can't start new thread")
    return Instead(threading.Thread, "start", reason, rng.randrange(8))


@contextmanager
def ignored() -> Iterator[list[str]]:
    """Collect exceptions that Python ignores, such as those in finalizers."""
    found: list[str] = []
    hook = sys.unraisablehook
    sys.unraisablehook = lambda what: found.append(f"{what.exc_value!r} in {what.object}")
    try:
        yield found
    finally:
        sys.unraisablehook = hook
