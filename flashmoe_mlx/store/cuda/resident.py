"""Experts that an NVIDIA GPU copies into its slots by itself, out of the page cache.

The expert files are mapped and their pages pinned, so the GPU reads them over the bus. Host threads
do not touch the bytes, and the page cache needs no second copy. In decoding the GPU also keeps the
table of slots and evicts, so nothing waits for the host, which prepares the next launches
meanwhile. For a prompt's batches the host chooses slots: the table moves to the host, and back with
the next token.
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

USEFUL_MEMORY = 0.7  # share of the available memory to pin at most; it evicts other programs' pages
TRIES, TRIED = 4, 8  # loads in the self-test, and experts in each


class GpuTable:
    """One layer's table of slots, kept on the GPU while it decodes: a `DeviceTable`.

    Attributes:
        record_bytes: bytes of an expert.
        clock: `[LEAST_ELEMENTS]` uint64, written by the GPU: start of the running copies, thread
            groups that are done, and total nanoseconds of copies.
    """

    def __init__(
        self, mapped: MappedFiles, layout: LayerLayout, slots: int, arrays: Sequence[mx.array]
    ) -> None:
        """Record the addresses of experts, and of the layer's nine arrays `[slots, ...]`.

        Raises:
            FlashMoEError: a file is shorter than the layout says.
        """
        self._experts, self._slots = layout.num_experts, slots
        self.record_bytes = layout.record_bytes
        fields = []
        for field, row in zip(layout.fields, gpu_rows(arrays), strict=True):
            if row.nbytes != slots * field.nbytes:
                raise FlashMoEError(
                    f"{field.file}: {slots} slots of {field.nbytes} bytes are not the "
                    f"{row.nbytes} bytes of a bank."
                )
            source = mapped.address(field, layout.num_experts)
            fields.append((source, field.stride, row.address, field.nbytes))
        self._fields = settled(mx.array(fields, mx.uint64))
        self._table = Table(mx.array(0), mx.array(0), mx.zeros(LEAST_ELEMENTS, dtype=mx.uint32))
        self._last: mx.array | None = None
        self.clock = _new_clock()
        mx.eval(self._table)
        self.is_newer, self.thread = False, 0

    @property
    def counts(self) -> mx.array:
        """Experts requested and loaded so far: the first two elements, uint32."""
        return self._table.counts

    def take_from_host(self, slot_of: np.ndarray, scores: np.ndarray) -> None:
        """Continue from the host's table: `[experts]` uint32 slots or NONE, float32 log2 uses."""
        for name, array in (("slots of experts", slot_of), ("uses of experts", scores)):
            expect(name, array, (self._experts,))
        arrays = settled(mx.array(slot_of)), settled(mx.array(scores))
        self._table = Table(*arrays, self._table.counts)
        self._last, self.is_newer = None, True

    def give_to_host(self) -> tuple[np.ndarray, np.ndarray]:
        """Wait for running loads, and return the table, which the host may then change.

        If the thread that started them has ended, the slots' contents are unknown: the table
        returned is empty.
        """
        self.is_newer = False
        try:
            mx.eval(self._table, [] if self._last is None else self._last)
            return np.array(self._table.slot_of), np.array(self._table.demand)
        except RuntimeError:  # MLX evaluates only in the thread that owns the stream
            counts = settled(mx.zeros(LEAST_ELEMENTS, dtype=mx.uint32))
            self._table, self._last = Table(*self._table[:2], counts), None
            self.clock = _new_clock()
            none, never = np.uint32(NONE), np.float32(NEVER)
            return np.full(self._experts, none), np.full(self._experts, never)

    def load(self, ids: mx.array, after: mx.array) -> mx.array:
        """Return the slots of experts `[..., K]` uint32; evaluating them loads the bytes.

        At most as many ids as slots may differ. The load starts when `after` is computed.
        """
        after = after if self._last is None else self._last
        *table, slots = _load(self._slots)(*self._table, ids, after, self._fields, self.clock)
        self._table, self._last, self.thread = Table(*table), slots, threading.get_ident()
        return slots

    def copy(
        self, experts: Sequence[int], slots: Sequence[int], after: Sequence[mx.array]
    ) -> mx.array:
        """Return an array whose evaluation copies experts into slots that the host chose."""
        expect_below("experts", np.array(experts, np.int64), self._experts)
        expect_below("slots", np.array(slots, np.int64), self._slots)
        places = mx.array(np.array(slots, np.uint32))
        tasks = mx.array(np.stack([experts, slots], axis=1).astype(np.uint32))
        if after:
            tasks = mx.depends(tasks, after)
        return _copy(tasks, places, self._fields, self.clock)

    def hold(self, consumer: mx.array) -> None:
        """Start the next load only when `consumer`, which reads the slots, is computed."""
        self._last = consumer


class GpuArrival(Arrival):
    """An expert that the GPU loads; the first `wait` completes it."""

    __slots__ = ("_expected", "_layer", "_lock", "_slots")

    def __init__(self, layer: int, slots: mx.array, nbytes: int) -> None:
        """Expect `nbytes` bytes of a layer, which are loaded when `slots` is computed."""
        super().__init__(1)
        self._layer, self._slots, self._expected = layer, slots, nbytes
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return when the load is done."""
        with self._lock:
            if self.done:
                return
            error = None
            try:
                mx.eval(self._slots)
            except RuntimeError as reason:
                error = _copy_failed(self._layer, reason)
            self.advance(0 if error else self._expected, error)


class GpuLoader:
    """The tables of all layers, and the files that they load from."""

    def __init__(self, mapped: MappedFiles, tables: Sequence[GpuTable]) -> None:
        """Take over the files: `close` unpins them."""
        self._mapped, self.of_layer = mapped, tables
        self._local = threading.local()
        self._seen = np.zeros((len(tables), 3), np.uint64)

    def copy(
        self,
        layer: int,
        experts: Sequence[int],
        slots: Sequence[int],
        after: Sequence[mx.array],
    ) -> list[Arrival]:
        """Start to copy experts into slots, beside the GPU's other work: see `DeviceLoader`.

        Raises:
            FlashMoEError: the GPU refuses.
        """
        if not hasattr(self._local, "stream"):  # MLX's streams belong to threads
            self._local.stream = mx.new_stream(mx.default_device())
        table = self.of_layer[layer]
        try:
            with mx.stream(self._local.stream):
                copied = table.copy(experts, slots, after)
                mx.async_eval(copied)
        except RuntimeError as reason:
            raise _copy_failed(layer, reason) from reason
        return [GpuArrival(layer, copied, table.record_bytes) for _ in experts]

    def counted(self) -> np.ndarray:
        """Return experts requested, loaded, and nanoseconds since last, `[layers, 3]` uint64."""
        try:
            clocks = np.array(mx.stack([table.clock for table in self.of_layer]))
            counts = np.array(mx.stack([table.counts for table in self.of_layer]))
        except RuntimeError:  # started by another thread, where MLX must evaluate it
            return np.zeros_like(self._seen)
        now = np.stack([*counts.T[:2].astype(np.uint64), clocks[:, 2]], axis=1)
        # A table that was emptied counts from 0 again.
        seen = np.where((now < self._seen).any(axis=1, keepdims=True), 0, self._seen)
        self._seen = now
        return now - seen

    def close(self) -> None:
        """Wait for running loads, and unpin the files."""
        for table in self.of_layer:
            table.give_to_host()
        self._mapped.close()


def _copy_failed(layer: int, reason: RuntimeError) -> FlashMoEError:
    return FlashMoEError(
        f"layer {layer}: the GPU could not copy experts ({reason}). Load the model again."
    )


@functools.cache
def _load(slots: int) -> Any:
    """Return the two launches of `GpuTable.load`, compiled once."""

    def load(
        slot_of: mx.array,
        demand: mx.array,
        counts: mx.array,
        ids: mx.array,
        after: mx.array,
        fields: mx.array,
        clock: mx.array,
    ) -> tuple[mx.array, ...]:
        table = Table(slot_of, demand, counts)
        table, places, tasks = choose_slots(table, ids, after, slots, HALF_LIFE)
        return *table, _copy(tasks, places, fields, clock)

    return mx.compile(load)


def map_files(
    layout: ExpertLayout, plan: CachePlan, arrays: Sequence[Sequence[mx.array]]
) -> GpuLoader | None:
    """Return a loader into nine arrays per layer, None if the GPU cannot load or gains nothing."""
    if plan.io.direct or plan.slots == layout.num_experts:  # or each is read once
        return None
    if any(plan.slots >= layer.num_experts for layer in layout.layers):
        return None
    if layout.total_bytes > USEFUL_MEMORY * available_bytes():
        return None
    files = sorted({field.file for layer in layout.layers for field in layer.fields})
    try:
        mapped = MappedFiles(_driver(), files)
    except FlashMoEError:  # not possible with this driver, file system or limit
        return None
    try:
        if _works(mapped, layout.layers[0], plan.slots):
            layers = zip(layout.layers, arrays, strict=True)
            return GpuLoader(mapped, [GpuTable(mapped, x, plan.slots, nine) for x, nine in layers])
    except (FlashMoEError, RuntimeError):  # a truncated file, which the host will name; a compiler
        pass
    mapped.close()
    return None


def _works(mapped: MappedFiles, layout: LayerLayout, slots: int) -> bool:
    """Self-test: let the GPU fill slots, and compare table and bytes with the reference."""
    arrays = [mx.zeros((slots, *field.shape), dtype=DTYPES[field.dtype]) for field in layout.fields]
    mx.eval(arrays)
    table, rng = GpuTable(mapped, layout, slots, arrays), np.random.default_rng(0)
    experts = layout.num_experts
    slot_of, scores = mx.full(experts, NONE, dtype=mx.uint32), mx.full(experts, NEVER)
    table.take_from_host(np.array(slot_of), np.array(scores))
    for _ in range(TRIES):
        ids = mx.array(rng.permutation(experts)[: min(TRIED, slots)].astype(np.uint32))
        with mx.stream(mx.cpu):  # where MLX need not compile these ops
            slot_of, scores, expected, _ = reference.choose_slots(
                slot_of, scores, ids, slots, HALF_LIFE
            )
            mx.eval(slot_of, scores, expected)
        if not mx.array_equal(table.load(ids, arrays[1]), expected):
            return False
    return bool(np.array_equal(table.give_to_host()[0], np.array(slot_of))) and all(
        np.array(array[int(slot)].view(mx.uint8)).tobytes() == _bytes_of(field, expert)
        for expert, slot in enumerate(np.array(slot_of).tolist())
        if slot != NONE
        for field, array in zip(layout.fields, arrays, strict=True)
    )


def _bytes_of(field: Field, expert: int) -> bytes:
    with field.file.open("rb") as file:
        return os.pread(file.fileno(), field.nbytes, field.offset + expert * field.stride)


@functools.cache
def _driver() -> Driver:
    return Driver()
