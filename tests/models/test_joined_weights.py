"""Joined weights: views of one array that follow changes of their layers."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from metal_cpu import metal_on_cpu
from test_gpu_model import cache_home, differ, gpu_path  # noqa: F401

from flashmoe_mlx.custom_kernels.linear.linear import join, joined, linear
from flashmoe_mlx.format.names import PROJECTIONS
from flashmoe_mlx.models.qwen3_5.moe import ResidentExperts


def quantized(rows: int, bits: int = 4, group_size: int = 32) -> nn.QuantizedLinear:
    layer = nn.QuantizedLinear(128, rows, bias=False, bits=bits, group_size=group_size)
    layer.weight, layer.scales, layer.biases = mx.quantize(
        mx.random.normal((rows, 128), key=mx.random.key(rows)), group_size, bits
    )
    return layer.eval()


def test_joined_weights_are_views_of_equal_value():
    layers = [quantized(rows) for rows in (5, 64, 1)]
    before = [dict(layer.items()) for layer in layers]
    weight = join(layers)
    assert weight.ends == [5, 69]
    for layer, old in zip(layers, before, strict=True):
        assert all(mx.array_equal(layer[name], old[name]) for name in old)
    wholes = weight.matrix.codes, weight.matrix.scales, weight.matrix.biases
    for name, whole in zip(("weight", "scales", "biases"), wholes, strict=True):
        assert mx.array_equal(whole, mx.concatenate([old[name] for old in before]))
        places = [np.asarray(layer[name]).ctypes.data for layer in layers]
        top, row = np.asarray(whole).ctypes.data, whole.nbytes // len(whole)
        assert places == [top + start * row for start in (0, 5, 69)]
    assert join(layers) is weight


def test_joining_takes_no_memory():
    layers = [quantized(512) for _ in range(4)]
    mx.eval([layer.parameters() for layer in layers])
    mx.clear_cache()
    before = mx.get_active_memory()
    weight = join(layers)
    assert before >= weight.matrix.codes.nbytes
    mx.clear_cache()
    assert mx.get_active_memory() <= before + weight.matrix.scales.nbytes / 2


@pytest.mark.parametrize("other", [
    lambda: quantized(8, bits=8),
    lambda: quantized(8, group_size=64),
    lambda: nn.Linear(128, 8, bias=False),
    lambda: quantized(8).train(),
    lambda: nn.QuantizedLinear(128, 8, bias=True, group_size=32).eval(),
    lambda: nn.QuantizedLinear(128, 8, bias=False, mode="mxfp4").eval(),
])  # fmt: skip
def test_differently_quantized_layers_are_not_joined(other):
    layers = quantized(8), other()
    weights = [layer.weight for layer in layers]
    assert join(layers) is None
    assert all(layer.weight is w for layer, w in zip(layers, weights, strict=True))


def test_layers_that_are_not_joined_compute_separately():
    x, layers = mx.random.normal((2, 128)), [quantized(5), quantized(8, bits=8)]
    with metal_on_cpu() as session:
        apart, together = linear(x, *layers), joined(x, *layers)
    assert not session.launches
    assert all(mx.array_equal(y, layer(x)) for y, layer in zip(apart, layers, strict=True))
    assert mx.array_equal(together, mx.concatenate(apart, axis=-1))


@pytest.mark.parametrize("names", [
    ["weight"], ["weight", "scales", "biases"], ["scales", "biases"],
])  # fmt: skip
def test_joined_weights_follow_a_change(names):
    x, layers = mx.random.normal((2, 128)), [quantized(5), quantized(70)]
    join(layers)
    fresh = {"weight": ~layers[1].weight, "scales": -layers[1].scales, "biases": mx.ones((70, 4))}
    for name in names:
        layers[1][name] = fresh[name]
    with metal_on_cpu() as session:
        outputs = linear(x, *layers)
    assert session.launches
    for y, layer in zip(outputs, layers, strict=True):
        assert differ(y, layer(x)) <= 1e-5 * mx.abs(y).max().item()


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("part", ["scales", "biases"])
def test_resident_experts_follow_a_change(name, part):
    experts = ResidentExperts(64, 64, 3)
    nn.quantize(experts, group_size=64, bits=4)
    experts.matrices()
    experts[name][part] = new = 2 * experts[name][part]
    assert getattr(experts.matrices()[PROJECTIONS.index(name)], part) is new
