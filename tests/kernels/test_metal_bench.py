"""The Metal bench agrees with MLX on MLX's own kernels, and catches wrong kernels."""

from pathlib import Path

import mlx.core as mx
import mlx_lm.models.gated_delta as stock
import numpy as np
import pytest
from metal_cpu import (
    MODES,
    BenchError,
    check_kernel,
    metal_on_cpu,
    mutations,
    require_bench,
)
from metal_cpu.bad_kernels import BAD, GOOD
from metal_cpu.calibration import quantized_matvec, softmax
from metal_cpu.catching import bad_inputs, bad_table, caught, markdown

require_bench()

RUNNING = ("fast", "checked", "order")
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
dtype_cases = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[-1])


def launch(source, inputs, *, shape=(64,), dtype=mx.float32, grid=None, group=32, **options):
    """Run a small kernel with inputs a, b, c and output o."""
    names = list("abc")[: len(inputs)]
    made = {k: options.pop(k) for k in ("ensure_row_contiguous", "header") if k in options}
    kernel = mx.fast.metal_kernel(
        name="small", input_names=names, output_names=["o"], source=source, **made
    )
    (out,) = kernel(
        inputs=inputs,
        grid=grid or (int(np.prod(shape)), 1, 1),
        threadgroup=group if isinstance(group, tuple) else (group, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
        **options,
    )
    return out


# ---- calibration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name, rows, columns, bits", [
    ("affine_qmv_fast", 40, 1024, 4),
    ("affine_qmv_fast", 16, 512, 2),
    ("affine_qmv", 20, 320, 4),
    ("affine_qmv", 4, 192, 8),
])  # fmt: skip
def test_agrees_with_mlx_on_its_own_matvec(name, rows, columns, bits):
    w = mx.random.normal((rows, columns), key=mx.random.key(1))
    x = mx.random.normal((3, columns), key=mx.random.key(2))
    packed = mx.quantize(w, group_size=64, bits=bits)
    check_kernel(
        lambda *arrays: quantized_matvec(name, *arrays, bits=bits),
        [*packed, x],
        lambda *a: a[3] @ mx.dequantize(*a[:3], group_size=64, bits=bits).T,
        rtol=1e-5,
        atol=1e-4,
        modes=RUNNING,
        strict=False,
    )


def test_sees_that_mlx_matvec_writes_some_rows_twice():
    # Harmless: with 19 rows the last simdgroup moves back and rewrites equal values.
    packed = mx.quantize(mx.random.normal((19, 192)), group_size=64, bits=4)
    with (
        metal_on_cpu("checked", strict=False),
        pytest.raises(BenchError, match="writes byte 60 of y"),
    ):
        quantized_matvec("affine_qmv", *packed, mx.ones((1, 192)), bits=4)


@pytest.mark.parametrize("columns", [5, 128, 700])
@dtype_cases
def test_agrees_with_mlx_on_its_own_softmax(columns, dtype):
    x = (4 * mx.random.normal((3, columns), key=mx.random.key(3))).astype(dtype)
    exact = mx.softmax(x.astype(mx.float32), axis=-1)
    tolerance = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    check_kernel(softmax, [x], exact, rtol=tolerance, modes=RUNNING, strict=False)


@pytest.fixture
def gated_delta(monkeypatch):
    """Return mlx-lm's kernel dispatcher, for use inside metal_on_cpu."""

    def call(*arrays):
        for has_mask, vectorized in ((0, 0), (0, 1), (1, 0), (1, 1)):
            name = "_gated_delta_kernel" + "_vec" * vectorized + "_masked" * has_mask
            kernel = stock._make_gated_delta_kernel(bool(has_mask), bool(vectorized))
            monkeypatch.setattr(stock, name, kernel)
        monkeypatch.setattr(
            stock, "_gated_delta_kernel_packed", stock._make_gated_delta_packed_kernel()
        )
        return stock.gated_delta_kernel(*arrays)

    return call


def gated_delta_arrays(dtype, key_dim, tokens, mask=False):
    b, hk, hv, dv = 2, 2, 4, 8
    keys = iter(mx.random.split(mx.random.key(4), 6))
    q, k = (0.3 * mx.random.normal((b, tokens, hk, key_dim), key=next(keys)) for _ in range(2))
    v = mx.random.normal((b, tokens, hv, dv), key=next(keys))
    g = mx.random.uniform(0.5, 1.0, (b, tokens, hv), key=next(keys))
    beta = mx.random.uniform(0.0, 1.0, (b, tokens, hv), key=next(keys))
    state = mx.random.normal((b, hv, dv, key_dim), key=next(keys))
    arrays = [x.astype(dtype) for x in (q, k, v)] + [g, beta.astype(dtype), state]
    masks = [mx.array([[True] * tokens, [True] * (tokens - 1) + [False]])] if mask else []
    return arrays + masks


@pytest.mark.parametrize("key_dim", [64, 128])
@dtype_cases
def test_agrees_with_mlx_lm_on_gated_delta(gated_delta, dtype, key_dim):
    arrays = gated_delta_arrays(dtype, key_dim, tokens=5)
    exact = stock.gated_delta_ops(*(x.astype(mx.float32) for x in arrays))
    tolerance = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]
    check_kernel(
        gated_delta, arrays, exact, rtol=tolerance, atol=tolerance, modes=RUNNING, strict=False
    )


def test_sees_that_the_masked_gated_delta_lets_32_lanes_write_one_element(gated_delta):
    arrays = gated_delta_arrays(mx.float32, 64, tokens=3, mask=True)
    with metal_on_cpu("checked", strict=False), pytest.raises(BenchError, match=r"race.* of y"):
        gated_delta(*arrays)


@pytest.mark.parametrize("mode", MODES)
@dtype_cases
def test_a_small_kernel_goes_all_the_way(mode, dtype):
    source = """
        uint i = thread_position_in_grid.x;
        uint n = a_shape[1];
        float scale = static_cast<float>(b) + static_cast<float>(c[0]);
        o[i] = static_cast<T>(metal::exp(static_cast<float>(a[i % n])) * scale + float(N));
    """
    a, b, c = mx.arange(64).reshape(1, 64).astype(dtype) / 64, mx.array(0.5), mx.array([1, 2])
    with metal_on_cpu(mode):
        out = launch(source, [a, b, c], dtype=dtype, template=[("T", dtype), ("N", 3)])
    assert out.dtype == dtype
    exact = np.exp(np.array(a.astype(mx.float32)).ravel()) * 1.5 + 3
    tolerance = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    np.testing.assert_allclose(np.array(out.astype(mx.float32)), exact, tolerance)


# ---- proof ---------------------------------------------------------------------------------------


def test_the_good_kernel_passes():
    def right(x, tiny):
        return np.repeat(np.array(x).reshape(2, 32)[::-1].sum(1), 32) * 2 + 1

    check_kernel(GOOD, bad_inputs(), right)


def test_every_bad_kernel_is_caught_and_readme_says_by_whom():
    table = bad_table()
    text = markdown(table)
    assert len(BAD) >= 50
    assert [bad.name for bad, found in table.items() if not found] == [], text
    readme = (Path(__file__).parents[1] / "metal_cpu" / "README.md").read_text()
    assert text in readme, f"the table in README.md is out of date; it should be\n{text}"


@dtype_cases
def test_the_good_matvec_passes(dtype):
    tolerance = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]
    arrays = mutations.arrays(dtype)
    check_kernel(mutations.matvec, arrays, mutations.reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("old, new", mutations.MUTATIONS)
def test_every_mutation_of_the_matvec_is_caught(old, new):
    assert mutations.SOURCE.count(old) == 1
    source = mutations.SOURCE.replace(old, new)
    assert caught(
        lambda *a: mutations.matvec(*a, source=source),
        mutations.arrays(),
        mutations.reference,
        first=True,
    )
