"""The GatedDeltaNet kernels' text on the Metal bench: results, and that mistakes are noticed."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from metal_cpu import MODES, BenchError, metal_on_cpu, require_bench

from flashmoe_mlx.custom_kernels import gpu
from flashmoe_mlx.custom_kernels.gated_delta import Heads, MixerWeights
from flashmoe_mlx.custom_kernels.gated_delta_step import step
from flashmoe_mlx.custom_kernels.gated_delta_trials import GatedDeltaStepTrial
from flashmoe_mlx.custom_kernels.trial import DTYPES

require_bench()

ODD = {"key_heads": 2, "value_heads": 6, "key_dim": 48, "value_dim": 37, "batch": 2}
ULPS = 16 * 2**-23  # of the largest output: sums of float32 in another order
STEP = GatedDeltaStepTrial(**ODD, dtype="bfloat16")
dtype_cases = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def fresh_kernels():
    """Make kernels inside each block of the bench, and keep none for others."""
    gpu._build.cache_clear()
    yield
    gpu._build.cache_clear()


def excesses(outputs, stocks, truths) -> list[float]:
    """Return each output's error as a share of what it may be: at most 1 if right."""
    shares = []
    for output, stock, truth in zip(outputs, stocks, truths, strict=True):
        assert output.shape == stock.shape
        found, theirs, right = (np.array(x.astype(mx.float32)) for x in (output, stock, truth))
        limit = max(2 * np.abs(theirs - right).max(), ULPS * np.abs(right).max())
        error = np.abs(found - right).max() if np.isfinite(found).all() else np.inf
        shares.append(float(error / limit))
    return shares


def check(trial, modes=tuple(MODES), edit=None) -> None:
    """Run a trial's kernel in the bench's modes; raise AssertionError if a result is off."""
    inputs = trial.inputs()
    others = trial.stock(*inputs), trial.reference(*inputs)
    for mode in modes:
        with metal_on_cpu(mode):
            outputs = trial.custom(*inputs)
        assert max(excesses(outputs, *others)) <= 1, mode


def caught(trial, monkeypatch, file, old, new) -> bool:
    """Say whether an edit of a kernel's text makes the bench or the comparison complain."""
    text = gpu.read_text(file)
    assert text.count(old) == 1, text.count(old)
    read = gpu.read_text
    edited = text.replace(old, new)
    monkeypatch.setattr(gpu, "read_text", lambda name: edited if name == file else read(name))
    try:
        check(trial, ("fast", "checked"))
    except (AssertionError, BenchError):
        return True
    return False


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
    trial = replace(STEP, dtype="float32", weight_dtype="float32")
    projected, *others = trial.inputs()
    gates = mx.array([-1e4, -88, -17, 17, 88, 1e4])
    projected[:, :, -6:] = gates
    projected[:, :, -12:-6] = gates[::-1]
    inputs = [projected, *others]
    with metal_on_cpu("fast"):
        outputs = trial.custom(*inputs)
    assert max(excesses(outputs, trial.stock(*inputs), trial.reference(*inputs))) <= 1


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"


@pytest.mark.parametrize("old, new", [
    (BARRIER + "float q[", "float q["),
    (BARRIER + "float square", "float square"),
    ("hk = hv / (HV / HK)", "hk = hv % HK"),
    ("head = b * HV + hv", "head = hv"),
    ("scale_by<COLUMNS>(g, s[r]);", ""),
    ("auto scalars = here + CHANNELS + HV * DV;", "auto scalars = here + CHANNELS;"),
    ("scalars[HV + hv]", "scalars[hv]"),
    ("hv % (HV / HK) == 0", "true"),
    ("hv % (HV / HK) == 0", "hv % (HV / HK) == 1 && hv > 3"),
    ("window[tap + 1]", "window[tap]"),
    ("conv[channel * TAPS + tap]", "conv[channel * TAPS + TAPS - 1 - tap]"),
    ("eps[1]", "eps[0] * 1e6f"),
    ("read_runs<DK, ROW_LANES, VEC>(keys, part, k)", "read_runs<DK, ROW_LANES, VEC>(keys, 0u, k)"),
    ("scale_by<COLUMNS>(k_norm, k);", ""),
    ("error * beta, k[c]", "error, k[c]"),
    ("if (row < DV) {", "if (row + 1 < DV) {"),
    ("if (row < DV) {", "{"),
    ("if (part == 0) {", "{"),
    ("gate * sigmoid(gate)", "sigmoid(gate)"),
    ("(HK + hk) * DK + i - DK", "hk * DK + i - DK"),
])  # fmt: skip
def test_a_mistake_in_step_is_caught(monkeypatch, old, new):
    assert caught(STEP, monkeypatch, "gated_delta_step.metal", old, new)


@pytest.mark.parametrize("heads, message", [
    (Heads(4, 6, 48, 37), "6 value heads are no multiple of 4 key heads"),
    (Heads(2, 6, 4, 37), "key_dim 4 is below 8"),
    (Heads(2, 6, 8, 600), "value_dim 600 is more than 512 lanes"),
])  # fmt: skip
def test_step_names_what_it_does_not_take(heads, message):
    some = mx.zeros((4, 4, 1))
    with pytest.raises(ValueError, match=message):
        step(some, MixerWeights(heads, some, some, some, some, 1e-6), some, some)
