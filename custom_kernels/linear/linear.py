"""Linear layers and the SwiGLU block."""

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
from ..launch import is_cuda, rounds_products
from ..op import Op
from ..packed import pack
from ..weights import QuantizedMatrix, arrays_of, is_affine, norm_parts, remembered
from .cases import MatvecCase, NormedMatvecCase
from .dequantize import MatmulCase, matmul, matmul_by_mlx
from .matvec import MAX_TOKENS, dequant_matvec, supports

T = TypeVar("T")
TRIED_TOKENS = 256, 1024, 2047  # per prompt chunk; mlx-lm's generate_step makes 2047


@Op
def linear(
    x: mx.array,
    *layers: nn.Module,
    norm: nn.RMSNorm | None = None,
    residual: mx.array | None = None,
) -> list[mx.array]:
    """Apply each linear layer to the same input: `[..., in]` to one `[..., out]` per layer.

    Kernels take affine-quantized layers without bias; other layers run themselves.

    Args:
        x: `[..., in]`.
        layers: nn.Linear, nn.QuantizedLinear or a replacement.
        norm: applied to x first.
        residual: `[..., out]` to add; takes one layer.
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
    if not on_gpu(x) or not (weights := join(layers)):
        return None
    y = _by_gpu(x, weights.matrix, norm, residual, x.dtype)
    return list(mx.split(y, weights.ends, axis=-1)) if weights.ends else [y]


@linear.register
def _linear_by_cpu(
    x: mx.array,
    *layers: nn.Module,
    norm: nn.RMSNorm | None = None,
    residual: mx.array | None = None,
) -> list[mx.array] | None:
    if (kernels := cpu_kernels(x)) is None or (steps := cpu_steps(x)) is None:
        return None
    if (step := steps.linear_step(x, layers, norm, residual)) is not None:
        return step
    weights = [_packed(kernels, layer) for layer in layers]
    if not any(weights):
        return None
    normed = x if norm is None else norm(x)
    rows = kernels.rows(normed)
    outputs = [
        layer(normed)
        if weight is None
        else mx.array(kernels.times(rows, weight).reshape(*x.shape[:-1], -1))
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

    The result has x's dtype unless `dtype` is given; kernels round once, to that dtype.
    """
    return mx.concatenate(linear(x, *layers, norm=norm), axis=-1).astype(dtype or x.dtype)


@joined.register
def _joined_by_gpu(
    x: mx.array,
    *layers: nn.Module,
    norm: nn.RMSNorm | None = None,
    dtype: mx.Dtype | None = None,
) -> mx.array | None:
    if not on_gpu(x) or not (weights := join(layers)):
        return None
    return _by_gpu(x, weights.matrix, norm, None, dtype or x.dtype)


class Joined(NamedTuple):
    """The weights of layers that share their input, stacked in one matrix.

    Attributes:
        matrix: `[sum of out, in]`.
        ends: end row of each layer but the last.
    """

    matrix: QuantizedMatrix
    ends: list[int]


def join(layers: Sequence[nn.Module]) -> Joined | None:
    """Join the weights of layers, or return None if their formats differ.

    Takes no extra memory: each layer's weights become views of the joined ones.
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
    names = "weight", "scales", "biases"
    parts = pack(*([layer[name] for layer in layers] for name in names))
    for name, part in zip(names, parts, strict=True):
        views = [part.array[a:b] for a, b in pairwise(ends)]
        mx.eval(views)
        for layer, view in zip(layers, views, strict=True):
            layer[name] = view
    return Joined(QuantizedMatrix.of(parts, first.bits, first.group_size), ends[1:-1])


def _by_gpu(
    x: mx.array,
    matrix: QuantizedMatrix,
    norm: nn.RMSNorm | None,
    residual: mx.array | None,
    dtype: mx.Dtype,
) -> mx.array:
    tokens = x.size // x.shape[-1]
    keeps = x.dtype in (matrix.scales.dtype, mx.float32)  # else stock widens the result
    kind = MatvecCase if norm is None else NormedMatvecCase
    if keeps and tokens <= MAX_TOKENS and prefers_custom(_case(kind, matrix, x, tokens)):
        gain = None if norm is None else norm_parts(norm)
        options: dict[str, Any] = {"norm": gain, "residual": residual, "dtype": dtype}
        return dequant_matvec(x, *matrix.bound, matrix.bits, **options)
    if norm is not None:
        x = norm(x)
    # MLX's own kernel for fewer tokens takes half a minute to compile on NVIDIA.
    least = MAX_TOKENS + 1 if is_cuda() else TRIED_TOKENS[0]
    tried = max((n for n in TRIED_TOKENS if n <= tokens), default=TRIED_TOKENS[0])
    by_matmul = tokens >= least and keeps and not rounds_products(x)
    if by_matmul and prefers_custom(_case(MatmulCase, matrix, x, tried)):
        y = matmul(x, matrix)
    else:
        y = matmul_by_mlx(x, matrix)
    return y.astype(dtype) if residual is None else residual + y


def _case(kind: Callable[..., T], matrix: QuantizedMatrix, x: mx.array, tokens: int) -> T:
    rows, columns = matrix.scales.shape[0], x.shape[-1]
    dtypes = NAMES[x.dtype], NAMES[matrix.scales.dtype]
    return kind(rows, columns, matrix.bits, matrix.group_size, *dtypes, tokens)


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


@mlp.register
def _mlp_by_gpu(x: mx.array, gate: nn.Module, up: nn.Module, down: nn.Module) -> mx.array | None:
    if not on_gpu(x):
        return None
    hidden = swiglu(*(linear(x, layer)[0] for layer in (gate, up)))
    return linear(hidden, down)[0]


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up."""
    return nn.silu(gate) * up


def product_by_cpu(x: mx.array, layer: nn.Module) -> mx.array | None:
    """Multiply by a quantized layer's matrix, without its bias: `[..., in]` to `[..., out]`.

    None if the CPU kernels do not support `x` or the layer's format.
    """
    if (kernels := cpu_kernels(x)) is None or (weight := _viewed(kernels, layer)) is None:
        return None
    return mx.array(kernels.times(kernels.rows(x), weight).reshape(*x.shape[:-1], -1))


def _packed(kernels: ModuleType, layer: nn.Module) -> Any:
    """View a layer's weights for the CPU kernels, or return None if its format is unsupported."""
    return _viewed(kernels, layer) if is_affine(layer) else None


def _viewed(kernels: ModuleType, layer: nn.Module) -> Any:
    if layer.mode != "affine" or not kernels.supports(layer.bits, layer.group_size, layer.scales):
        return None

    def view() -> Any:
        mx.eval(arrays_of([layer]))
        return QuantizedMatrix.of_layer(layer).packed

    return remembered(layer, "_packed", lambda: arrays_of([layer]), view)
