"""The slots of a bank as a GPU keeps them, so that no step waits for the host to give them out."""

from typing import NamedTuple

import mlx.core as mx

from ..launch import LEAST_ELEMENTS, Kernel
from ..reference import NONE as NONE
from ..shapes import expect

LANES = 256
_kernel = Kernel(
    "cuda/slots",
    ("slot_of", "demand", "counts", "ids", "earlier"),
    ("new_slot_of", "new_demand", "new_counts", "slots", "tasks"),
)


class Table(NamedTuple):
    """What is known of a bank.

    Attributes:
        slot_of: `[experts]` uint32, the slot of each or NONE.
        demand: `[experts]` float32, log2 of the uses of each, earlier ones counting less.
        counts: `[LEAST_ELEMENTS]` uint32, experts asked for and missing so far, each once per step.
    """

    slot_of: mx.array
    demand: mx.array
    counts: mx.array


def choose_slots(
    table: Table, ids: mx.array, earlier: mx.array, slots: int, half_life: int
) -> tuple[Table, mx.array, mx.array]:
    """Give each expert that is asked for a slot, by the GPU kernel.

    Args:
        table: of the bank.
        ids: `[..., K]` uint32, of which at most `slots` differ.
        earlier: an array that must be computed before.
        slots: of the bank.
        half_life: uses of experts after which an earlier use counts half.

    Returns:
        The table after that; the slots `[..., K]` uint32; and `[ids, 2]` uint32, expert and slot of
        those whose bytes must come, NONE behind the last.
    """
    experts = table.slot_of.shape[0]
    expect("the slot of each expert", table.slot_of, (experts,), mx.uint32)
    expect("the uses of each expert", table.demand, (experts,), mx.float32)
    expect("experts asked for and missing", table.counts, (LEAST_ELEMENTS,), mx.uint32)
    expect("experts asked for", ids, ids.shape, mx.uint32)
    *after, places, tasks = _kernel(
        [*table, ids, earlier],
        [
            *(((experts,), dtype) for dtype in (mx.uint32, mx.float32)),
            ((LEAST_ELEMENTS,), mx.uint32),
            (ids.shape, mx.uint32),
            ((ids.size, 2), mx.uint32),
        ],
        (1, 1, 1),
        LANES,
        EXPERTS=experts,
        SLOTS=slots,
        M=ids.size,
        HALF_LIFE=half_life,
    )
    return Table(*after), places, tasks
