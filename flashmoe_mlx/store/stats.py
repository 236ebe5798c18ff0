"""Counters of requested experts and of bytes read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import mlx.core as mx

FAST = 3e9  # bytes per second; faster reads come from the page cache
DECAY = 0.98  # weight of earlier reads at each new one


@dataclass
class ExpertStats:
    """Counters since the store was opened or reset.

    Attributes:
        asked: experts requested, once per layer and step. A GPU with all experts resident does
            not report its requests to the host, so they are not counted.
        hits: requested experts that were resident or being read, without a prefetch.
        reads: byte ranges read.
        bytes_read: bytes that `preadv` returned, from disk or page cache.
        seconds_waited: time the caller waited for reads.
        seconds_reading: time during which at least one read was in flight.
        bytes_preloaded: bytes read when the store opened, if all experts fit. The other counters
            exclude them.
        seconds_preloading: time of that, including allocation.
        early: requested experts that a prefetch had read or was reading.
        bytes_useless: bytes of prefetched experts that were not requested.
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

    def as_preload(self, seconds: float) -> "ExpertStats":
        """Return new counters whose preload are the reads so far, which took `seconds`."""
        done = self.bytes_read
        return ExpertStats(bytes_preloaded=done, seconds_preloading=seconds if done else 0.0)

    def add_loaded(self, asked: int, loaded: int, nanoseconds: int, record_bytes: int) -> None:
        """Add one layer's loads by the device."""
        self.asked += asked
        self.hits += asked - loaded
        self.reads += loaded
        self.bytes_read += loaded * record_bytes
        self.seconds_reading += nanoseconds / 1e9

    def add_read(self, reads: int, nbytes: int, useless: bool) -> None:
        """Add an expert's reads."""
        self.reads += reads
        self.bytes_read += nbytes
        self.bytes_useless += useless * nbytes

    @property
    def hit_rate(self) -> float:
        """Share of the requested experts that were resident, 0 to 1."""
        return self.hits / self.asked if self.asked else 0.0

    def as_dict(self) -> dict[str, float]:
        """Return the counters and the hit rate as plain numbers."""
        return {**asdict(self), "hit_rate": self.hit_rate}

    def __str__(self) -> str:
        """Return one readable line."""
        if self.bytes_preloaded and not self.asked:
            return f"Experts: all are resident, nothing is read; {self.preloaded}"
        speed = self.bytes_read / self.seconds_reading / 1e9 if self.seconds_reading else 0.0
        return (
            f"Experts: {self.asked} asked, {self.hit_rate:.1%} hits, "
            f"{self.bytes_read / 1e6:.1f} MB in {self.reads} reads, "
            f"{speed:.2f} GB/s while reading, waited {self.seconds_waited:.3f} s"
            + self._prefetches
            + (f"; {self.preloaded}" if self.bytes_preloaded else "")
        )

    @property
    def _prefetches(self) -> str:
        if not (self.early or self.bytes_useless):
            return ""
        return f"; prefetched: {self.early} in time, {self.bytes_useless / 1e6:.1f} MB unused"

    @property
    def preloaded(self) -> str:
        """Describe the reads at load."""
        return f"{self.bytes_preloaded / 1e6:.1f} MB at load in {self.seconds_preloading:.2f} s"


class Observer(Protocol):
    """Receives a store's requests; benchmarks and profiles implement it."""

    def asked(self, layer: int, experts: Sequence[int]) -> None:
        """Receive a request for distinct experts, before anything is read."""
        ...

    def loading(self, layer: int, ids: mx.array, slots: mx.array) -> None:
        """Receive a load of experts `[..., K]` by the device; evaluating `slots` completes it."""
        ...


class ReadRate:
    """Decaying average of the read speed."""

    def __init__(self) -> None:
        """Start without reads."""
        self._nbytes = self._seconds = 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        """Add finished reads."""
        self._nbytes = DECAY * self._nbytes + nbytes
        self._seconds = DECAY * self._seconds + seconds

    @property
    def fast(self) -> bool:
        """Say whether reads come from the page cache, which takes a core's time."""
        return self._nbytes > FAST * self._seconds
