"""The matrix, expert and router kernels on the Metal bench: every format and every branch."""

import mlx.core as mx
import pytest
from gpu_cases import (
    FAST,
    BenchCase,
    bits_cases,
    both,
    case_of,
    check,
    dense,
    down_case,
    dtype_cases,
    gate_up_case,
    group_cases,
    matrix,
    matvec_case,
    modes_for,
    nvidia,
    random,
    router_case,
    scales_of,
)
from metal_cpu import metal_on_cpu, require_bench

from flashmoe_mlx.custom_kernels import autotune, reference
from flashmoe_mlx.custom_kernels.experts.cases import (
    ExpertDownCase,
    ExpertGateUpCase,
    ExpertOutputsCase,
    ExpertsCase,
    ExpertTermsCase,
)
from flashmoe_mlx.custom_kernels.experts.router import RouterCase, route
from flashmoe_mlx.custom_kernels.linear import matvec
from flashmoe_mlx.custom_kernels.linear.cases import MatvecCase, NormedMatvecCase
from flashmoe_mlx.custom_kernels.linear.dequantize import DequantizeCase, MatmulCase
from flashmoe_mlx.custom_kernels.linear.matvec import dequant_matvec, naive_matvec

require_bench()

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
    for kind in (ExpertsCase, ExpertTermsCase, ExpertOutputsCase):
        case = kind(*others, "float32", "float16", down_bits=4, shared_bits=8, tokens=2)
        check(case_of(case), FAST)
        for dtype in ("float16", "bfloat16"):
            with metal_on_cpu("fast"):
                case = kind(*others, dtype, dtype, down_bits=4, shared_bits=8)
                verdict = autotune.check(case)
            assert verdict.ok, verdict


@both
@dtype_cases
@pytest.mark.parametrize("inner, top_k", [(544, 2), (32, 16)])
def test_two_machines_compute_what_one_does(geometry, dtype, inner, top_k):
    case = ExpertsCase(32, inner, top_k + 1, top_k, 4, 32, dtype, dtype, tokens=2)
    inputs = case.inputs()
    with metal_on_cpu("fast"):
        whole, shared = case.custom(*inputs), ExpertTermsCase.custom(case, *inputs)
    assert mx.array_equal(*whole, *shared)


@both
def test_no_expert_is_zero(geometry):
    case = ExpertOutputsCase(96, 64, 5, 3, 4, 32, "float16", "float16", tokens=2)
    x, slots, *rest = case.inputs()
    with metal_on_cpu("checked"):
        (whole,) = case.custom(x, slots, *rest)
        (some,) = case.custom(x, mx.where(slots == 2, reference.NONE, slots), *rest)
    there = (slots != 2)[..., None]
    assert there.sum() < slots.size
    assert mx.array_equal(some, mx.where(there, whole, 0))


@dtype_cases
@pytest.mark.parametrize("experts, top_k", [(16, 4), (33, 10), (100, 4), (33, 32), (512, 10)])
def test_router(dtype, experts, top_k):
    check(case_of(RouterCase(experts, top_k, dtype, tokens=3)), ("fast",))


# ---- every branch --------------------------------------------------------------------------------


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


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_router_with_ties(renormalize, shared):
    check(router_case(renormalize, shared))


@pytest.mark.parametrize("logit", [-1e30, -200, 0, 200, 1e30])
def test_router_of_large_equal_logits(logit):
    with metal_on_cpu("fast"):
        ids, weights = route(mx.full((1, 40), logit), 4, renormalize=True, shared=False)
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert weights.tolist() == [[0.25] * 4]


def test_router_of_nan_stays_in_range():
    """Ids index the experts' slots, so they stay in range even with NaN logits."""
    with metal_on_cpu("fast"):
        ids, weights = route(mx.full((2, 40), mx.nan), 4, renormalize=True, shared=False)
    assert ids.max().item() < 40
    assert mx.isnan(weights).all()


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
