"""The CPU kernels against the float32 reference and against stock MLX's own error."""

import json
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flashmoe_mlx.custom_kernels import reference
from flashmoe_mlx.custom_kernels.cpu import gated_delta, prefill
from flashmoe_mlx.custom_kernels.device import cpu_kernels
from flashmoe_mlx.custom_kernels.experts.prefill import QuantizedMatrix, cpu_experts
from flashmoe_mlx.custom_kernels.gated_delta.naive import mix
from flashmoe_mlx.custom_kernels.gated_delta.weights import Heads, MixerState, MixerWeights
from flashmoe_mlx.custom_kernels.linear.linear import linear
from flashmoe_mlx.errors import FlashMoEError

FORMATS = [(b, g) for b in prefill.BITS for g in prefill.GROUP_SIZES]
DTYPES = [mx.float32, mx.bfloat16]


def quantized(shape, bits, group_size, dtype):
    key = mx.random.key(sum(shape) + bits + group_size)
    weight = mx.random.normal(shape, key=key) / shape[-1] ** 0.5
    tensors = mx.quantize(weight.astype(dtype), group_size, bits)
    mx.eval(tensors)
    return tensors


def random(*shape) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(len(shape) + shape[0]))


def times(x, weight, slots=None) -> np.ndarray:
    return prefill.times(x, weight, prefill.runs(len(x), slots))


def in_float64(x, codes, scales, biases, bits) -> np.ndarray:
    """Return x W^T in float64."""
    weight = np.array(reference.dequantize(codes, scales, biases, bits)).astype(np.float64)
    return np.array(x).astype(np.float64) @ weight.swapaxes(-1, -2)


@pytest.mark.parametrize(("bits", "group_size"), [*FORMATS, (3, 64), (6, 32)])
def test_reference_unpacks_as_mlx_does(bits, group_size):
    codes, scales, biases = quantized((7, 384), bits, group_size, mx.float32)
    ours = reference.dequantize(codes, scales, biases, bits)
    theirs = mx.dequantize(codes, scales, biases, group_size, bits)
    assert mx.abs(ours - theirs).max().item() <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_matmul_is_as_exact_as_stock(bits, group_size, dtype):
    """Odd row counts: 37 weight rows fill no tile, 11 activation rows are 2 fours and 3 ones."""
    for height, rows in ((37, 1), (132, 11)):
        weight = quantized((height, 384), bits, group_size, dtype)
        x = random(rows, 384)
        exact = in_float64(x, *weight, bits)
        ours = times(np.array(x), prefill.packed(*weight, bits, group_size))
        wide = [weight[0], *(t.astype(mx.float32) for t in weight[1:])]
        stock = np.array(mx.quantized_matmul(x, *wide, group_size=group_size, bits=bits))
        assert np.abs(ours - exact).max() <= 2 * np.abs(stock - exact).max()


@pytest.mark.parametrize("bits", prefill.BITS)
def test_a_row_does_not_depend_on_the_others(bits):
    arrays = quantized((5, 36, 128), bits, 64, mx.bfloat16)
    weight = prefill.packed(*arrays, bits, 64)
    x, slots = np.array(random(19, 128)), np.sort(np.arange(19) * 7 % 5)
    together = times(x, weight, slots)
    alone = [times(x[i : i + 1], weight, slots[i : i + 1]) for i in range(19)]
    assert np.array_equal(together, np.concatenate(alone))
    for i, slot in enumerate(slots):
        one = [t[int(slot)] for t in arrays]
        assert np.abs(together[i] - in_float64(x[i], *one, bits)).max() <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [(4, 4, 4), (2, 2, 2), (2, 2, 4), (8, 8, 8)])
def test_expert_mlp(bits, dtype):
    shapes = (6, 96, 64), (6, 96, 64), (6, 64, 96)
    projections = [quantized(s, b, 32, dtype) for s, b in zip(shapes, bits, strict=True)]
    x, slots = random(9, 64), np.array([0, 0, 0, 0, 0, 2, 3, 3, 5])
    packed = [QuantizedMatrix(*t, b, 32) for t, b in zip(projections, bits, strict=True)]
    kernels = cpu_experts(x, packed)
    ours = mx.array(kernels.mlp(kernels.rows(x), *(b.packed for b in packed), slots))
    for i, slot in enumerate(slots.tolist()):
        weights = [
            reference.dequantize(*(t[slot] for t in arrays), b)
            for arrays, b in zip(projections, bits, strict=True)
        ]
        expected = reference.expert_mlp(x[i : i + 1], *weights)
        assert mx.abs(ours[i] - expected[0]).max().item() <= 1e-5


@pytest.mark.parametrize("tokens", [1, 63, 130])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by_column", [False, True])
def test_gated_delta(tokens, masked, by_column):
    batch, key_heads, value_heads, key_dim, value_dim = 2, 2, 6, 48, 37
    q, k = random(batch, tokens, key_heads, key_dim) / 7, random(batch, tokens, key_heads, key_dim)
    k = k / mx.linalg.norm(k, axis=-1, keepdims=True)
    v = random(batch, tokens, value_heads, value_dim)
    g = mx.sigmoid(random(batch, tokens, value_heads, *[key_dim] * by_column))
    beta = mx.broadcast_to(mx.sigmoid(random(3, 1, 1)[:2]), v.shape[:3])  # not contiguous
    state = random(batch, value_heads, value_dim, key_dim)
    mask = mx.arange(tokens) < mx.array([[tokens - 1], [tokens // 2]]) if masked else None
    before = np.array(state)
    arrays = [np.array(t) for t in (q, k, v, g, beta)]
    y, final = gated_delta.gated_delta(*arrays, before, None if mask is None else np.array(mask))
    expected_y, expected_final = reference.gated_delta(q, k, v, g, beta, state, mask)
    assert np.abs(y - np.array(expected_y)).max() <= 2e-5
    assert np.abs(final - np.array(expected_final)).max() <= 2e-5
    assert np.array_equal(before, np.array(state))  # the caller's state is unchanged


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("padded", [False, True])
def test_mixer_equals_mlx_ops(tokens, padded, monkeypatch):
    heads, batch = Heads(2, 6, 48, 37), 3
    width = 2 * 2 * 48 + 6 * 37
    weights = MixerWeights(
        heads, random(width, 4, 1), random(6), random(6) - 1, random(37) + 1, 1e-6
    )
    inputs = (
        random(batch, tokens, width),
        random(batch, tokens, 6 * 37),
        random(batch, tokens, 6),
        random(batch, tokens, 6) + 0.5,
    )
    past, state = random(batch, 3, width), random(batch, 6, 37, 48)
    ends = mx.array([tokens, 1, 0]) if padded else None
    mask = mx.arange(tokens) < ends[:, None] if padded else None
    before = MixerState(past, state, mask, ends)
    ours, theirs = (f(*inputs, weights, before) for f in (mix, mix.naive))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert mx.abs(mine - other).max() <= 1e-5 * mx.abs(other).max()
    first = mix(*inputs, weights, MixerState(None, None, mask, ends))
    assert all(mx.isfinite(t).all() for t in first)


def test_linear_takes_the_kernel_and_follows_new_weights():
    layer = nn.QuantizedLinear(128, 40, bias=False)
    x = random(3, 5, 128).transpose(1, 0, 2)  # not contiguous
    for _ in range(2):
        layer.eval()
        exact = in_float64(x.reshape(-1, 128), layer.weight, layer.scales, layer.biases, 4)
        (y,) = linear(x, layer)
        assert y.shape == (5, 3, 40)
        assert np.abs(np.array(y).reshape(-1, 40) - exact).max() <= 1e-5
        layer.update({"weight": layer.weight + mx.array(0x11111111, mx.uint32)})


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(64, 8), nn.QuantizedLinear(64, 8, bias=True), nn.QuantizedLinear(64, 8, bits=3)],
)
def test_linear_runs_other_layers_themselves(layer):
    layer.eval()
    x = random(3, 64)
    assert mx.array_equal(linear(x, layer)[0], layer(x))


def test_other_dtypes_are_left_to_mlx():
    assert cpu_kernels(random(2, 2)) is prefill
    assert cpu_kernels(random(2, 2).astype(mx.bfloat16)) is None


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    import os

    code = (
        "import sys, mlx.core as mx\n"
        "from flashmoe_mlx.custom_kernels.device import cpu_kernels\n" + code
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env
    )


def test_stock_ops_on_request(fresh_kernel_mode, monkeypatch):
    monkeypatch.setenv("FLASHMOE_KERNELS", "stock")
    assert cpu_kernels(mx.ones(1)) is None


def test_without_numba_the_user_is_told_once():
    result = run(
        "sys.modules['numba'] = None\nprint(cpu_kernels(mx.ones(1)), cpu_kernels(mx.ones(1)))"
    )
    assert result.stdout == "None None\n"
    assert result.stderr.count("numba is not installed") == 1


def test_a_wrong_mode_is_named(fresh_kernel_mode, monkeypatch):
    monkeypatch.setenv("FLASHMOE_KERNELS", "fast")
    with pytest.raises(FlashMoEError, match="FLASHMOE_KERNELS = 'fast' is not valid"):
        cpu_kernels(mx.ones(1))


def test_kernels_are_compiled_once_on_a_machine(tmp_path):
    formats = [(4, 32, "bfloat16")] * 3  # only here, so that no other test marks them
    where = "from flashmoe_mlx.custom_kernels.cpu.compile import _marker, prepare\n"
    code = f"{where}prepare({formats})"
    forget = f"{where}_marker({json.dumps(formats)!r}).unlink(missing_ok=True)"
    assert run(forget).returncode == 0
    first = run(code, XDG_CACHE_HOME=str(tmp_path))
    assert (first.returncode, first.stderr.count("compiling kernels, first use only")) == (0, 1)
    again = run(code, XDG_CACHE_HOME=str(tmp_path))
    assert (again.returncode, again.stderr) == (0, "")


def test_nothing_is_compiled_for_stock_ops(tmp_path):
    code = (
        "from flashmoe_mlx.custom_kernels.cpu.compile import prepare\n"
        "prepare([(4, 32, 'bfloat16')])"
    )
    assert run(code, XDG_CACHE_HOME=str(tmp_path), FLASHMOE_KERNELS="stock").stderr == ""
    assert not list(tmp_path.iterdir())
