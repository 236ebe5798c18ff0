"""Experts in memory: requests that bring experts.

The store knows nothing of models: it maps (layer, expert ids) to slots of the layer's bank.
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import FlashMoEError
from ..format.layout import ExpertLayout
from .backend import Backend, DeviceLoader
from .checks import RecordChecks
from .devices import choose
from .files import close, close_files, open_files
from .prefetch import Lookahead, Prefetched
from .reader import Arrival, Batch, Piece, Preadv, Reader
from .requests import Consumer, Consumers, Pending, Requests
from .signals import defer_signals
from .sizing import CachePlan
from .slots import SlotBank, no_room
from .stats import ExpertStats as ExpertStats
from .stats import Observer, ReadRate

LEAST_PIECE = 256 << 10  # bytes; cutting a record finer costs more than it gains
LAYERS_AHEAD = 2  # that are read while memory for the next is allocated


class ExpertStore:
    """Resident experts of all layers, and the way to get others from disk.

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
        """Open the expert files and allocate the banks.

        Args:
            layout: where the experts lie.
            plan: slots per layer, how to read, and why.
            io_threads: reader threads.
            preload: read all experts now, expert e into slot e, if the plan has slots for all.
            checks: what to compare every expert with when it has been read.
            lookahead: whether to read what is guessed: "auto", "on" or "off".
            backend: of the device that computes; that of MLX's default device unless given.

        Raises:
            FlashMoEError: an expert file cannot be opened, or not be read to be preloaded, or the
                system refuses memory or threads.
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
        paths = {f.file for layer in layout.layers for f in layer.fields}
        self.banks: list[SlotBank] = []
        self._requests = Requests(len(layout.layers))
        self._prefetched = Prefetched(len(layout.layers))
        self._consumers = Consumers()
        self._lock = threading.Lock()
        self._process = os.getpid()
        with defer_signals():
            files = open_files(paths, plan.io.direct)
            names = {number: path for path, number in files.items()}
            try:
                self._reader = Reader(names, io_threads, self.backend)
            except BaseException:
                close_files(files.values())
                raise
            loaders: list[DeviceLoader] = []
            closing = self._reader, loaders, [*names], self._process
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
        """Allocate the banks and, while that goes on, read those that have room for all experts."""
        start, ahead = time.perf_counter(), deque[Pending]()
        for number, layer in enumerate(self.layout.layers):
            self.banks.append(SlotBank(layer, self.plan.slots, files, self.backend))
            if preload and self.plan.slots == layer.num_experts:
                ahead.append(self.request(number, range(layer.num_experts)))
            if len(ahead) > LAYERS_AHEAD:
                ahead.popleft().wait()
        for pending in ahead:
            pending.wait()
        if nbytes := self._stats.bytes_read:
            seconds = time.perf_counter() - start
            self._stats = ExpertStats(bytes_preloaded=nbytes, seconds_preloading=seconds)

    def close(self) -> None:
        """Stop the reader threads and close the files. A closed store cannot fetch."""
        with self._lock:
            self._count()
            self._finalizer()

    @property
    def stats(self) -> ExpertStats:
        """What was asked for and read until now."""
        if self._loader:
            with self._lock:
                self._count()
        return self._stats

    def _count(self) -> None:
        """Add what a GPU has brought by itself since this was last called."""
        if self._loader and self._finalizer.alive and os.getpid() == self._process:
            for layer, counts in zip(
                self.layout.layers, self._loader.counted().tolist(), strict=True
            ):
                asked, loaded, nanoseconds = counts
                self._stats.add_loaded(asked, loaded, nanoseconds, layer.record_bytes)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertStore":
        """Share the store: it is a cache over files that do not change."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled."""
        raise TypeError(
            "an ExpertStore holds open files and threads and cannot be pickled; "
            "load the model again in the other process"
        )

    def hold(self, consumer: mx.array, layer: int, slots: Iterable[int] | None = None) -> None:
        """Keep bytes as they are until `consumer`, which reads them, is evaluated.

        A lazy graph reads a bank when it is evaluated, not when it is built. At most
        KEPT_CONSUMERS are kept unevaluated, since each keeps memory; and none of a bank with all
        experts, since nobody writes there.

        Args:
            consumer: what was computed from a bank.
            layer: the bank it reads.
            slots: the slots that it reads, all of the layer's unless given; it is evaluated
                before one of them is written anew.
        """
        if self.banks[layer].holds_all:
            return
        with self._lock:
            if self._loader and self._loader.of_layer[layer].leads:
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
            FlashMoEError: a file is shorter than it was, or cannot be read. The bank then holds
                what it held, less what was dropped to make room.
        """
        return self.request(layer, experts).wait()

    def load_by_device(self, layer: int, ids: mx.array, earlier: mx.array) -> mx.array | None:
        """Have the GPU itself make experts resident and find their slots, if it can.

        Args:
            layer: decoder layer.
            ids: `[..., K]` uint32 expert ids, perhaps not computed yet.
            earlier: any array that is computed before.

        Returns:
            The slots `[..., K]`; whoever reads them finds the bytes there. None if the host has to
            do it, by `fetch`.
        """
        bank = self.banks[layer]
        if not self._loader or ids.size > len(bank):
            return None
        with self._lock:
            self.check_usable()
            table = self._loader.of_layer[layer]
            if table.thread != threading.get_ident():  # which alone evaluates what it has begun
                self._recall(layer)
            if not table.leads:
                if self._requests.living(layer):
                    return None
                self._rest(bank)
                self._consumers.evaluate(self._consumers.of_layer(layer))
                table.take(*bank.table())
            there = table.load(ids, earlier)
        if self.observer:
            self.observer.loading(layer, ids, there)
        return there

    def request(self, layer: int, experts: Sequence[int]) -> Pending:
        """Give experts slots and begin to read those that are missing; return at once.

        Consumers of the slots that are taken for this are evaluated first. Requests of the same
        or of other layers may be under way.

        Args:
            layer: decoder layer.
            experts: distinct expert ids, at most as many as there are slots that no other
                `Pending` has.

        Raises:
            FlashMoEError: the bank has too few slots, or the store was closed, or belongs to
                another process.
        """
        bank = self.banks[layer]
        if self.observer:
            self.observer.asked(layer, experts)
        with self._lock:
            self.check_usable()
            self._recall(layer)
            self._complete(bank, experts)
            missing = bank.absent(experts)
            self._stats.asked += len(experts)
            early = self._prefetched.claim(layer, experts, missing)
            self._stats.hits += len(experts) - len(missing) - early
            self._stats.early += early
            batch = None
            if missing:
                with defer_signals():
                    slots = self._slots(layer, missing, self._requests.kept(layer, experts))
                    batch = self._read(layer, missing, slots)
            slots = [bank.touch(e) for e in experts]
            arrivals = [bank.arriving[e][1] for e in experts if e in bank.arriving]
            arrivals.reverse()  # the last is over last: fewer times to wake up
            pending = Pending(layer, experts, slots, self._wait, (batch, arrivals))
            self._requests.add(pending)
        return pending

    def count_hits(self, layer: int, experts: Sequence[int]) -> None:
        """Count experts asked for of a bank that holds all: nothing has to be done for them.

        Args:
            layer: decoder layer.
            experts: distinct expert ids.

        Raises:
            FlashMoEError: the store was closed, or belongs to another process.
        """
        if self.observer:
            self.observer.asked(layer, experts)
        with self._lock:
            self.check_usable()
            self._stats.asked += len(experts)
            self._stats.hits += len(experts)

    @contextmanager
    def reads_answered_by(self, preadv: Preadv) -> Iterator[None]:
        """Have `preadv` answer reads while the block runs, as benchmarks do to leave out the disk.

        Slots then hold what it left there.
        """
        with self._reader.answered_by(preadv):
            yield

    @property
    def reads_compute(self) -> bool:
        """Say whether reads take the time of the cores that compute, as they come from memory."""
        return self._rate.fast and self.backend.shares_cores

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to read experts that will probably be asked for next; nothing waits for them.

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
            slots = bank.choose(missing, self._requests.kept(layer, experts)) if missing else None
            if slots is None:
                return
            with defer_signals():
                batch = self._read(layer, missing, slots)
                arrivals = [bank.arriving[expert][1] for expert in missing]
                self._prefetched.add(layer, batch, missing, arrivals)

    def cancel_prefetch(self, layer: int, experts: Iterable[int]) -> None:
        """Cancel prefetches of a layer but those of `experts`, which are about to be asked for."""
        self._recall(layer)
        if not self._prefetched.any(layer):
            return
        with defer_signals(), self._lock:
            for expert, batch, arrival in self._prefetched.drop_others(layer, experts):
                self._reader.drop(batch, {arrival})
                if arrival.over and expert not in self.banks[layer].arriving:
                    self._stats.bytes_useless += arrival.nbytes
                else:  # counted when it is complete
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
                "this model was loaded in another process, whose reader threads a fork does not "
                "bring along; load it again in this one."
            )

    def _read(self, layer: int, missing: Sequence[int], slots: Sequence[int]) -> Batch:
        """Put experts into slots that were chosen, beginning to read in the order of the file."""
        bank = self.banks[layer]
        readers = self._consumers.of_slots(layer, slots)
        if self._loader:
            arrays = [held.array for held in readers]
            arrivals = self._loader.copy(layer, missing, slots, arrays)
            self._consumers.forget(readers)
            for expert, slot, coming in zip(missing, slots, arrivals, strict=True):
                bank.expect(expert, slot, coming)
            return Batch(())
        self._consumers.evaluate(readers)
        parts = self._parts(bank, len(missing))
        brought = [bank.pieces(e, s, parts) for e, s in zip(missing, slots, strict=True)]
        batch = Batch(sorted((p for _, pieces in brought for p in pieces), key=_place))
        for expert, slot, (arrival, _) in zip(missing, slots, brought, strict=True):
            bank.expect(expert, slot, arrival)
            if self._checks:
                rows: Any = bank.rows(slot)  # in this process's memory, or there were no checks
                arrival.expect_check(partial(self._checks.compare, layer, expert, rows))
        self._reader.start(batch)
        return batch

    def _slots(self, layer: int, missing: Sequence[int], keep: set[int]) -> list[int]:
        """Choose slots, if need be after experts have arrived that nobody waits for."""
        bank = self.banks[layer]
        slots = bank.choose(missing, keep)
        if slots is None and bank.arriving:
            self._rest(bank)
            slots = bank.choose(missing, keep)
        if slots is None:
            others = any(p.thread != threading.get_ident() for p in self._requests.living(layer))
            raise no_room(layer, len(missing), len(bank), others)
        return slots

    def _parts(self, bank: SlotBank, experts: int) -> int:
        """Return into how many pieces to cut each record, so that all threads have something."""
        wanted = -(-self._reader.width // experts)
        return max(1, min(wanted, bank.layout.record_bytes // LEAST_PIECE))

    def _wait(self, layer: int, batch: Batch | None, arrivals: list[Arrival]) -> None:
        """Read what no thread has begun, and wait for the rest."""
        start = time.perf_counter()
        try:
            if batch:
                self._reader.help(batch)
            for arrival in arrivals:
                arrival.wait()
        except BaseException:  # Ctrl-C
            if batch:
                self._reader.drop(batch)
            raise
        finally:
            with defer_signals(), self._lock:
                self._complete(self.banks[layer])
                self._stats.seconds_waited += time.perf_counter() - start

    def _rest(self, bank: SlotBank) -> None:
        """Wait for all bytes that are on their way into a bank."""
        for _, arrival in bank.arriving.values():
            arrival.wait()
        self._complete(bank)

    def _recall(self, layer: int) -> None:
        """Take a layer's table back from the device, if that has the newer one."""
        if self._loader and self._loader.of_layer[layer].leads:
            self.banks[layer].adopt(*self._loader.of_layer[layer].give())

    def _complete(self, bank: SlotBank, wanted: Iterable[int] = ()) -> None:
        """Take note of experts that have arrived, and of those wanted that never will."""
        if bank.arriving:
            for _, arrival in (bank.arriving[e] for e in wanted if e in bank.arriving):
                if arrival.doomed:
                    arrival.wait()
            nbytes, seconds = 0, self._reader.take_seconds()
            for arrival in bank.complete():
                nbytes += arrival.nbytes
                self._stats.reads += arrival.pieces
                self._stats.bytes_read += arrival.nbytes
                self._stats.bytes_useless += arrival.useless * arrival.nbytes
            self._stats.seconds_reading += seconds
            self._rate.add(nbytes, seconds)


def _place(piece: Piece) -> tuple[int, int]:
    """Return where a piece lies: its file, and the offset."""
    return piece[:2]
