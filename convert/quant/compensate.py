"""Quantization that makes up for each column's error in the columns that follow (GPTQ).

What counts is not how far weights are off but how far products with a layer's usual inputs are.
With H the second moments of these inputs, rounding column j changes a product by an error that the
columns right of j can cancel in part, in the proportions that H's inverse gives. So columns are
rounded one after another, each after all corrections. A group's scale and bias are fitted when its
first column is due, by `fit`: the less a column can be made up for, the more its errors count.
When all are there, `refine` goes over codes and scales again, each beside all others.

The method is Frantar and others', "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (2022); scales fitted by least squares and the shared moments are ours.
"""

import mlx.core as mx
import numpy as np

from ..plan.parts import Quant
from .codes import Codes
from .fit import fit, pack
from .refine import Fit, Floats, refine

DAMPING = 0.05  # of the mean second moment, added to each: inputs never seen must not cost nothing


def quantize_for(
    weights: Floats, moments: Floats, quant: Quant, dtype: mx.Dtype, damping: float = DAMPING
) -> Codes:
    """Quantize experts' matrices for the inputs that each of them sees.

    Args:
        weights: `[experts, rows, columns]` float32.
        moments: `[experts, columns, columns]` float32, mean of x x^T over an expert's inputs.
        quant: bits and group size; columns are a multiple of the group size.
        dtype: of scales and biases.
        damping: share of the mean second moment to add to each column's.

    Returns:
        codes, scales and biases.
    """
    damped = np.stack([_damped(one, damping) for one in moments])
    upper = np.stack([_upper(one) for one in damped])
    found = _compensated(weights.astype(np.float32, copy=True), upper, quant, dtype)
    found = refine(weights, damped, found, quant, dtype)
    scales, biases = (mx.array(part).astype(dtype) for part in found[1:])
    return Codes(pack(mx.array(found[0]), quant.bits), scales, biases)


def _compensated(left: Floats, upper: Floats, quant: Quant, dtype: mx.Dtype) -> Fit:
    """Quantize `left` group by group, which becomes what is left to quantize."""
    size = quant.group_size
    codes, found = np.empty_like(left), []
    for first in range(0, left.shape[-1], size):
        block = left[..., first : first + size]
        inner = upper[:, first : first + size, first : first + size]
        pivots = np.einsum("ejj->ej", inner)
        importance = mx.array(np.broadcast_to((pivots**-2)[:, None], block.shape))
        _, scales, biases = fit(mx.array(block), quant, dtype, importance)
        scale, bias = (np.array(x.astype(mx.float32)) for x in (scales, biases))
        found.append((scale, bias))
        codes[..., first : first + size], errors = _round(block, scale, bias, inner, quant.bits)
        left[..., first + size :] -= errors @ upper[:, first : first + size, first + size :]
    joined = [np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True)]
    return codes, joined[0], joined[1]


def _damped(moments: Floats, damping: float) -> Floats:
    """Return moments with a share of their mean diagonal added to each; ones if all are zero."""
    damped = moments.astype(np.float32, copy=True)
    diagonal = np.einsum("jj->j", damped)
    diagonal += damping * diagonal.mean() or 1.0
    return damped


def _upper(damped: Floats) -> Floats:
    """Return the upper triangular U with U^T U = H^-1, of damped moments."""
    inverse = np.linalg.inv(damped.astype(np.float64))
    return np.linalg.cholesky(inverse).T.astype(np.float32)


def _round(
    block: Floats, scale: Floats, bias: Floats, upper: Floats, bits: int
) -> tuple[Floats, Floats]:
    """Round a group's columns in turn; return codes, and errors over the columns' pivots."""
    block, errors = block.copy(), np.empty_like(block)
    codes = np.empty_like(block)
    steps = np.where(scale[..., 0] == 0, np.inf, scale[..., 0])
    for j in range(block.shape[-1]):
        column = block[..., j]
        code = np.clip(np.rint((column - bias[..., 0]) / steps), 0, (1 << bits) - 1)
        codes[..., j] = code
        errors[..., j] = (column - (code * scale[..., 0] + bias[..., 0])) / upper[:, None, j, j]
        block[..., j + 1 :] -= errors[..., j, None] * upper[:, None, j, j + 1 :]
    return codes, errors
