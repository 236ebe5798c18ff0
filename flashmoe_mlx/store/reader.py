"""Reader threads: read byte ranges of files into existing memory.

A *piece* is one `preadv`. The pieces of one expert share an `Arrival`, which is done when its last
piece is; until then its memory must not be read or reused.
"""

import contextlib
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..errors import FlashMoEError
from .backend import Backend, BulkReads, Row
from .signals import defer_signals


class Arrival:
    """An expert's reads in flight.

    Attributes:
        pieces: number of pieces.
        left: pieces that are not done, plus one for a checksum that is not compared yet.
        nbytes: bytes read so far.
        error: the first error, if any.
        useless: whether this was a prefetch that no request used.
    """

    __slots__ = ("_running", "check", "error", "left", "nbytes", "pieces", "useless")

    def __init__(self, pieces: int) -> None:
        """Expect `pieces` pieces, at least one."""
        self.pieces = self.left = pieces
        self.nbytes = 0
        self.error: FlashMoEError | None = None
        self.useless = False
        self.check: Callable[[], FlashMoEError | None] | None = None
        self._running = threading.Lock()  # held until done; a third of the cost of an Event
        self._running.acquire()

    def expect_check(self, check: Callable[[], FlashMoEError | None]) -> None:
        """Check the bytes once all are read. Call this before the first read."""
        self.check = check
        self.left += 1

    @property
    def needs_check(self) -> bool:
        """Say whether all bytes are read, so that the thread of the last piece must check them."""
        return self.left == 1 and self.check is not None and not self.error

    @property
    def done(self) -> bool:
        """Say whether all writes have ended, with or without an error."""
        return not self.left

    def wait(self) -> None:
        """Return when it is done."""
        with self._running:
            pass

    @property
    def failing(self) -> bool:
        """Say whether it has an error while other pieces are still being read."""
        return bool(self.left and self.error)

    def advance(self, nbytes: int, error: FlashMoEError | None) -> None:
        """Count a piece that is done. Callers hold a common lock."""
        self.nbytes += nbytes
        self.error = self.error or error
        self.left -= 1
        if self.left == 1 and self.check and self.error:  # incomplete bytes need no check
            self.left = 0
        if not self.left:
            self._running.release()


REMEDIES = {
    errno.ENODEV: "The disk is disconnected: reconnect it, and load the model again.",
    errno.ENXIO: "The disk is disconnected: reconnect it, and load the model again.",
    errno.ENOMEM: "Memory is short: close other programs, or load with a smaller expert_cache.",
    errno.ESTALE: "The file server has replaced the file: load the model again.",
}
DEFAULT_REMEDY = "Check the disk."

Preadv = Callable[[int, Sequence[Any], int], int]  # descriptor, rows, offset -> bytes read
Piece = tuple[int, int, int, list[Row], Arrival]  # descriptor, offset, bytes, rows, expert


class Batch:
    """Pieces of one request, in the order to read them."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        """Collect pieces that have not started."""
        self.pieces = deque(pieces)


class Reader:
    """Threads that read pieces in the order given, until the files close."""

    def __init__(self, names: Mapping[int, Path], threads: int, backend: Backend) -> None:
        """Start the threads.

        Args:
            names: path of each file descriptor, for errors.
            threads: number of threads.
            backend: device whose rows are filled.

        Raises:
            FlashMoEError: the system refuses to start that many threads.
        """
        self._names = names
        self._preadv: Preadv = backend.preadv
        self._bulk = backend.bulk
        self._queue: SimpleQueue[Batch | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._helping = threading.Lock()
        self._batches: set[Batch] = set()
        self._in_flight = 0
        self._since = self._seconds = 0.0
        self.threads: list[threading.Thread] = []
        try:
            for number in range(threads):
                name = f"flashmoe-read-{number}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                thread.start()
                self.threads.append(thread)
        except (RuntimeError, MemoryError) as error:
            started = len(self.threads)
            self.close()
            raise FlashMoEError(
                f"io_threads = {threads}: the system started {started} and refuses more ({error}). "
                "Use fewer, or raise the limit (ulimit -u)."
            ) from error

    @property
    def width(self) -> int:
        """How many pieces are read concurrently."""
        return self._bulk.width if self._bulk else len(self.threads)

    def start(self, batch: Batch) -> None:
        """Start to read pieces; bulk reads finish before this returns."""
        self._batches.add(batch)
        if self._bulk:
            self._read_at_once(batch, self._bulk)
        for _ in range(min(len(batch.pieces), len(self.threads))):
            self._queue.put(batch)

    def _read_at_once(self, batch: Batch, bulk: BulkReads) -> None:
        """Read a batch in one call, and leave incomplete pieces to the threads."""
        with self._lock:
            self._count_seconds()
            self._in_flight += 1
        pieces = list(filter(bulk.takes, batch.pieces))
        others = [piece for piece in batch.pieces if not bulk.takes(piece)]
        try:
            counts = bulk.read(pieces) if pieces else []
        except FlashMoEError:  # the threads will name the file
            counts = [0] * len(pieces)
        with self._lock:
            self._count_seconds()
            self._in_flight -= 1
            batch.pieces.clear()
            batch.pieces.extend(others)
            for piece, count in zip(pieces, counts, strict=True):
                if count == piece[2]:
                    piece[-1].advance(count, None)
                else:
                    batch.pieces.append(piece)

    @contextlib.contextmanager
    def answered_by(self, preadv: Preadv) -> Iterator[None]:
        """Fill rows by `preadv` while the block runs."""
        before = self._preadv, self._bulk
        self._preadv, self._bulk = preadv, None
        try:
            yield
        finally:
            self._preadv, self._bulk = before

    def help(self, batch: Batch) -> None:
        """Read a batch's remaining pieces in the calling thread.

        The caller would wait anyway, and this saves waking it up. Ctrl-C stops it after the piece
        being read.
        """
        with self._helping, defer_signals() as interrupted:
            while not interrupted and (piece := self._take(batch)):
                self._read(piece)

    def cancel(self, batch: Batch, unwanted: Set[Arrival] | None = None) -> None:
        """Cancel pieces that no thread has started; their arrivals fail when all pieces are done.

        Args:
            batch: the pieces.
            unwanted: cancel only the pieces of these arrivals, by default all.
        """
        error = FlashMoEError("the read was cancelled; load the model again.")
        with defer_signals(), self._lock:
            pieces, kept = batch.pieces, list[Piece]()
            while pieces:
                piece = pieces.popleft()
                if unwanted is None or piece[-1] in unwanted:
                    piece[-1].advance(0, error)
                else:
                    kept.append(piece)
            pieces.extend(kept)
            if not kept:
                self._batches.discard(batch)

    def take_seconds(self) -> float:
        """Return the time with at least one read in flight since the last call."""
        with self._lock:
            self._count_seconds()
            seconds, self._seconds = self._seconds, 0.0
            return seconds

    def close(self) -> None:
        """Cancel pieces that have not started, wait for the others, and end the threads."""
        for batch in list(self._batches):
            self.cancel(batch)
        for _ in self.threads:
            self._queue.put(None)
        for thread in self.threads:
            thread.join()
        with self._helping:
            pass

    def _work(self) -> None:
        while batch := self._queue.get():
            while piece := self._take(batch):
                with contextlib.suppress(BaseException):  # its arrival has the error
                    self._read(piece)
                del piece  # or the waiting thread would keep its memory
            del batch

    def _take(self, batch: Batch) -> Piece | None:
        with self._lock:
            if not batch.pieces:
                self._batches.discard(batch)
                return None
            self._count_seconds()
            self._in_flight += 1
            return batch.pieces.popleft()

    def _read(self, piece: Piece) -> None:
        """Read a piece, and count it as done even after an error: other threads wait for it."""
        done, error = 0, None
        try:
            done, error = self._fill(piece)
        except BaseException as reason:  # a signal handler may raise anything in the main thread
            error = FlashMoEError(
                f"{self._names[piece[0]]}: reading an expert was interrupted ({reason!r}). Retry."
            )
            error.__cause__ = reason
            if not isinstance(reason, Exception):
                raise
        finally:
            with self._lock:
                self._count_seconds()
                self._in_flight -= 1
                piece[-1].advance(done, error)
                needs_check = piece[-1].needs_check
            if needs_check:
                self._check(piece[-1])

    def _check(self, arrival: Arrival) -> None:
        """Check complete bytes, and count that as done even after an error."""
        assert arrival.check
        error: FlashMoEError | None = FlashMoEError("checking an expert was interrupted. Retry.")
        try:
            error = arrival.check()
        finally:
            with self._lock:
                arrival.advance(0, error)

    def _fill(self, piece: Piece) -> tuple[int, FlashMoEError | None]:
        """Read a piece; return the bytes read, and an error if some are missing.

        `preadv` may return less than requested, so it is repeated.
        """
        descriptor, offset, nbytes, rows, _ = piece
        if (room := sum(map(len, rows))) != nbytes:
            return 0, FlashMoEError(
                f"{self._names[descriptor]}: {nbytes} bytes of an expert do not fit into {room} "
                "bytes of memory. Load the model again."
            )
        done = 0
        while done < nbytes:
            try:
                count = self._preadv(descriptor, skip(rows, done) if done else rows, offset + done)
            except InterruptedError:
                continue
            except Exception as reason:
                return done, self._failure(descriptor, offset + done, offset + nbytes, reason)
            if count == 0:
                return done, self._failure(descriptor, offset + done, offset + nbytes, None)
            done += count
        return done, None

    def _failure(
        self, descriptor: int, offset: int, end: int, reason: Exception | None
    ) -> FlashMoEError:
        """Return the error for a failed read at `offset`."""
        name = self._names[descriptor]
        try:
            size = os.fstat(descriptor).st_size
        except OSError:
            size = end
        if reason is None or size < end:  # direct reads fail there instead of returning less
            error = FlashMoEError(
                f"{name}: ends at byte {min(size, offset)}, in the middle of an expert. The file "
                "was truncated while the model was in use; restore it and load the model again."
            )
        else:
            short = isinstance(reason, MemoryError)
            code = errno.ENOMEM if short else getattr(reason, "errno", None)
            remedy = REMEDIES.get(code or 0, DEFAULT_REMEDY)
            error = FlashMoEError(
                f"{name}: reading an expert at byte {offset} failed "
                f"({getattr(reason, 'strerror', None) or repr(reason)}); nothing was computed from "
                f"it. {remedy}"
            )
        error.__cause__ = reason and reason.with_traceback(None)  # frames would keep memory
        return error

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        if self._in_flight:
            self._seconds += now - self._since
        self._since = now


def skip(rows: Sequence[Row], nbytes: int) -> list[Row]:
    """Return `rows` without their first `nbytes` bytes."""
    left: list[Row] = []
    for row in rows:
        if nbytes < len(row):
            left.append(row[nbytes:])
        nbytes = max(0, nbytes - len(row))
    return left


def cut(rows: Sequence[Row], nbytes: int) -> Iterator[list[Row]]:
    """Cut `rows` into lists of `nbytes` bytes; the last may have fewer."""
    part: list[Row] = []
    room = nbytes
    for row in rows:
        while len(row):
            head, row = row[:room], row[room:]
            part.append(head)
            room -= len(head)
            if not room:
                yield part
                part, room = [], nbytes
    if part:
        yield part
