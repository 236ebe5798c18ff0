"""Parts of a layer's rows, as a small bank makes them, are multiplied the way the whole is.

MLX chooses kernels, which round differently, by how many rows it gets and how large the bank is.
"""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.custom_kernels import expert_mlp
from flashmoe_mlx.custom_kernels.bank import Bank
from flashmoe_mlx.custom_kernels.expert_mlp import Routed, _gathered, _grouped, routed

SLOTS, HIDDEN, INNER = 6, 64, 96


@pytest.fixture(scope="module")
def banks():
    shapes = (SLOTS, INNER, HIDDEN), (SLOTS, INNER, HIDDEN), (SLOTS, HIDDEN, INNER)
    keys = mx.random.split(mx.random.key(1), 3)
    matrices = (mx.random.normal(s, key=k) for s, k in zip(shapes, keys, strict=True))
    return tuple(Bank(*mx.quantize(matrix, 32, 4), 4, 32) for matrix in matrices)


@pytest.fixture
def seen(monkeypatch):
    """Note how many rows MLX is given, and whether it is told that they are in order."""
    calls, multiply = [], mx.gather_qmm

    def spy(x, *arrays, **settings):
        calls.append((len(x), settings["sorted_indices"]))
        return multiply(x, *arrays, **settings)

    monkeypatch.setattr(expert_mlp.mx, "gather_qmm", spy)
    return calls


def rows_of(slots: list[int]):
    x = mx.random.normal((40, HIDDEN), key=mx.random.key(2))
    return x, np.arange(len(slots)), np.array(slots)


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("part_of, in_order", [
    (Routed(pairs=5, experts=5, of=SLOTS), False),
    (Routed(pairs=23, experts=6, of=SLOTS), False),
    (Routed(pairs=24, experts=6, of=SLOTS), True),
    (Routed(pairs=900, experts=230, of=256), False),
    (Routed(pairs=1024, experts=230, of=256), True),
])  # fmt: skip
@pytest.mark.parametrize("slots", [[3], [0, 0, 2, 5, 5], [0, 0, 1, 1, 1, 2, 3, 3, 4, 4]])
def test_each_part_goes_the_way_of_the_whole(
    banks, seen, monkeypatch, slots, part_of, in_order, cuda
):
    monkeypatch.setattr(expert_mlp, "is_cuda", lambda: cuda)
    x, tokens, slots = rows_of(slots)
    y = _gathered(x, tokens, slots, banks, part_of)
    least = 4 * SLOTS if in_order and not cuda else min(8, part_of.pairs)
    assert seen == 3 * [(max(len(slots), least), in_order and not cuda)]
    assert y.shape == (len(slots), HIDDEN)
    whole = _gathered(x, tokens, slots, banks, Routed(len(slots), 1, 1 << 20))
    assert mx.allclose(y, whole, rtol=1e-6, atol=1e-6)


def test_no_expert_is_multiplied_alone(banks, monkeypatch):
    batches, batched = [], expert_mlp._batched

    def spy(x, tokens, slots, banks):
        batches.append(slots.size)
        return batched(x, tokens, slots, banks)

    monkeypatch.setattr(expert_mlp, "_batched", spy)
    x, tokens, slots = rows_of([0] * 20 + [2] * 3 + [4])
    y = _grouped(x, tokens, slots, banks)
    assert batches == [2, 2]
    truth = _gathered(x, tokens, slots, banks, routed(slots, SLOTS))
    assert mx.allclose(y, truth, rtol=1e-4, atol=1e-4)


def test_what_is_counted():
    assert routed(np.array([[5, 1], [5, 7]]), 9) == Routed(pairs=4, experts=3, of=9)
