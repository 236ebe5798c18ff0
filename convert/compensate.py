"""Quantisation that makes up for each column's error in the columns that follow (GPTQ).

What counts is not how far weights are off but how far products with a layer's usual inputs are.
With H the second moments of these inputs, rounding column j changes a product by an error that the
columns right of j can cancel in part, in the proportions that H's inverse gives. So columns are
rounded one after another, each after all corrections. A group's scale and bias are fitted when its
first column is due, by `fit`: the less a column can be made up for, the more its errors count.

The method is Frantar and others', "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (2022); scales fitted by least squares and the shared moments are ours.
"""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe_mlx.convert.fit import Codes, fit, pack
from flashmoe_mlx.convert.parts import Quant

DAMPING = 0.05  # of the mean second moment, added to each: inputs never seen must not cost nothing

Floats = npt.NDArray[np.float32]


def quantize_for(
    weights: Floats, moments: Floats, quant: Quant, dtype: mx.Dtype, damping: float = DAMPING
) -> Codes:
    """Quantise experts' matrices for the inputs that each of them sees.

    Args:
        weights: `[experts, rows, columns]` float32.
        moments: `[experts, columns, columns]` float32, mean of x x^T over an expert's inputs.
        quant: bits and group size; columns are a multiple of the group size.
        dtype: of scales and biases.
        damping: share of the mean second moment to add to each column's.

    Returns:
        codes, scales and biases.
    """
    left = weights.astype(np.float32, copy=True)
    upper = np.stack([_upper(one, damping) for one in moments])
    size, columns = quant.group_size, weights.shape[-1]
    codes = np.empty(weights.shape, np.uint8)
    found = []
    for first in range(0, columns, size):
        block = left[..., first : first + size]
        inner = upper[:, first : first + size, first : first + size]
        pivots = np.einsum("ejj->ej", inner)
        importance = mx.array(np.broadcast_to((pivots**-2)[:, None], block.shape))
        _, scales, biases = fit(mx.array(block), quant, dtype, importance)
        found.append((scales, biases))
        scale, bias = (np.array(x.astype(mx.float32)) for x in (scales, biases))
        codes[..., first : first + size], errors = _round(block, scale, bias, inner, quant.bits)
        left[..., first + size :] -= errors @ upper[:, first : first + size, first + size :]
    scales, biases = (mx.concatenate(list(x), axis=-1) for x in zip(*found, strict=True))
    return Codes(pack(mx.array(codes), quant.bits), scales, biases)


def _upper(moments: Floats, damping: float) -> Floats:
    """Return the upper triangular U with U^T U = H^-1, of the damped moments."""
    damped = moments.astype(np.float64)
    diagonal = np.einsum("jj->j", damped)
    diagonal += damping * diagonal.mean() or 1.0
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def _round(
    block: Floats, scale: Floats, bias: Floats, upper: Floats, bits: int
) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Round a group's columns in turn; return codes, and errors over the columns' pivots."""
    block, errors = block.copy(), np.empty_like(block)
    codes = np.empty(block.shape, np.uint8)
    steps = np.where(scale[..., 0] == 0, np.inf, scale[..., 0])
    for j in range(block.shape[-1]):
        column = block[..., j]
        code = np.clip(np.rint((column - bias[..., 0]) / steps), 0, (1 << bits) - 1)
        codes[..., j] = code
        errors[..., j] = (column - (code * scale[..., 0] + bias[..., 0])) / upper[:, None, j, j]
        block[..., j + 1 :] -= errors[..., j, None] * upper[:, None, j, j + 1 :]
    return codes, errors
