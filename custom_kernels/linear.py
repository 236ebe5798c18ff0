"""Linear layers and the SwiGLU block made of them, by the fastest executor for their weights."""

from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flashmoe_mlx.custom_kernels.executor import cpu_kernels


def linear(x: mx.array, *layers: nn.Module) -> list[mx.array]:
    """Apply each linear layer to the same input: `[..., in]` to one `[..., out]` per layer.

    The CPU kernel takes affine-quantised layers without bias; all else goes to the layer itself.
    """
    kernels = cpu_kernels(x)
    weights = [_packed(kernels, layer) if kernels else None for layer in layers]
    if kernels is None or not any(weights):
        return [layer(x) for layer in layers]
    rows = kernels.rows(x)
    activations = kernels.Activations(rows, kernels.plan(len(rows)))
    return [
        layer(x)
        if weight is None
        else mx.array(activations.times(weight)).reshape(*x.shape[:-1], -1)
        for layer, weight in zip(layers, weights, strict=True)
    ]


def mlp(x: mx.array, gate: nn.Module, up: nn.Module, down: nn.Module) -> mx.array:
    """Run a SwiGLU block, down(silu(gate x) * up x): `[..., H]` to `[..., H]`."""
    kernels = cpu_kernels(x)
    weights = [_packed(kernels, layer) if kernels else None for layer in (gate, up, down)]
    if kernels is None or not all(weights):
        return down(swiglu(gate(x), up(x)))
    return mx.array(kernels.mlp(kernels.rows(x), *weights)).reshape(x.shape)


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up."""
    return nn.silu(gate) * up


def _packed(kernels: ModuleType, layer: nn.Module) -> Any:
    """View a layer's weights for the CPU kernels, or return None if they do not take it."""
    plain = type(layer) is nn.QuantizedLinear and layer.mode == "affine" and "bias" not in layer
    if not plain or layer.training:
        return None
    if not kernels.supports(layer.bits, layer.group_size, layer.scales):
        return None
    cached = getattr(layer, "_packed", None)
    if cached is None or cached[0] is not layer.weight:
        weights = layer.weight, layer.scales, layer.biases
        mx.eval(weights)
        cached = layer.weight, kernels.packed(*weights, layer.bits, layer.group_size)
        layer._packed = cached
    return cached[1]
