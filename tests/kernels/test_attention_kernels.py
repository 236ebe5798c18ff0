"""The attention kernels on the Metal bench: results, and detection of planted mistakes."""

from dataclasses import replace
from math import tau

import mlx.core as mx
import pytest
from gpu_cases import BenchCase, case_of, caught, check, verify
from metal_cpu import metal_on_cpu, require_bench

from flashmoe_mlx.custom_kernels.attention import step
from flashmoe_mlx.custom_kernels.attention.step import (
    AttentionHeads,
    AttentionStepCase,
    attend,
    integer,
    prepare,
    turns,
)
from flashmoe_mlx.custom_kernels.case import DTYPES

require_bench()

CASE = AttentionStepCase(6, 2, 64, 16, "bfloat16", batch=2, keys=301, position=70_000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype):
    check(case_of(replace(CASE, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 2, 17, 256, 257])
def test_few_keys_and_a_full_cache(dtype, keys):
    check(case_of(replace(CASE, dtype=dtype, keys=keys)), ("fast",))


@pytest.mark.parametrize("dim, rope_dims", [
    (32, 8), (64, 64), (128, 32), (128, 24), (256, 64), (256, 2),
])  # fmt: skip
@pytest.mark.parametrize("heads, kv_heads", [(16, 2), (3, 3)])
def test_attention_at_other_sizes(heads, kv_heads, dim, rope_dims):
    case = AttentionStepCase(heads, kv_heads, dim, rope_dims, "float32", keys=77)
    check(case_of(case), ("fast", "checked"))


@pytest.mark.parametrize("position", [0, 1, 4095, 131_072, 262_143])
def test_positions(position):
    """Compare with the reference only: stock's angles are off by up to 0.01."""
    case = AttentionStepCase(2, 1, 256, 64, "float32", keys=9, position=position)
    inputs = case.inputs()
    check(BenchCase(lambda: case.custom(*inputs), case.reference(*inputs)), ("fast",))


@pytest.mark.parametrize("base", [1e4, 1e7])
def test_turns_are_exact(base):
    position = 262_143
    found = [int(n) * position % 2**64 / 2**64 for n in turns(64, base).tolist()]
    right = [position * base ** (-2 * i / 64) / tau % 1 for i in range(32)]
    assert found == pytest.approx(right, abs=1e-10)


@pytest.mark.parametrize("lanes, flight", [(64, 1), (96, 3), (128, 8), (512, 2), (992, 4)])
def test_other_geometries(lanes, flight):
    projected, q_norm, k_norm, keys, values, offset, length = inputs = CASE.inputs()
    heads, norms = AttentionHeads(6, 2, 64, 16), (q_norm, k_norm)
    with metal_on_cpu("checked"):
        queries, new = prepare(projected, heads, norms, 1e-6, 1e7, offset)
        y = attend(queries, projected, heads, keys, values, length, lanes=lanes, flight=flight)
    verify([y, new], CASE.reference(*inputs), CASE.stock(*inputs))


def test_a_cache_of_another_dtype():
    """After a change of the model's dtype."""
    projected, q_norm, k_norm, keys, values, *scalars = CASE.inputs()
    inputs = [projected, q_norm, k_norm, keys.astype(mx.float32), values.astype(mx.float16)]
    inputs += scalars
    check(BenchCase(lambda: CASE.custom(*inputs), CASE.reference(*inputs)), ("fast", "types"))


def test_scores_that_exp_cannot_take():
    case = replace(CASE, dtype="float32", position=3)
    projected, q_norm, *others = case.inputs()
    inputs = [projected, 100 * q_norm, *others]
    with metal_on_cpu("fast"):
        y, _ = case.custom(*inputs)
    right = case.reference(*inputs)[0]
    assert mx.abs(y - right).max() <= 1e-3 * mx.abs(right).max()


def test_nan_propagates():
    projected, q_norm, k_norm, keys, *others = CASE.inputs()
    keys[1, 1, 299, 5] = mx.nan
    with metal_on_cpu("fast"):
        y, _ = CASE.custom(projected, q_norm, k_norm, keys, *others)
    broken = mx.isnan(y).reshape(2, 6, 64)
    assert broken[1, 3:].all() and not broken[0].any() and not broken[1, :3].any()


@pytest.mark.parametrize("heads, supported", [
    (AttentionHeads(16, 2, 256, 64), True),
    (AttentionHeads(4, 2, 32, 8), True),
    (AttentionHeads(16, 3, 256, 64), False),
    (AttentionHeads(16, 2, 96, 64), False),
    (AttentionHeads(16, 2, 512, 64), False),
    (AttentionHeads(16, 2, 256, 63), False),
    (AttentionHeads(16, 2, 256, 0), False),
    (AttentionHeads(16, 2, 32, 64), False),
])  # fmt: skip
def test_sizes_that_are_supported(heads, supported):
    assert heads.supported() == supported


def test_a_step_makes_each_integer_once():
    assert integer(7) is integer(7)
    assert (integer(7).tolist(), integer(7).dtype) == ([7] * 4, mx.int32)


# ---- mistakes ------------------------------------------------------------------------------------

BARRIER = "barrier(mem_flags::mem_threadgroup);\n"


@pytest.mark.parametrize("old, new", [
    ("simdgroup_" + BARRIER, ""),
    ("2 * head : HQ + head", "head : HQ + head"),
    ("2 * head : HQ + head", "2 * head : head"),
    ("b * ((2 * HQ + 2 * HK) * D)", "b * ((2 * HQ + HK) * D)"),
    ("is_query ? static_cast<float>(q_norm", "!is_query ? static_cast<float>(q_norm"),
    ("simd_sum(square)", "square"),
    ("/ float(D)", ""),
    ("+ static_cast<float>(eps[0])", ""),
    ("* factor * gains[j]", "* factor"),
    ("if (i < DIMS) {", "if (i <= DIMS) {"),
    ("if (i < DIMS) {", "if (i < HALF) {"),
    ("turns[i % HALF]", "turns[i / 2]"),
    ("turn >> 32", "turn >> 33"),
    ("-normed[i + HALF]", "normed[i + HALF]"),
    ("-normed[i + HALF]", "-normed[i + 1]"),
    ("static_cast<size_t>(offset[0])", "static_cast<size_t>(offset[0] + 1)"),
    ("x * metal::cos(angle) + other * metal::sin", "x * metal::sin(angle) + other * metal::cos"),
    ("x * metal::rsqrt(float(D))", "x"),
    ("(b * HK + head - HQ)", "(head - HQ)"),
    ("(b * HQ + head)", "head"),
])  # fmt: skip
def test_a_mistake_in_prepare_is_caught(monkeypatch, old, new):
    monkeypatch.setattr(step, "EPS", 0.5)
    assert caught(case_of(CASE), monkeypatch, "attention/prepare.metal", old, new)


@pytest.mark.parametrize("old, new", [
    ("threadgroup_" + BARRIER, ""),
    ("threadgroup_" + BARRIER, "simdgroup_" + BARRIER),
    ("head / (HQ / HK)", "head % HK"),
    ("keys_shape[2]", "length[0]"),
    ("2 * head + 1", "2 * head"),
    ("8 * part + team;", "8 * part;"),
    ("start - team < count", "start < count"),
    ("start += FLIGHT * TEAMS", "start += TEAMS"),
    ("uint start = team;", "uint start = 0;"),
    ("count - 1)", "count)"),
    ("count - 1)", "count - 2)"),
    ("scores[f], LEAST)", "scores[f], scores[f])"),
    ("sum_over<FLIGHT, PARTS>(scores);\n", ""),
    ("total *= factor;\n", ""),
    ("scale_by<8>(factor, sum);\n", ""),
    ("top = higher;\n", ""),
    ("if (part == 0) {", "{"),
    ("uint t = 0; t < TEAMS", "uint t = 0; t + 1 < TEAMS"),
    ("weight, totals[t], all", "1.0f, totals[t], all"),
    ("team * LANES + t * PARTS", "team * LANES + t"),
    ("out / all *", "out *"),
    ("* sigmoid(gate)", ""),
    ("if (lane < D) {\nfloat highest", "{\nfloat highest"),
])  # fmt: skip
def test_a_mistake_in_attention_is_caught(monkeypatch, old, new):
    assert caught(case_of(CASE), monkeypatch, "attention/step.metal", old, new)
