"""Attention over a prompt on a CPU, against MLX's own op and float64."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import BatchKVCache, QuantizedKVCache
from model_helpers import make_model, tokens

from flashmoe_mlx import load
from flashmoe_mlx.custom_kernels import device, reference
from flashmoe_mlx.custom_kernels.attention import prompt
from flashmoe_mlx.custom_kernels.attention.step import AttentionHeads
from flashmoe_mlx.custom_kernels.cpu import attention, attention_step

BLOCK = attention.BLOCK
# B, Hq, Hkv, T, S, D
SHAPES = [
    (1, 4, 4, 7, 7, 16),
    (2, 6, 2, BLOCK, BLOCK + 9, 32),
    (2, 4, 1, BLOCK + 1, BLOCK + 1, 16),
    (1, 8, 2, 2 * BLOCK + 5, 3 * BLOCK, 8),
    (1, 4, 2, BLOCK - 1, 2 * BLOCK, 16),
    (2, 4, 2, 1, 33, 16),
    (1, 2, 1, 1, 1, 8),
]


def inputs(batch, heads, kv_heads, count, length, dim) -> list[mx.array]:
    """Return q, k and v with a model's strides."""
    shapes = (batch, count, heads, dim), (batch, kv_heads, length + 3, dim)
    q, k, v = (mx.random.normal(shapes[i > 0], key=mx.random.key(length + i)) for i in range(3))
    return [q.transpose(0, 2, 1, 3), k[:, :, :length], v[:, :, :length]]


def in_float64(q, k, v, scale, mask) -> np.ndarray:
    """Return attention in float64; a bool mask sets hidden scores to one value."""
    q, k, v = (np.array(x).astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = scale * q @ k.swapaxes(-1, -2)
    if isinstance(mask, str):
        mask = create_causal_mask(q.shape[2], k.shape[2] - q.shape[2])
    if mask is not None and mask.dtype == mx.bool_:
        scores = np.where(np.array(mask), scores, -1e300)
    elif mask is not None:
        scores = scores + np.array(mask.astype(mx.float32))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def check(arrays, mask) -> None:
    scale = arrays[0].shape[-1] ** -0.5
    ours = attention.attention(*arrays, scale, mask)
    stock = mx.fast.scaled_dot_product_attention(*arrays, scale=scale, mask=mask)
    assert (ours.shape, ours.dtype) == (stock.shape, stock.dtype)
    exact = in_float64(*arrays, scale, mask)
    assert np.abs(np.array(ours) - exact).max() <= 5e-6
    assert mx.abs(ours - stock).max() <= 5e-6


def masks(batch, heads, count, length) -> dict:
    """Return a mask of each kind and shape."""
    causal, offset = create_causal_mask(count, length - count), length - count
    padding = mx.arange(batch) * min(5, length - 1)
    bias = mx.random.normal((batch, heads, count, length), key=mx.random.key(count))
    return {
        "none": None,
        "causal": "causal",
        "bool": causal,
        "window": create_causal_mask(count, offset, window_size=4),
        "left padding": create_causal_mask(count, offset, left_padding=padding),
        "right padding": create_causal_mask(count, offset, right_padding=padding),
        "one row": mx.arange(length) != 1,
        "additive": mx.where(causal, 0.0, -mx.inf),
        "additive per head": bias,
        "additive in bfloat16": bias[:, :1].astype(mx.bfloat16),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", masks(1, 1, 2, 2))
def test_equals_stock_and_float64(shape, kind):
    batch, heads, _, count, length, _ = shape
    check(inputs(*shape), masks(batch, heads, count, length)[kind])


@pytest.mark.parametrize("kind", ["causal", "none", "left padding", "additive per head"])
def test_a_block_shrinks_until_its_scores_fit(kind, monkeypatch):
    """Blocks of 5 queries, then of one query that exceeds the limit."""
    shape = (2, 6, 2, 23, 40, 16)
    for limit in (5 * 3 * 40, 1):
        monkeypatch.setattr(attention, "SCORES", limit)
        check(inputs(*shape), masks(2, 6, 23, 40)[kind])


def test_scores_of_a_block_stay_within_the_limit(monkeypatch):
    sizes, softmax_times = [], attention._softmax_times

    def spy(scores, values):
        sizes.append(scores.size)
        return softmax_times(scores, values)

    monkeypatch.setattr(attention, "_softmax_times", spy)
    monkeypatch.setattr(attention, "SCORES", 1000)
    attention.attention(*inputs(1, 4, 2, 90, 100, 8), 1.0, "causal")
    assert max(sizes) <= 1000
    assert sum(sizes) < 0.6 * 4 * 90 * 100  # later keys are skipped


@pytest.mark.parametrize("hidden", [False, float(mx.finfo(mx.float32).min), -1e30])
def test_a_query_without_keys_equals_stock(hidden):
    arrays, rows = inputs(2, 4, 2, BLOCK + 3, BLOCK + 8, 16), mx.arange(BLOCK + 3)[:, None]
    sees = mx.broadcast_to(rows % 3 > 0, (BLOCK + 3, BLOCK + 8))
    mask = sees if hidden is False else mx.where(sees, 0.0, hidden)
    check(arrays, mask)


@pytest.mark.filterwarnings("error")
def test_nan_stays_in_its_row():
    arrays = inputs(1, 2, 2, 9, 9, 8)
    arrays[0][0, 0, 4] = mx.nan
    y = np.array(attention.attention(*arrays, 1.0, "causal"))
    assert np.isnan(y[0, 0, 4]).all()
    assert np.isnan(y).sum() == 8


@pytest.fixture
def calls(monkeypatch) -> list:
    """Record the masks with which the model calls our attention."""
    seen, ours = [], attention.attention

    def spy(*args):
        seen.append(args[-1])
        return ours(*args)

    monkeypatch.setattr(attention, "attention", spy)
    return seen


def without(monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.setattr(prompt, "cpu_kernels", lambda x: None)
        return function()


def assert_close(ours, theirs) -> None:
    assert not mx.isnan(ours).any()
    assert mx.abs(ours - theirs).max() <= 1e-4 * mx.abs(theirs).max()


def test_logits_of_the_bundled_model(models, monkeypatch, calls):
    bundled, _ = load(models["packed4"])
    prompt = tokens(1, 2 * BLOCK + 17)

    def in_two_calls():
        cache = bundled.make_cache()
        parts = [bundled(prompt[:, a:b], cache=cache) for a, b in ((0, 90), (90, None))]
        return mx.concatenate([*parts, bundled(prompt[:, :1], cache=cache)], axis=1)

    stock = without(monkeypatch, in_two_calls)
    assert not calls
    assert_close(in_two_calls(), stock)
    assert calls
    assert set(calls) == {"causal"}
    bundled.close()


def test_logits_of_a_padded_batch(monkeypatch, calls):
    tiny, prompt = make_model(), tokens(2, BLOCK + 6)

    def run():
        cache = [
            c if layer.is_linear else BatchKVCache([0, 7])
            for layer, c in zip(tiny.layers, tiny.make_cache(), strict=True)
        ]
        return tiny(prompt, cache=cache)

    stock = without(monkeypatch, run)
    assert not calls
    assert_close(run(), stock)
    assert calls
    assert all(isinstance(mask, mx.array) for mask in calls)


def test_other_work_is_left_to_stock(monkeypatch, calls):
    """Half precision, a quantized cache, and FLASHMOE_KERNELS=stock."""
    for dtype, count, cache in (
        (mx.bfloat16, 9, None),
        (mx.float32, 9, QuantizedKVCache(group_size=32)),
    ):
        attend(dtype, count, cache)
    assert not calls
    attend(mx.float32, 9, None)
    assert calls == ["causal"]
    monkeypatch.setenv("FLASHMOE_KERNELS", "stock")
    device._cpu_module.cache_clear()
    attend(mx.float32, 9, None)
    device._cpu_module.cache_clear()
    assert calls == ["causal"]


def attend(dtype, count, cache) -> None:
    layer = make_model(dtype, head_dim=32).layers[-1]
    h = mx.ones((1, count, layer.input_layernorm.weight.size), dtype)
    y = layer.self_attn(h, layer.input_layernorm, "causal" if count > 1 else None, cache)
    assert (y.shape, y.dtype) == (h.shape, dtype)


@pytest.mark.parametrize("rope_dims", [8, 32])
def test_a_step_equals_the_reference(rope_dims):
    """Two rows with seven valid keys in a buffer of nine; RoPE of a part of each head, or all."""
    heads, base, eps = AttentionHeads(6, 2, 32, rope_dims), 1e7, 1e-6
    shapes = (2, 6, 64), (2, 2, 32), (32,), (32,), (2, 2, 9, 32), (2, 2, 9, 32)
    rng = np.random.default_rng(rope_dims)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    projected, new, weight, key_weight, keys, values = arrays
    norms = (weight, eps), (key_weight, eps)
    queries, turned = attention_step.prepare(projected, new, norms, heads, base, 70_000)
    for x, gain, ours in (projected[..., :32], weight, queries), (new, key_weight, turned):
        normed = mx.fast.rms_norm(mx.array(x), mx.array(gain), eps)
        expected = reference.rope(normed, rope_dims, base, 70_000)
        assert np.abs(ours - np.array(expected)).max() <= 1e-5
    ours = attention_step.attend(queries, projected, keys, values, 7)
    some = (mx.array(x[:, :, :7]) for x in (keys, values))
    expected = np.array(reference.attention(mx.array(queries) * 32**-0.5, *some))
    expected /= 1 + np.exp(-projected[..., 32:])
    assert np.abs(ours - expected).max() <= 1e-5
