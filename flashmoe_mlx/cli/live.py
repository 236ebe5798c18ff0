"""A status line during generation: tokens, tokens per second, the disk's rate and the hit rate.

tqdm cannot stay below text that grows without line feeds, so the line uses a scroll region. A
thread writes it, so that it also moves during a prompt or a slow token.
"""

import bisect
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..profile.stats import TokenTimes
from ..store.stats import ExpertStats

INTERVAL = 0.25  # seconds between updates; 1 if standard error is not a terminal
WINDOW = 2.0  # seconds that the rates cover


class Live:
    """The status line on standard error: a terminal's last line, or a new line per update."""

    def __init__(self, times: TokenTimes, count: Callable[[], ExpertStats]) -> None:
        """Show tokens of `times` and counters that `count` returns, in the thread that calls it."""
        self._times, self._count = times, count
        self._terminal = sys.stderr.isatty()
        self._interval = INTERVAL if self._terminal else 1.0
        self._counted = deque([(times.start, replace(count()))])
        self._ended = threading.Event()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the line while the block runs; a terminal's last line is reserved for it."""
        rows = shutil.get_terminal_size().lines
        if self._terminal:
            # Make room, let all lines but the last scroll, and restore the cursor.
            _write(f"\n\x1b[1A\x1b7\x1b[1;{rows - 1}r\x1b8")
        writer = threading.Thread(target=self._keep_writing, name="live", daemon=True)
        writer.start()
        try:
            yield
        finally:
            self._ended.set()
            writer.join()
            if self._terminal:
                _write(f"\x1b7\x1b[r\x1b[{rows};1H\x1b[2K\x1b8")
            else:
                self._write_line()

    def note(self) -> None:
        """Read the counters, if the last reading is old."""
        now = self._times.times[-1]
        if now - self._counted[-1][0] < INTERVAL:
            return
        self._counted.append((now, replace(self._count())))
        while len(self._counted) > 2 and self._counted[1][0] <= now - WINDOW:
            self._counted.popleft()

    def line(self) -> str:
        """Return the current line."""
        if not self._times.count:
            return f"[flashmoe] reading {self._times.prompt} tokens, {self._elapsed()}"
        first, last = self._counted[0][1], self._counted[-1][1]
        done = f"{self._times.count} tokens in {self._elapsed()}"
        return (
            f"[flashmoe] {done}, {recent_rate(self._times.times):.1f} tok/s, {reads(first, last)}"
        )

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(self._times.elapsed()), 60)
        return f"{minutes}:{seconds:02}"

    def _keep_writing(self) -> None:
        while not self._ended.wait(self._interval):
            self._write_line()

    def _write_line(self) -> None:
        if self._terminal:
            size = shutil.get_terminal_size()
            line = self.line()[: size.columns - 1]
            _write(f"\x1b7\x1b[{size.lines};1H\x1b[2K{line}\x1b8")
        else:
            _write(f"{self.line()}\n")


def _write(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def recent_rate(times: list[float]) -> float:
    """Return tokens per second over the last `WINDOW`, or since the token before the last."""
    if len(times) < 2:
        return 0.0
    first = min(bisect.bisect_left(times, times[-1] - WINDOW), len(times) - 2)
    return (len(times) - 1 - first) / (times[-1] - times[first])


def reads(before: ExpertStats, after: ExpertStats) -> str:
    """Format the difference between two sets of counters."""
    asked, hits = after.asked - before.asked, after.hits - before.hits
    nbytes = after.bytes_read - before.bytes_read
    seconds = after.seconds_reading - before.seconds_reading
    reading = f"{nbytes / seconds / 1e9:.2f} GB/s while reading" if seconds else "nothing read"
    return f"{reading}, {hits / asked if asked else 1:.0%} hits"
