"""Requests for experts, and arrays computed from them: neither's slots may be overwritten."""

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import mlx.core as mx

from .reader import Arrival, Batch

Wait = Callable[[int, Batch | None, list[Arrival]], None]
KEPT_CONSUMERS = 2  # one for each half of a layer's slots


class Consumer(NamedTuple):
    """A possibly unevaluated array that reads slots of a layer; None means all slots."""

    array: mx.array
    layer: int
    slots: frozenset[int] | None

    def reads(self, layer: int, slots: Iterable[int]) -> bool:
        """Say whether it may read one of these slots."""
        mine = self.slots is None or not self.slots.isdisjoint(slots)
        return self.layer == layer and mine


class Consumers(list[Consumer]):
    """Consumers that may not be evaluated yet; each keeps memory."""

    def hold(self, consumer: Consumer) -> None:
        """Add a consumer, and evaluate the oldest beyond KEPT_CONSUMERS."""
        self.append(consumer)
        self.evaluate(self[:-KEPT_CONSUMERS])

    def of_layer(self, layer: int) -> list[Consumer]:
        """Return the consumers of a layer."""
        return [held for held in self if held.layer == layer]

    def of_slots(self, layer: int, slots: Iterable[int]) -> list[Consumer]:
        """Return the consumers that may read one of these slots."""
        return [held for held in self if held.reads(layer, slots)]

    def evaluate(self, consumers: list[Consumer]) -> None:
        """Evaluate consumers and forget them."""
        if consumers:
            mx.eval([consumer.array for consumer in consumers])
            self.forget(consumers)

    def forget(self, consumers: list[Consumer]) -> None:
        """Forget consumers."""
        done = set(map(id, consumers))
        self[:] = [held for held in self if id(held) not in done]


class Pending:
    """A request for experts, some of which may still be in flight.

    It keeps its slots until it is deleted, released, or fails. Dropping a request without waiting
    is safe: its reads still complete.

    Attributes:
        layer: decoder layer.
        experts: ids, in the order requested.
        slots: one for each expert; their bytes are complete when `wait` has returned.
        released: whether other experts may take its slots.
        thread: id of the thread that made the request.
    """

    def __init__(
        self,
        layer: int,
        experts: Sequence[int],
        slots: list[int],
        wait: Wait,
        reads: tuple[Batch | None, list[Arrival]],
    ) -> None:
        """Record the request, how to wait for it, and the reads in flight."""
        self.layer = layer
        self.experts = experts
        self.slots = slots
        self.released = False
        self.thread = threading.get_ident()
        self._wait = wait
        self._batch, self._arrivals = reads

    def wait(self) -> list[int]:
        """Wait for all bytes, and return the slots.

        Raises:
            FlashMoEError: a file is truncated or cannot be read, or the store was closed. The bank
                keeps its other experts, except those evicted to make room.
        """
        try:
            if self._arrivals:
                self._wait(self.layer, self._batch, self._arrivals)
                for arrival in self._arrivals:
                    if arrival.error:
                        raise arrival.error
                self._arrivals, self._batch = [], None
        except BaseException:  # also Ctrl-C
            self.release()
            raise
        return self.slots

    def release(self) -> None:
        """Let other experts take the slots, as soon as their reads are done."""
        self.released = True


class Requests:
    """Each layer's requests that still need their slots."""

    def __init__(self, layers: int) -> None:
        """Start without any."""
        # Without callbacks: a Ctrl-C inside one would be lost.
        self._of: list[list[weakref.ref[Pending]]] = [[] for _ in range(layers)]

    def add(self, pending: Pending) -> None:
        """Track a request until its last reference is gone."""
        active = (*self.active(pending.layer), pending)
        self._of[pending.layer] = [weakref.ref(request) for request in active]

    def active(self, layer: int) -> list[Pending]:
        """Return the requests that keep their slots."""
        found = (reference() for reference in self._of[layer])
        return [pending for pending in found if pending and not pending.released]

    def reserved(self, layer: int, experts: Iterable[int]) -> set[int]:
        """Return the experts that must not be evicted: these, and those of active requests."""
        return set(experts).union(*(pending.experts for pending in self.active(layer)))
