"""Decoding on a CPU: integer dot products and whole blocks, against the float32 reference."""

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flashmoe_mlx.custom_kernels import reference
from flashmoe_mlx.custom_kernels.cpu import block as cpu_block
from flashmoe_mlx.custom_kernels.cpu import prefill
from flashmoe_mlx.custom_kernels.cpu.decode import Group, project
from flashmoe_mlx.custom_kernels.cpu.gated_delta_step import DeltaBlock
from flashmoe_mlx.custom_kernels.cpu.moe import MoeBlock
from flashmoe_mlx.custom_kernels.gated_delta.naive import mix
from flashmoe_mlx.custom_kernels.gated_delta.weights import Heads, MixerState, MixerWeights
from flashmoe_mlx.custom_kernels.weights import QuantizedMatrix

FORMATS = [(b, g) for b in prefill.BITS for g in prefill.GROUP_SIZES]


def matrix(*shape, bits=4, group_size=32, dtype=mx.bfloat16) -> QuantizedMatrix:
    key = mx.random.key(sum(shape) + bits + group_size)
    weight = mx.random.normal(shape, key=key) / shape[-1] ** 0.5
    return QuantizedMatrix(*mx.quantize(weight.astype(dtype), group_size, bits), bits, group_size)


def dense(m: QuantizedMatrix) -> np.ndarray:
    weights = reference.dequantize(m.codes, m.scales, m.biases, m.bits)
    return np.array(weights).astype(np.float64)


def random(*shape) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def normalized(h: np.ndarray, weight: np.ndarray) -> np.ndarray:
    h = h.astype(np.float64)
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * weight


def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    g = gate @ x
    return g / (1 + np.exp(-g)) * (up @ x)


@pytest.mark.parametrize("dtype", prefill.SCALE_TYPES)
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_project_is_as_exact_as_stock(bits, group_size, dtype):
    """384 columns at 2 bits end in a partial vector, 333 rows in a partial unit."""
    m = matrix(333, 384, bits=bits, group_size=group_size, dtype=dtype)
    x = random(3, 384) * np.array([[1], [1e-3], [1e4]], np.float32)
    exact = x.astype(np.float64) @ dense(m).T
    (ours,) = project(x, Group(m))
    wide = [m.codes, m.scales.astype(mx.float32), m.biases.astype(mx.float32)]
    stock = np.array(mx.quantized_matmul(mx.array(x), *wide, group_size=group_size, bits=bits))
    assert np.all(np.abs(ours - exact).max(1) <= 2 * np.abs(stock - exact).max(1))


def test_one_large_activation_does_not_blur_the_others():
    """Scales are per group, so an outlier costs precision in its group only."""
    m, x = matrix(64, 256), random(1, 256)
    x[0, 70] = 1e6
    weight = dense(m)
    weight[:, 64:96] = 0
    (ours,), (outlier,) = project(x, Group(m)), project(x * (np.arange(256) // 32 == 2), Group(m))
    exact = x.astype(np.float64) @ weight.T
    assert np.abs(ours - outlier - exact).max() <= 1e-6 * np.abs(outlier).max()


def test_nan_and_infinity_propagate():
    m, x = matrix(40, 128), random(3, 128)
    x[0, 5], x[1, 5] = np.nan, np.inf
    (y,) = project(x, Group(m))
    assert not np.isfinite(y[:2]).any()
    assert np.isfinite(y[2]).all()


@pytest.mark.parametrize("dtype", prefill.SCALE_TYPES)
@pytest.mark.parametrize("columns", [384, 1152])
def test_project_mixes_formats_and_keeps_rows_apart(columns, dtype):
    """11 rows exceed MAX_ROWS, and 1152 columns exceed a block of any format."""
    shapes = [(9 + n, bits, group_size) for n, (bits, group_size) in enumerate(FORMATS)]
    shapes += [(70, 4, 64), (1, 8, 64)]
    matrices = [matrix(h, columns, bits=b, group_size=g, dtype=dtype) for h, b, g in shapes]
    group, h, norm = Group(*matrices), random(11, columns), random(columns)
    together = project(h, group, norm, 1e-6)
    for m, y in zip(group.matrices, together, strict=True):
        assert np.abs(y - normalized(h, norm) @ dense(m).T).max() <= 5e-6
    for row in range(11):
        alone = project(h[row : row + 1], group, norm, 1e-6)
        assert all(np.array_equal(a[0], t[row]) for a, t in zip(alone, together, strict=True))
    few = project(h[3:8], group, norm, 1e-6)
    assert all(np.array_equal(f, t[3:8]) for f, t in zip(few, together, strict=True))


@pytest.mark.parametrize("bits", [(4, 4, 4), (2, 4, 8)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_mixture_of_experts(bits, renormalize):
    """12 rows of 3 experts each: some of 16 experts have many rows, some none."""
    experts, top_k, hidden, inner = 16, 3, 128, 96
    router, switch = matrix(experts, hidden, bits=8), matrix(1, hidden, bits=8)
    shared = [matrix(64, hidden), matrix(64, hidden), matrix(hidden, 64)]
    shapes = (experts, inner, hidden), (experts, inner, hidden), (experts, hidden, inner)
    projections = [matrix(*s, bits=b) for s, b in zip(shapes, bits, strict=True)]
    norm, h = random(hidden), random(12, hidden)
    block = MoeBlock(router, switch, shared, projections, (norm, 1e-6), top_k, renormalize)

    def at_once(ids):
        yield np.arange(ids.size), ids.reshape(-1)

    def in_batches(ids):
        for places in np.array_split(np.arange(ids.size)[::-1], 3):
            yield places, ids.reshape(-1)[places]

    y = block(h, at_once)
    assert np.array_equal(y, block(h, in_batches))
    x, weights = normalized(h, norm), [dense(b) for b in projections]
    for row in range(12):
        assert np.array_equal(y[row], block(h[row : row + 1], at_once)[0])
        scores = np.exp(dense(router) @ x[row])
        best = np.argsort(-scores)[:top_k]
        scores /= scores[best].sum() if renormalize else scores.sum()
        expected = h[row].astype(np.float64)
        for e in best:
            gate, up, down = (w[e] for w in weights)
            expected += scores[e] * (down @ swiglu(x[row], gate, up))
        gate, up, down = (dense(m) for m in shared)
        strength = 1 / (1 + np.exp(-(dense(switch) @ x[row])))
        expected += strength * (down @ swiglu(x[row], gate, up))
        assert np.abs(y[row] - expected).max() <= 1e-5


def test_gated_delta_net():
    heads, hidden = Heads(2, 4, 48, 32), 128
    channels = 2 * 2 * 48 + 4 * 32
    conv, rest = random(channels, 4, 1), (random(4), random(4) - 1, random(32) + 1)
    weights = MixerWeights(heads, mx.array(conv), *map(mx.array, rest), 1e-6)
    inputs = [matrix(n, hidden) for n in (channels, 128)] + [matrix(4, hidden, bits=8)] * 2
    out, norm, h = matrix(hidden, 128), random(hidden), random(3, hidden)
    past, state = random(3, 3, channels), random(3, 4, 32, 48)
    block = DeltaBlock(inputs, out, (norm, 1e-6), weights)
    new_past, new = np.empty_like(past), np.empty_like(state)
    y = block(h, past, state, new_past, new)
    x = normalized(h, norm)
    projected = [mx.array((x @ dense(m).T).astype(np.float32))[:, None] for m in inputs]
    before = MixerState(mx.array(past), mx.array(state))
    mixed, stock_past, stock_state = mix.naive(*projected, weights, before)
    assert np.abs(y - (h + np.array(mixed)[:, 0] @ dense(out).T)).max() <= 1e-5
    assert np.abs(new_past - np.array(stock_past)).max() <= 1e-5
    assert np.abs(new - np.array(stock_state)).max() <= 1e-5
    for row in range(3):
        own, one = np.empty_like(state[:1]), slice(row, row + 1)
        alone = block(h[one], past[one], state[one], np.empty_like(past[:1]), own)
        assert np.array_equal(alone[0], y[row])
        assert np.array_equal(own[0], new[row])


def test_a_step_follows_new_weights_and_copies():
    layer, x = nn.QuantizedLinear(128, 40, bias=False), mx.array(random(2, 1, 128))
    layer.eval()
    for _ in range(2):
        for one in (layer, copy.deepcopy(layer)):
            (y,) = cpu_block.linear_step(x, [one], residual=mx.ones((2, 1, 40)))
            assert mx.abs(y - 1 - one(x)).max() <= 1e-5
        layer.update({"weight": layer.weight + mx.array(0x11111111, mx.uint32)})


def test_a_step_declines_other_work():
    layer = nn.QuantizedLinear(64, 8, bias=False)
    layer.eval()
    assert cpu_block.linear_step(mx.zeros((1, 2, 64)), [layer]) is None
    assert cpu_block.linear_step(mx.zeros((1, 1, 64)), [nn.Linear(64, 8)]) is None
