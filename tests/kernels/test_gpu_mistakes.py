"""The Metal bench and the comparisons find mistakes planted in the kernels."""

import pytest
from gpu_cases import (
    BenchCase,
    both,
    case_of,
    caught,
    down_case,
    gate_up_case,
    launch_as,
    matvec_case,
    nvidia,
    router_case,
)
from metal_cpu import require_bench

from flashmoe_mlx.custom_kernels.linear.cases import MatvecCase
from flashmoe_mlx.custom_kernels.linear.dequantize import DequantizeCase

require_bench()


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
    ("weights[n * WIDTH + k]", "weights[k]"),
    ("weights[n * WIDTH + k]", "weights[n * WIDTH]"),
    ("slots[n * K + k]", "slots[k]"),
    ("slots[n * K + k]", "k"),
    ("k < WIDTH; k += ", "k < K; k += "),
    ("k += SIMDGROUPS", "k += WIDTH"),
    ("+ k * I", "+ k * SHARED"),
    ("k < WIDTH; k++", "k < WIDTH - 1; k++"),
    ("column += 32 * CHUNK", "column += 64 * CHUNK"),
    ("column += 32 * SHARED_CHUNK", "column += 64 * SHARED_CHUNK"),
    ("column = lane * CHUNK", "column = lane"),
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
    ("metal::exp(-static_cast", "metal::exp(static_cast"),
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
