"""A layer's slot table in GPU memory, so that no step waits for the host to assign slots."""

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
    """Slots and decayed uses of a layer's experts.

    Attributes:
        slot_of: `[experts]` uint32, the slot of each or NONE.
        demand: `[experts]` float32, log2 of each expert's decayed uses.
        counts: `[LEAST_ELEMENTS]` uint32, experts requested and missing so far, once per step.
    """

    slot_of: mx.array
    demand: mx.array
    counts: mx.array


def choose_slots(
    table: Table, ids: mx.array, earlier: mx.array, slots: int, half_life: int
) -> tuple[Table, mx.array, mx.array]:
    """Assign a slot to each requested expert, by the GPU kernel.

    Args:
        table: the layer's.
        ids: `[..., K]` uint32, at most `slots` of them distinct.
        earlier: an array that must be computed first.
        slots: slots of the layer.
        half_life: uses of any experts after which a use counts half.

    Returns:
        The new table; slots `[..., K]` uint32; and `[ids, 2]` uint32, expert and slot of each
        missing expert, then NONE.
    """
    experts = table.slot_of.shape[0]
    expect("the slot of each expert", table.slot_of, (experts,), mx.uint32)
    expect("the uses of each expert", table.demand, (experts,), mx.float32)
    expect("counts of experts", table.counts, (LEAST_ELEMENTS,), mx.uint32)
    expect("ids of experts", ids, ids.shape, mx.uint32)
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
