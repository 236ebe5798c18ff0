"""Linear layers and the SwiGLU block made of them."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn

from ..autotune import prefers_custom
from ..case import NAMES
from ..cpu.entry import cpu_steps
from ..device import cpu_kernels, on_gpu
from ..launch import rounds_products, scalar
from ..op import Op
from ..weights import QuantizedMatrix, arrays_of, is_affine, remembered
from .cases import MatvecCase, NormedMatvecCase
from .dequantize import MatmulCase, matmul, matmul_by_mlx
from .matvec import MAX_TOKENS, dequant_matvec, supports

T = TypeVar("T")
TRIED_TOKENS = 256, 1024, 2047  # of prompts; the last as mlx-lm's generate_step makes them


@Op
def linear(
    x: mx.array,
    *layers: nn.Module,
    norm: nn.RMSNorm | None = None,
    residual: mx.array | None = None,
) -> list[mx.array]:
    """Apply each linear layer to the same input: `[..., in]` to one `[..., out]` per layer.

    Kernels take affine-quantized layers without bias; all else goes to the layer itself.

    Args:
        x: `[..., in]`.
        layers: nn.Linear, nn.QuantizedLinear, or what has taken their place.
        norm: to apply to x first.
        residual: `[..., out]` to add, with one layer only.
    """
    normed = x if norm is None else norm(x)
    return _plus(residual, [layer(normed) for layer in layers])


@linear.register
def _linear_by_gpu(
    x: mx.array,
    *layers: nn.Module,
    norm: nn.RMSNorm | None = None,
    residual: mx.array | None = None,
) -> list[mx.array] | None:
    if not on_gpu(x) or not (weight := join(layers)):
        return None
    y = _by_gpu(x, weight, norm, residual, x.dtype)
    return list(mx.split(y, weight.ends, axis=-1)) if weight.ends else [y]


@linear.register
def _linear_step_by_cpu(
    x: mx.array,
    *layers: nn.Module,
    norm: nn.RMSNorm | None = None,
    residual: mx.array | None = None,
) -> list[mx.array] | None:
    steps = cpu_steps(x)
    return steps.linear_step(x, layers, norm, residual) if steps else None


@linear.register
def _linear_by_cpu(
    x: mx.array,
    *layers: nn.Module,
    norm: nn.RMSNorm | None = None,
    residual: mx.array | None = None,
) -> list[mx.array] | None:
    if (kernels := cpu_kernels(x)) is None:
        return None
    weights = [_packed(kernels, layer) for layer in layers]
    if not any(weights):
        return None
    normed = x if norm is None else norm(x)
    rows = kernels.rows(normed)
    activations = kernels.Activations(rows, kernels.plan(len(rows)))
    outputs = [
        layer(normed)
        if weight is None
        else mx.array(activations.times(weight)).reshape(*x.shape[:-1], -1)
        for layer, weight in zip(layers, weights, strict=True)
    ]
    return _plus(residual, outputs)


def _plus(residual: mx.array | None, outputs: list[mx.array]) -> list[mx.array]:
    return outputs if residual is None else [residual + outputs[0]]


@Op
def joined(
    x: mx.array,
    *layers: nn.Module,
    norm: nn.RMSNorm | None = None,
    dtype: mx.Dtype | None = None,
) -> mx.array:
    """Apply linear layers to the same input: `[..., in]` to `[..., sum of out]`, side by side.

    The result has x's dtype unless another is given; a kernel rounds once, to that.
    """
    return mx.concatenate(linear(x, *layers, norm=norm), axis=-1).astype(dtype or x.dtype)


@joined.register
def _joined_by_gpu(
    x: mx.array,
    *layers: nn.Module,
    norm: nn.RMSNorm | None = None,
    dtype: mx.Dtype | None = None,
) -> mx.array | None:
    if not on_gpu(x) or not (weight := join(layers)):
        return None
    return _by_gpu(x, weight, norm, None, dtype or x.dtype)


class Joined(NamedTuple):
    """The weights of layers that share their input, one below the other in one matrix.

    Attributes:
        bank: `[sum of out, ...]`.
        ends: rows at which all layers but the last end.
    """

    bank: QuantizedMatrix
    ends: list[int]


def join(layers: Sequence[nn.Module]) -> Joined | None:
    """Join the weights of layers, or return None if they are not quantized alike.

    It takes no memory: each layer's weights become views of the joined ones.
    """
    return remembered(layers[0], "_joined", lambda: arrays_of(layers), lambda: _join(layers))


def _join(layers: Sequence[nn.Module]) -> Joined | None:
    first = layers[0]
    if not all(is_affine(layer) for layer in layers):
        return None
    formats = {(layer.bits, layer.group_size, layer.scales.dtype) for layer in layers}
    if len(formats) > 1 or not supports(first.bits, first.group_size):
        return None
    ends = [0]
    for layer in layers:
        ends.append(ends[-1] + layer.weight.shape[0])
    arrays = []
    for name in ("weight", "scales", "biases"):
        whole = mx.concatenate([layer[name] for layer in layers])
        views = [whole[a:b] for a, b in pairwise(ends)]
        mx.eval(whole, views)
        for layer, view in zip(layers, views, strict=True):
            layer[name] = view
        arrays.append(whole)
    return Joined(QuantizedMatrix.of(arrays, first.bits, first.group_size), ends[1:-1])


def _by_gpu(
    x: mx.array,
    weight: Joined,
    norm: nn.RMSNorm | None,
    residual: mx.array | None,
    dtype: mx.Dtype,
) -> mx.array:
    bank, tokens = weight.bank, x.size // x.shape[-1]
    keeps = x.dtype in (bank.scales.dtype, mx.float32)  # else stock widens the result
    kind = MatvecCase if norm is None else NormedMatvecCase
    if keeps and tokens <= MAX_TOKENS and prefers_custom(_case(kind, bank, x, tokens)):
        arrays = bank.codes, bank.scales, bank.biases
        gain = None if norm is None else (norm.weight, scalar(norm.eps))
        return dequant_matvec(x, *arrays, bank.bits, norm=gain, residual=residual, dtype=dtype)
    if norm is not None:
        x = norm(x)
    tried = max((n for n in TRIED_TOKENS if n <= tokens), default=0)
    by_matmul = tried and keeps and not rounds_products(x)
    if by_matmul and prefers_custom(_case(MatmulCase, bank, x, tried)):
        y = matmul(x, bank)
    else:
        y = matmul_by_mlx(x, bank)
    return y.astype(dtype) if residual is None else residual + y


def _case(kind: Callable[..., T], bank: QuantizedMatrix, x: mx.array, tokens: int) -> T:
    rows, columns = bank.scales.shape[0], x.shape[-1]
    dtypes = NAMES[x.dtype], NAMES[bank.scales.dtype]
    return kind(rows, columns, bank.bits, bank.group_size, *dtypes, tokens)


@Op
def mlp(x: mx.array, gate: nn.Module, up: nn.Module, down: nn.Module) -> mx.array:
    """Run a SwiGLU block, down(silu(gate x) * up x): `[..., H]` to `[..., H]`."""
    return down(swiglu(gate(x), up(x)))


@mlp.register
def _mlp_by_cpu(x: mx.array, gate: nn.Module, up: nn.Module, down: nn.Module) -> mx.array | None:
    if (kernels := cpu_kernels(x)) is None:
        return None
    weights = [_packed(kernels, layer) for layer in (gate, up, down)]
    return (
        mx.array(kernels.mlp(kernels.rows(x), *weights)).reshape(x.shape) if all(weights) else None
    )


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up."""
    return nn.silu(gate) * up


def _packed(kernels: ModuleType, layer: nn.Module) -> Any:
    """View a layer's weights for the CPU kernels, or return None if they do not take it."""
    if not is_affine(layer) or not kernels.supports(layer.bits, layer.group_size, layer.scales):
        return None

    def view() -> Any:
        mx.eval(arrays_of([layer]))
        return QuantizedMatrix.of_layer(layer).packed

    return remembered(layer, "_packed", lambda: arrays_of([layer]), view)
