"""The slot table's kernel on the Metal bench, step by step against the reference."""

import mlx.core as mx
import numpy as np
import pytest
from metal_cpu import metal_on_cpu, require_bench

from flashmoe_mlx.custom_kernels import reference
from flashmoe_mlx.custom_kernels.cuda.slots import NONE, Table, choose_slots

require_bench()


def empty(experts: int) -> Table:
    return Table(mx.full(experts, NONE, mx.uint32), mx.full(experts, -1e30), mx.zeros(4, mx.uint32))


def steps(rng, experts: int, shape: tuple[int, int], slots: int, count: int):
    """Yield distinct ids per row; rows share some, and every fifth step repeats the last."""
    ids = np.zeros(shape, np.uint32)
    for number in range(count):
        if number % 5 != 4:
            popular = rng.permutation(experts)[: max(slots, shape[1])]
            ids = np.stack([rng.permutation(popular)[: shape[1]] for _ in range(shape[0])])
        yield mx.array(ids.astype(np.uint32))


@pytest.mark.parametrize("mode", ["fast", "checked", "order"])
@pytest.mark.parametrize("experts, slots, shape", [
    (10, 3, (1, 3)), (10, 9, (2, 4)), (300, 70, (3, 10)), (512, 300, (1, 10)), (5, 4, (1, 1)),
])  # fmt: skip
def test_the_table_equals_the_reference(mode, experts, slots, shape):
    rng, table = np.random.default_rng(experts + slots), empty(experts)
    slot_of, demand = table.slot_of, table.demand
    requested = missed = 0
    with metal_on_cpu(mode):
        for ids in steps(rng, experts, shape, slots, 12 if mode == "fast" else 3):
            table, places, tasks = choose_slots(table, ids, mx.zeros(1), slots, 128)
            mx.eval(*table, places, tasks)
            slot_of, demand, *expected = reference.choose_slots(slot_of, demand, ids, slots, 128)
            found, wanted = np.array(table.demand), np.array(demand)
            assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5)
            for ours, right in zip(
                (table.slot_of, places, tasks), (slot_of, *expected), strict=True
            ):
                assert np.array_equal(np.array(ours), np.array(right))
            demand = table.demand  # so that rounding does not break ties
            requested += len(np.unique(np.array(ids)))
            missed += int((np.array(tasks)[:, 0] != NONE).sum())
            assert table.counts.tolist() == [requested, missed, 0, 0]
    assert 0 < missed < requested or mode != "fast"


def test_recent_frequent_experts_stay():
    table, places = empty(6), {}
    with metal_on_cpu("fast"):
        for ids in ([0, 1], [0, 2], [1, 0], [3, 4]):
            table, slots, _ = choose_slots(table, mx.array(ids, mx.uint32), mx.zeros(1), 3, 2)
            places = dict(zip(ids, slots.tolist(), strict=True))
    assert places.keys() == {3, 4} and table.slot_of[0].item() != NONE
    assert table.slot_of[1].item() == table.slot_of[2].item() == NONE
