"""One line that follows a generation: tokens per second, the disk's rate, and the hit rate.

tqdm cannot keep it below text that grows without line feeds, so the terminal's scroll region does.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..store.store import ExpertStats

INTERVAL = 0.25  # seconds, at least, between two lines; 1 where they follow one another


class Live:
    """The line, on standard error: the last one of a terminal, or one line after another."""

    def __init__(self, stats: ExpertStats) -> None:
        """Start counting."""
        self._terminal = sys.stderr.isatty()
        self._interval = INTERVAL if self._terminal else 1.0
        self._start(stats)

    def _start(self, stats: ExpertStats) -> None:
        self._then, self._stats, self._tokens = time.perf_counter(), replace(stats), 0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the terminal's last line free while the block runs."""
        if not self._terminal:
            yield
            return
        rows = shutil.get_terminal_size().lines
        # Make room, scroll all lines but the last, and come back to where the text goes on.
        _write(f"\n\x1b[1A\x1b7\x1b[1;{rows - 1}r\x1b8")
        try:
            yield
        finally:
            _write(f"\x1b7\x1b[r\x1b[{rows};1H\x1b[2K\x1b8")

    def update(self, count: Callable[[], ExpertStats]) -> None:
        """Count a token, and show the line when it is due; `count` returns the counters now."""
        self._tokens += 1
        seconds = time.perf_counter() - self._then
        if seconds < self._interval:
            return
        stats = count()
        line = line_of(self._tokens / seconds, self._stats, stats)
        if self._terminal:
            size = shutil.get_terminal_size()
            _write(f"\x1b7\x1b[{size.lines};1H\x1b[2K{line[: size.columns - 1]}\x1b8")
        else:
            _write(f"{line}\n")
        self._start(stats)


def _write(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def line_of(speed: float, before: ExpertStats, after: ExpertStats) -> str:
    """Return the line for `speed` tokens per second, and counters when last shown and now."""
    asked, hits = after.asked - before.asked, after.hits - before.hits
    nbytes = after.bytes_read - before.bytes_read
    seconds = after.seconds_reading - before.seconds_reading
    reading = f"{nbytes / seconds / 1e9:.2f} GB/s while reading" if seconds else "nothing read"
    return f"[flashmoe] {speed:.1f} tokens/s, {reading}, {hits / asked if asked else 1:.1%} hits"
