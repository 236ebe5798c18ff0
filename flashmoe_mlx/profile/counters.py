"""What a stretch of a run took: time, reads, memory; and the least that its reads could take."""

import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..store.stats import ExpertStats
from ..store.store import ExpertStore


@dataclass(frozen=True)
class Use:
    """What a stretch of work took.

    Attributes:
        seconds: by the clock.
        stats: the store's counters.
        from_disk: bytes that the disk delivered, where the system counts them.
        user: seconds of all cores in the program.
        system: seconds of all cores in the kernel, which copies pages.
    """

    seconds: float
    stats: ExpertStats
    from_disk: int | None
    user: float
    system: float

    @property
    def needed(self) -> int:
        """Bytes that had to come from the disk: neither cached nor wrongly prefetched."""
        return min(self.stats.bytes_read - self.stats.bytes_useless, self._came)

    @property
    def _came(self) -> int:
        """Bytes read that came from the disk."""
        read = self.stats.bytes_read
        return read if self.from_disk is None else min(read, self.from_disk)

    def disk_floor(self, bandwidths: list[float]) -> float:
        """Return the least seconds that the disk needed for the run.

        Args:
            bandwidths: bytes per second of the disk, measured around the run; their median counts,
                or what the run itself reached while a read was in flight if that is more.
        """
        reading = self.stats.seconds_reading
        reached = self._came / reading if reading else 0.0
        return self.needed / max(statistics.median(bandwidths), reached)

    def __sub__(self, before: "Use") -> "Use":
        """Return what came after `before`."""
        mine, theirs = asdict(self.stats), asdict(before.stats)
        stats = ExpertStats(**{name: mine[name] - theirs[name] for name in mine})
        disk = None if self.from_disk is None else self.from_disk - (before.from_disk or 0)
        user, system = self.user - before.user, self.system - before.system
        return Use(self.seconds - before.seconds, stats, disk, user, system)


def now(store: ExpertStore | None) -> Use:
    """Return the counters as they stand; subtract two of these."""
    stats = replace(store.stats) if store else ExpertStats()
    cpu = os.times()
    return Use(time.perf_counter(), stats, disk_bytes(), cpu.user, cpu.system)


def disk_bytes() -> int | None:
    """Return the bytes that disks have delivered for this process, where the system counts them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["read_bytes"])
