"""GPTQ: compensate each column's rounding error in the columns to its right.

The objective is the error of products with a layer's usual inputs, whose second moments are H.
Columns are rounded in order, and H's inverse distributes each error over the columns not rounded
yet. `fit` finds a group's scale and bias before its first column is rounded, weighting columns by
how little of their error can be compensated.

`refine` then alternates: with D the error of the weights, the objective is D H D^T. For fixed
codes, the best scales and biases of a row solve a linear system; for fixed scales, coordinate
descent improves one code at a time. Each row keeps its best result.

After Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022); the least-squares scales and the shared moments are ours.
"""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..plan.parts import Quant
from .codes import Codes
from .fit import fit, pack

DAMPING = 0.05  # share of the mean second moment to add, so that unseen inputs cost something
ROUNDS = 2  # the second gains a fifth of the first's gain
RIDGE = 1e-6  # relative; equal codes leave scales undetermined

Floats = npt.NDArray[np.float32]
Fit = tuple[Floats, Floats, Floats]  # codes `[..., rows, columns]`, scales and biases, as floats


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


def refine(
    weights: Floats,
    moments: Floats,
    found: Fit,
    quant: Quant,
    dtype: mx.Dtype,
    rounds: int = ROUNDS,
) -> Fit:
    """Improve a quantization; no row gets worse.

    Args:
        weights: `[experts, rows, columns]`.
        moments: `[experts, columns, columns]`, positive definite.
        found: codes of weights' shape, scales and biases `[experts, rows, groups]`.
        quant: bits and group size.
        dtype: of stored scales and biases.
        rounds: how often to improve scales, then codes.
    """
    best, least = found, _row_errors(weights, moments, found)
    for _ in range(rounds):
        for improved in (_refit, _recode):
            new = improved(weights, moments, best, quant, dtype)
            error = _row_errors(weights, moments, new)
            less = error < least
            parts = zip(new, best, strict=True)
            first, second, third = (np.where(less[..., None], a, b) for a, b in parts)
            best, least = (first, second, third), np.where(less, error, least)
    return best


def _restored(found: Fit) -> Floats:
    codes, scales, biases = found
    grouped = codes.reshape(*scales.shape, -1)
    restored: Floats = (grouped * scales[..., None] + biases[..., None]).reshape(codes.shape)
    return restored


def _row_errors(weights: Floats, moments: Floats, found: Fit) -> Floats:
    """Return D H D^T of each row, `[experts, rows]`."""
    off = weights - _restored(found)
    error: Floats = ((off @ moments) * off).sum(-1)
    return error


def _refit(weights: Floats, moments: Floats, found: Fit, quant: Quant, dtype: mx.Dtype) -> Fit:
    """Return the best scales and biases for the same codes."""
    codes, (*rows, groups) = found[0], found[1].shape
    grouped = codes.reshape(*rows, groups, quant.group_size)

    def sums(products: Floats) -> Floats:
        """Sum `[..., columns]` by group, times codes and plain: `[..., 2 groups]`."""
        parts = products.reshape(grouped.shape)
        return np.concatenate([(parts * grouped).sum(-1), parts.sum(-1)], -1)

    system = np.empty((*rows, 2 * groups, 2 * groups))
    for group in range(groups):
        own = slice(group * quant.group_size, (group + 1) * quant.group_size)
        system[..., group, :] = sums(codes[..., own] @ moments[:, own])
        system[..., groups + group, :] = sums(
            np.broadcast_to(moments[:, None, own].sum(-2), codes.shape)
        )
    diagonal = np.einsum("...jj->...j", system)
    diagonal += RIDGE * diagonal + 1e-12
    solved = np.linalg.solve(system, sums(weights @ moments)[..., None])[..., 0]
    stored = np.array(mx.array(solved.astype(np.float32)).astype(dtype).astype(mx.float32))
    return codes, stored[..., :groups], stored[..., groups:]


def _recode(weights: Floats, moments: Floats, found: Fit, quant: Quant, _: mx.Dtype) -> Fit:
    """Return the best codes, column by column, for the same scales and biases."""
    codes, (scales, biases) = found[0].copy(), found[1:]
    most, size = (1 << quant.bits) - 1, quant.group_size
    pull = (weights - _restored(found)) @ moments
    for group in range(scales.shape[-1]):
        own = slice(group * size, (group + 1) * size)
        inner, scale, near = moments[:, own, own], scales[..., group], pull[..., own].copy()
        steps = np.where(scale == 0, np.inf, scale)
        moved = np.empty_like(near)
        for j in range(size):
            code = codes[..., own][..., j]
            off = near[..., j] / inner[:, None, j, j] / steps
            new = np.where(scale == 0, code, np.clip(np.rint(code + off), 0, most))
            moved[..., j] = (new - code) * scale
            code[...] = new
            near -= moved[..., j, None] * inner[:, None, j]
        pull -= moved @ moments[:, own]
    return codes, scales, biases
