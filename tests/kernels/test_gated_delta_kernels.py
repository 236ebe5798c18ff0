"""The GatedDeltaNet kernels on the Metal bench: results, and detection of planted mistakes."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from kernel_helpers import complains, plant
from metal_cpu import MODES, metal_on_cpu, require_bench

from flashmoe_mlx.custom_kernels import device
from flashmoe_mlx.custom_kernels.case import DTYPES
from flashmoe_mlx.custom_kernels.gated_delta.cases import (
    GatedDeltaNormCase,
    GatedDeltaPrepareCase,
    GatedDeltaScanCase,
    GatedDeltaStepCase,
)
from flashmoe_mlx.custom_kernels.gated_delta.prepare import gated_norm, prepare
from flashmoe_mlx.custom_kernels.gated_delta.rule import MOST_KEY_DIM, rule_by_gpu
from flashmoe_mlx.custom_kernels.gated_delta.scan import ScanShape, scan
from flashmoe_mlx.custom_kernels.gated_delta.step import step
from flashmoe_mlx.custom_kernels.gated_delta.weights import Heads, MixerWeights

require_bench()

ODD = {"key_heads": 2, "value_heads": 6, "key_dim": 48, "value_dim": 37, "batch": 2}
ULPS = 16 * 2**-23  # of the largest output: sums of float32 in another order
STEP = GatedDeltaStepCase(**ODD, dtype="bfloat16")
SCAN = GatedDeltaScanCase(**ODD, dtype="bfloat16", tokens=5)
PREPARE = GatedDeltaPrepareCase(**ODD, dtype="bfloat16", tokens=5)
NORM = GatedDeltaNormCase(**ODD, dtype="bfloat16", tokens=5)
dtype_cases = pytest.mark.parametrize("dtype", DTYPES)


def excesses(outputs, stocks, expected) -> list[float]:
    """Return each output's error over its limit: at most 1 if correct."""
    shares = []
    for output, stock, exact in zip(outputs, stocks, expected, strict=True):
        assert output.shape == stock.shape
        found, theirs, right = (np.array(x.astype(mx.float32)) for x in (output, stock, exact))
        limit = max(2 * np.abs(theirs - right).max(), ULPS * np.abs(right).max())
        error = np.abs(found - right).max() if np.isfinite(found).all() else np.inf
        shares.append(float(error / limit))
    return shares


def check(case, modes=tuple(MODES)) -> None:
    """Run a case's kernel in the bench's modes; raise AssertionError if a result is off."""
    inputs = case.inputs()
    others = case.stock(*inputs), case.reference(*inputs)
    for mode in modes:
        with metal_on_cpu(mode):
            outputs = case.custom(*inputs)
        assert max(excesses(outputs, *others)) <= 1, mode


def caught(case, monkeypatch, file, old, new) -> bool:
    """Return whether an edit of a kernel's text fails the bench or the comparison."""
    plant(monkeypatch, file, old, new)
    return complains(lambda: check(case, ("fast", "checked")))


@dtype_cases
def test_step(dtype):
    check(replace(STEP, dtype=dtype))


@pytest.mark.parametrize("changes", [
    {"key_dim": 128, "value_dim": 64, "key_heads": 1, "value_heads": 2},
    {"key_dim": 9, "value_dim": 5, "key_heads": 3, "value_heads": 3},
    {"taps": 2, "weight_dtype": "float32"},
    {"taps": 5, "dtype": "float32", "weight_dtype": "float16", "batch": 1},
])  # fmt: skip
def test_step_at_other_sizes(changes):
    check(replace(STEP, **changes), ("fast", "checked"))


@pytest.mark.parametrize("lanes, row_lanes", [(64, 4), (96, 16), (128, 1), (256, 32), (1024, 8)])
def test_step_in_other_geometries(lanes, row_lanes):
    inputs = STEP.inputs()
    projected, past, *weights, state = inputs
    mixer = MixerWeights(Heads(2, 6, 48, 37), *weights, norm_eps=1e-6)
    with metal_on_cpu("checked"):
        outputs = step(projected, mixer, past, state, lanes, row_lanes)
    assert max(excesses(outputs, STEP.stock(*inputs), STEP.reference(*inputs))) <= 1


def test_step_of_extreme_gates():
    """Softplus neither overflows nor loses the small decay of a long memory."""
    case = replace(STEP, dtype="float32", weight_dtype="float32")
    projected, *others = case.inputs()
    gates = mx.array([-1e4, -88, -17, 17, 88, 1e4])
    projected[:, :, -6:] = gates
    projected[:, :, -12:-6] = gates[::-1]
    inputs = [projected, *others]
    with metal_on_cpu("fast"):
        outputs = case.custom(*inputs)
    assert max(excesses(outputs, case.stock(*inputs), case.reference(*inputs))) <= 1


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"


@pytest.mark.parametrize("old, new", [
    (BARRIER + "float q[", "float q["),
    (BARRIER + "float square", "float square"),
    ("hk = hv / (HV / HK)", "hk = hv % HK"),
    ("head = b * HV + hv", "head = hv"),
    ("g * s[r][c]", "s[r][c]"),
    ("auto scalars = here + CHANNELS + HV * DV;", "auto scalars = here + CHANNELS;"),
    ("scalars[HV + hv]", "scalars[hv]"),
    ("hv % (HV / HK) == 0", "true"),
    ("hv % (HV / HK) == 0", "hv % (HV / HK) == 1 && hv > 3"),
    ("window[tap + 1]", "window[tap]"),
    ("conv[channel * TAPS + tap]", "conv[channel * TAPS + TAPS - 1 - tap]"),
    ("eps[1]", "eps[0] * 1e6f"),
    ("read_runs<DK, ROW_LANES, VEC>(keys, part, k)", "read_runs<DK, ROW_LANES, VEC>(keys, 0u, k)"),
    ("metal::rsqrt(squares[1] + qk_eps)", "1.0f"),
    ("sum_over<2, ROW_LANES>(squares);", ""),
    ("- g * dots[r]) * beta", "- dots[r]) * beta"),
    ("- g * dots[r]) * beta", "- g * dots[r])"),
    ("if (row < DV) {", "if (row + 1 < DV) {"),
    ("if (row < DV) {", "{"),
    ("if (part == 0) {", "{"),
    ("gate * sigmoid(gate)", "sigmoid(gate)"),
    ("(HK + hk) * DK + i - DK", "hk * DK + i - DK"),
])  # fmt: skip
def test_a_mistake_in_step_is_caught(monkeypatch, old, new):
    assert caught(STEP, monkeypatch, "gated_delta/step.metal", old, new)


@pytest.mark.parametrize("heads, message", [
    (Heads(4, 6, 48, 37), "6 value heads are not a multiple of 4 key heads"),
    (Heads(2, 6, 4, 37), "key_dim 4 is below 8"),
    (Heads(2, 6, 8, 600), "value_dim 600 is more than 512 lanes"),
])  # fmt: skip
def test_step_names_what_it_does_not_take(heads, message):
    some = mx.zeros((4, 4, 1))
    with pytest.raises(ValueError, match=message):
        step(some, MixerWeights(heads, some, some, some, some, 1e-6), some, some)


@pytest.mark.parametrize("masked", [False, True])
@dtype_cases
def test_scan(dtype, masked):
    check(replace(SCAN, dtype=dtype, masked=masked))


@pytest.mark.parametrize("changes", [
    {"tokens": 1},
    {"tokens": 8},
    {"tokens": 33, "masked": True},
    {"key_dim": 128, "value_dim": 70, "key_heads": 1, "value_heads": 2, "tokens": 9},
    {"key_dim": 9, "value_dim": 5, "key_heads": 3, "value_heads": 3},
])  # fmt: skip
def test_scan_at_other_sizes(changes):
    check(replace(SCAN, **changes), ("checked",))


@pytest.mark.parametrize("shape", [
    ScanShape(4, 1, 2, 3), ScanShape(16, 4, 1, 4), ScanShape(32, 8, 2, 1), ScanShape(1, 1, 1, 8),
])  # fmt: skip
def test_scan_in_other_geometries(shape):
    case = replace(SCAN, tokens=7, masked=True)
    inputs = case.inputs()
    with metal_on_cpu("checked"):
        outputs = scan(*inputs, shape=shape)
    assert max(excesses(outputs, case.stock(*inputs), case.reference(*inputs))) <= 1


def test_scan_takes_a_dtype_per_input():
    q, k, v, g, beta, state = SCAN.inputs()
    inputs = [
        q.astype(mx.float16), k, v.astype(mx.float32), g.astype(mx.bfloat16), beta, state
    ]  # fmt: skip
    with metal_on_cpu("fast"):
        outputs = scan(*inputs)
    assert outputs[0].dtype == mx.float16
    assert max(excesses(outputs, SCAN.stock(*inputs), SCAN.reference(*inputs))) <= 1


@pytest.mark.parametrize("masked", [False, True])
def test_the_rule_alone(masked, monkeypatch):
    """For layers of mlx-lm's own; what the kernel does not support is declined."""
    monkeypatch.setenv("FLASHMOE_KERNELS", "custom")
    monkeypatch.setattr(device, "_gpu_is_default", lambda: True)
    case = replace(SCAN, masked=masked)
    inputs = case.inputs()
    with metal_on_cpu("checked"):
        outputs = rule_by_gpu(*inputs)
    assert max(excesses(outputs, case.stock(*inputs), case.reference(*inputs))) <= 1
    q, k, v, g, *others = inputs
    by_column = mx.broadcast_to(g[..., None], (*g.shape, q.shape[-1]))
    assert rule_by_gpu(q, k, v, by_column, *others) is None
    assert rule_by_gpu(q[..., :7], k[..., :7], v, g, *others) is None
    wide = mx.zeros((*q.shape[:3], MOST_KEY_DIM + 1), q.dtype)
    assert rule_by_gpu(wide, wide, v, g, *others) is None


@pytest.mark.parametrize("old, new", [
    (BARRIER, ""),
    ("base = tile % 2 * TILE", "base = 0"),
    ("hk = hv / (HV / HK)", "hk = hv % HK"),
    ("uint(tile * TILE + i / WIDTH), last)", "uint(tile * TILE + i / WIDTH), tokens)"),
    ("lane < TILE && tile * TILE + lane < tokens", "lane < TILE"),
    ("- factor * sums[r])", "- sums[r])"),
    ("factor * s[r][c]", "s[r][c]"),
    (" * strengths[slot]", ""),
    ("MASK && !mask[place]", "MASK && mask[place]"),
    ("choose(keep, fresh[r][c], s[r][c])", "fresh[r][c]"),
    ("writes && t > 0", "writes && keep && t > 0"),
    ("writes && t > 0", "t > 0"),
    ("t <= tokens", "t < tokens"),
    ("part < ROWS &&", "part <= ROWS &&"),
    ("if (row < DV) {", "{"),
    ("i + 1 < TILE ? slot + 1 : slot", "slot"),
    ("for (uint tile = 0; tile <= tiles; tile++) {", "for (uint tile = 0; tile < tiles; tile++) {"),
    (BARRIER + "}\nsum_over<2 * ROWS, ROW_LANES>(sums);", BARRIER + "}"),
])  # fmt: skip
def test_a_mistake_in_scan_is_caught(monkeypatch, old, new):
    # The last y comes after the loop if the tiles are full, else from inside.
    tokens = 16 if "}" in new else 11
    case = replace(SCAN, tokens=tokens, masked=True, key_dim=12, value_dim=9)
    assert caught(case, monkeypatch, "gated_delta/scan.metal", old, new)


@pytest.mark.parametrize("masked", [False, True])
@dtype_cases
def test_prepare(dtype, masked):
    check(replace(PREPARE, dtype=dtype, masked=masked))


@pytest.mark.parametrize("changes", [
    {"tokens": 1},
    {"tokens": 33},
    {"key_dim": 128, "value_dim": 70, "key_heads": 1, "value_heads": 2, "masked": True},
    {"key_dim": 9, "value_dim": 40, "taps": 2, "weight_dtype": "float32", "tokens": 34},
])  # fmt: skip
def test_prepare_at_other_sizes(changes):
    check(replace(PREPARE, **changes), ("checked",))


@pytest.mark.parametrize("tokens", [1, 8, 32])
def test_prepare_in_other_geometries(tokens):
    inputs = replace(PREPARE, tokens=40).inputs()
    projected, past, *weights = inputs
    with metal_on_cpu("checked"):
        mixer = MixerWeights(Heads(2, 6, 48, 37), *weights, norm_eps=1e-6)
        outputs = prepare(projected, mixer, past, tokens=tokens)
    assert max(excesses(outputs, PREPARE.stock(*inputs), PREPARE.reference(*inputs))) <= 1


@pytest.mark.parametrize("old, new", [
    ("before = place < TAPS - 1", "before = false"),
    ("before = place < TAPS - 1", "before = place < TAPS"),
    (" || mask[b * tokens + t]", " || !mask[b * tokens + t]"),
    ("(b * (TAPS - 1) + place)", "place"),
    ("rows[i + tap][j]", "rows[i][j]"),
    ("square += lane + 32 * j < size ? xs[j] * xs[j] : 0.0f;", "square += xs[j] * xs[j];"),
    ("simd_sum(square)", "square"),
    ("head < HK ? metal::rsqrt(float(DK))", "head <= HK ? metal::rsqrt(float(DK))"),
    ("uint hv = is_value ? head - 2 * HK : 0u;", "uint hv = is_value ? head - HK : 0u;"),
    ("start + lane < tokens", "true"),
    ("start + i < tokens && column", "column"),
    ("column < size) {", "column <= size) {"),
    ("scalars[HV + hv]", "scalars[hv]"),
])  # fmt: skip
def test_a_mistake_in_prepare_is_caught(monkeypatch, old, new):
    case = replace(PREPARE, masked=True)
    assert caught(case, monkeypatch, "gated_delta/prepare.metal", old, new)


@dtype_cases
def test_gated_norm(dtype):
    check(replace(NORM, dtype=dtype))


@pytest.mark.parametrize("old, new", [
    ("lane + 32 * j < DV ? ys[j] * ys[j] : 0.0f", "ys[j] * ys[j]"),
    ("+ CHANNELS + hv * DV;", "+ CHANNELS;"),
    ("place < tokens &&", ""),
    ("* sigmoid(zs[j])", ""),
])  # fmt: skip
def test_a_mistake_in_gated_norm_is_caught(monkeypatch, old, new):
    assert caught(NORM, monkeypatch, "gated_delta/norm.metal", old, new)


def test_prefill_equals_decoding():
    """Prepare, scan and norm over T tokens, and T steps, give the same outputs and states."""
    projected, past, *arrays, state = replace(STEP, dtype="float32", tokens=6).inputs()
    mixer = MixerWeights(Heads(2, 6, 48, 37), *arrays, norm_eps=1e-6)
    outputs, last_past, last_state = [], past, state
    with metal_on_cpu("fast"):
        made, whole = scan(*prepare(projected, mixer, past), state)
        made = gated_norm(made, projected, mixer)
        for t in range(6):
            y, last_past, last_state = step(projected[:, t : t + 1], mixer, last_past, last_state)
            outputs.append(y)
    assert mx.abs(made - mx.concatenate(outputs, axis=1)).max().item() <= 1e-5
    assert mx.abs(whole - last_state).max().item() <= 1e-5
    assert mx.array_equal(last_past, projected[:, 3:, : past.shape[-1]])
