"""Stretches of code that Ctrl-C does not tear apart."""

import signal
import threading
from _signal import signal as set_handler  # type: ignore[import-not-found]
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# `signal.signal` itself also looks for handlers' names, which takes ten times as long.
SIGINT = int(signal.SIGINT)


@contextmanager
def unbroken() -> Iterator[list[int]]:
    """Let Ctrl-C wait until the block is over, and raise what it raises there.

    Python interrupts the main thread between any two steps, so that half of a change would be
    made. Other threads are never interrupted.

    Yields:
        A list that is empty as long as nobody has pressed Ctrl-C.
    """
    waiting: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield waiting
        return

    def note(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    before = set_handler(SIGINT, note)
    try:
        yield waiting
    finally:
        # None: it was not set from Python, and cannot be set back.
        set_handler(SIGINT, signal.default_int_handler if before is None else before)
        if waiting:
            signal.raise_signal(signal.SIGINT)
