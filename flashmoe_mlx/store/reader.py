"""Reader threads: byte ranges of files straight into memory that is already there.

A *piece* is one `preadv`. The pieces of one expert share an `Arrival`, which is over when the last
of them is; only then may anybody read those bytes, or write others there.
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
    """Bytes on their way into memory.

    Attributes:
        pieces: how many `preadv` calls bring them, if none returns early.
        left: pieces that are not over yet, and one more while the whole is to be checked.
        nbytes: bytes that came.
        error: why they are not all there; the first reason found.
        useless: whether nobody wants them, as it turned out.
    """

    __slots__ = ("_over", "check", "error", "left", "nbytes", "pieces", "useless")

    def __init__(self, pieces: int) -> None:
        """Expect so many pieces, at least one."""
        self.pieces = self.left = pieces
        self.nbytes = 0
        self.error: FlashMoEError | None = None
        self.useless = False
        self.check: Callable[[], FlashMoEError | None] | None = None
        self._over = threading.Lock()  # held until it is over; a third of the cost of an Event
        self._over.acquire()

    def expect_check(self, check: Callable[[], FlashMoEError | None]) -> None:
        """Have the bytes checked when all are there; called before the first is read."""
        self.check = check
        self.left += 1

    @property
    def unchecked(self) -> bool:
        """Say whether all bytes are there, and whoever brought the last has to check them now."""
        return self.left == 1 and self.check is not None and not self.error

    @property
    def over(self) -> bool:
        """Say whether nothing will be written any more, be the bytes whole or not."""
        return not self.left

    def wait(self) -> None:
        """Return when it is over."""
        with self._over:
            pass

    @property
    def doomed(self) -> bool:
        """Say whether bytes are still being written, and yet it will not be whole."""
        return bool(self.left and self.error)

    def advance(self, nbytes: int, error: FlashMoEError | None) -> None:
        """Count a piece that is over. Callers hold one lock."""
        self.nbytes += nbytes
        self.error = self.error or error
        self.left -= 1
        if self.left == 1 and self.check and self.error:  # there is nothing to check
            self.left = 0
        if not self.left:
            self._over.release()


REMEDIES = {
    errno.ENODEV: "The disk is gone: connect it again, and load the model again.",
    errno.ENXIO: "The disk is gone: connect it again, and load the model again.",
    errno.ENOMEM: "Memory is short: end other programs, or load with a smaller expert_cache.",
    errno.ESTALE: "The file server has another file there: load the model again.",
}
OTHERS = "Check the disk."

Preadv = Callable[[int, Sequence[Any], int], int]  # descriptor, rows, offset; bytes that came
Piece = tuple[int, int, int, list[Row], Arrival]  # descriptor, offset, bytes, rows, of what


class Batch:
    """Pieces that are asked for together, in the order to read them."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        """Collect pieces that nobody has begun."""
        self.pieces = deque(pieces)


class Reader:
    """Threads that live as long as the files are open, and read pieces in the order given."""

    def __init__(self, names: Mapping[int, Path], threads: int, backend: Backend) -> None:
        """Start the threads.

        Args:
            names: file descriptors, and what to call the files in errors.
            threads: how many.
            backend: of the rows, which knows how to fill them.

        Raises:
            FlashMoEError: the system does not give so many threads.
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
                "Give fewer, or raise its limit (ulimit -u)."
            ) from error

    @property
    def width(self) -> int:
        """How many pieces are read at a time."""
        return self._bulk.width if self._bulk else len(self.threads)

    def start(self, batch: Batch) -> None:
        """Have pieces read and return at once, or once those that are read in bulk are there."""
        self._batches.add(batch)
        if self._bulk:
            self._read_at_once(batch, self._bulk)
        for _ in range(min(len(batch.pieces), len(self.threads))):
            self._queue.put(batch)

    def _read_at_once(self, batch: Batch, bulk: BulkReads) -> None:
        """Read a batch by one call; pieces that do not come whole are left to the threads."""
        with self._lock:
            self._count_seconds()
            self._in_flight += 1
        pieces = list(filter(bulk.takes, batch.pieces))
        others = [piece for piece in batch.pieces if not bulk.takes(piece)]
        try:
            came = bulk.read(pieces) if pieces else []
        except FlashMoEError:  # the threads will find out which file it is
            came = [0] * len(pieces)
        with self._lock:
            self._count_seconds()
            self._in_flight -= 1
            batch.pieces.clear()
            batch.pieces.extend(others)
            for piece, count in zip(pieces, came, strict=True):
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
        """Read pieces of a batch that is started in the calling thread, until none is left.

        Who has to wait anyway is awake already, and the other threads need not wake it. Ctrl-C
        ends it behind the piece that is being read.
        """
        with self._helping, defer_signals() as interrupted:
            while not interrupted and (piece := self._take(batch)):
                self._read(piece)

    def drop(self, batch: Batch, unwanted: Set[Arrival] | None = None) -> None:
        """Give up what no thread has begun: it fails, once its other pieces are over.

        Args:
            batch: pieces.
            unwanted: give up only what belongs to these.
        """
        error = FlashMoEError("reading was given up; load the model again.")
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
        """Return for how long some read was in flight since this was last asked."""
        with self._lock:
            self._count_seconds()
            seconds, self._seconds = self._seconds, 0.0
            return seconds

    def close(self) -> None:
        """Drop what no thread has begun, wait for what one has, and end the threads."""
        for batch in list(self._batches):
            self.drop(batch)
        for _ in self.threads:
            self._queue.put(None)
        for thread in self.threads:
            thread.join()
        with self._helping:
            pass

    def _work(self) -> None:
        while batch := self._queue.get():
            while piece := self._take(batch):
                with contextlib.suppress(BaseException):  # its arrival has failed; the thread lives
                    self._read(piece)
                del piece  # or the thread would keep its memory while it waits for more
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
        """Read a piece, and count it as over whatever happens: others wait for that."""
        done, error = 0, None
        try:
            done, error = self._fill(piece)
        except BaseException as reason:  # a signal's handler may raise anything in the main thread
            error = FlashMoEError(
                f"{self._names[piece[0]]}: reading an expert was broken off ({reason!r}). Retry."
            )
            error.__cause__ = reason
            if not isinstance(reason, Exception):
                raise
        finally:
            with self._lock:
                self._count_seconds()
                self._in_flight -= 1
                piece[-1].advance(done, error)
                unchecked = piece[-1].unchecked
            if unchecked:
                self._check(piece[-1])

    def _check(self, arrival: Arrival) -> None:
        """Check bytes that are all there, and count that as over whatever happens."""
        assert arrival.check
        error: FlashMoEError | None = FlashMoEError("checking an expert was broken off. Retry.")
        try:
            error = arrival.check()
        finally:
            with self._lock:
                arrival.advance(0, error)

    def _fill(self, piece: Piece) -> tuple[int, FlashMoEError | None]:
        """Return how much of a piece came, and why not all of it.

        `preadv` may return less than asked, so go on until all is there.
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
        """Say what is wrong with a file that could not be read at `offset`."""
        name = self._names[descriptor]
        try:
            size = os.fstat(descriptor).st_size
        except OSError:
            size = end
        if reason is None or size < end:  # unbuffered reads fail there, instead of returning less
            error = FlashMoEError(
                f"{name}: ends at byte {min(size, offset)}, in the middle of an expert. The file "
                "was cut short while the model was in use; restore it and load the model again."
            )
        else:
            short = isinstance(reason, MemoryError)
            code = errno.ENOMEM if short else getattr(reason, "errno", None)
            remedy = REMEDIES.get(code or 0, OTHERS)
            error = FlashMoEError(
                f"{name}: reading an expert at byte {offset} failed "
                f"({getattr(reason, 'strerror', None) or repr(reason)}); nothing was computed from "
                f"it. {remedy}"
            )
        error.__cause__ = reason and reason.with_traceback(None)  # frames keep what they wait for
        return error

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        if self._in_flight:
            self._seconds += now - self._since
        self._since = now


def skip(rows: Sequence[Row], nbytes: int) -> list[Row]:
    """Return what is left of `rows` behind their first `nbytes` bytes."""
    left: list[Row] = []
    for row in rows:
        if nbytes < len(row):
            left.append(row[nbytes:])
        nbytes = max(0, nbytes - len(row))
    return left


def cut(rows: Sequence[Row], nbytes: int) -> Iterator[list[Row]]:
    """Cut `rows` into lists of exactly `nbytes` bytes; the last may have fewer."""
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
