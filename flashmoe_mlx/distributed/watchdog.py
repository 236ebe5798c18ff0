"""Ends this process when another rank hangs, or when the launcher is gone.

MLX's collectives have no time limit, and `mlx.launch` leaves its ranks running if it is killed.
"""

import atexit
import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from .heartbeat import Heartbeat

EXIT_CODE = 75  # "temporary failure": a supervisor may start the ranks again
LOOK, FAREWELL = 0.5, 2  # seconds
STDOUT = 1


class Watchdog(threading.Thread):
    """A thread that ends the process once a step makes no progress for some seconds."""

    def __init__(self, timeout: float, who: str, patience: int = 1) -> None:
        """Start to watch the launcher.

        Args:
            timeout: seconds of a step, and of silence of another rank.
            who: names this rank in messages.
            patience: how many times as long a step may take.
        """
        super().__init__(name="flashmoe-watchdog", daemon=True)
        self.timeout, self._who, self._patience = timeout, who, patience
        self._launcher = os.getppid()
        self._what, self._limit, self._deadline = "", timeout, float("inf")
        self.heartbeat: Heartbeat | None = None
        atexit.register(self._leave)
        self.start()

    def progress(self, what: str) -> None:
        """Start to wait for `what`, and count its seconds from now."""
        self._await(what, self._patience * self.timeout)

    def _await(self, what: str, limit: float) -> None:
        self._what, self._limit, self._deadline = what, limit, time.monotonic() + limit

    @contextlib.contextmanager
    def watching(self, what: str, times: int = 1) -> Iterator[None]:
        """Watch a block; at least `times` the timeout."""
        self._await(what, max(times, self._patience) * self.timeout)
        try:
            yield
        finally:
            self._deadline = float("inf")

    def run(self) -> None:
        """Look at the clock, at the launcher, and for signs of life."""
        look = min(LOOK, self.timeout / 4)
        while True:
            self.heartbeat.beat(look) if self.heartbeat else time.sleep(look)
            if os.getppid() != self._launcher or _nobody_reads():
                os._exit(EXIT_CODE)  # stderr is gone too
            if time.monotonic() > self._deadline:
                end_process(
                    f"{self._who}: {self._what} took more than {self._limit:g} s, so another rank "
                    "hangs or has lost its connection. Start all ranks again; "
                    "FLASHMOE_COLLECTIVE_TIMEOUT=SECONDS allows slower ones."
                )
            self._check_heartbeat()

    def _check_heartbeat(self) -> None:
        if self.heartbeat and (silent := self.heartbeat.silence()) > self.timeout:
            ended = "ended" if silent == float("inf") else f"was silent for {silent:.0f} s"
            end_process(
                f"{self._who}: rank {self.heartbeat.before} {ended}; its own output may say "
                "why. Start all ranks again."
            )

    def _leave(self) -> None:
        """Notice at exit if the rank before ended without a goodbye.

        A server's thread may lose its connection in a collective of mlx-lm's, and nothing remains.
        """
        if self.heartbeat:
            self.heartbeat.leave(FAREWELL)
            self._check_heartbeat()


def _nobody_reads() -> bool:
    """Say whether the launcher, which reads this rank's output, ended before the watch began."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def end_process(message: str) -> NoReturn:
    """Print a message and end the process at once: other threads may hang in a collective."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"[flashmoe] {message}\n")
        sys.stderr.flush()
    os._exit(EXIT_CODE)
