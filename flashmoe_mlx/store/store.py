"""The expert store: loads experts from disk into slots.

It knows nothing of models: it maps (layer, expert ids) to slots of the layer's bank.
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import FlashMoEError
from ..format.layout import ExpertLayout
from ..progress import bar
from .backend import Backend, DeviceLoader
from .checks import RecordChecks
from .devices import choose
from .files import close, open_reader
from .prefetch import Lookahead, Prefetched
from .reader import Arrival, Batch, Preadv
from .requests import Consumer, Consumers, Pending, Requests
from .signals import defer_signals
from .sizing import CachePlan
from .slots import SlotBank, no_free_slots
from .stats import ExpertStats as ExpertStats
from .stats import Observer, ReadRate

LAYERS_AHEAD = 2  # read while memory for the next layer is allocated


class ExpertStore:
    """A cache of experts, and the reads that fill it.

    One generation at a time may use a store. Copies of a model share it.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        plan: CachePlan,
        io_threads: int = 8,
        preload: bool = False,
        checks: RecordChecks | None = None,
        lookahead: str = "off",
        backend: Backend | None = None,
    ) -> None:
        """Open the expert files and allocate the slots.

        Args:
            layout: where the experts lie.
            plan: slots per layer, and how to read.
            io_threads: reader threads.
            preload: read all experts now, expert e into slot e, if the plan has slots for all.
            checks: checksums to compare with every expert after its read.
            lookahead: whether to prefetch: "auto", "on" or "off".
            backend: device that computes, by default MLX's default device.

        Raises:
            FlashMoEError: a file cannot be opened or preloaded, or the system refuses memory or
                threads.
        """
        self.backend = backend or choose()
        self.backend.check_room(plan.slots * layout.token_bytes)
        self.layout = layout
        self.plan = plan
        self._checks = checks
        self.lookahead = Lookahead(lookahead)
        self._stats = ExpertStats()
        self._rate = ReadRate()
        self._loader: DeviceLoader | None = None
        self.observer: Observer | None = None
        self.banks: list[SlotBank] = []
        self._requests = Requests(len(layout.layers))
        self._prefetched = Prefetched(len(layout.layers))
        self._consumers = Consumers()
        self._lock = threading.Lock()
        self._process = os.getpid()
        loaders: list[DeviceLoader] = []
        with defer_signals():
            files, self._reader = open_reader(layout, plan.io.direct, io_threads, self.backend)
            closing = self._reader, loaders, [*files.values()], self._process
            self._finalizer = weakref.finalize(self, close, *closing)
        try:
            self._fill(files, preload)
            arrays = [bank.arrays for bank in self.banks]
            self._loader = self.backend.loader(layout, plan, arrays)
            loaders += [self._loader] if self._loader else []
        except BaseException:  # also Ctrl-C
            self.close()
            raise

    def _fill(self, files: dict[Path, int], preload: bool) -> None:
        """Allocate the banks; meanwhile preload those with slots for all experts."""
        start, ahead, layers = time.perf_counter(), deque[Pending](), self.layout.layers
        slots = [min(self.plan.slots, layer.num_experts) for layer in layers]
        whole = [preload and n == layer.num_experts for n, layer in zip(slots, layers, strict=True)]
        sizes = deque(layer.total_bytes for layer, w in zip(layers, whole, strict=True) if w)
        with bar(sum(sizes) or None, "B", "loading experts") as progress:
            for number, layer in enumerate(layers):
                self.banks.append(SlotBank(layer, slots[number], files, self.backend))
                if whole[number]:
                    ahead.append(self.request(number, range(layer.num_experts)))
                while len(ahead) > (LAYERS_AHEAD if layer is not layers[-1] else 0):
                    ahead.popleft().wait()
                    progress.update(sizes.popleft())
        self._stats = self._stats.as_preload(time.perf_counter() - start)

    def close(self) -> None:
        """Stop the reader threads and close the files. A closed store cannot fetch."""
        with self._lock:
            self._count_device_loads()
            self._finalizer()

    @property
    def stats(self) -> ExpertStats:
        """The counters up to now."""
        if self._loader:
            with self._lock:
                self._count_device_loads()
        return self._stats

    def _count_device_loads(self) -> None:
        """Add the device's own loads since the last call."""
        if self._loader and self._finalizer.alive and os.getpid() == self._process:
            counts = self._loader.counted().tolist()
            for layer, (asked, loaded, nanoseconds) in zip(self.layout.layers, counts, strict=True):
                self._stats.add_loaded(asked, loaded, nanoseconds, layer.record_bytes)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertStore":
        """Return the store itself: the files do not change."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled."""
        raise TypeError(
            "an ExpertStore holds open files and threads and cannot be pickled; "
            "load the model again in the other process"
        )

    @property
    def holds_all(self) -> bool:
        """Say whether all experts are resident."""
        return all(bank.holds_all for bank in self.banks)

    def hold(self, consumer: mx.array, layer: int, slots: Iterable[int] | None = None) -> None:
        """Keep slots unchanged until `consumer`, which reads them, is evaluated.

        A lazy graph reads slots only when it is evaluated. Unevaluated consumers keep memory, so
        at most KEPT_CONSUMERS stay; a bank with all experts is never overwritten and needs none.

        Args:
            consumer: an array computed from slots.
            layer: decoder layer.
            slots: the slots it reads, by default all. It is evaluated before one is overwritten.
        """
        if self.banks[layer].holds_all:
            return
        with self._lock:
            if self._loader and self._loader.of_layer[layer].is_newer:
                self._loader.of_layer[layer].hold(consumer)
                return
            read = None if slots is None else frozenset(slots)
            self._consumers.hold(Consumer(consumer, layer, read))

    def fetch(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Make experts resident and return their slots, in the order given.

        Args:
            layer: decoder layer.
            experts: distinct expert ids, at most as many as there are slots.

        Raises:
            FlashMoEError: a file is truncated or cannot be read. The bank keeps its other
                experts, except those evicted to make room.
        """
        return self.request(layer, experts).wait()

    def load_by_device(self, layer: int, ids: mx.array, after: mx.array) -> mx.array | None:
        """Let the GPU itself make experts resident, if it can.

        Args:
            layer: decoder layer.
            ids: `[..., K]` uint32 expert ids, possibly not computed yet.
            after: any array; the load starts when it is computed.

        Returns:
            The slots `[..., K]`; evaluating them loads the bytes. None if the host must `fetch`.
        """
        bank = self.banks[layer]
        if not self._loader or ids.size > len(bank):
            return None
        with self._lock:
            self.check_usable()
            table = self._loader.of_layer[layer]
            if table.thread != threading.get_ident():  # only that thread can evaluate its loads
                self._table_to_host(layer)
            if not table.is_newer:
                if self._requests.active(layer):
                    return None
                self._finish_reads(bank)
                self._consumers.evaluate(self._consumers.of_layer(layer))
                table.take_from_host(*bank.table())
            slots = table.load(ids, after)
        if self.observer:
            self.observer.loading(layer, ids, slots)
        return slots

    def request(self, layer: int, experts: Sequence[int]) -> Pending:
        """Assign slots to experts, start to read those that are missing, and return at once.

        Consumers of slots that change hands are evaluated first. Other requests, of any layer, may
        be in flight.

        Args:
            layer: decoder layer.
            experts: distinct expert ids, at most as many as the slots that no other `Pending` has.

        Raises:
            FlashMoEError: the layer has too few slots, or the store was closed, or belongs to
                another process.
        """
        bank = self.banks[layer]
        if self.observer:
            self.observer.asked(layer, experts)
        with self._lock:
            self.check_usable()
            self._table_to_host(layer)
            self._complete(bank, experts)
            missing = bank.absent(experts)
            self._stats.asked += len(experts)
            early = self._prefetched.claim(layer, experts, missing)
            self._stats.hits += len(experts) - len(missing) - early
            self._stats.early += early
            batch = None
            if missing:
                with defer_signals():
                    slots = self._slots(layer, missing, self._requests.reserved(layer, experts))
                    batch = self._read(layer, missing, slots)
            slots = [bank.touch(e) for e in experts]
            arrivals = [bank.arriving[e][1] for e in experts if e in bank.arriving]
            arrivals.reverse()  # the last one usually finishes last: fewer wake-ups
            pending = Pending(layer, experts, slots, self._wait, (batch, arrivals))
            self._requests.add(pending)
        return pending

    def count_hits(self, layer: int, experts: Sequence[int]) -> None:
        """Count distinct experts requested of a bank that holds all, where nothing is read.

        Raises:
            FlashMoEError: the store was closed, or belongs to another process.
        """
        if self.observer:
            self.observer.asked(layer, experts)
        with self._lock:
            self.check_usable()
            self._stats.asked += len(experts)
            self._stats.hits += len(experts)

    def reads_answered_by(self, preadv: Preadv) -> AbstractContextManager[None]:
        """Let `preadv` fill the slots in a `with` block, as benchmarks without the disk do."""
        return self._reader.answered_by(preadv)

    @property
    def reads_compute(self) -> bool:
        """Say whether reads come from the page cache and take time of the cores that compute."""
        return self._rate.fast and self.backend.shares_cores

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Start to read experts that the next request will probably need.

        Args:
            layer: decoder layer.
            experts: distinct expert ids; none is read if there are too few slots.

        Raises:
            FlashMoEError: the store was closed, or belongs to another process.
        """
        bank = self.banks[layer]
        with self._lock:
            self.check_usable()
            self._complete(bank)
            missing = bank.absent(experts)
            keep = self._requests.reserved(layer, experts)
            slots = bank.choose(missing, keep) if missing else None
            if slots is None:
                return
            with defer_signals():
                batch = self._read(layer, missing, slots)
                arrivals = [bank.arriving[expert][1] for expert in missing]
                self._prefetched.add(layer, batch, missing, arrivals)

    def cancel_prefetch(self, layer: int, experts: Iterable[int]) -> None:
        """Cancel a layer's prefetches except `experts`, which the next request needs."""
        self._table_to_host(layer)
        if not self._prefetched.any(layer):
            return
        with defer_signals(), self._lock:
            for expert, batch, arrival in self._prefetched.pop_others(layer, experts):
                self._reader.cancel(batch, {arrival})
                if arrival.done and expert not in self.banks[layer].arriving:
                    self._stats.bytes_useless += arrival.nbytes
                else:  # counted on completion
                    arrival.useless = True

    def check_usable(self) -> None:
        """Refuse a store that was closed, or that another process opened.

        Raises:
            FlashMoEError: it was.
        """
        if not self._finalizer.alive:
            raise FlashMoEError("this model was closed; load it again.")
        if os.getpid() != self._process:
            raise FlashMoEError(
                "this model was loaded in another process, and a fork does not copy its reader "
                "threads; load it again in this process."
            )

    def _read(self, layer: int, missing: Sequence[int], slots: Sequence[int]) -> Batch:
        """Start to read experts into their slots, in file order."""
        bank = self.banks[layer]
        readers = self._consumers.of_slots(layer, slots)
        if self._loader:
            arrays = [held.array for held in readers]
            arrivals = self._loader.copy(layer, missing, slots, arrays)
            self._consumers.forget(readers)
            for expert, slot, arrival in zip(missing, slots, arrivals, strict=True):
                bank.expect(expert, slot, arrival)
            return Batch(())
        self._consumers.evaluate(readers)
        parts = bank.parts(len(missing), self._reader.width)
        reads = [bank.pieces(e, s, parts) for e, s in zip(missing, slots, strict=True)]
        pieces = (piece for _, pieces in reads for piece in pieces)
        batch = Batch(sorted(pieces, key=lambda piece: piece[:2]))
        for expert, slot, (arrival, _) in zip(missing, slots, reads, strict=True):
            bank.expect(expert, slot, arrival)
            if self._checks:
                rows: Any = bank.rows(slot)  # host memory: RecordChecks refuses any other
                arrival.expect_check(partial(self._checks.compare, layer, expert, rows))
        self._reader.start(batch)
        return batch

    def _slots(self, layer: int, missing: Sequence[int], keep: set[int]) -> list[int]:
        """Choose slots, if necessary after reads that no request waits for."""
        bank = self.banks[layer]
        if (slots := bank.choose(missing, keep)) is None and bank.arriving:
            self._finish_reads(bank)
            slots = bank.choose(missing, keep)
        if slots is None:
            others = any(p.thread != threading.get_ident() for p in self._requests.active(layer))
            raise no_free_slots(layer, len(missing), len(bank), others)
        return slots

    def _wait(self, layer: int, batch: Batch | None, arrivals: list[Arrival]) -> None:
        """Read pieces that no thread has started, and wait for the rest."""
        start = time.perf_counter()
        try:
            if batch:
                self._reader.help(batch)
            for arrival in arrivals:
                arrival.wait()
        except BaseException:  # Ctrl-C
            if batch:
                self._reader.cancel(batch)
            raise
        finally:
            with defer_signals(), self._lock:
                self._complete(self.banks[layer])
                self._stats.seconds_waited += time.perf_counter() - start

    def _finish_reads(self, bank: SlotBank) -> None:
        """Wait for all reads into a bank."""
        for _, arrival in bank.arriving.values():
            arrival.wait()
        self._complete(bank)

    def _table_to_host(self, layer: int) -> None:
        """Copy a layer's table back from the device if that one is newer."""
        if self._loader and self._loader.of_layer[layer].is_newer:
            self.banks[layer].set_table(*self._loader.of_layer[layer].give_to_host())

    def _complete(self, bank: SlotBank, wanted: Iterable[int] = ()) -> None:
        """Record finished reads; of those `wanted`, wait until failing ones have finished."""
        if bank.arriving:
            for _, arrival in (bank.arriving[e] for e in wanted if e in bank.arriving):
                if arrival.failing:
                    arrival.wait()
            nbytes, seconds = 0, self._reader.take_seconds()
            for arrival in bank.complete():
                nbytes += arrival.nbytes
                self._stats.add_read(arrival.pieces, arrival.nbytes, arrival.useless)
            self._stats.seconds_reading += seconds
            self._rate.add(nbytes, seconds)
