"""Experts that an NVIDIA GPU brings into its banks by itself, from where the page cache has them.

The expert files are mapped and their pages locked, so that the card reads them over the bus. No
thread of the host touches the bytes, and no memory is taken but the page cache's. In decoding the
card also knows which expert lies in which slot, and decides who gives way: nothing waits for the
host, which prepares the next launches meanwhile. For the batches of a prompt the host decides; then
the bank's table goes there, and comes back with the next token.
"""

import functools
import os
import threading
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ...custom_kernels import reference
from ...custom_kernels.cuda.copy import copy as _copy
from ...custom_kernels.cuda.copy import new_clock as _new_clock
from ...custom_kernels.cuda.slots import NONE, Table, choose_slots
from ...custom_kernels.launch import LEAST_ELEMENTS, settled
from ...custom_kernels.shapes import expect, expect_below
from ...errors import FlashMoEError
from ...format.layout import ExpertLayout, Field, LayerLayout
from ..memory import available_bytes
from ..reader import Arrival
from ..sizing import CachePlan
from ..slots import DTYPES, HALF_LIFE, NEVER
from .mapped import MappedFiles
from .pinned import Driver, gpu_rows

USEFUL_MEMORY = 0.7  # of what is available, at most; the pages of other programs have to leave
TRIES, TRIED = 4, 8  # times that experts are asked for, and how many, before this is relied on


class GpuTable:
    """One layer's bank in decoding: which expert lies where is known on the card alone.

    Attributes:
        leads: whether the card's table is newer than the host's.
        thread: the one that asked for experts last.
        record_bytes: of an expert.
        clock: `[LEAST_ELEMENTS]` uint64, where the card writes: when copies under way began, how
            many groups of threads are done, and the nanoseconds that copies took so far.
    """

    def __init__(
        self, mapped: MappedFiles, layout: LayerLayout, slots: int, arrays: Sequence[mx.array]
    ) -> None:
        """Note where experts lie in the files and where they go.

        Args:
            mapped: the files.
            layout: the layer's experts.
            slots: of the bank.
            arrays: the bank's nine, `[slots, ...]`.

        Raises:
            FlashMoEError: a file is shorter than the layout says.
        """
        self._experts, self._slots = layout.num_experts, slots
        self.record_bytes = layout.record_bytes
        rows = gpu_rows(arrays)
        for field, row in zip(layout.fields, rows, strict=True):
            if row.nbytes != slots * field.nbytes:
                raise FlashMoEError(
                    f"{field.file}: {slots} slots of {field.nbytes} bytes are not the "
                    f"{row.nbytes} bytes of a bank."
                )
        self._fields = settled(
            mx.array(
                [
                    (
                        mapped.address(field, layout.num_experts),
                        field.stride,
                        row.address,
                        field.nbytes,
                    )
                    for field, row in zip(layout.fields, rows, strict=True)
                ],
                mx.uint64,
            )
        )
        self._table = Table(mx.array(0), mx.array(0), mx.zeros(LEAST_ELEMENTS, dtype=mx.uint32))
        self._last: mx.array | None = None
        self.clock = _new_clock()
        mx.eval(self._table)
        self.leads, self.thread = False, 0

    @property
    def counts(self) -> mx.array:
        """Experts asked for and brought since this was made: the first two elements, uint32."""
        return self._table.counts

    def take(self, slot_of: np.ndarray, demand: np.ndarray) -> None:
        """Go on from a table of the host's: `[experts]` uint32 slots or NONE, float32 log2 uses."""
        for name, array in (("slots of experts", slot_of), ("uses of experts", demand)):
            expect(name, array, (self._experts,))
        arrays = settled(mx.array(slot_of)), settled(mx.array(demand))
        self._table = Table(*arrays, self._table.counts)
        self._last, self.leads = None, True

    def give(self) -> tuple[np.ndarray, np.ndarray]:
        """Wait for all that was begun, and return the table; now the host may change it.

        If a thread is gone that had begun something, nothing is known: the bank is empty then.
        """
        self.leads = False
        try:
            mx.eval(self._table, [] if self._last is None else self._last)
            return np.array(self._table.slot_of), np.array(self._table.demand)
        except RuntimeError:  # MLX evaluates in the thread that a stream belongs to
            counts = settled(mx.zeros(LEAST_ELEMENTS, dtype=mx.uint32))
            self._table, self._last = Table(*self._table[:2], counts), None
            self.clock = _new_clock()
            return np.full(self._experts, NONE, np.uint32), np.full(
                self._experts, NEVER, np.float32
            )

    def load(self, ids: mx.array, earlier: mx.array) -> mx.array:
        """Return the slots of experts `[..., K]`, whose bytes are there when they are computed.

        Args:
            ids: uint32, of which at most as many differ as there are slots.
            earlier: any array that is computed before.
        """
        earlier = earlier if self._last is None else self._last
        *table, there = _load(self._slots)(*self._table, ids, earlier, self._fields, self.clock)
        self._table, self._last, self.thread = Table(*table), there, threading.get_ident()
        return there

    def copy(
        self, experts: Sequence[int], slots: Sequence[int], earlier: Sequence[mx.array]
    ) -> mx.array:
        """Return an array that is computed once experts are in slots that the host chose."""
        expect_below("experts", np.array(experts, np.int64), self._experts)
        expect_below("slots", np.array(slots, np.int64), self._slots)
        there = mx.array(np.array(slots, np.uint32))
        tasks = mx.array(np.stack([experts, slots], axis=1).astype(np.uint32))
        if earlier:
            tasks = mx.depends(tasks, earlier)
        return _copy(tasks, there, self._fields, self.clock)

    def hold(self, consumer: mx.array) -> None:
        """Bring nothing more before `consumer`, which reads the bank, is computed."""
        self._last = consumer


class GpuArrival(Arrival):
    """An expert that the card brings; it is over when somebody has waited for it."""

    __slots__ = ("_expected", "_layer", "_there", "_turn")

    def __init__(self, layer: int, there: mx.array, nbytes: int) -> None:
        """Expect so many bytes of a layer, which are there when an array is computed."""
        super().__init__(1)
        self._layer, self._there, self._expected = layer, there, nbytes
        self._turn = threading.Lock()

    def wait(self) -> None:
        """Return when it is over."""
        with self._turn:
            if self.over:
                return
            error = None
            try:
                mx.eval(self._there)
            except RuntimeError as reason:
                error = _refusal(self._layer, reason)
            self.advance(0 if error else self._expected, error)


class GpuLoader:
    """The banks of all layers, and the files they are filled from."""

    def __init__(self, mapped: MappedFiles, banks: Sequence[GpuTable]) -> None:
        """Bind banks to the files that they are filled from."""
        self._mapped, self.of_layer = mapped, banks
        self._local = threading.local()
        self._seen = np.zeros((len(banks), 3), np.uint64)

    def copy(
        self,
        layer: int,
        experts: Sequence[int],
        slots: Sequence[int],
        earlier: Sequence[mx.array],
    ) -> list[Arrival]:
        """Begin to bring experts into slots, beside what the card computes; return at once.

        The bank's table stays as it is.

        Args:
            layer: decoder layer.
            experts: ids.
            slots: of the layer's bank, as many.
            earlier: what reads these slots, and is computed before.

        Returns:
            The arrival of each.

        Raises:
            FlashMoEError: the card refuses.
        """
        if not hasattr(self._local, "stream"):  # MLX's belong to threads
            self._local.stream = mx.new_stream(mx.default_device())
        bank = self.of_layer[layer]
        try:
            with mx.stream(self._local.stream):
                there = bank.copy(experts, slots, earlier)
                mx.async_eval(there)
        except RuntimeError as reason:
            raise _refusal(layer, reason) from reason
        return [GpuArrival(layer, there, bank.record_bytes) for _ in experts]

    def counted(self) -> np.ndarray:
        """Return what was counted since this was last called, `[layers, 3]` uint64.

        Experts asked for, experts brought, nanoseconds in which they came.
        """
        try:
            clocks = np.array(mx.stack([bank.clock for bank in self.of_layer]))
            counts = np.array(mx.stack([bank.counts for bank in self.of_layer]))
        except RuntimeError:  # begun by another thread, in which MLX has to evaluate it
            return np.zeros_like(self._seen)
        now = np.stack([*counts.T[:2].astype(np.uint64), clocks[:, 2]], axis=1)
        # A layer that was emptied counts from 0 again.
        seen = np.where((now < self._seen).any(axis=1, keepdims=True), 0, self._seen)
        self._seen = now
        return now - seen

    def close(self) -> None:
        """Wait for what is under way, and give the files back."""
        for bank in self.of_layer:
            bank.give()
        self._mapped.close()


def _refusal(layer: int, reason: RuntimeError) -> FlashMoEError:
    return FlashMoEError(
        f"layer {layer}: the GPU could not copy experts ({reason}). Load the model again."
    )


@functools.cache
def _load(slots: int) -> Any:
    """Return the two launches of `GpuTable.load`, prepared once."""

    def load(
        slot_of: mx.array,
        demand: mx.array,
        counts: mx.array,
        ids: mx.array,
        earlier: mx.array,
        fields: mx.array,
        clock: mx.array,
    ) -> tuple[mx.array, ...]:
        table = Table(slot_of, demand, counts)
        table, places, tasks = choose_slots(table, ids, earlier, slots, HALF_LIFE)
        return *table, _copy(tasks, places, fields, clock)

    return mx.compile(load)


def map_files(
    layout: ExpertLayout, plan: CachePlan, banks: Sequence[Sequence[mx.array]]
) -> GpuLoader | None:
    """Return banks that the card fills by itself, or None where that is no gain or no way.

    Args:
        layout: where the experts lie.
        plan: how large banks are. Those with room for all experts read each once.
        banks: nine arrays per layer.
    """
    if plan.io.direct or plan.slots == layout.layers[0].num_experts:
        return None
    if layout.total_bytes > USEFUL_MEMORY * available_bytes():
        return None
    files = sorted({field.file for layer in layout.layers for field in layer.fields})
    try:
        mapped = MappedFiles(_driver(), files)
    except FlashMoEError:  # a driver, a file system or a limit that does not allow it
        return None
    try:
        if _works(mapped, layout.layers[0], plan.slots):
            layers = zip(layout.layers, banks, strict=True)
            return GpuLoader(
                mapped, [GpuTable(mapped, layer, plan.slots, arrays) for layer, arrays in layers]
            )
    except (FlashMoEError, RuntimeError):  # a file cut short, which the host will name; a compiler
        pass
    mapped.close()
    return None


def _works(mapped: MappedFiles, layout: LayerLayout, slots: int) -> bool:
    """Try it: have the card fill a bank, and look at what came."""
    arrays = [mx.zeros((slots, *field.shape), dtype=DTYPES[field.dtype]) for field in layout.fields]
    mx.eval(arrays)
    bank, rng = GpuTable(mapped, layout, slots, arrays), np.random.default_rng(0)
    experts = layout.num_experts
    truth = mx.full(experts, NONE, dtype=mx.uint32), mx.full(experts, NEVER)
    bank.take(*map(np.array, truth))
    for _ in range(TRIES):
        ids = mx.array(rng.permutation(experts)[: min(TRIED, slots)].astype(np.uint32))
        first, second, expected, _ = reference.choose_slots(*truth, ids, slots, HALF_LIFE)
        truth = first, second
        if not mx.array_equal(bank.load(ids, arrays[1]), expected):
            return False
    return bool(np.array_equal(bank.give()[0], np.array(truth[0]))) and all(
        np.array(array[int(slot)].view(mx.uint8)).tobytes() == _bytes_of(field, expert)
        for expert, slot in enumerate(np.array(truth[0]).tolist())
        if slot != NONE
        for field, array in zip(layout.fields, arrays, strict=True)
    )


def _bytes_of(field: Field, expert: int) -> bytes:
    with field.file.open("rb") as file:
        return os.pread(file.fileno(), field.nbytes, field.offset + expert * field.stride)


@functools.cache
def _driver() -> Driver:
    return Driver()
