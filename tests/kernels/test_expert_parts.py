"""Parts of a layer's rows, as a small bank makes them, are multiplied the way the whole is.

MLX chooses kernels, which round differently, by how many rows it gets and how large the bank is.
"""

import mlx.core as mx
import pytest

from flashmoe_mlx.custom_kernels.experts import prefill
from flashmoe_mlx.custom_kernels.experts.prefill import Routed, _gathered, _tile_rows
from flashmoe_mlx.custom_kernels.weights import QuantizedMatrix

SLOTS, HIDDEN, INNER = 6, 64, 96


@pytest.fixture(scope="module")
def banks():
    shapes = (SLOTS, INNER, HIDDEN), (SLOTS, INNER, HIDDEN), (SLOTS, HIDDEN, INNER)
    keys = mx.random.split(mx.random.key(1), 3)
    matrices = (mx.random.normal(s, key=k) for s, k in zip(shapes, keys, strict=True))
    return tuple(QuantizedMatrix(*mx.quantize(matrix, 32, 4), 4, 32) for matrix in matrices)


@pytest.fixture
def seen(monkeypatch):
    """Note how many rows MLX is given, and whether it is told that they are in order."""
    calls, multiply = [], mx.gather_qmm

    def spy(x, *arrays, **settings):
        ids = settings["rhs_indices"].tolist()
        assert ids == sorted(ids)
        calls.append((len(x), settings["sorted_indices"]))
        return multiply(x, *arrays, **settings)

    monkeypatch.setattr(prefill.mx, "gather_qmm", spy)
    return calls


def outputs(slots: list[int], banks, part_of: Routed) -> mx.array:
    x = mx.random.normal((40, HIDDEN), key=mx.random.key(2))
    tokens = mx.arange(len(slots), dtype=mx.uint32)
    y, places = _gathered(x, tokens, mx.array(slots, mx.uint32), banks, part_of)
    return y[places]


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("part_of, in_order", [
    (Routed(pairs=5, of=SLOTS), False),
    (Routed(pairs=23, of=SLOTS), False),
    (Routed(pairs=24, of=SLOTS), True),
    (Routed(pairs=900, of=256), False),
    (Routed(pairs=1024, of=256), True),
])  # fmt: skip
@pytest.mark.parametrize("slots", [[3], [5, 0, 2, 0, 5], [4, 0, 1, 1, 3, 2, 0, 3, 1, 4]])
def test_each_part_goes_the_way_of_the_whole(
    banks, seen, monkeypatch, slots, part_of, in_order, cuda
):
    monkeypatch.setattr(prefill, "is_cuda", lambda: cuda)
    y = outputs(slots, banks, part_of)
    least = 4 * SLOTS if in_order and not cuda else min(8, part_of.pairs)
    assert seen == 3 * [(max(len(slots), least), in_order and not cuda)]
    whole = outputs(slots, banks, Routed(len(slots), 1 << 20))
    assert mx.allclose(y, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("slots", [[5, 0, 2, 0, 5], [3]])
def test_each_row_has_its_own_expert(banks, slots):
    y = outputs(slots, banks, Routed(len(slots), SLOTS))
    for row, slot in enumerate(slots):
        alone = outputs([slot] * (row + 1), banks, Routed(row + 1, SLOTS))[row]
        assert mx.allclose(y[row], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pairs, cuda, rows", [
    (1, False, 32), (1 << 20, False, 32), (16383, True, 16), (16384, True, 64),
])  # fmt: skip
def test_tiles_are_as_high_as_mlx_multiplies_at_once(monkeypatch, pairs, cuda, rows):
    monkeypatch.setattr(prefill, "is_cuda", lambda: cuda)
    assert _tile_rows(Routed(pairs, 256)) == rows
