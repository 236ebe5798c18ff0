"""Defer signals, so that their handlers cannot interrupt an update."""

import signal
import threading
from _signal import getsignal as get_handler  # type: ignore[import-not-found]
from _signal import signal as set_handler
from types import FrameType, TracebackType
from typing import Any

# `signal.signal` also looks up names of handlers, which takes ten times as long.
SIGNALS = tuple(
    int(getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)


class defer_signals:
    """Defer signals until the end of the block.

    Python calls signal handlers in the main thread between any two bytecodes. A handler that
    raises, as those of Ctrl-C, timeouts and SIGTERM do, would leave an update half done. Other
    threads are never interrupted.

    `with` yields the list of signals received so far.
    """

    def __enter__(self) -> list[int]:
        """Replace the handlers."""
        self._received: list[int] = []
        self._before: list[tuple[int, Any]] = []
        if threading.current_thread() is threading.main_thread():
            try:
                for number in SIGNALS:
                    # Others end the process, are ignored, or were not set from Python.
                    if callable(handler := get_handler(number)):
                        self._before.append((number, handler))
                        set_handler(number, self._note)
            except BaseException:  # from a handler that is not replaced yet
                self._restore()
                raise
        return self._received

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the handlers, and call those whose signals arrived."""
        self._restore()

    def _restore(self) -> None:
        """Restore all handlers in reverse order, even if one of them raises."""
        try:
            if self._before:
                number, handler = self._before.pop()
                set_handler(number, handler)
                if number in self._received:
                    signal.raise_signal(number)
        finally:
            if self._before:
                self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
