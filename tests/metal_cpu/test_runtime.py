"""The bench's runtime: lanes, simdgroups, geometry, types, recording and error messages."""

import mlx.core as mx
import numpy as np
import pytest

from . import BenchError, launching, metal_on_cpu, record, require_bench, toolchain

require_bench()

I32 = np.int32
LANES = np.arange(64)


def build(source, inputs, names="abcd", **made):
    return mx.fast.metal_kernel(
        name="small",
        input_names=list(names[: len(inputs)]),
        output_names=["o"],
        source=source,
        **made,
    )


def launch(source, *inputs, shape=(64,), dtype=mx.float32, grid=None, group=32, made=None, **rest):
    """Run a small kernel with inputs a, b, c, d and output o."""
    (out,) = build(source, inputs, **(made or {}))(
        inputs=list(inputs),
        grid=grid or (int(np.prod(shape)), 1, 1),
        threadgroup=group if isinstance(group, tuple) else (group, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
        **rest,
    )
    return out


def run(source, *inputs, mode="checked", **options):
    with metal_on_cpu(mode, strict=False):
        out = launch(source, *inputs, **options)
    return np.array(out.astype(mx.float32) if out.dtype == mx.bfloat16 else out)


def each(expression):
    start = "uint i = thread_position_in_grid.x; uint l = thread_index_in_simdgroup; (void)l;"
    return f"{start} o[i] = {expression};"


def rows(values):
    return values.reshape(2, 32)


# ---- simdgroups ----------------------------------------------------------------------------------

REDUCTIONS = {
    "simd_sum(a[i])": lambda x: x.sum(1),
    "simd_max(a[i])": lambda x: x.max(1),
    "simd_min(a[i])": lambda x: x.min(1),
    "simd_or(a[i])": lambda x: np.bitwise_or.reduce(x, 1),
    "simd_xor(a[i])": lambda x: np.bitwise_xor.reduce(x, 1),
    "simd_and(a[i])": lambda x: np.bitwise_and.reduce(x, 1),
}
MOVES = {
    "simd_broadcast(a[i], 5)": lambda x, lane: x[:, lane * 0 + 5],
    "simd_shuffle(a[i], ushort(31 - l))": lambda x, lane: x[:, 31 - lane],
    "simd_shuffle_xor(a[i], 9)": lambda x, lane: x[:, lane ^ 9],
    "simd_shuffle_down(a[i], 4)": lambda x, lane: x[:, np.where(lane + 4 < 32, lane + 4, lane)],
    "simd_shuffle_up(a[i], 4)": lambda x, lane: x[:, np.where(lane >= 4, lane - 4, lane)],
    "simd_shuffle_rotate_down(a[i], 4)": lambda x, lane: x[:, (lane + 4) % 32],
    "simd_shuffle_rotate_up(a[i], 4)": lambda x, lane: x[:, (lane - 4) % 32],
    "simd_shuffle_and_fill_up(a[i], -a[i], 4)": lambda x, lane: np.where(
        lane >= 4, x[:, (lane - 4) % 32], -x[:, (lane - 4) % 32]
    ),
    "simd_shuffle_and_fill_down(a[i], -a[i], 4)": lambda x, lane: np.where(
        lane + 4 < 32, x[:, (lane + 4) % 32], -x[:, (lane + 4) % 32]
    ),
    "simd_prefix_inclusive_sum(a[i])": lambda x, lane: x.cumsum(1),
    "simd_prefix_exclusive_sum(a[i])": lambda x, lane: x.cumsum(1) - x,
}


@pytest.mark.parametrize("expression", REDUCTIONS)
def test_simd_reductions(expression):
    values = np.random.default_rng(1).integers(1, 999, 64).astype(I32)
    out = run(each(expression), mx.array(values), dtype=mx.int32)
    np.testing.assert_array_equal(
        rows(out), REDUCTIONS[expression](rows(values))[:, None].repeat(32, 1)
    )


@pytest.mark.parametrize("expression", MOVES)
def test_simd_moves(expression):
    values = np.random.default_rng(1).integers(1, 999, 64).astype(I32)
    out = run(each(expression), mx.array(values), dtype=mx.int32)
    np.testing.assert_array_equal(rows(out), MOVES[expression](rows(values), np.arange(32)))


def test_simd_sum_adds_half_in_half_and_bfloat_through_mlx():
    values = mx.random.normal((64,), key=mx.random.key(0))
    for dtype in (mx.float16, mx.bfloat16):
        x = values.astype(dtype)
        out = run(each("simd_sum(a[i])"), x, dtype=dtype)
        exact = rows(np.array(x.astype(mx.float32))).sum(1)[:, None].repeat(32, 1)
        np.testing.assert_allclose(rows(out), exact, atol=0.1)


SHARING = {
    "threadgroup memory, threadgroup barrier": (
        "threadgroup float t[64]; t[n] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup);"
        "o[i] = t[n ^ 33];",
        lambda n: n ^ 33,
    ),
    "threadgroup memory, simdgroup barrier": (
        "threadgroup float t[64]; t[n] = a[i]; simdgroup_barrier(mem_flags::mem_threadgroup);"
        "o[i] = t[n ^ 1];",
        lambda n: n ^ 1,
    ),
    "reused threadgroup memory": (
        "threadgroup float t[64]; t[n] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup);"
        "float v = t[63 - n]; threadgroup_barrier(mem_flags::mem_threadgroup);"
        "t[n] = v; simdgroup_barrier(mem_flags::mem_threadgroup); o[i] = t[n ^ 2];",
        lambda n: 63 - (n ^ 2),
    ),
    "device memory, threadgroup barrier": (
        "o[i] = a[i]; threadgroup_barrier(mem_flags::mem_device); float v = o[i ^ 40];"
        "threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup); o[i] = v;",
        lambda n: n ^ 40,
    ),
}


@pytest.mark.parametrize("mode", ["checked", "order"])
@pytest.mark.parametrize("name", SHARING)
def test_memory_shared_behind_the_right_barrier_is_no_race(name, mode):
    source, index = SHARING[name]
    start = "uint i = thread_position_in_grid.x; uint n = thread_position_in_threadgroup.x;"
    x = np.arange(192, dtype=np.float32)
    out = run(start + source, mx.array(x), mode=mode, shape=(192,), group=64)
    np.testing.assert_array_equal(out, x.reshape(3, 64)[:, index(LANES)].ravel())


# ---- geometry ------------------------------------------------------------------------------------


def test_edge_threadgroups_shrink():
    out = run(
        each("float(threads_per_threadgroup.x) + simd_sum(1.0f)"), shape=(70,), grid=(70, 1, 1)
    )
    np.testing.assert_array_equal(out, [64.0] * 64 + [12.0] * 6)


def test_three_dimensions():
    source = """
        uint3 p = thread_position_in_grid;
        uint3 g = threadgroup_position_in_grid * threads_per_threadgroup;
        uint3 t = g + thread_position_in_threadgroup;
        uint n = thread_index_in_simdgroup + 32 * simdgroup_index_in_threadgroup;
        bool same = t.x == p.x && t.y == p.y && t.z == p.z && n == thread_index_in_threadgroup;
        o[(p.z * 4 + p.y) * 8 + p.x] = same ? int(p.x + 10 * p.y + 100 * p.z) : -1;
    """
    out = run(source, shape=(6, 4, 8), dtype=mx.int32, grid=(8, 4, 6), group=(4, 2, 3))
    z, y, x = np.indices((6, 4, 8))
    np.testing.assert_array_equal(out, x + 10 * y + 100 * z)


def test_equal_names_in_two_blocks_are_two_variables():
    source = """
        uint l = thread_position_in_threadgroup.x;
        { threadgroup float t[32]; t[l] = 1.0f; o[l] = t[l]; }
        { threadgroup float t[32], u; if (l == 0) u = t[0]; }
    """
    with pytest.raises(BenchError, match="reads byte 0 of t before any write"):
        run(source, shape=(32,))


# ---- types ---------------------------------------------------------------------------------------

TYPES = [mx.bool_, mx.uint8, mx.uint16, mx.uint32, mx.int32, mx.float16, mx.bfloat16, mx.float32]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_goes_in_and_out(dtype):
    x = (mx.arange(64) % 3).astype(dtype)
    for value in (x, x[:3], x[1]):  # device, constant, and a reference
        expression = "a" if not value.ndim else f"a[i % {value.size}]"
        with metal_on_cpu():
            out = launch(each(expression), value, dtype=dtype)
        assert out.dtype == dtype
        assert mx.array_equal(out, value.reshape(-1)[mx.arange(64) % value.size])


def test_bfloat_and_half_round_as_in_mlx():
    bits = np.random.default_rng(2).integers(0, 2**32, 4096, dtype=np.uint32)
    edges = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 1, 0], np.uint32)
    x = mx.array(np.concatenate([bits, edges])).view(mx.float32)
    x = mx.where(mx.isnan(x), 1.0, x)
    for dtype in (mx.bfloat16, mx.float16):
        with metal_on_cpu():
            out = launch(each("T(a[i])"), x, shape=x.shape, dtype=dtype, template=[("T", dtype)])
        assert mx.array_equal(out.view(mx.uint16), x.astype(dtype).view(mx.uint16))


def test_half_arithmetic_rounds_after_every_operation():
    a, b, c = (np.random.default_rng(i).normal(size=64).astype(np.float16) for i in range(3))
    out = run(each("a[i] * b[i] + c[i]"), *map(mx.array, (a, b, c)), dtype=mx.float16)
    np.testing.assert_array_equal(out, a * b + c)


def test_vectors():
    source = """
        uint i = thread_position_in_grid.x;
        auto p = (const device float4*)a;
        float4 v = metal::fma(p[i], float4(2.0f), float4(1.0f, 2.0f, float2(3.0f, 4.0f)));
        o[i] = metal::dot(v, float4(1.0f)) + float(as_type<uint>(v.x) >> 31);
    """
    x = np.arange(128, dtype=np.float32)
    np.testing.assert_array_equal(
        run(source, mx.array(x), shape=(32,)), x.reshape(32, 4).sum(1) * 2 + 10
    )


def test_strides_of_an_array_that_is_not_made_contiguous():
    x = mx.arange(64, dtype=mx.float32).reshape(8, 8)
    source = """
        uint i = thread_position_in_grid.x;
        o[i] = a[(i / 8) * a_strides[0] + (i % 8) * a_strides[1]] + float(a_shape[0] * a_ndim);
    """
    for flag in (True, False):
        out = run(source, x.T, made={"ensure_row_contiguous": flag})
        np.testing.assert_array_equal(out, np.array(x).T.ravel() + 16)


def test_init_value_counts_as_written():
    source = "uint i = thread_position_in_grid.x; if (i & 1) o[i] = 7.0f;"
    np.testing.assert_array_equal(run(source, init_value=3.0), np.where(LANES & 1, 7, 3))


# ---- recording -----------------------------------------------------------------------------------


def test_record_returns_text_geometry_and_inputs():
    x, y = mx.arange(64, dtype=mx.float32), mx.array(2.0)
    kernel = build("o[thread_position_in_grid.x] = a[0] * b;", [x, y])
    options = {"threadgroup": (32, 1, 1), "output_shapes": [(64,)], "output_dtypes": [mx.float32]}

    def f(x, y):
        first = kernel(inputs=[x, y], grid=(64, 1, 1), **options)
        return first + kernel(inputs=[y, 3], grid=(64, 2, 1), **options)

    first, second = record(f, x, y)
    assert "o[thread_position_in_grid.x] = a[0] * b;" in first.source
    assert (first.grid, second.grid, first.threadgroup) == ((64, 1, 1), (64, 2, 1), (32, 1, 1))
    assert first.inputs[0].data == np.array(x).tobytes()
    assert second.inputs[1].data == I32(3).tobytes()


def test_record_says_why_it_cannot():
    with pytest.raises(BenchError, match="recorded no Metal kernel"):
        record(lambda x: x + 1, mx.ones(3))
    kernel = build("o[0] = a[0];", "a")

    def f(x):
        options = {"output_shapes": [(1,)], "output_dtypes": [mx.float32]}
        return kernel(inputs=[x + 1], grid=(1, 1, 1), threadgroup=(1, 1, 1), **options)

    with pytest.raises(BenchError, match="f computes an input"):
        record(f, mx.ones(9))


def test_the_patch_ends_with_its_block():
    before = mx.fast.metal_kernel, mx.metal.is_available
    with metal_on_cpu():
        assert mx.metal.is_available()
        kernel = build("o[0] = 1.0f;", [])
    assert before == (mx.fast.metal_kernel, mx.metal.is_available)
    with pytest.raises(BenchError, match="was made in a metal_on_cpu block"):
        kernel(inputs=[], grid=(1, 1, 1), threadgroup=(1, 1, 1))
    with (
        pytest.raises(BenchError, match="no mode 'slow'; there are rules, types, fast"),
        metal_on_cpu("slow"),
    ):
        pass


def test_compiled_functions_run_uncompiled():
    @mx.compile
    def f(x):
        return launch(each("a[i] + 1.0f"), x * 2) * 3

    with metal_on_cpu():
        out = f(mx.ones(64))
    assert mx.array_equal(out, mx.full(64, 9.0))


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fast", "checked"])
def test_errors_name_line_lane_and_array(mode):
    source = "\n\n  uint i = thread_position_in_grid.x;\n  float v = a[i * 4000];\n  o[i] = v;\n"
    with pytest.raises(BenchError) as caught:
        run(source, mx.ones(64), mode=mode)
    text = str(caught.value)
    assert "past the end of a (256 bytes)" in text
    assert "lane (1, 0, 0) of threadgroup (0, 0, 0)" in text
    assert "float v = a[i * 4000];" in text


def test_divergence_names_the_lanes_of_each_place():
    source = "if (thread_index_in_simdgroup < 7) { o[0] = simd_sum(1.0f); }"
    with pytest.raises(BenchError, match=r"lanes 0-6 in simd_sum at line .*, lanes 7-31 finished"):
        run(source, shape=(1,), grid=(32, 1, 1))


def test_a_kernel_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(launching, "TIMEOUT", 1)
    with pytest.raises(BenchError, match=r"timeout: .* still running after 1 s"):
        run("while (true) o[0] = 1.0f;", shape=(1,), grid=(1, 1, 1), group=1)


def test_an_endless_loop_that_the_compiler_removes_is_seen():
    with pytest.raises(BenchError, match=r"^undefined"):
        run("for (int k = 1; k; k |= 1) {}\no[0] = 1.0f;", shape=(1,), grid=(1, 1, 1), group=1)


def test_endless_recursion_is_stopped_and_the_bench_goes_on():
    header = "inline float deep(float v) { volatile float w = v; return deep(v + 1.0f) + w; }\n"
    with pytest.raises(BenchError, match="the lane's stack is full"):
        run(each("deep(1.0f)"), made={"header": header}, mode="fast")
    np.testing.assert_array_equal(run(each("1.0f"), mode="fast"), np.ones(64))


def test_without_clang_users_skip_and_ci_fails(monkeypatch):
    monkeypatch.setattr(toolchain, "missing", lambda: "no clang")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no clang"):
        require_bench()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must run the Metal bench: no clang"):
        require_bench()
