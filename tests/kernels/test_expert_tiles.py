"""Tiles of rows that share an expert, and sums of experts: their kernels on the Metal bench."""

import mlx.core as mx
import numpy as np
import pytest
from kernel_helpers import complains, plant
from metal_cpu import metal_on_cpu, require_bench

from flashmoe_mlx.custom_kernels import autotune, reference
from flashmoe_mlx.custom_kernels import launch as gpu
from flashmoe_mlx.custom_kernels.case import DTYPES
from flashmoe_mlx.custom_kernels.experts import prefill
from flashmoe_mlx.custom_kernels.experts import tiles as expert_tiles
from flashmoe_mlx.custom_kernels.experts.prefill import TiledCase
from flashmoe_mlx.custom_kernels.experts.tiles import CombineCase, cut, most_tiles

require_bench()


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Build kernels inside each bench block, keep none, and use ours whichever is faster."""
    monkeypatch.setenv("FLASHMOE_KERNELS", "custom")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu._build.cache_clear()
    autotune.forget()
    yield
    gpu._build.cache_clear()
    autotune.forget()


def random_slots(count: int, of: int, kind: str) -> mx.array:
    rng = np.random.default_rng(count + of)
    slots = {
        "even": rng.integers(of, size=count),
        "few": rng.integers(of, size=count) // 3 * 3 % of,
        "one": np.full(count, of // 2),
        "last": np.full(count, of - 1),
        "each": np.arange(count) % of,
    }[kind]
    return mx.array(slots.astype(np.uint32))


def agrees(slots: mx.array, of: int, rows: int) -> bool:
    tiles = cut(slots, of, rows)
    expected = reference.cut(slots, of, rows, len(tiles.slots))
    return all(
        np.array_equal(np.array(a), np.array(b)) for a, b in zip(tiles, expected, strict=True)
    )


@pytest.mark.parametrize("mode", ["fast", "checked", "order"])
@pytest.mark.parametrize("kind", ["even", "few", "one", "last", "each"])
@pytest.mark.parametrize("count, of, rows", [
    (1, 1, 16), (1, 7, 16), (300, 1, 16), (50, 7, 16), (7, 40, 32), (700, 20, 64), (257, 5, 2),
])  # fmt: skip
def test_assignments_are_cut_as_in_the_reference(mode, kind, count, of, rows):
    with metal_on_cpu(mode) as session:
        assert agrees(random_slots(count, of, kind), of, rows)
    assert session.launches


@pytest.mark.parametrize("old, new", [
    ("(counts[s] + ROWS - 1) / ROWS", "counts[s] / ROWS"),
    ("s < slot ? tiles", "s <= slot ? tiles"),
    ("(pairs + 255) / 256", "pairs / 256"),
    ("slots[p] == slot ? 1u : 0u", "slots[p] <= slot ? 1u : 0u"),
    ("threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    ("for (uint l = 0; l < lane; l++)", "for (uint l = 0; l <= lane; l++)"),
    ("places[p] = place;", "places[p] = p;"),
    ("rows[place] = p;", "rows[place] = place;"),
    ("place += 1;", ""),
    ("r = count + lane", "r = count + 1 + lane"),
    ("tile_slots[tiles_before + t] = slot;", "tile_slots[t] = slot;"),
    ("t = tiles_in_all + lane", "t = tiles_in_all + 1 + lane"),
    ("r = tiles_in_all * ROWS + lane", "r = tiles_in_all * ROWS + 1 + lane"),
])  # fmt: skip
def test_a_mistake_in_cutting_is_caught(monkeypatch, old, new):
    plant(monkeypatch, "experts/tiles.metal", old, new)

    def check() -> None:
        with metal_on_cpu("checked"):
            assert agrees(random_slots(700, 20, "few"), 20, 16)

    assert complains(check)


def test_a_prompt_of_another_length_compiles_nothing(monkeypatch):
    """Each combination of constants compiles for seconds, and every batch has another size."""
    seen, launch = set(), gpu.Kernel.__call__

    def spy(self, inputs, outputs, groups, lanes, **constants):
        seen.add((self.name, *constants.items()))
        return launch(self, inputs, outputs, groups, lanes, **constants)

    monkeypatch.setattr(gpu.Kernel, "__call__", spy)
    x = mx.random.normal((700, 64))
    with metal_on_cpu("fast"):
        for count in 7, 300, 700:
            tiles = cut(random_slots(count, 20, "even"), 20, 16)
            y = expert_tiles.take_rows(x, mx.arange(count, dtype=mx.uint32), tiles)
            y = y.reshape(-1, 64)
            y = expert_tiles.combine_by_kernel(y, tiles.places[:, None], x[:count, :1])
            assert mx.array_equal(y, x[:count] * x[:count, :1])
    assert {name for name, *_ in seen} == {"experts/tiles", "experts/take_rows", "experts/combine"}
    assert len(seen) == 3


@pytest.mark.parametrize("count, of, rows", [(1, 9, 16), (9, 9, 16), (40, 3, 16), (64, 4, 16)])
def test_most_tiles_are_enough(count, of, rows):
    """One assignment in each slot but one needs the most tiles."""
    each = min(of, count)
    counts = [1] * (each - 1) + [count - each + 1]
    needed = sum(-(-count // rows) for count in counts)
    assert needed <= most_tiles(count, of, rows) <= needed + 1


@pytest.mark.parametrize("mode", ["fast", "checked", "order"])
@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_are_added_up(dtype, weights, mode):
    for sizes in (384, 3), (1032, 8), (8, 1):
        case = CombineCase(*sizes, dtype, weights, tokens=5)
        with metal_on_cpu(mode) as session:
            assert autotune.check(case).ok
        assert session.launches


@pytest.mark.parametrize("old, new", [
    ("* 8;", "* 4;"),
    ("column < COLUMNS", "column <= COLUMNS"),
    ("k < K", "k < K - 1"),
    ("places[n * K + k]", "places[n + k]"),
    ("weights[n * K + k]", "weights[k]"),
    ("values[i], totals[i])", "values[i], 0.0f)"),
    ("size_t(n) * COLUMNS", "size_t(0) * COLUMNS"),
])  # fmt: skip
def test_a_mistake_in_adding_up_is_caught(monkeypatch, old, new):
    plant(monkeypatch, "experts/combine.metal", old, new)

    def check() -> None:
        with metal_on_cpu("checked"):
            assert autotune.check(CombineCase(1032, 3, "bfloat16", "float32", tokens=5)).ok

    assert complains(check)


def taken(dtype: str, width: int = 1032) -> bool:
    x = mx.random.normal((40, width)).astype(DTYPES[dtype])
    tokens = mx.array(np.random.default_rng(0).integers(40, size=90).astype(np.uint32))
    tiles = expert_tiles.Tiles(mx.arange(89, -7, -1).reshape(6, 16) % 90, mx.zeros(6), mx.zeros(0))
    rows = tiles.rows.astype(mx.uint32)
    y = expert_tiles.take_rows(x, tokens, tiles._replace(rows=rows))
    return mx.array_equal(y, x[tokens[rows]]).item()


@pytest.mark.parametrize("mode", ["fast", "checked", "order"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_taken(dtype, mode):
    with metal_on_cpu(mode) as session:
        assert taken(dtype) and taken(dtype, 8)
        assert len(session.launches) == 2
        assert taken(dtype, 12)  # by MLX
    assert len(session.launches) == 2


@pytest.mark.parametrize("old, new", [
    ("* 8;", "* 4;"),
    ("column < COLUMNS", "column <= COLUMNS"),
    ("tokens[rows[r]]", "tokens[r]"),
    ("tokens[rows[r]]", "rows[r]"),
    ("size_t(r) * COLUMNS", "size_t(0) * COLUMNS"),
])  # fmt: skip
def test_a_mistake_in_taking_is_caught(monkeypatch, old, new):
    plant(monkeypatch, "experts/take_rows.metal", old, new)

    def check() -> None:
        with metal_on_cpu("checked"):
            assert taken("bfloat16")

    assert complains(check)


@pytest.mark.parametrize("nvidia", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits, group_size", [(2, 64), (3, 32), (4, 128), (8, 64)])
def test_tiles_of_experts(monkeypatch, bits, group_size, dtype, nvidia):
    monkeypatch.setattr(prefill, "is_cuda", lambda: nvidia)
    # MLX's CPU ops are slow in 16 bits.
    hidden, inner = (384, 128) if dtype == "float32" else (128, max(group_size, 64))
    for slots, rows in ((5, 9), (20, 1), (1, 1), (3, 70)):
        case = TiledCase(hidden, inner, bits, group_size, dtype, dtype, bits, slots, rows)
        with metal_on_cpu("fast") as session:
            assert autotune.check(case).ok
        assert session.launches


def test_mlx_ops_add_up_what_the_kernel_does_not_take():
    outputs, places = mx.random.normal((9, 12)), mx.array([[1, 8], [4, 0]], mx.uint32)
    weights = mx.array([[0.5, 2.0], [1.0, -1.0]])
    with metal_on_cpu("fast") as session:
        y = expert_tiles.combine(outputs, places, weights)
    assert not session.launches
    expected = [0.5 * outputs[1] + 2 * outputs[8], outputs[4] - outputs[0]]
    assert mx.allclose(y, mx.stack(expected))


@pytest.mark.parametrize("file, old, new", [
    ("experts/tiles", "tile_slots[tiles_before + t] = slot;", "tile_slots[tiles_before + t] = 0;"),
    ("experts/tiles", "places[p] = place;", "places[p] = p;"),
    ("experts/take_rows", "tokens[rows[r]]", "tokens[r % 9]"),
])  # fmt: skip
def test_wrong_tiles_are_found_at_first_use(monkeypatch, capsys, file, old, new):
    """MLX's own matmuls are used then."""
    plant(monkeypatch, f"{file}.metal", old, new)
    with metal_on_cpu("fast"):
        assert not autotune.prefers_custom(TiledCase(384, 128, 4, 64, *["float32"] * 2, 4, 5, 9))
    assert "tiled_experts" in capsys.readouterr().err
