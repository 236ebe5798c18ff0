"""Progress bars of our commands: on standard error, on a terminal only, gone when the work is done.

In other programs, and without a terminal, they show nothing; a log gets one line per kind of work
that only the first run does.
"""

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .commands import running

TICK = 0.5  # seconds between redraws, so that the elapsed time moves
DELAY = 0.5  # seconds; shorter work shows no bar
TIME_ALONE = "{desc} [{elapsed}]"
STEPS = "{desc}{n_fmt}/{total_fmt} [{elapsed}]"

_open: list["_Shown"] = []  # the last one is on the screen
_first_use = [0.0]
_logged: set[str] = set()


@contextmanager
def bar(total: int | None, unit: str = "", what: str = "") -> Iterator["Bar"]:
    """Show how far some work is while the block runs.

    Bars may be nested: the innermost is shown.

    Args:
        total: amount of work; None shows the elapsed time alone.
        unit: "B" for bytes, a noun, or nothing for steps of unequal length.
        what: the work, such as "loading experts".
    """
    if not visible():
        yield Bar()
        return
    shown = _Shown(total, unit, what)
    try:
        yield shown
    finally:
        shown.close()


@contextmanager
def first_use(what: str, everywhere: bool = False) -> Iterator[None]:
    """Show work that only the first run on a machine does, and add it to `first_use_seconds`.

    Without a terminal a line names it, once; with `everywhere`, in other programs too.
    """
    start = time.perf_counter()
    if (running() or everywhere) and not visible() and what not in _logged:
        _logged.add(what)
        print(f"[flashmoe] {what}, first use only", file=sys.stderr, flush=True)
    try:
        with bar(None, what=f"{what}, first use only"):
            yield
    finally:
        _first_use[0] += time.perf_counter() - start


def first_use_seconds() -> float:
    """Return the time that this process has spent in `first_use`: no part of a model's speed."""
    return _first_use[0]


def visible() -> bool:
    """Say whether bars are shown: in a command of ours, on a terminal."""
    return running() is not None and sys.stderr is not None and sys.stderr.isatty()


class Bar:
    """Receives how far some work is; this one shows nothing."""

    def update(self, n: int = 1) -> None:
        """Add work done."""

    def set_description(self, what: str) -> None:
        """Name the work."""


class _Shown(Bar):
    """A tqdm bar that a thread redraws, also while nothing is added."""

    def __init__(self, total: int | None, unit: str, what: str) -> None:
        from tqdm import tqdm  # here: most programs show no bar

        size = shutil.get_terminal_size()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._bar: Any = tqdm(
            total=total, unit=unit, unit_scale=unit == "B", desc=what, leave=False, file=sys.stderr,
            delay=DELAY, mininterval=0.1, miniters=0, position=0,
            ncols=size.columns, nrows=size.lines,  # tqdm shows nothing where these are unknown
            bar_format=TIME_ALONE if total is None else None if unit else STEPS,
        )  # fmt: skip
        if _open:
            _open[-1].hide()
        _open.append(self)
        threading.Thread(target=self._tick, name="progress", daemon=True).start()

    def update(self, n: int = 1) -> None:
        """Add work done, and redraw if this bar is the innermost."""
        with self._lock:
            if self._ended.is_set():
                return
            if _open[-1] is self:
                self._bar.update(n)
            else:
                self._bar.n += n

    def set_description(self, what: str) -> None:
        """Name the work, and redraw if this bar is the innermost."""
        with self._lock:
            self._bar.set_description(what, refresh=_open[-1] is self)

    def hide(self) -> None:
        """Clear the bar's line until the next `update`."""
        with self._lock:
            self._bar.clear()

    def close(self) -> None:
        """Clear the bar's line for good."""
        with self._lock:
            self._ended.set()
            _open.remove(self)
            self._bar.close()

    def _tick(self) -> None:
        while not self._ended.wait(TICK):
            self.update(0)
