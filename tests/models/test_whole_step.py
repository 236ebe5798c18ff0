"""A decode step of all layers in one trace, with MLX's ops in the place of GPU kernels."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, BatchKVCache, KVCache
from test_gpu_model import (  # noqa: F401
    attend_by_mlx,
    cache_home,
    differ,
    gpu_path,
    open_model,
    prepare_by_mlx,
    tiny,
)

from flashmoe_mlx.custom_kernels.experts.prefill import gather_matmul
from flashmoe_mlx.custom_kernels.experts.router import route_by_mlx
from flashmoe_mlx.custom_kernels.linear.dequantize import matmul_by_mlx
from flashmoe_mlx.custom_kernels.linear.linear import swiglu
from flashmoe_mlx.models.qwen3_5 import mixers, moe
from flashmoe_mlx.models.qwen3_5.step import DecodeStep

EPS, PROMPT, STEPS = 1e-6, [1, 200, 3], [5, 99, 3, 17, 250, 8, 8]


def experts_by_mlx(x, slots, weights, experts, shared, *, norm, residual):
    x = mx.fast.rms_norm(x, norm[0].array, EPS)
    wide = x[..., None, None, :]
    hidden = swiglu(*(gather_matmul(wide, matrix, slots) for matrix in experts[:2]))
    y = (gather_matmul(hidden, experts[2], slots).squeeze(-2) * weights[..., :-1, None]).sum(-2)
    other = matmul_by_mlx(swiglu(*(matmul_by_mlx(x, m) for m in shared[:2])), shared[2])
    return residual + y + weights[..., -1:] * other


@pytest.fixture
def model(open_model, monkeypatch):  # noqa: F811
    """A model whose layers have traces; caches grow by four slots."""
    monkeypatch.setattr(KVCache, "step", 4)
    monkeypatch.setattr(mixers, "prefers_custom", lambda case: True)
    monkeypatch.setattr(mixers, "prepare", prepare_by_mlx)
    monkeypatch.setattr(mixers, "attend", attend_by_mlx)
    monkeypatch.setattr(moe, "wanted", lambda h, *_: h.shape[1] == 1)
    monkeypatch.setattr(moe, "route", route_by_mlx)
    monkeypatch.setattr(moe, "expert_mlp_by_kernels", experts_by_mlx)
    return open_model()


@pytest.fixture
def taken(monkeypatch):
    """Note for each token whether the whole step ran."""
    found, run = [], DecodeStep.run

    def noted(self, h, *rest):
        y = run(self, h, *rest)
        if h.shape[1] == 1:
            found.append(y is not None)
        return y

    monkeypatch.setattr(DecodeStep, "run", noted)
    return found


def decode(model, rows=1, cache=None, steps=STEPS) -> mx.array:
    """Return each step's logits, `[rows, steps, V]`."""
    cache = cache or model.make_cache()
    model(mx.array([PROMPT] * rows), cache=cache)
    found = mx.concatenate([model(mx.array([[t]] * rows), cache=cache) for t in steps], axis=1)
    mx.eval(found)
    return found


def by_layers(model, monkeypatch, *arguments) -> mx.array:
    with monkeypatch.context() as patch:
        patch.setattr(DecodeStep, "run", lambda *_: None)
        return decode(model, *arguments)


@pytest.mark.parametrize("rows", [1, 3])
def test_equals_the_layers(model, monkeypatch, taken, rows):
    right = by_layers(model, monkeypatch, rows)
    assert differ(decode(model, rows), right) <= 1e-5
    # The cache has room for 4 tokens after the prompt of 3, and grows at 5 and 9.
    assert taken == [True, False, True, True, True, False, True]
    taken.clear()
    assert differ(decode(model, rows), right) <= 1e-5 and taken.count(False) == 2


def test_writes_into_the_caches_buffers(model):
    decode(model)  # traces
    cache = model.make_cache()
    decode(model, cache=cache, steps=STEPS[:2])
    keys = next(c for c in cache if type(c) is KVCache)

    def place() -> int:
        return np.frombuffer(memoryview(keys.keys).cast("B"), np.uint8).ctypes.data

    before = place()
    mx.eval(model(mx.array([[7]]), cache=cache))
    assert place() == before and keys.offset == 6


def test_a_copied_cache_keeps_its_tokens(model):
    cache = model.make_cache()
    decode(model, cache=cache, steps=STEPS[:2])
    kept = copy.deepcopy(cache)
    first = model(mx.array([[7]]), cache=cache)
    mx.eval(first, model(mx.array([[9]]), cache=cache))
    assert mx.array_equal(model(mx.array([[7]]), cache=kept), first)


def test_follows_changed_weights(model, taken):
    before = decode(model)
    taken.clear()
    layer = model.layers[0]
    layer.input_layernorm.weight = 2 * layer.input_layernorm.weight
    after = decode(model)
    assert differ(before, after) > 0.01 and True in taken


def test_other_caches_run_layer_by_layer(model, taken):
    cache = [
        ArraysCache(2, left_padding=[0, 2]) if layer.is_linear else BatchKVCache([0, 2])
        for layer in model.layers
    ]
    decode(model, rows=2, cache=cache)
    assert not any(taken)


def test_a_missing_expert_runs_layer_by_layer(model, taken, monkeypatch):
    monkeypatch.setattr(type(model.layers[0].mlp.switch_mlp), "holds_all", False)
    decode(model)
    assert not any(taken)
