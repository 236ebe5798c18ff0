"""Parts of a layer's rows, as few slots make them, are multiplied by the whole layer's kernels.

MLX chooses kernels, which round differently, by the number of rows and of slots.
"""

import mlx.core as mx
import pytest

from flashmoe_mlx.custom_kernels.experts import prefill
from flashmoe_mlx.custom_kernels.experts.prefill import Routed, _gathered, _tile_rows
from flashmoe_mlx.custom_kernels.weights import QuantizedMatrix

SLOTS, HIDDEN, INNER = 6, 64, 96


@pytest.fixture(scope="module")
def experts():
    shapes = (SLOTS, INNER, HIDDEN), (SLOTS, INNER, HIDDEN), (SLOTS, HIDDEN, INNER)
    keys = mx.random.split(mx.random.key(1), 3)
    matrices = (mx.random.normal(s, key=k) for s, k in zip(shapes, keys, strict=True))
    return tuple(QuantizedMatrix(*mx.quantize(matrix, 32, 4), 4, 32) for matrix in matrices)


@pytest.fixture
def seen(monkeypatch):
    """Record the number of rows MLX gets, and whether it knows that they are sorted."""
    calls, multiply = [], mx.gather_qmm

    def spy(x, *arrays, **settings):
        ids = settings["rhs_indices"].tolist()
        assert ids == sorted(ids)
        calls.append((len(x), settings["sorted_indices"]))
        return multiply(x, *arrays, **settings)

    monkeypatch.setattr(prefill.mx, "gather_qmm", spy)
    return calls


def outputs(slots: list[int], experts, whole: Routed) -> mx.array:
    x = mx.random.normal((40, HIDDEN), key=mx.random.key(2))
    tokens = mx.arange(len(slots), dtype=mx.uint32)
    y, places = _gathered(x, tokens, mx.array(slots, mx.uint32), experts, whole)
    return y[places]


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("whole, in_order", [
    (Routed(assignments=5, experts=SLOTS), False),
    (Routed(assignments=23, experts=SLOTS), False),
    (Routed(assignments=24, experts=SLOTS), True),
    (Routed(assignments=900, experts=256), False),
    (Routed(assignments=1024, experts=256), True),
])  # fmt: skip
@pytest.mark.parametrize("slots", [[3], [5, 0, 2, 0, 5], [4, 0, 1, 1, 3, 2, 0, 3, 1, 4]])
def test_each_part_uses_the_kernel_of_the_whole(
    experts, seen, monkeypatch, slots, whole, in_order, cuda
):
    monkeypatch.setattr(prefill, "is_cuda", lambda: cuda)
    y = outputs(slots, experts, whole)
    least = 4 * SLOTS if in_order and not cuda else min(8, whole.assignments)
    assert seen == 3 * [(max(len(slots), least), in_order and not cuda)]
    alone = outputs(slots, experts, Routed(len(slots), 1 << 20))
    assert mx.allclose(y, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("slots", [[5, 0, 2, 0, 5], [3]])
def test_each_row_has_its_own_expert(experts, slots):
    y = outputs(slots, experts, Routed(len(slots), SLOTS))
    for row, slot in enumerate(slots):
        alone = outputs([slot] * (row + 1), experts, Routed(row + 1, SLOTS))[row]
        assert mx.allclose(y[row], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("assignments, cuda, rows", [
    (1, False, 32), (1 << 20, False, 32), (16383, True, 16), (16384, True, 64),
])  # fmt: skip
def test_tiles_are_as_high_as_mlx_multiplies_at_once(monkeypatch, assignments, cuda, rows):
    monkeypatch.setattr(prefill, "is_cuda", lambda: cuda)
    assert _tile_rows(Routed(assignments, 256)) == rows
