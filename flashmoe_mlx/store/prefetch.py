"""Prefetch: whether to read experts before their router has chosen them.

The next layer's router is asked about the residual stream as it leaves this layer, and the experts
that it likes best are read while the next layer's attention runs. A wrong prefetch costs bytes, so
`auto` times the steps of a generation with and without, and keeps the faster for a while.
"""

import statistics
import time
from collections.abc import Iterable, Iterator

from .reader import Arrival, Batch

BLOCK = 4  # steps that are timed together, the first of them not: its bank is the other way's
BLOCKS = 8  # of each way in a trial
TERM = 2000  # steps until the next trial
WORTH = 0.98  # of the time without; less of a gain is noise, and bytes are not free


class Lookahead:
    """Says for each decoding step whether to guess, and learns from how long they take."""

    def __init__(self, mode: str = "auto") -> None:
        """Begin with a trial in "auto"; "on" and "off" stay as they are."""
        self.mode = mode
        self._pays = mode == "on"
        self._left = 0
        self._begin_trial()

    def _begin_trial(self) -> None:
        self._number = 0
        self._seconds: tuple[list[float], list[float]] = [], []

    def begin(self) -> bool:
        """Say whether to guess in the step that begins now."""
        self._start = time.perf_counter()
        if self.mode != "auto" or self._left:
            return self._pays
        return bool(self._number // BLOCK % 2)

    def end(self) -> None:
        """Note that the step is over."""
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
            without, with_guess = map(statistics.median, self._seconds)
            self._pays, self._left = with_guess < WORTH * without, TERM
            self._begin_trial()

    def __str__(self) -> str:
        """A few words for people."""
        if self.mode != "auto":
            return self.mode
        return ("on" if self._pays else "off") + ", by trial" if self._left else "on trial"


class Prefetched:
    """Experts of each layer that were read, or are, before anybody asked for them."""

    def __init__(self, layers: int) -> None:
        """Start without any."""
        self._of: list[dict[int, tuple[Batch, Arrival]]] = [{} for _ in range(layers)]

    def any(self, layer: int) -> bool:
        """Say whether a layer has some."""
        return bool(self._of[layer])

    def add(
        self, layer: int, batch: Batch, experts: Iterable[int], arrivals: Iterable[Arrival]
    ) -> None:
        """Note experts whose reads begin."""
        for expert, arrival in zip(experts, arrivals, strict=True):
            self._of[layer][expert] = batch, arrival

    def claim(self, layer: int, experts: Iterable[int], missing: Iterable[int]) -> int:
        """Return how many experts that are asked for came early, and forget all of them."""
        early = len(self._of[layer].keys() & set(experts) - set(missing))
        for expert in experts:
            self._of[layer].pop(expert, None)
        return early

    def drop_others(
        self, layer: int, experts: Iterable[int]
    ) -> Iterator[tuple[int, Batch, Arrival]]:
        """Yield and forget those that are not among `experts`."""
        for expert in self._of[layer].keys() - set(experts):
            yield expert, *self._of[layer].pop(expert)
