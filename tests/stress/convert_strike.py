"""Run flashmoe-convert in this process, and kill it at its nth system call.

    python tests/stress/convert_strike.py '{"point": 17, "when": "amid", "power": 5}' ARGUMENTS

`convert_trials.py` starts it. The JSON has:

* `point`: index of the call among those below; -1 for none;
* `when`: "before" or "after" the call, or "amid" it, with half of a write done;
* `power`: a seed, to simulate a power failure in addition to SIGKILL: some bytes that were written
  but not synced become zeros, or the file ends before them;
* `log`: a file for the calls: a JSON list of their names and times.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashmoe_mlx.convert.cli import main

CALLS = "open", "pwrite", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir"
REAL = {name: getattr(os, name) for name in (*CALLS, "close")}


class Strike:
    """Counts calls, records which bytes are not synced, and kills the process."""

    def __init__(
        self, point: int = -1, when: str = "before", power: int | None = None, log: str = ""
    ) -> None:
        """Replace the system calls."""
        self.calls: list[tuple[str, float]] = []
        self._point, self._when, self._power, self._log = point, when, power, log
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        self._paths: dict[int, str] = {}  # of open files
        self._unsynced: dict[str, list[tuple[int, int]]] = {}  # by path: (offset, bytes)
        for name in CALLS:
            setattr(os, name, self._call(name))

    def _call(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                mine = len(self.calls)
                self.calls.append((name, time.monotonic() - self._begun))
            if mine == self._point:
                self._strike(name, *arguments, **options)
            return self._noted(name, *arguments, **options)

        return call

    def _noted(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Make the call, and record which bytes it syncs."""
        if name == "pwrite":
            written = REAL[name](*arguments)
            self._unsynced.setdefault(self._paths.get(arguments[0], "?"), []).append(
                (arguments[2], written)
            )
            return written
        if name == "fsync":
            path = self._paths.get(arguments[0], "?")
            before = len(self._unsynced.get(path, []))  # writes during the sync may not be synced
            REAL[name](*arguments)
            self._unsynced[path] = self._unsynced.get(path, [])[before:]
            return None
        result = REAL[name](*arguments, **options)
        if name == "open":
            self._paths[result] = _absolute(arguments[0])
        elif name in ("replace", "rename"):
            old, new = map(_absolute, arguments[:2])
            self._unsynced[new] = self._unsynced.pop(old, [])
            self._paths = {file: new if p == old else p for file, p in self._paths.items()}
        elif name == "unlink" and not options:
            self._unsynced.pop(_absolute(arguments[0]), None)
        return result

    def _strike(self, name: str, *arguments: Any, **options: Any) -> None:
        try:
            if self._when == "amid" and name == "pwrite":
                file, data, offset = arguments
                self._noted(name, file, memoryview(data).cast("B")[: len(data) // 2], offset)
            elif self._when != "before":
                self._noted(name, *arguments, **options)
            if self._power is not None:
                self._lose(random.Random(self._power))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)

    def _lose(self, chances: random.Random) -> None:
        """Damage the bytes that are not synced, as a power failure may."""
        for path, ranges in self._unsynced.items():
            if not ranges or not os.path.exists(path):
                continue
            if chances.random() < 0.3:
                os.truncate(path, min(offset for offset, _ in ranges))
                continue
            file = REAL["open"](path, os.O_WRONLY)
            for offset, nbytes in ranges:
                if chances.random() < 0.5:
                    REAL["pwrite"](file, bytes(nbytes), offset)
            REAL["close"](file)

    def close(self) -> None:
        """Write the log."""
        if self._log:
            Path(self._log).write_text(json.dumps(self.calls))


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.realpath(os.fspath(path))


if __name__ == "__main__":
    strike = Strike(**json.loads(sys.argv[1]))
    code = main(sys.argv[2:])
    strike.close()
    sys.exit(code)
