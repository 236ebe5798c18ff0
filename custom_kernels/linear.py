"""A linear layer by the fastest executor for its weights."""

import mlx.core as mx
import mlx.nn as nn

from flashmoe_mlx.custom_kernels.executor import cpu_kernels


def linear(layer: nn.Module, x: mx.array) -> mx.array:
    """Apply a linear layer: `[..., in]` to `[..., out]`.

    The CPU kernel takes affine-quantised layers without bias; all else goes to the layer itself.
    """
    kernels = cpu_kernels(x)
    if kernels is None or layer.training or not _plain(layer):
        return layer(x)
    if not kernels.supports(layer.bits, layer.group_size, layer.scales):
        return layer(x)
    cached = getattr(layer, "_packed", None)
    if cached is None or cached[0] is not layer.weight:
        weights = layer.weight, layer.scales, layer.biases
        mx.eval(weights)
        cached = layer.weight, kernels.packed(*weights, layer.bits, layer.group_size)
        layer._packed = cached
    y = kernels.matmul(kernels.rows(x), cached[1])
    return mx.array(y).reshape(*x.shape[:-1], y.shape[-1])


def _plain(layer: nn.Module) -> bool:
    return type(layer) is nn.QuantizedLinear and layer.mode == "affine" and "bias" not in layer
