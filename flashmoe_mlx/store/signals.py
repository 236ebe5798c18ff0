"""Stretches of code that no signal tears apart."""

import signal
import threading
from _signal import getsignal as get_handler  # type: ignore[import-not-found]
from _signal import signal as set_handler
from types import FrameType, TracebackType
from typing import Any

# `signal.signal` itself also looks for handlers' names, which takes ten times as long.
SIGNALS = tuple(
    int(getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)


class defer_signals:
    """Let signals wait until the block is over, and have them handled there.

    Python calls a signal's handler in the main thread between any two steps. If it raises, as
    Ctrl-C's does, and as those of timeouts and of SIGTERM often do, half of a change would be made.
    Other threads are never interrupted.

    As a context it is a list that is empty as long as there was no signal.
    """

    def __enter__(self) -> list[int]:
        """Put the handlers off."""
        self._waiting: list[int] = []
        self._before: list[tuple[int, Any]] = []
        if threading.current_thread() is threading.main_thread():
            try:
                for number in SIGNALS:
                    # Otherwise it ends the process, is ignored, or was not set from Python.
                    if callable(handler := get_handler(number)):
                        self._before.append((number, handler))
                        set_handler(number, self._note)
            except BaseException:  # from one that was not put off yet
                self._restore()
                raise
        return self._waiting

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the handlers back, and call those that are due."""
        self._restore()

    def _restore(self) -> None:
        """Do so one by one, the first last, whatever they raise."""
        try:
            if self._before:
                number, handler = self._before.pop()
                set_handler(number, handler)
                if number in self._waiting:
                    signal.raise_signal(number)
        finally:
            if self._before:
                self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._waiting.append(number)
