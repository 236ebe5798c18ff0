"""The matrix, expert and router kernels on the Metal bench, and detection of planted mistakes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from kernel_helpers import complains, plant
from metal_cpu import MODES, metal_on_cpu, require_bench

from flashmoe_mlx.cli import full_check
from flashmoe_mlx.custom_kernels import autotune, launch, reference
from flashmoe_mlx.custom_kernels.case import DTYPES, random_quantized
from flashmoe_mlx.custom_kernels.experts import decode as experts
from flashmoe_mlx.custom_kernels.experts.cases import (
    ExpertDownCase,
    ExpertGateUpCase,
    ExpertOutputsCase,
    ExpertsCase,
)
from flashmoe_mlx.custom_kernels.experts.router import RouterCase, route
from flashmoe_mlx.custom_kernels.linear import matvec
from flashmoe_mlx.custom_kernels.linear.cases import MatvecCase, NormedMatvecCase
from flashmoe_mlx.custom_kernels.linear.dequantize import DequantizeCase, MatmulCase
from flashmoe_mlx.custom_kernels.linear.matvec import dequant_matvec, naive_matvec
from flashmoe_mlx.custom_kernels.weights import QuantizedMatrix

require_bench()

ULPS = 16 * 2**-23  # of the largest output: sums of float32 in another order
EPS = 0.5  # of norms; large enough to matter
FAST = ("fast", "checked")
dtype_cases = pytest.mark.parametrize("dtype", DTYPES)
bits_cases = pytest.mark.parametrize("bits", matvec.BITS)
group_cases = pytest.mark.parametrize("group_size", matvec.GROUP_SIZES)
both = pytest.mark.parametrize("geometry", ["apple", "nvidia"], indirect=True)
nvidia = pytest.mark.parametrize("geometry", ["nvidia"], indirect=True)


@pytest.fixture(autouse=True)
def fresh_kernels():
    """Build kernels inside each bench block, and keep none."""
    launch._build.cache_clear()
    yield
    launch._build.cache_clear()


def launch_as(name: str, monkeypatch) -> None:
    """Launch with this vendor's geometry and the CUDA prelude's form of codes."""
    for module in (matvec, experts):
        monkeypatch.setattr(module, "is_cuda", lambda: name == "nvidia")
    if name == "nvidia":
        read = launch.read_text
        codes = read("cuda_prelude.cuh").partition("#define CODE_VALUE")
        texts = {"affine.metal": "".join(codes[1:]) + "\n" + read("affine.metal")}
        monkeypatch.setattr(launch, "read_text", lambda file: texts.get(file) or read(file))


@pytest.fixture
def geometry(request, monkeypatch):
    """Launch with this vendor's geometry."""
    launch_as(request.param, monkeypatch)
    return request.param


@dataclass
class BenchCase:
    """A kernel call, the expected outputs, and stock MLX's outputs."""

    custom: Callable[[], list[mx.array]]
    expected: list[mx.array]
    stocks: list[mx.array] | None = None


def case_of(case) -> BenchCase:
    inputs = case.inputs()
    return BenchCase(lambda: case.custom(*inputs), case.reference(*inputs), case.stock(*inputs))


def verify(outputs, expected, stocks=None) -> None:
    """Allow one rounding to the output's dtype beside the sums, and no more than twice stock's."""
    for index, (output, exact) in enumerate(zip(outputs, expected, strict=True)):
        assert output.shape == exact.shape
        found, right = (np.array(x.astype(mx.float32), np.float64) for x in (output, exact))
        size = np.abs(right)
        rounding = mx.finfo(output.dtype).eps / 2
        # Not `error > limit`, which is False for NaN.
        assert (np.abs(found - right) <= rounding * size + ULPS * size.max()).all()
        if stocks is not None:
            assert autotune._error(output, exact) <= autotune._limit(stocks[index], exact)


def check(bench_case: BenchCase, modes=tuple(MODES)) -> None:
    """Run a kernel in the bench's modes; raise AssertionError if a result is off."""
    for mode in modes:
        with metal_on_cpu(mode) as session:
            outputs = bench_case.custom()
        assert session.launches, mode
        verify(outputs, bench_case.expected, bench_case.stocks)


def caught(bench_case: BenchCase, monkeypatch, file, old, new) -> bool:
    """Return whether an edit of a kernel's text fails the bench or the comparison."""
    plant(monkeypatch, file, old, new)
    return complains(lambda: check(bench_case, FAST))


def random(*shape, dtype="float32") -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(DTYPES[dtype])


def matrix(*shape, bits=4, group_size=32, dtype="bfloat16", seed=0) -> QuantizedMatrix:
    key = mx.random.key(sum(shape) + seed)
    arrays = random_quantized(key, shape, bits, group_size, DTYPES[dtype])
    return QuantizedMatrix(*arrays, bits, group_size)


def dense(b: QuantizedMatrix) -> mx.array:
    return reference.dequantize(b.codes, b.scales, b.biases, b.bits)


def normalized(x: mx.array, gain: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    return x * mx.rsqrt((x * x).mean(-1, keepdims=True) + EPS) * gain.astype(mx.float32)


def scales_of(dtype: str, group_size: int) -> str:
    """Float32 activations go with any scales, others with their own."""
    return list(DTYPES)[matvec.GROUP_SIZES.index(group_size)] if dtype == "float32" else dtype


def modes_for(dtype: str, bits: int, group_size: int) -> tuple[str, ...]:
    """Return "fast", and "checked" in a third of the formats: any two of the three meet there."""
    places = list(DTYPES).index(dtype), (2, 4, 8).index(bits), (32, 64, 128).index(group_size)
    return FAST if sum(places) % 3 == 0 else FAST[:1]


# ---- every format --------------------------------------------------------------------------------


@both
@dtype_cases
@bits_cases
@group_cases
def test_matvecs(geometry, dtype, bits, group_size):
    modes = modes_for(dtype, bits, group_size)
    case = MatvecCase(37, 384, bits, group_size, dtype, scales_of(dtype, group_size), tokens=3)
    bench_case = case_of(case)
    check(bench_case, modes)
    inputs = case.inputs()
    check(BenchCase(lambda: case.naive(*inputs), bench_case.expected, bench_case.stocks), modes)


@both
@dtype_cases
@bits_cases
@group_cases
def test_experts(geometry, dtype, bits, group_size):
    modes = modes_for(dtype, bits, group_size)
    others = 3, 2, bits, group_size, dtype, scales_of(dtype, group_size)
    check(case_of(ExpertGateUpCase(384, 19, *others, shared_bits=bits, tokens=3)), modes)
    check(case_of(ExpertDownCase(19, 384, *others, shared_bits=bits, tokens=3)), modes)


@both
def test_whole_mixture(geometry):
    """In half precision the two halves round in between, so compare with stock's error."""
    others = 96, 64, 5, 3, 2, 32
    for kind in (ExpertsCase, ExpertOutputsCase):
        case = kind(*others, "float32", "float16", down_bits=4, shared_bits=8, tokens=2)
        check(case_of(case), FAST)
        for dtype in ("float16", "bfloat16"):
            with metal_on_cpu("fast"):
                case = kind(*others, dtype, dtype, down_bits=4, shared_bits=8)
                verdict = autotune.check(case)
            assert verdict.ok, verdict


@dtype_cases
@pytest.mark.parametrize("experts, top_k", [(16, 4), (33, 10), (100, 4), (33, 32), (512, 10)])
def test_router(dtype, experts, top_k):
    check(case_of(RouterCase(experts, top_k, dtype, tokens=3)), ("fast",))


# ---- every branch --------------------------------------------------------------------------------


def matvec_case(columns=384, norm=True, residual=True, bits=4, dtype="bfloat16") -> BenchCase:
    weight = matrix(37, columns, bits=bits, group_size=64, dtype=dtype)
    x, gain, past = (random(*s, dtype=dtype) for s in ((3, columns), (columns,), (3, 37)))
    exact = (normalized(x, gain) if norm else x.astype(mx.float32)) @ dense(weight).T
    options = {
        "norm": (gain, mx.array([EPS])) if norm else None,
        "residual": past if residual else None,
    }
    arrays = x, weight.codes, weight.scales, weight.biases, bits
    return BenchCase(
        lambda: [dequant_matvec(*arrays, **options)],
        [exact + past.astype(mx.float32) if residual else exact],
    )


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@both
def test_matvec_with_norm_and_residual(geometry, norm, residual):
    columns, split = (384, 1) if geometry == "apple" else (2176, 4)
    assert matvec.geometry(columns, 4, cuda=geometry == "nvidia")["SPLIT"] == split
    check(matvec_case(columns, norm, residual))


@both
@dtype_cases
def test_norm_in_every_dtype(geometry, dtype):
    check(matvec_case(dtype=dtype), ("fast",))


@pytest.mark.parametrize("columns, bits, split", [
    (384, 4, 1), (1024, 4, 2), (1536, 4, 3), (4096, 2, 4),
])  # fmt: skip
@nvidia
def test_other_splits_of_columns(geometry, columns, bits, split):
    assert matvec.geometry(columns, bits, cuda=True)["SPLIT"] == split
    check(matvec_case(columns, bits=bits), FAST)


@both
def test_naive_matvec_with_columns_split(geometry):
    case = MatvecCase(11, 2176, 4, 64, "bfloat16", "bfloat16")
    x, *weight = inputs = case.inputs()
    check(BenchCase(lambda: [naive_matvec(x, *weight, 4)], case.reference(*inputs)))


@both
def test_one_row_and_more_axes_and_float32_from_bfloat16(geometry):
    weight, x = matrix(1, 128, group_size=128), random(2, 1, 3, 128, dtype="bfloat16")
    exact = x.astype(mx.float32) @ dense(weight).T
    arrays = x, weight.codes, weight.scales, weight.biases, 4
    bench_case = BenchCase(lambda: [dequant_matvec(*arrays, dtype=mx.float32)], [exact])
    check(bench_case, FAST)
    with metal_on_cpu("fast"):
        assert bench_case.custom()[0].dtype == mx.float32


def swiglu(x: mx.array, gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(x @ gate.swapaxes(-1, -2)) * (x @ up.swapaxes(-1, -2))


def chosen(tokens: int, slots: int, top_k: int) -> mx.array:
    rng = np.random.default_rng(tokens)
    return mx.array(np.stack([rng.permutation(slots)[:top_k] for _ in range(tokens)]).astype("u4"))


def gate_up_case(norm=True, shared=True, top_k=3, bits=8, hidden=384) -> BenchCase:
    """With a shared expert of another width, group size and height."""
    inner, tokens, slots = 13, 2, top_k + 2
    gate, up = (matrix(slots, inner, hidden, bits=bits, seed=s) for s in (1, 2))
    others = tuple(matrix(27, hidden, bits=4, group_size=64, seed=s) for s in (3, 4))
    x, gain = random(tokens, hidden, dtype="bfloat16"), random(hidden, dtype="bfloat16")
    where = chosen(tokens, slots, top_k)
    rows = normalized(x, gain) if norm else x.astype(mx.float32)
    exact = swiglu(rows[:, None, None, :], dense(gate)[where], dense(up)[where]).flatten(1)
    if shared:
        exact = mx.concatenate([exact, swiglu(rows, *map(dense, others))], axis=1)
    options = others if shared else None, (gain, mx.array([EPS])) if norm else None
    return BenchCase(lambda: [experts.expert_gate_up(x, where, gate, up, *options)], [exact])


def down_case(residual=True, shared=True, top_k=3, bits=8) -> BenchCase:
    """Columns that two simdgroups share, and more of them."""
    height, inner, extra, tokens, slots = 21, 704, 1088 if shared else 0, 2, top_k + 2
    down = matrix(slots, height, inner, bits=bits)
    other = matrix(height, 1088, bits=4, group_size=64)
    where, hidden = chosen(tokens, slots, top_k), random(tokens, top_k * inner + extra)
    weights = mx.softmax(random(tokens, top_k))
    strength = mx.sigmoid(random(tokens, 1))
    past = random(tokens, height, dtype="bfloat16")
    routed = hidden[:, : top_k * inner].reshape(tokens, top_k, inner)
    exact = ((dense(down)[where] @ routed[..., None])[..., 0] * weights[..., None]).sum(1)
    if shared:
        exact = exact + strength * (hidden[:, top_k * inner :] @ dense(other).T)
    if residual:
        exact = exact + past.astype(mx.float32)
    options = (other, strength) if shared else None, past if residual else None, mx.bfloat16
    return BenchCase(
        lambda: [experts.expert_down_combine(hidden, where, weights, down, *options)], [exact]
    )


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@both
def test_gate_up_with_norm_and_shared_expert(geometry, norm, shared):
    check(gate_up_case(norm, shared))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@both
def test_down_with_residual_and_shared_expert(geometry, residual, shared):
    check(down_case(residual, shared))


@both
def test_more_experts_than_simdgroups(geometry):
    check(down_case(top_k=20), FAST)
    check(down_case(top_k=1, shared=False), FAST)


def router_case(renormalize=True, shared=True, experts=70, top_k=32) -> BenchCase:
    """Check the order of ids too: most logits tie, and the lower id comes first."""
    logits = mx.round(2 * random(3, experts + shared)) / 2
    logits[0, experts - 1] = 5
    scores = np.array(mx.softmax(logits[:, :experts], axis=-1))
    ids = np.argsort(-np.array(logits[:, :experts]), axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, -1)
    weights /= weights.sum(-1, keepdims=True) if renormalize else 1
    gate = mx.sigmoid(logits[:, experts:]) if shared else mx.full((3, 1), 0.5)

    def custom():
        ids, *others = route(logits, top_k, renormalize=renormalize, shared=shared)
        return [ids.astype(mx.float32), *others]

    return BenchCase(custom, [mx.array(ids.astype(np.float32)), mx.array(weights), gate])


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_router_with_ties(renormalize, shared):
    check(router_case(renormalize, shared))


@pytest.mark.parametrize("logit", [-1e30, -200, 0, 200, 1e30])
def test_router_of_large_equal_logits(logit):
    with metal_on_cpu("fast"):
        ids, weights, _ = route(mx.full((1, 40), logit), 4, renormalize=True, shared=False)
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert weights.tolist() == [[0.25] * 4]


def test_router_of_nan_stays_in_range():
    """Ids index the experts' slots, so they stay in range even with NaN logits."""
    with metal_on_cpu("fast"):
        ids, weights, _ = route(mx.full((2, 40), mx.nan), 4, renormalize=True, shared=False)
    assert ids.max().item() < 40
    assert mx.isnan(weights).all()


# ---- mistakes ------------------------------------------------------------------------------------

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SCALED = """totals[r] = metal::fma(static_cast<float>(scales[group]) * SCALE, dot,
metal::fma(static_cast<float>(biases[group]), sum, totals[r]));"""
SWAPPED = SCALED.replace("scales", "s").replace("biases", "scales").replace("(s[", "(biases[")
SQUARE = "square = metal::fma(xs[i + j], xs[i + j], square);\n"
GAIN = "xs[i + j] *= gains[j];\n"


@pytest.mark.parametrize("old, new", [
    (SCALED, SWAPPED),
    ("metal::min(first + r, rows - 1)", "metal::min(first + r + 1, rows - 1)"),
    ("metal::min(first + r, rows - 1)", "metal::min(first + r, rows)"),
    ("column / GROUP;", "(column + GROUP / 2) / GROUP % (COLUMNS / GROUP);"),
    ("LIFT / static_cast<float>(1u << place<BITS>(i % PER_WORD))", "LIFT"),
    ("sum += xs[i];\n", ""),
    (SQUARE + GAIN, GAIN + SQUARE),
    (GAIN, ""),
    ("dot_word<BITS>(words.y, xs + PER_WORD, dot);\n}", "dot_word<BITS>(words.x, xs, dot);\n}"),
    ("bits & (MASK << place<BITS>(j))", "(bits >> BITS) & (MASK << place<BITS>(j))"),
])  # fmt: skip
@both
def test_a_mistake_in_the_dot_products_is_caught(monkeypatch, geometry, old, new):
    assert caught(matvec_case(), monkeypatch, "affine.metal", old, new)


@pytest.mark.parametrize("old, new", [
    ("BITS * i - (32 - PLACES) : BITS * i", "BITS * i : BITS * i"),
    ("word >> (32 - PLACES)", "word"),
    ("LIFT = 0x1p64f", "LIFT = 0x1p63f"),
])  # fmt: skip
@nvidia
def test_a_mistake_in_taking_codes_for_floats_is_caught(monkeypatch, geometry, old, new):
    assert caught(matvec_case(), monkeypatch, "affine.metal", old, new)


@pytest.mark.parametrize("name, old, new", [
    ("nvidia", BARRIER + "\n} else", "} else"),
    ("apple", "simdgroup_barrier(mem_flags::mem_threadgroup);", ""),
    ("nvidia", "simdgroup % SPLIT * 32 + lane", "lane"),
    ("nvidia", "simdgroup % SPLIT * 32 + lane", "simdgroup * 32 + lane + 32"),
    ("nvidia", "column += 32 * SPLIT * CHUNK", "column += 32 * CHUNK"),
    ("apple", "column += 32 * SPLIT * CHUNK", "column += 64 * SPLIT * CHUNK"),
    ("nvidia", "s < simdgroup + SPLIT", "s < simdgroup + SPLIT - 1"),
    ("nvidia", "simdgroup % SPLIT == 0 && ", ""),
    ("apple", "* UNITS + simdgroup / SPLIT", "* UNITS"),
    ("apple", "row < ROWS) {", "row <= ROWS) {"),
    ("apple", "row < ROWS) {", "row + 1 < ROWS) {"),
    ("apple", "lane < TILE && ", ""),
    ("apple", "x + n * COLUMNS", "x"),
    ("apple", "n * ROWS + row", "row"),
    ("apple", "residual[place]", "residual[row]"),
    ("apple", "+ static_cast<float>(eps[0])", ""),
    ("nvidia", "squares += parts", "squares = parts"),
    ("apple", "squares / float(COLUMNS)", "squares"),
    ("apple", "s * (TILE + 1) + lane", "s * TILE + lane"),
])  # fmt: skip
def test_a_mistake_in_dequant_matvec_is_caught(monkeypatch, name, old, new):
    launch_as(name, monkeypatch)
    assert caught(matvec_case(2176), monkeypatch, "linear/dequant_matvec.metal", old, new)


@pytest.mark.parametrize("name, old, new", [
    ("nvidia", BARRIER, ""),
    ("apple", "static_cast<float>(code) * scale + bias", "static_cast<float>(code) * bias + scale"),
    ("apple", "metal::min(unit * TILE + r, uint(ROWS - 1))", "unit * TILE + r"),
    ("apple", "x[n * COLUMNS + column + i]", "x[column + i]"),
    ("apple", "words[i / (32 / BITS)]", "words[0]"),
    ("nvidia", "column += 32 * SPLIT * CHUNK", "column += 32 * CHUNK"),
])  # fmt: skip
def test_a_mistake_in_naive_matvec_is_caught(monkeypatch, name, old, new):
    launch_as(name, monkeypatch)
    case = MatvecCase(11, 2176, 4, 64, "bfloat16", "bfloat16", tokens=2)
    inputs = case.inputs()
    bench_case = BenchCase(lambda: case.naive(*inputs), case.reference(*inputs))
    assert caught(bench_case, monkeypatch, "linear/naive_matvec.metal", old, new)


@pytest.mark.parametrize("old, new", [
    ("slots[n * K + k]", "slots[k]"),
    ("slots[n * K + k]", "k"),
    ("slots[n * K + k]", "(slots[n * K + k] + 1)"),
    ("unit >= K * PER_EXPERT", "unit > K * PER_EXPERT"),
    ("(unit - k * PER_EXPERT) * TILE", "unit * TILE"),
    ("rows = is_shared ? SHARED : I", "rows = I"),
    ("x + n * H", "x"),
    ("column += 32 * SPLIT * CHUNK", "column += 64 * SPLIT * CHUNK"),
    ("begin * CHUNK", "begin * CHUNK + CHUNK"),
    ("shared_up_codes,", "shared_gate_codes,"),
    ("up_codes + top", "gate_codes + top"),
    ("gate_biases + top", "gate_scales + top"),
    ("up *= factor;", ""),
    ("gate *= factor;", ""),
    ("squares / float(H)", "squares"),
    ("+ static_cast<float>(eps[0])", ""),
    ("metal::exp(-gate)", "metal::exp(gate)"),
    ("first + lane < rows", "first + lane <= rows"),
    ("lane < TILE && first", "first"),
    ("PARTS + TILE + r] = up", "PARTS + r] = up"),
    ("PARTS + TILE + lane", "PARTS + lane"),
    ("simdgroup_barrier(mem_flags::mem_threadgroup);", ""),
    ("n * (K * I + SHARED)", "n * K * I"),
])  # fmt: skip
@pytest.mark.parametrize("geometry", ["apple"], indirect=True)
def test_a_mistake_in_gate_up_is_caught(monkeypatch, geometry, old, new):
    assert caught(gate_up_case(), monkeypatch, "experts/gate_up.metal", old, new)


@pytest.mark.parametrize("old, new", [
    (BARRIER + "\n} else", "} else"),
    ("simdgroup % SPLIT * 32 + lane", "lane"),
    ("column += 32 * SPLIT * CHUNK", "column += 32 * CHUNK"),
    ("column += 32 * SPLIT * SHARED_CHUNK", "column += 32 * SHARED_CHUNK"),
    ("UNITS + simdgroup / SPLIT", "UNITS + simdgroup"),
    ("s < simdgroup + SPLIT", "s < simdgroup + SPLIT - 1"),
    ("gate += parts", "gate = parts"),
    ("squares += parts", "squares = parts"),
])  # fmt: skip
@nvidia
def test_a_mistake_in_sharing_gate_up_out_is_caught(monkeypatch, geometry, old, new):
    assert caught(gate_up_case(hidden=2176), monkeypatch, "experts/gate_up.metal", old, new)


@pytest.mark.parametrize("old, new", [
    (BARRIER, ""),
    (BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);"),
    ("weights[n * K + k]", "weights[k]"),
    ("weights[n * K + k]", "weights[n * K]"),
    ("slots[n * K + k]", "slots[k]"),
    ("slots[n * K + k]", "k"),
    ("shared_weight[n]", "shared_weight[0]"),
    ("term < TERMS", "term < K * SPLIT"),
    ("term += SIMDGROUPS", "term += TERMS"),
    ("+ k * I", "+ k * SHARED"),
    ("s < SIMDGROUPS", "s < SIMDGROUPS - 1"),
    ("column += 32 * SPLIT * CHUNK", "column += 64 * SPLIT * CHUNK"),
    ("column += 32 * SPLIT * SHARED_CHUNK", "column += 64 * SPLIT * SHARED_CHUNK"),
    ("k = term / SPLIT", "k = term"),
    ("term % SPLIT * 32 + lane", "lane"),
    ("biases + top", "scales + top"),
    ("RESIDUAL ?", "!RESIDUAL ?"),
    ("residual[place]", "residual[row]"),
    ("first = threadgroup_position_in_grid.x * TILE", "first = threadgroup_position_in_grid.x * 8"),
    ("&& row < H", ""),
    ("* (K * I + SHARED)", "* (K * I)"),
])  # fmt: skip
@both
def test_a_mistake_in_down_combine_is_caught(monkeypatch, geometry, old, new):
    assert caught(down_case(top_k=16), monkeypatch, "experts/down_combine.metal", old, new)


@pytest.mark.parametrize("old, new", [
    ("id == lane + 32 * i ? TAKEN", "false ? TAKEN"),
    ("id == lane + 32 * i ? TAKEN", "id == lane ? TAKEN"),
    ("id < EXPERTS ?", "true ?"),
    ("id < EXPERTS ?", "id + 1 < EXPERTS ?"),
    ("int i = PER_LANE - 1; i >= 0; i--", "int i = 0; i < PER_LANE; i++"),
    ("simd_min(id)", "simd_max(id)"),
    ("best = simd_max(best);", ""),
    ("my_share / total", "my_share"),
    ("RENORMALISE ? 0.0f : simd_sum(total)", "simd_sum(total)"),
    ("n * (EXPERTS + (SHARED ? 1 : 0))", "n * EXPERTS"),
    ("here[EXPERTS]", "here[EXPERTS - 1]"),
    ("metal::exp(-gate)", "metal::exp(gate)"),
    ("lane < K", "lane + 1 < K"),
    ("int i = 1; i < PER_LANE", "int i = 1; i < PER_LANE - 1"),
])  # fmt: skip
def test_a_mistake_in_router_is_caught(monkeypatch, old, new):
    assert caught(router_case(), monkeypatch, "experts/router.metal", old, new)


@pytest.mark.parametrize("old, new", [
    ("RENORMALISE ? 0.0f : simd_sum(total)", "RENORMALISE ? 0.0f : total"),
    ("RENORMALISE ? share : 0.0f", "share"),
])  # fmt: skip
def test_a_mistake_in_router_without_renormalizing_is_caught(monkeypatch, old, new):
    assert caught(router_case(renormalize=False), monkeypatch, "experts/router.metal", old, new)


# ---- many rows -----------------------------------------------------------------------------------


@dtype_cases
@bits_cases
@group_cases
def test_dequantize(dtype, bits, group_size):
    scales = scales_of(dtype, group_size)
    case = DequantizeCase(7, 384, bits, group_size, dtype, scales)
    check(case_of(case), modes_for(dtype, bits, group_size))


def test_dequantize_in_every_mode():
    check(case_of(DequantizeCase(11, 768, 4, 64, "bfloat16", "bfloat16")))


@pytest.mark.parametrize("file, old, new", [
    ("linear/dequantize.metal", "eight < EIGHTS", "eight <= EIGHTS"),
    ("linear/dequantize.metal", "code), scale, bias", "code), bias, scale"),
    ("linear/dequantize.metal", "% 32) & ((1u << BITS) - 1u)", "% 32)"),
    ("linear/dequantize.metal", "float>(code), scale", "float>(word), scale"),
    ("linear/dequantize.metal", "scales[eight / (GROUP / 8)]", "scales[eight / GROUP]"),
    ("linear/dequantize.metal", "biases[eight / (GROUP / 8)]", "biases[eight / GROUP]"),
    ("linear/dequantize.metal", "weights + first", "weights + eight"),
    ("write.metal", "words.z = pair_of<T>(values + 4)", "words.z = pair_of<T>(values + 2)"),
    ("write.metal", "low | high << 16", "high | low << 16"),
])  # fmt: skip
def test_a_mistake_in_dequantize_is_caught(monkeypatch, file, old, new):
    case = DequantizeCase(11, 768, 4, 64, "bfloat16", "bfloat16")
    assert caught(case_of(case), monkeypatch, file, old, new)


@pytest.fixture
def always_ours(monkeypatch, tmp_path):
    """Dequantize by our kernel, whichever is faster on the bench."""
    monkeypatch.setenv("FLASHMOE_KERNELS", "custom")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    autotune.forget()
    yield
    autotune.forget()


@dtype_cases
@pytest.mark.usefixtures("always_ours")
def test_products_of_many_rows(dtype):
    case = MatmulCase(37, 384, 4, 64, dtype, scales_of(dtype, 64))
    with metal_on_cpu("fast") as session:
        verdict = autotune.check(case)
    assert verdict.ok and session.launches


@dtype_cases
@both
def test_matvec_of_a_normalized_input(geometry, dtype):
    case = NormedMatvecCase(37, 384, 4, 64, dtype, scales_of(dtype, 64), tokens=3)
    check(case_of(case), ("fast",))


# ---- flashmoe-doctor --full ----------------------------------------------------------------------


def first_of_each_op() -> dict:
    found: dict = {}
    for case in [*full_check.quantized(), *full_check.others()]:
        found.setdefault(case.op, case)
    return found


def test_the_full_check_has_every_op_in_every_format():
    formats = {(t.op, t.dtype, t.bits, t.group_size) for t in full_check.quantized()}
    ops = {op for op, *_ in formats}
    for op in ops:
        dtypes = 2 if op == "dequantized_matmul" else 3
        assert len([f for f in formats if f[0] == op]) == dtypes * 9
    assert {t.dtype for t in full_check.others()} == set(DTYPES)
    folder = Path(launch.__file__).parent
    kernels = {str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.metal")}
    helpers = {"affine", "gated_delta/common", "write", "linear/naive_matvec", "cuda/slots"}
    names = {  # ops named unlike their kernel; cuda/slots is in test_expert_slots
        "attention/prepare": "attention_step",
        "experts/combine": "expert_combine",
        "experts/down_combine": "expert_down_combine",
        "experts/gate_up": "expert_gate_up",
        "experts/router": "router",
        "experts/take_rows": "tiled_experts",
        "experts/tiles": "tiled_experts",
        "linear/dequant_matvec": "dequant_matvec",
        "linear/dequantize": "dequantize",
    }
    of = {names.get(kernel, kernel.replace("/", "_")) for kernel in kernels - helpers}
    assert of <= ops | {case.op for case in full_check.others()}


def test_the_full_check_judges(monkeypatch):
    with metal_on_cpu("fast"):
        for case in first_of_each_op().values():
            assert full_check.judge(case).ok, case
    plant(monkeypatch, "affine.metal", "(biases[group]), sum", "(scales[group]), sum")
    launch._build.cache_clear()
    with metal_on_cpu("fast"):
        assert not full_check.judge(first_of_each_op()["expert_gate_up"]).ok
