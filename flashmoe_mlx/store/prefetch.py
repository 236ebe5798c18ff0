"""Prefetch: read experts before their router has chosen them.

The next layer's router scores the residual stream as it leaves this layer, and the experts with the
highest scores are read while the next layer's attention runs. A wrong prefetch costs bytes, so
`auto` times decoding steps with and without prefetch, and keeps the faster mode for a while.
"""

import statistics
import time
from collections.abc import Iterable, Iterator

from .reader import Arrival, Batch

BLOCK = 4  # steps per block; the first is not timed: its slots are from the other mode
BLOCKS = 8  # per mode in a trial
TERM = 2000  # steps until the next trial
WORTH = 0.98  # of the time without prefetch; a smaller gain is noise, and bytes cost


class Lookahead:
    """Decides for each decoding step whether to prefetch, from the times of earlier steps."""

    def __init__(self, mode: str = "auto") -> None:
        """Start a trial if the mode is "auto"; "on" and "off" are fixed."""
        self.mode = mode
        self._pays = mode == "on"
        self._left = 0
        self._begin_trial()

    def _begin_trial(self) -> None:
        self._number = 0
        self._seconds: tuple[list[float], list[float]] = [], []

    def begin(self) -> bool:
        """Say whether to prefetch in the step that starts now."""
        self._start = time.perf_counter()
        if self.mode != "auto" or self._left:
            return self._pays
        return bool(self._number // BLOCK % 2)

    def end(self) -> None:
        """Record that the step has ended."""
        if self.mode != "auto":
            return
        if self._left:
            self._left -= 1
            return
        if self._number % BLOCK:
            seconds = time.perf_counter() - self._start
            self._seconds[self._number // BLOCK % 2].append(seconds)
        self._number += 1
        if self._number == 2 * BLOCK * BLOCKS:
            without, prefetching = map(statistics.median, self._seconds)
            self._pays, self._left = prefetching < WORTH * without, TERM
            self._begin_trial()

    def __str__(self) -> str:
        """Describe the mode."""
        if self.mode != "auto":
            return self.mode
        return ("on" if self._pays else "off") + ", by trial" if self._left else "on trial"


class Prefetched:
    """Each layer's prefetched experts that have not been requested yet."""

    def __init__(self, layers: int) -> None:
        """Start empty."""
        self._of: list[dict[int, tuple[Batch, Arrival]]] = [{} for _ in range(layers)]

    def any(self, layer: int) -> bool:
        """Say whether a layer has any."""
        return bool(self._of[layer])

    def add(
        self, layer: int, batch: Batch, experts: Iterable[int], arrivals: Iterable[Arrival]
    ) -> None:
        """Record experts whose prefetch starts."""
        for expert, arrival in zip(experts, arrivals, strict=True):
            self._of[layer][expert] = batch, arrival

    def claim(self, layer: int, experts: Iterable[int], missing: Iterable[int]) -> int:
        """Return how many requested experts were prefetched, and forget all of them."""
        early = len(self._of[layer].keys() & set(experts) - set(missing))
        for expert in experts:
            self._of[layer].pop(expert, None)
        return early

    def pop_others(
        self, layer: int, experts: Iterable[int]
    ) -> Iterator[tuple[int, Batch, Arrival]]:
        """Yield and forget all prefetches except `experts`."""
        for expert in self._of[layer].keys() - set(experts):
            yield expert, *self._of[layer].pop(expert)
