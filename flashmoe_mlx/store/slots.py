"""Slots: memory for a layer's experts, and the table of which expert lies where.

A layer's bank is nine MLX arrays `[slots, ...]`. Reads go from the file directly into one row of
each array, without another copy.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..custom_kernels.reference import NONE
from ..errors import FlashMoEError
from ..format.layout import LayerLayout
from .backend import Backend, Row
from .io_mode import BLOCK
from .reader import Arrival, Piece, cut

DTYPES = {
    "U8": mx.uint8,
    "U32": mx.uint32,
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
}
Cut = tuple[int, int, int, int, list[Row]]  # descriptor, offset of expert 0, step, bytes, rows
LEAST_PIECE = 256 << 10  # bytes; smaller pieces cost more than they gain
NEVER = -1e30  # stands for log2(0)
HALF_LIFE = 128  # uses of a layer's experts


class DecayedLFU:
    """Use counts of a layer's experts, in which each use decays with a half-life.

    A half-life of 1 is least recently used, an infinite one least frequently used; dev/LOG.md has
    the hit rates.
    """

    def __init__(self, experts: int, half_life: float = HALF_LIFE) -> None:
        """Start without any use."""
        self._half_life, self._uses = half_life, 0
        self._score = [-math.inf] * experts

    def count(self, expert: int) -> None:
        """Count a use. Scores are log2, and grow with time instead of decaying."""
        self._uses += 1
        now = self._uses / self._half_life
        self._score[expert] = now + math.log2(1 + 2 ** (self._score[expert] - now))

    def ascending(self, experts: Iterable[int]) -> list[int]:
        """Return experts in the order in which to evict them."""
        return sorted(experts, key=self._score.__getitem__)

    def scores(self) -> np.ndarray:
        """Return log2 of each expert's decayed uses, `[experts]` float32."""
        now = self._uses / self._half_life
        return np.maximum(np.array(self._score) - now, NEVER).astype(np.float32)

    def set_scores(self, scores: np.ndarray) -> None:
        """Continue from scores that `scores` returned."""
        now = self._uses / self._half_life
        self._score = [-math.inf if s <= NEVER else now + s for s in scores.tolist()]


class SlotBank:
    """The slots of one layer: free, occupied by an expert, or being read into."""

    def __init__(
        self, layout: LayerLayout, slots: int, files: Mapping[Path, int], backend: Backend
    ) -> None:
        """Allocate `slots` rows for each of the nine tensors; `files` maps paths to descriptors."""
        self.layout = layout
        shapes = [((slots, *f.shape), DTYPES[f.dtype]) for f in layout.fields]
        self.packed = backend.allocate_together(shapes)
        self.arrays = (
            [part.array for part in self.packed]
            if self.packed
            else [backend.allocate(shape, dtype) for shape, dtype in shapes]
        )
        self._slots = slots
        self._views = backend.rows(self.arrays)
        self._spans = [(files[s.file], s.offset, s.first, s.last) for s in layout.spans(0)]
        self._cuts: dict[tuple[int, int], list[Cut]] = {}
        self._free = dict.fromkeys(range(slots))
        self._slot_of: dict[int, int] = {}
        self._uses = DecayedLFU(layout.num_experts)
        self._expert_in: dict[int, int] = {}
        self.arriving: dict[int, tuple[int, Arrival]] = {}

    def __len__(self) -> int:
        """Return the number of slots."""
        return self._slots

    def resident(self, experts: Iterable[int]) -> list[int]:
        """Return the experts among these that are resident."""
        return [e for e in experts if e in self._slot_of]

    def absent(self, experts: Iterable[int]) -> list[int]:
        """Return the experts among these that are neither resident nor being read, sorted."""
        return sorted(e for e in experts if e not in self._slot_of and e not in self.arriving)

    def touch(self, expert: int) -> int:
        """Return the slot of an expert that is resident or being read, and count a use."""
        if self._slots < self.layout.num_experts:  # else nothing is evicted
            self._uses.count(expert)
        return self.arriving[expert][0] if expert in self.arriving else self._slot_of[expert]

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each expert's slot or NONE, uint32, and log2 of its uses, float32: `[experts]`."""
        slot_of = np.full(self.layout.num_experts, NONE, np.uint32)
        slot_of[list(self._slot_of)] = list(self._slot_of.values())
        return slot_of, self._uses.scores()

    def set_table(self, slot_of: np.ndarray, scores: np.ndarray) -> None:
        """Continue from a table in the form of `table`; no reads may be in flight."""
        self._slot_of = {e: int(slot_of[e]) for e in np.flatnonzero(slot_of != NONE).tolist()}
        self._expert_in = {slot: e for e, slot in self._slot_of.items()}
        self._free = dict.fromkeys(s for s in range(self._slots) if s not in self._expert_in)
        self._uses.set_scores(scores)

    @property
    def holds_all(self) -> bool:
        """Say whether all experts are resident; then expert e lies in slot e."""
        return len(self._slot_of) == self.layout.num_experts

    def choose(self, experts: Sequence[int], keep: Set[int]) -> list[int] | None:
        """Return a slot for each expert, or None if there are too few.

        Free slots come first, then those of the least used experts that are not in `keep`. If all
        experts fit, expert e gets slot e.
        """
        if self._slots == self.layout.num_experts:
            return list(experts)
        slots = list(islice(self._free, len(experts)))
        if wanted := len(experts) - len(slots):
            others = self._uses.ascending(self._slot_of.keys() - keep)
            slots += [self._slot_of[e] for e in others[:wanted]]
        return slots if len(slots) == len(experts) else None

    def expect(self, expert: int, slot: int, arrival: Arrival) -> None:
        """Assign a slot from `choose` to an expert being read, evicting the one in it."""
        if slot in self._free:
            del self._free[slot]
        else:
            del self._slot_of[self._expert_in.pop(slot)]
        self.arriving[expert] = slot, arrival

    def complete(self) -> list[Arrival]:
        """Make experts resident whose reads succeeded, and free the slots of those that failed.

        Returns:
            The arrivals that were done.
        """
        done = {e: pair for e, pair in self.arriving.items() if pair[1].done}
        for expert, (slot, arrival) in done.items():
            del self.arriving[expert]
            if arrival.error:
                self._free[slot] = None
            else:
                self._slot_of[expert], self._expert_in[slot] = slot, expert
        return [arrival for _, arrival in done.values()]

    def parts(self, experts: int, threads: int) -> int:
        """Return how many pieces to cut each record into, so that every thread gets one."""
        return max(1, min(-(-threads // experts), self.layout.record_bytes // LEAST_PIECE))

    def pieces(self, expert: int, slot: int, parts: int) -> tuple[Arrival, list[Piece]]:
        """Return the reads that load an expert into a slot.

        Args:
            expert: id.
            slot: destination.
            parts: pieces of about equal size per record. A stock checkpoint, with nine byte
                ranges per expert, gives at least nine.
        """
        cuts = self._cuts.get((slot, parts)) or self._cut(slot, parts)
        if self._slots < self.layout.num_experts:  # else each slot is read into once
            self._cuts[slot, parts] = cuts
        arrival = Arrival(len(cuts))
        return arrival, [
            (file, offset + expert * stride, nbytes, rows, arrival)
            for file, offset, stride, nbytes, rows in cuts
        ]

    def _cut(self, slot: int, parts: int) -> list[Cut]:
        """Cut a slot's rows into pieces for any expert."""
        most = -(-self.layout.record_bytes // (parts * BLOCK)) * BLOCK
        cuts = []
        for file, offset, first, last in self._spans:
            for rows in cut([self._row(slot, index) for index in range(first, last)], most):
                nbytes = sum(map(len, rows))
                cuts.append((file, offset, self.layout.fields[first].stride, nbytes, rows))
                offset += nbytes
        return cuts

    def rows(self, slot: int) -> list[Row]:
        """Return the bytes of a slot's nine tensors, in file order."""
        return [self._row(slot, index) for index in range(len(self._views))]

    def _row(self, slot: int, index: int) -> Row:
        size = self.layout.fields[index].nbytes
        if not 0 <= slot < self._slots:
            raise FlashMoEError(f"slot {slot} is not one of {self._slots}. Load the model again.")
        return self._views[index][slot * size : (slot + 1) * size]


def no_free_slots(layer: int, missing: int, slots: int, others: bool) -> FlashMoEError:
    """Return the error for too few slots; `others`: another thread's requests hold some."""
    if others:
        return FlashMoEError(
            f"layer {layer}: another thread is generating with this model, and {slots} slots are "
            "too few for both. Run one generation at a time."
        )
    return FlashMoEError(
        f"layer {layer}: {missing} more experts do not fit into a bank of {slots} slots beside "
        "those in use. Request fewer at a time, or raise expert_cache."
    )
