"""A status line during generation: tokens per second, the disk's rate and the hit rate.

tqdm cannot stay below text that grows without line feeds, so the line uses a scroll region.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..store.stats import ExpertStats

INTERVAL = 0.25  # seconds between updates at least; 1 if standard error is not a terminal


class Live:
    """The status line on standard error: a terminal's last line, or a new line per update."""

    def __init__(self, stats: ExpertStats) -> None:
        """Start counting."""
        self._terminal = sys.stderr.isatty()
        self._interval = INTERVAL if self._terminal else 1.0
        self._start(stats)

    def _start(self, stats: ExpertStats) -> None:
        self._then, self._stats, self._tokens = time.perf_counter(), replace(stats), 0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Reserve the terminal's last line while the block runs."""
        if not self._terminal:
            yield
            return
        rows = shutil.get_terminal_size().lines
        # Make room, let all lines but the last scroll, and restore the cursor.
        _write(f"\n\x1b[1A\x1b7\x1b[1;{rows - 1}r\x1b8")
        try:
            yield
        finally:
            _write(f"\x1b7\x1b[r\x1b[{rows};1H\x1b[2K\x1b8")

    def update(self, count: Callable[[], ExpertStats]) -> None:
        """Count a token; update the line when due. `count` returns the current counters."""
        self._tokens += 1
        seconds = time.perf_counter() - self._then
        if seconds < self._interval:
            return
        stats = count()
        line = status_line(self._tokens / seconds, self._stats, stats)
        if self._terminal:
            size = shutil.get_terminal_size()
            _write(f"\x1b7\x1b[{size.lines};1H\x1b[2K{line[: size.columns - 1]}\x1b8")
        else:
            _write(f"{line}\n")
        self._start(stats)


def _write(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def status_line(speed: float, before: ExpertStats, after: ExpertStats) -> str:
    """Format `speed` in tokens per second and the difference between two sets of counters."""
    asked, hits = after.asked - before.asked, after.hits - before.hits
    nbytes = after.bytes_read - before.bytes_read
    seconds = after.seconds_reading - before.seconds_reading
    reading = f"{nbytes / seconds / 1e9:.2f} GB/s while reading" if seconds else "nothing read"
    return f"[flashmoe] {speed:.1f} tokens/s, {reading}, {hits / asked if asked else 1:.1%} hits"
