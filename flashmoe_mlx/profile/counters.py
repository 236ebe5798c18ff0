"""Resources that a part of a run used, and a lower bound of its time on disk."""

import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..store.stats import ExpertStats
from ..store.store import ExpertStore


@dataclass(frozen=True)
class Use:
    """Resources used.

    Attributes:
        seconds: wall-clock time.
        stats: the store's counters.
        from_disk: bytes read from disk, None if the system does not count them.
        user: CPU seconds in user mode, all cores.
        system: CPU seconds in the kernel, all cores.
    """

    seconds: float
    stats: ExpertStats
    from_disk: int | None
    user: float
    system: float

    @property
    def needed(self) -> int:
        """Bytes needed from disk: neither cached nor prefetched without use."""
        return min(self.stats.bytes_read - self.stats.bytes_useless, self._read_from_disk)

    @property
    def _read_from_disk(self) -> int:
        """Bytes of experts read from disk."""
        read = self.stats.bytes_read
        return read if self.from_disk is None else min(read, self.from_disk)

    def disk_floor(self, bandwidths: list[float]) -> float:
        """Return the least time that the disk needs for these bytes, in seconds.

        Args:
            bandwidths: bytes per second of the disk, measured before and after the run. The bound
                uses their median, or the run's own speed while reading if that is higher.
        """
        reading = self.stats.seconds_reading
        reached = self._read_from_disk / reading if reading else 0.0
        return self.needed / max(statistics.median(bandwidths), reached)

    def __sub__(self, before: "Use") -> "Use":
        """Return the difference to an earlier `now`."""
        mine, theirs = asdict(self.stats), asdict(before.stats)
        stats = ExpertStats(**{name: mine[name] - theirs[name] for name in mine})
        disk = None if self.from_disk is None else self.from_disk - (before.from_disk or 0)
        user, system = self.user - before.user, self.system - before.system
        return Use(self.seconds - before.seconds, stats, disk, user, system)


def now(store: ExpertStore | None) -> Use:
    """Return the current counters; subtract two of these."""
    stats = replace(store.stats) if store else ExpertStats()
    cpu = os.times()
    return Use(time.perf_counter(), stats, disk_bytes(), cpu.user, cpu.system)


def disk_bytes() -> int | None:
    """Return the bytes that this process has read from disk, None if the system does not count."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["read_bytes"])
