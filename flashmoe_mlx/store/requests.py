"""Experts asked for, and what was computed from them: who keeps slots from being written anew."""

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import mlx.core as mx

from .reader import Arrival, Batch

Wait = Callable[[int, Batch | None, list[Arrival]], None]
KEPT_CONSUMERS = 2  # one for each half of a layer's slots


class Consumer(NamedTuple):
    """What was computed, perhaps not yet, from slots of a layer; None stands for all of them."""

    array: mx.array
    layer: int
    slots: frozenset[int] | None

    def reads(self, layer: int, slots: Iterable[int]) -> bool:
        """Say whether it may read one of some slots."""
        mine = self.slots is None or not self.slots.isdisjoint(slots)
        return self.layer == layer and mine


class Consumers(list[Consumer]):
    """What was computed from slots and may not be evaluated yet; each keeps memory."""

    def hold(self, consumer: Consumer) -> None:
        """Add one, and evaluate the oldest when there are more than KEPT_CONSUMERS."""
        self.append(consumer)
        self.evaluate(self[:-KEPT_CONSUMERS])

    def of_layer(self, layer: int) -> list[Consumer]:
        """Return those that read a layer's slots."""
        return [held for held in self if held.layer == layer]

    def of_slots(self, layer: int, slots: Iterable[int]) -> list[Consumer]:
        """Return those that may read one of some slots."""
        return [held for held in self if held.reads(layer, slots)]

    def evaluate(self, consumers: list[Consumer]) -> None:
        """Evaluate some and forget them."""
        if consumers:
            mx.eval([consumer.array for consumer in consumers])
            self.forget(consumers)

    def forget(self, consumers: list[Consumer]) -> None:
        """Drop some."""
        done = set(map(id, consumers))
        self[:] = [held for held in self if id(held) not in done]


class Pending:
    """Experts asked for, of which some may be on their way.

    As long as it lives and has not failed, its slots are not given to other experts. Who drops
    one that was not waited for loses nothing: its experts arrive all the same.

    Attributes:
        layer: decoder layer.
        experts: ids, as asked for.
        slots: where they lie, or will; their bytes are whole when `wait` has returned.
        released: whether its slots may be given to others though it lives.
        thread: which one asked.
    """

    def __init__(
        self,
        layer: int,
        experts: Sequence[int],
        slots: list[int],
        wait: Wait,
        reads: tuple[Batch | None, list[Arrival]],
    ) -> None:
        """Remember what was asked, how to wait for it, and what is on its way."""
        self.layer = layer
        self.experts = experts
        self.slots = slots
        self.released = False
        self.thread = threading.get_ident()
        self._wait = wait
        self._batch, self._arrivals = reads

    def wait(self) -> list[int]:
        """Return the slots when all bytes are there.

        Raises:
            FlashMoEError: a file is shorter than it was, or cannot be read, or the store was
                closed. The bank then holds what it held, less what was dropped to make room.
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
        """Let others have the slots once they are at rest, as if it lived no more."""
        self.released = True


class Requests:
    """The requests of each layer that still need their slots."""

    def __init__(self, layers: int) -> None:
        """Start without any."""
        # References that call nothing when a request dies: Ctrl-C would be lost in there.
        self._of: list[list[weakref.ref[Pending]]] = [[] for _ in range(layers)]

    def add(self, pending: Pending) -> None:
        """Remember a request for as long as somebody keeps it."""
        living = (*self.living(pending.layer), pending)
        self._of[pending.layer] = [weakref.ref(request) for request in living]

    def living(self, layer: int) -> list[Pending]:
        """Return the requests whose slots must stay theirs."""
        found = (reference() for reference in self._of[layer])
        return [pending for pending in found if pending and not pending.released]

    def kept(self, layer: int, experts: Iterable[int]) -> set[int]:
        """Return experts whose slots must stay theirs: these, and those of living requests."""
        return set(experts).union(*(pending.experts for pending in self.living(layer)))
