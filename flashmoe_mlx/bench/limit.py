"""How near generation comes to what the disk and the page cache give at best.

The *limit* is the best of the raw ways of `flashmoe-bench io` at reading as large records of the
same model, measured in rounds between the runs. Of the bytes of a run, those that the disk
delivered would have taken their time at the best cold way, the others at the best warm one. The
share is that time in the time during which at least one read of the run was in flight.
"""

import statistics
from dataclasses import asdict
from typing import Any

from ..format.layout import ExpertLayout
from ..profile.counters import Use
from .io import Case, Cell, cases, measure

THREADS = (2, 4, 8)
SAMPLE = 128 << 20  # bytes that each way reads in a round


class Limit:
    """Raw reads of a model's experts, measured round by round."""

    def __init__(self, layout: ExpertLayout) -> None:
        """Choose the ways to measure."""
        self._layout = layout
        self._cases = [
            case for case in cases(layout, THREADS) if not case.ours and case.way != "memcpy"
        ]
        self._rounds: dict[Case, list[float]] = {case: [] for case in self._cases}

    def measure(self) -> None:
        """Measure each way once more."""
        for cell in measure(self._layout, self._cases, 1, SAMPLE)[0]:
            self._rounds[cell.case] += cell.bytes_per_s

    def best(self, state: str) -> Cell:
        """Return the fastest way by the median of its rounds; `state` is "cold" or "warm"."""
        cells = [Cell(c, speeds, None) for c, speeds in self._rounds.items() if c.state == state]
        return max(cells, key=lambda cell: cell.median)

    def share(self, use: Use) -> float | None:
        """Return the limit's time for a run's bytes in the time of its reads.

        None if nothing was read, or if the system does not say what came from the disk.
        """
        stats = use.stats
        if not stats.seconds_reading or use.from_disk is None:
            return None
        cold = use.needed / self.best("cold").median
        warm = (stats.bytes_read - use.needed) / self.best("warm").median
        return (cold + warm) / stats.seconds_reading

    def report(self, uses: dict[str, list[Use]]) -> dict[str, Any]:
        """Print the limit and what each kind of run reached, by the median; return JSON values."""
        best = {state: self.best(state) for state in ("cold", "warm")}
        ways = "; ".join(
            f"{state} {cell.median / 1e9:.2f} GB/s ({cell.case.way}, {cell.case.threads} threads)"
            for state, cell in best.items()
        )
        print(f"raw reads of such records at best, between the runs: {ways}")
        found = {s: {**asdict(c.case), "bytes_per_s": c.median} for s, c in best.items()}
        reached = {name: self._reached(name, runs) for name, runs in uses.items()}
        return {"best": found, "reached": reached}

    def _reached(self, name: str, uses: list[Use]) -> dict[str, float] | None:
        """Print and return what runs reached; None if they read nothing."""
        counters = [use.stats for use in uses if use.stats.seconds_reading]
        if not counters:
            return None
        speed = statistics.median(c.bytes_read / c.seconds_reading for c in counters)
        shares = [share for use in uses if (share := self.share(use)) is not None]
        found, line = {"bytes_per_s": speed}, f"{speed / 1e9:.2f} GB/s while a read was in flight"
        if shares:
            found["share"] = statistics.median(shares)
            line += f", {found['share']:.0%} of what its bytes allow"
        print(f"{name}: {line}")
        return found
