"""GPTQ: compensate each column's rounding error in the columns to its right.

The objective is the error of products with a layer's usual inputs, whose second moments are H.
Columns are rounded in order, and H's inverse distributes each error over the columns not rounded
yet. `fit` finds a group's scale and bias before its first column is rounded, weighting columns by
how little of their error can be compensated. `refine` then improves codes and scales.

After Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022); the least-squares scales and the shared moments are ours.
"""

import mlx.core as mx
import numpy as np

from ..plan.parts import Quant
from .codes import Codes
from .fit import fit, pack
from .refine import Fit, Floats, refine

DAMPING = 0.05  # share of the mean second moment to add, so that unseen inputs cost something


def quantize_for(
    weights: Floats, moments: Floats, quant: Quant, dtype: mx.Dtype, damping: float = DAMPING
) -> Codes:
    """Quantize experts' matrices for their inputs.

    Args:
        weights: `[experts, rows, columns]` float32.
        moments: `[experts, columns, columns]` float32, mean of x x^T over an expert's inputs.
        quant: bits and group size, which divides columns.
        dtype: of scales and biases.
        damping: see DAMPING.
    """
    damped = np.stack([_damped(one, damping) for one in moments])
    upper = np.stack([_upper(one) for one in damped])
    found = _compensated(weights.astype(np.float32, copy=True), upper, quant, dtype)
    found = refine(weights, damped, found, quant, dtype)
    scales, biases = (mx.array(part).astype(dtype) for part in found[1:])
    return Codes(pack(mx.array(found[0]), quant.bits), scales, biases)


def _compensated(left: Floats, upper: Floats, quant: Quant, dtype: mx.Dtype) -> Fit:
    """Quantize `left` group by group, compensating the later groups in place."""
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
    """Add a share of the mean diagonal to the diagonal; 1 if all moments are zero."""
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
    """Round a group's columns in order; return codes, and errors divided by the pivots."""
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
