"""A benchmark's figures: what a run took, its floor, and what others published.

A run's *floor* is the time that no way of streaming could undercut here: the bytes that had to
come from the disk, at the bandwidth measured in the same run, or the time to compute with nothing
to read, whichever is longer.
"""

import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .expert_store import ExpertStats, ExpertStore
from .geometry import GEOMETRIES
from .memory import peak_bytes
from .published import ROWS
from .synthetic import Recipe


@dataclass(frozen=True)
class Floor:
    """The least time of a run, in seconds: the disk's share of the work, and the computer's."""

    disk: float
    compute: float

    @property
    def seconds(self) -> float:
        """Return the longer of the two: they can overlap."""
        return max(self.disk, self.compute)


@dataclass(frozen=True)
class Use:
    """What a stretch of work took.

    Attributes:
        seconds: by the clock.
        stats: the store's counters.
        from_disk: bytes that the disk delivered, where the system counts them.
        user: seconds of all cores in the program.
        system: seconds of all cores in the system's kernel, which copies and finds pages.
    """

    seconds: float
    stats: ExpertStats
    from_disk: int | None
    user: float
    system: float

    @property
    def needed(self) -> int:
        """Bytes that had to come from the disk: missed by the banks, and by the page cache.

        Those of wrong guesses did not have to.
        """
        return min(self.stats.bytes_read - self.stats.bytes_useless, self._came)

    @property
    def _came(self) -> int:
        """Bytes read that came from the disk."""
        read = self.stats.bytes_read
        return read if self.from_disk is None else min(read, self.from_disk)

    def floor(self, bandwidths: list[float], compute: float) -> Floor:
        """Return the run's floor.

        Args:
            bandwidths: of the disk, measured about the run; it counts at their median, or at what
                the run itself got while a read was in flight if that is more.
            compute: seconds of computing.
        """
        reading = self.stats.seconds_reading
        reached = self._came / reading if reading else 0.0
        return Floor(self.needed / max(statistics.median(bandwidths), reached), compute)

    def __sub__(self, before: "Use") -> "Use":
        """Return what came after `before`."""
        mine, theirs = asdict(self.stats), asdict(before.stats)
        stats = ExpertStats(**{name: mine[name] - theirs[name] for name in mine})
        disk = None if self.from_disk is None else self.from_disk - (before.from_disk or 0)
        return Use(
            self.seconds - before.seconds,
            stats,
            disk,
            self.user - before.user,
            self.system - before.system,
        )


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


def result(use: Use, tokens: int, floor: Floor) -> dict[str, Any]:
    """Return one run's figures as JSON values."""
    stats = use.stats
    return {
        "tokens_per_s": tokens / use.seconds,
        "hit_rate": stats.hit_rate,
        "bytes_per_token": stats.bytes_read / tokens,
        "useless_bytes_per_token": stats.bytes_useless / tokens,
        "disk_bytes_per_token": None if use.from_disk is None else use.from_disk / tokens,
        "read_bytes_per_s": stats.bytes_read / stats.seconds_waited if stats.reads else None,
        "cpu_user_s": use.user,
        "cpu_system_s": use.system,
        "floor_disk_s": floor.disk,
        "floor_compute_s": floor.compute,
        "share_of_floor": floor.seconds / use.seconds,
    }


HEADER = (
    f"{'tok/s':>9} {'hits':>6} {'MB/token':>9} {'in vain':>8} {'disk MB':>9} {'GB/s':>6} "
    f"{'disk ms':>9} {'comp. ms':>9} {'share':>6} {'user ms':>8} {'sys ms':>7}  run"
)
LEGEND = (
    "MB/token: read into the banks; in vain: of wrong guesses; disk MB: what the disk delivered; "
    "GB/s: while waiting for reads;\n"
    "disk, comp. ms: a token's least time by the disk and by computing; share: of the longer in "
    "the time taken;\nuser, sys ms: of all cores, in the program and in the kernel"
)


def line(row: dict[str, Any], tokens: int, name: str) -> str:
    """Return a `result` as one line under HEADER."""
    disk, speed = row["disk_bytes_per_token"], row["read_bytes_per_s"]
    return " ".join((
        f"{row['tokens_per_s']:9.2f} {row['hit_rate']:6.1%} {row['bytes_per_token'] / 1e6:9.2f}",
        f"{row['useless_bytes_per_token'] / 1e6:8.2f}",
        f"{'-' if disk is None else f'{disk / 1e6:.2f}':>9}",
        f"{'-' if speed is None else f'{speed / 1e9:.2f}':>6}",
        f"{row['floor_disk_s'] / tokens * 1e3:9.2f} {row['floor_compute_s'] / tokens * 1e3:9.2f}",
        f"{row['share_of_floor']:6.0%} {row['cpu_user_s'] / tokens * 1e3:8.2f}",
        f"{row['cpu_system_s'] / tokens * 1e3:7.2f}  {name}",
    ))  # fmt: skip


def middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of median speed."""
    speed = statistics.median_low(row["tokens_per_s"] for row in rows)
    return next(row for row in rows if row["tokens_per_s"] == speed)


def published(recipe: Recipe, unit: str) -> list[dict[str, Any]]:
    """Return what others published for whole models of this geometry and width, in `unit`."""
    layers = GEOMETRIES[recipe.geometry].num_hidden_layers
    return [
        {
            "name": f"{row.setup.name}, {row.name}, K={row.top_k}",
            "tokens_per_s": row.published,
            "ms_per_layer": 1e3 / row.published / layers,
            "source": row.setup.source,
        }
        for row in ROWS
        if (row.setup.model, row.bits, row.unit) == (recipe.geometry, recipe.bits, unit)
    ]


def print_published(rows: list[dict[str, Any]], ours: float) -> None:
    """Print published figures beside ours, which is milliseconds per token and layer."""
    if rows:
        print(f"ms per token and layer: {ours:.3f} here; published, of whole models elsewhere:")
    for row in rows:
        print(f"{row['ms_per_layer']:9.3f}  {row['tokens_per_s']} tok/s: {row['name']}")


def peak() -> dict[str, int]:
    """Print and return this process's peak memory, in bytes."""
    print(f"peak resident memory: {peak_bytes() / 2**20:.0f} MiB")
    return {"peak_bytes": peak_bytes()}
