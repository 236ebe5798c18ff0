"""Counters of experts asked for and of bytes read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import mlx.core as mx

FAST = 3e9  # bytes per second; what comes faster is copied out of the page cache
DECAY = 0.98  # what a read still counts for when the next one comes


@dataclass
class ExpertStats:
    """Counters since the store was opened or reset.

    Attributes:
        asked: experts asked for, counted once per layer and step; not where a GPU computes from
            banks that hold all, because it does not tell the host.
        hits: of these, experts that were resident already, or on their way, and not by a guess.
        reads: byte ranges read.
        bytes_read: bytes that `preadv` delivered from the expert files, or from the page cache.
        seconds_waited: time that the caller waited for reads.
        seconds_reading: time during which at least one read was in flight.
        bytes_preloaded: bytes read when the store was opened, because the banks hold all experts.
            No other counter knows of them: nobody had asked for these experts.
        seconds_preloading: what that took, with the allocation of the banks.
        early: experts asked for that were no hits, but on their way or there by a guess.
        bytes_useless: bytes read of experts that had been guessed and were not asked for.
    """

    asked: int = 0
    hits: int = 0
    reads: int = 0
    bytes_read: int = 0
    seconds_waited: float = 0.0
    seconds_reading: float = 0.0
    bytes_preloaded: int = 0
    seconds_preloading: float = 0.0
    early: int = 0
    bytes_useless: int = 0

    def add_loaded(self, asked: int, loaded: int, nanoseconds: int, record_bytes: int) -> None:
        """Add what a device has loaded by itself, for one layer."""
        self.asked += asked
        self.hits += asked - loaded
        self.reads += loaded
        self.bytes_read += loaded * record_bytes
        self.seconds_reading += nanoseconds / 1e9

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were resident, 0 to 1."""
        return self.hits / self.asked if self.asked else 0.0

    def as_dict(self) -> dict[str, float]:
        """Return the counters and the hit rate as plain numbers."""
        return {**asdict(self), "hit_rate": self.hit_rate}

    def __str__(self) -> str:
        """One line for people."""
        if self.bytes_preloaded and not self.asked:
            return f"Experts: all are resident, nothing is read; {self.preloaded}"
        speed = self.bytes_read / self.seconds_reading / 1e9 if self.seconds_reading else 0.0
        return (
            f"Experts: {self.asked} asked, {self.hit_rate:.1%} hits, "
            f"{self.bytes_read / 1e6:.1f} MB in {self.reads} reads, "
            f"{speed:.2f} GB/s while reading, waited {self.seconds_waited:.3f} s"
            + self._guesses
            + (f"; {self.preloaded}" if self.bytes_preloaded else "")
        )

    @property
    def _guesses(self) -> str:
        if not (self.early or self.bytes_useless):
            return ""
        return f"; guessed: {self.early} in time, {self.bytes_useless / 1e6:.1f} MB in vain"

    @property
    def preloaded(self) -> str:
        """A few words for people on what was read at load."""
        return f"{self.bytes_preloaded / 1e6:.1f} MB at load in {self.seconds_preloading:.2f} s"


class Observer(Protocol):
    """Hears of what is asked of a store, as benchmarks and profiles do."""

    def asked(self, layer: int, experts: Sequence[int]) -> None:
        """Hear of distinct experts that are asked for, before anything is read."""
        ...

    def loading(self, layer: int, ids: mx.array, slots: mx.array) -> None:
        """Hear of experts `[..., K]` that the device loads; their bytes are there with `slots`."""
        ...


class ReadRate:
    """How fast reads were, the latest counting most."""

    def __init__(self) -> None:
        """Start with none."""
        self._nbytes = self._seconds = 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        """Count reads that are over."""
        self._nbytes = DECAY * self._nbytes + nbytes
        self._seconds = DECAY * self._seconds + seconds

    @property
    def fast(self) -> bool:
        """Say whether bytes come out of the page cache, which takes a core's time."""
        return self._nbytes > FAST * self._seconds
