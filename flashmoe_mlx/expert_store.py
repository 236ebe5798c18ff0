"""Experts in memory: slot banks, the LRU policy, the threads that read, and the counters.

A *bank* is nine MLX arrays `[slots, ...]` per layer. A reader writes an expert's bytes from the
file straight into one row of each, through `memoryview`; no other copy of the bytes exists. The
store knows nothing of models: it maps (layer, expert ids) to slots.
"""

import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .config import CachePlan
from .errors import FlashMoEError
from .layout import ExpertLayout, LayerLayout, Span

DTYPES = {"U32": mx.uint32, "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


@dataclass
class ExpertStats:
    """Counters since the store was opened or reset.

    Attributes:
        asked: experts asked for, counted once per layer and step.
        hits: of these, experts that were resident already.
        reads: byte ranges read.
        bytes_read: bytes read from the expert files (or the page cache above them).
        seconds_waited: time that the caller waited for reads.
    """

    asked: int = 0
    hits: int = 0
    reads: int = 0
    bytes_read: int = 0
    seconds_waited: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were resident, 0 to 1."""
        return self.hits / self.asked if self.asked else 0.0

    def as_dict(self) -> dict[str, float]:
        """Return the counters and the hit rate as plain numbers."""
        return {**asdict(self), "hit_rate": self.hit_rate}

    def __str__(self) -> str:
        """One line for people."""
        speed = self.bytes_read / self.seconds_waited / 1e9 if self.seconds_waited else 0.0
        return (
            f"Experts: {self.asked} asked, {self.hit_rate:.1%} hits, "
            f"{self.bytes_read / 1e6:.1f} MB in {self.reads} reads, "
            f"waited {self.seconds_waited:.3f} s ({speed:.2f} GB/s)"
        )


class Bank:
    """The slots of one layer."""

    def __init__(self, layout: LayerLayout, slots: int) -> None:
        """Allocate `slots` rows for each of the layer's nine tensors."""
        self.layout = layout
        self.arrays = [mx.zeros((slots, *f.shape), dtype=DTYPES[f.dtype]) for f in layout.fields]
        mx.eval(self.arrays)
        self._views = [memoryview(a).cast("B") for a in self.arrays]  # type: ignore[arg-type]
        self._free = list(range(slots))[::-1]
        self._slot_of: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of slots."""
        return len(self._free) + len(self._slot_of)

    def resident(self, experts: Iterable[int]) -> list[int]:
        """Return those of `experts` that are in the bank now."""
        return [e for e in experts if e in self._slot_of]

    def touch(self, expert: int) -> int:
        """Return a resident expert's slot and mark it as just used."""
        self._slot_of.move_to_end(expert)
        return self._slot_of[expert]

    @property
    def complete(self) -> bool:
        """Say whether every expert is resident; then expert e lies in slot e."""
        return len(self._slot_of) == self.layout.num_experts

    def claim(self, experts: Sequence[int], keep: set[int]) -> list[int]:
        """Free a slot for each expert, dropping the least recently used that are not in `keep`."""
        if len(self) == self.layout.num_experts:
            self._free = [slot for slot in self._free if slot not in experts]
            return list(experts)
        victims = (e for e in list(self._slot_of) if e not in keep)
        return [
            self._free.pop() if self._free else self._slot_of.pop(next(victims)) for _ in experts
        ]

    def settle(self, expert: int, slot: int) -> None:
        """Record that an expert's bytes now lie whole in a slot."""
        self._slot_of[expert] = slot

    def release(self, slot: int) -> None:
        """Give back a slot whose bytes did not arrive."""
        self._free.append(slot)

    def rows(self, slot: int, span: Span) -> list[memoryview]:
        """Return the writable rows of one slot that a byte range of the file fills."""
        rows = []
        for index in range(span.first, span.last):
            size = self.layout.fields[index].nbytes
            rows.append(self._views[index][slot * size : (slot + 1) * size])
        return rows


class ExpertStore:
    """Resident experts of all layers, and the way to get others from disk.

    One generation at a time may use a store. Copies of a model share it.
    """

    def __init__(self, layout: ExpertLayout, plan: CachePlan, io_threads: int = 8) -> None:
        """Open the expert files and allocate the banks.

        Args:
            layout: where the experts lie.
            plan: slots per layer, and why so many.
            io_threads: reader threads.

        Raises:
            FlashMoEError: an expert file cannot be opened.
        """
        self.layout = layout
        self.plan = plan
        self.stats = ExpertStats()
        self.banks = [Bank(layer, plan.slots) for layer in layout.layers]
        self._consumers: list[mx.array] = []
        self._lock = threading.Lock()
        self._files = _open_files({f.file for layer in layout.layers for f in layer.fields})
        self._pool = ThreadPoolExecutor(io_threads, thread_name_prefix="flashmoe-read")
        self._finalizer = weakref.finalize(self, _close, self._pool, self._files)

    def close(self) -> None:
        """Stop the reader threads and close the files. A closed store cannot fetch."""
        self._finalizer()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertStore":
        """Share the store: it is a cache over files that do not change."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled."""
        raise TypeError(
            "an ExpertStore holds open files and threads and cannot be pickled; "
            "load the model again in the other process"
        )

    def hold(self, consumer: mx.array) -> None:
        """Keep all banks as they are until `consumer`, which reads one, is evaluated."""
        self._consumers.append(consumer)

    def fetch(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Make experts resident and return their slots, in the order given.

        Everything held is evaluated first: a lazy graph reads a bank when it is evaluated, not
        when it is built. In a decoder this costs nothing, because the router of this layer has
        already waited for the experts of the layers below.

        Args:
            layer: decoder layer.
            experts: distinct expert ids, at most as many as there are slots.

        Raises:
            FlashMoEError: a file is shorter than it was, or cannot be read. The bank then holds
                what it held, less what was dropped to make room.
        """
        bank = self.banks[layer]
        with self._lock:
            if not self._finalizer.alive:
                raise FlashMoEError("this model was closed; load it again.")
            mx.eval(self._consumers)
            self._consumers.clear()
            hits = bank.resident(experts)
            self.stats.asked += len(experts)
            self.stats.hits += len(hits)
            if len(hits) < len(experts):
                missing = sorted(set(experts).difference(hits))
                start = time.perf_counter()
                self._read(bank, missing, bank.claim(missing, keep=set(experts)))
                self.stats.seconds_waited += time.perf_counter() - start
            return [bank.touch(e) for e in experts]

    def _read(self, bank: Bank, missing: Sequence[int], slots: Sequence[int]) -> None:
        jobs = [
            self._pool.submit(self._read_expert, bank, expert, slot)
            for expert, slot in zip(missing, slots, strict=True)
        ]
        try:
            wait(jobs)
        finally:
            # Also after Ctrl-C: a late write must never land in a slot that was given away.
            wait(jobs)
            for expert, slot, job in zip(missing, slots, jobs, strict=True):
                if job.exception():
                    bank.release(slot)
                    continue
                bank.settle(expert, slot)
                self.stats.reads += job.result()
                self.stats.bytes_read += bank.layout.record_bytes
        for job in jobs:
            job.result()

    def _read_expert(self, bank: Bank, expert: int, slot: int) -> int:
        """Read one expert into a slot and return the number of byte ranges; in a reader thread."""
        spans = bank.layout.spans(expert)
        for span in spans:
            _read_span(self._files[span.file], span, bank.rows(slot, span))
        return len(spans)


def _open_files(paths: set[Path]) -> dict[Path, int]:
    files: dict[Path, int] = {}
    try:
        for path in sorted(paths):
            files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        for descriptor in files.values():
            os.close(descriptor)
        raise FlashMoEError(
            f"{error.filename}: cannot be opened ({error.strerror}). "
            "Check that the model directory is complete and readable."
        ) from error
    return files


def _close(pool: ThreadPoolExecutor, files: dict[Path, int]) -> None:
    pool.shutdown(wait=True)
    for descriptor in files.values():
        os.close(descriptor)


def _read_span(descriptor: int, span: Span, rows: list[memoryview]) -> None:
    """Fill `rows` from the file. `preadv` may return less than asked, so go on until full."""
    offset = span.offset
    while rows:
        try:
            count = os.preadv(descriptor, rows, offset)
        except OSError as error:
            raise FlashMoEError(
                f"{span.file}: reading an expert at byte {offset} failed ({error.strerror}). "
                "Check the disk; nothing was computed from these bytes."
            ) from error
        if count == 0:
            raise FlashMoEError(
                f"{span.file}: ends at byte {offset}, in the middle of an expert. The file was "
                "cut short while the model was in use; restore it and load the model again."
            )
        offset += count
        while rows and count >= len(rows[0]):
            count -= len(rows.pop(0))
        if rows:
            rows[0] = rows[0][count:]
