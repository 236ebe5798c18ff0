"""Traced steps in plain MLX: they run once in Python, and only with unchanged weights."""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from test_gpu_model import cache_home, gpu_path  # noqa: F401

from flashmoe_mlx.custom_kernels.traced import Traced


class Layer(nn.Module):
    """A scale, and a norm of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.scale = mx.ones(4)
        self.inner = nn.Sequential(nn.RMSNorm(4))
        self.norm = nn.RMSNorm(4)

    def __call__(self, x: mx.array) -> mx.array:
        self.calls += 1
        return self.scale * self.norm(x)


def traced_layer() -> tuple[Layer, nn.RMSNorm, mx.array, Traced]:
    layer, outer, x, traced = Layer(), nn.RMSNorm(4), mx.arange(4.0)[None], Traced()
    assert not traced.ready(x) and traced.functions == ()
    traced.trace((x,), (layer, outer), lambda x: layer(outer(x)), lambda x: 2 * layer(x))
    return layer, outer, x, traced


@pytest.mark.usefixtures("compiled")
def test_traced_functions_run_once_in_python():
    layer, outer, x, traced = traced_layer()
    first, second = traced.functions
    for value in (x, x + 1, -x):
        assert traced.ready(value)
        assert mx.allclose(first(value), layer.scale * layer.norm(outer(value)))
        assert mx.allclose(second(value), 2 * layer.scale * layer.norm(value))
    assert layer.calls == 2


@pytest.mark.parametrize("change", [
    lambda layer, outer: setattr(layer, "scale", mx.zeros(4)),
    lambda layer, outer: setattr(layer.norm, "weight", mx.zeros(4)),
    lambda layer, outer: setattr(outer, "weight", mx.zeros(4)),
    lambda layer, outer: setattr(layer, "norm", nn.RMSNorm(4)),
    lambda layer, outer: layer.pop("scale"),
    lambda layer, outer: layer.set_dtype(mx.bfloat16),
    lambda layer, outer: layer.update({"scale": mx.zeros(4)}),
])  # fmt: skip
def test_traced_functions_do_not_outlive_their_weights(change):
    layer, outer, x, traced = traced_layer()
    change(layer, outer)
    assert not traced.ready(x)


def test_traced_functions_hold_for_one_shape_and_dtype():
    layer, outer, x, traced = traced_layer()
    assert not traced.ready(mx.ones((2, 4)))
    assert not traced.ready(x.astype(mx.bfloat16))
    traced.trace((mx.ones((2, 4)),), (layer, outer), layer)
    assert traced.ready(mx.ones((2, 4))) and not traced.ready(x)


def test_restored_weights_reuse_their_trace():
    layer, _, x, traced = traced_layer()
    scale = layer.scale
    layer.scale = mx.zeros(4)
    assert not traced.ready(x)
    layer.scale = scale
    assert traced.ready(x)


def test_a_copy_is_not_traced():
    layer, _, x, traced = traced_layer()
    layer._step = traced
    twin = copy.deepcopy(layer)
    assert not twin._step.ready(x) and twin._step.functions == ()
    assert traced.ready(x)
