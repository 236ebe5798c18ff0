"""GPTQ: compensate each column's rounding error in the columns to its right.

The objective is the error of products with a layer's usual inputs, whose second moments are H: with
D the error of the weights, the sum over rows of D H D^T. Columns are rounded in order, and H's
inverse distributes each error over the columns not rounded yet. `fit` finds a group's scale and
bias before its first column is rounded, weighting columns by how little of their error can be
compensated.

Then all scales and biases of a row are fitted together for its codes, and sweeps improve one group
after the other: its scale and bias, then each of its codes. No step makes a row worse.

`compensate_cpu` has the same steps in numba. After Frantar et al., "GPTQ: Accurate Post-Training
Quantization for Generative Pre-trained Transformers" (2022); the least-squares scales, the sweeps
and the shared moments are ours.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..plan.parts import Quant
from .codes import Codes, has_numba
from .fit import STARTS, STEPS, fit, pack
from .products import product, solve, upper_factor

DAMPING = 0.05  # share of the mean second moment to add, so that unseen inputs cost something
SWEEPS = 4  # more gain less than 0.3 %
RIDGE = 1e-6  # relative; equal codes leave scales undetermined

Floats = npt.NDArray[np.float32]
Fit = tuple[mx.array, mx.array, mx.array]  # codes `[rows, columns]`, scales, biases: float32


class Rounded(NamedTuple):
    """Codes `[rows, columns]`, scales and biases `[rows, groups]`, all float32."""

    codes: Floats
    scales: Floats
    biases: Floats

    def restored(self) -> Floats:
        """Return the weights `[rows, columns]`, not rounded to the dtype of the scales."""
        grouped = self.codes.reshape(*self.scales.shape, -1)
        wide: Floats = grouped * self.scales[..., None] + self.biases[..., None]
        return wide.reshape(self.codes.shape)

    def packed(self, quant: Quant, dtype: mx.Dtype) -> Codes:
        """Return the codes packed, and the rest in `dtype`."""
        scales, biases = (mx.array(part).astype(dtype) for part in self[1:])
        return Codes(pack(mx.array(self.codes), quant.bits), scales, biases)


def quantize_for(
    weights: Floats, moments: Floats, quant: Quant, dtype: mx.Dtype, wanted: Floats | None = None
) -> Rounded:
    """Quantize a matrix for its inputs; with numba, any thread may call this.

    Args:
        weights: `[rows, columns]` float32.
        moments: `[columns, columns]` float32, mean of x x^T over the inputs.
        quant: bits and group size, which divides columns.
        dtype: of scales and biases.
        wanted: mean of y x^T, if the products shall be close to those of `weights` with y.
    """
    ridge = np.float32(DAMPING * np.diag(moments).mean() or 1.0)
    damped = _plus(moments, ridge)
    factor = upper_factor(damped)
    if wanted is not None:
        weights = solve(product(weights, _plus(wanted, ridge)), factor)
    if has_numba():
        return _on_cpu(weights, damped, factor, quant, dtype)
    return Rounded(*map(np.array, compensated(weights, damped, factor, quant, dtype)))


def _plus(moments: Floats, ridge: np.float32) -> Floats:
    """Add `ridge` to the diagonal."""
    damped = moments.astype(np.float32, copy=True)
    np.einsum("jj->j", damped)[:] += ridge
    return damped


def _on_cpu(
    weights: Floats, damped: Floats, factor: Floats, quant: Quant, dtype: mx.Dtype
) -> Rounded:
    """`compensated` in numba; uses no MLX, whose arrays belong to one thread."""
    from .compensate_cpu import compensated
    from .fit_cpu import KINDS

    shares = np.array(STARTS, np.float32)
    form = quant.bits, quant.group_size, KINDS[dtype]
    return Rounded(*compensated(weights, damped, factor, form, shares, STEPS, SWEEPS))


def compensated(
    weights: Floats, damped: Floats, factor: Floats, quant: Quant, dtype: mx.Dtype
) -> Fit:
    """Quantize a matrix, with MLX's ops on the default device.

    Args:
        weights: `[rows, columns]` float32.
        damped: H, `[columns, columns]`.
        factor: `products.upper_factor(damped)`.
        quant: bits and group size.
        dtype: that scales and biases are rounded to.
    """
    moments, exact = mx.array(damped), mx.array(weights)
    upper = mx.array(np.linalg.inv(factor.astype(np.float64)).astype(np.float32))
    found = _start(exact, upper, quant, dtype)
    found = _refit(exact, moments, found, quant, dtype)
    for _ in range(SWEEPS):
        found = _sweep(exact, moments, found, quant, dtype)
    return found


def _start(left: mx.array, upper: mx.array, quant: Quant, dtype: mx.Dtype) -> Fit:
    """Quantize group by group, compensating the later groups."""
    parts, size = [], quant.group_size
    for first in range(0, left.shape[1], size):
        block, inner = left[:, :size], upper[first : first + size, first : first + size]
        importance = mx.broadcast_to(mx.diag(inner) ** -2, block.shape)
        found = fit(block, quant, dtype, importance)
        scale, bias = (x.astype(mx.float32) for x in (found.scales, found.biases))
        codes, errors = _round(block, scale[:, 0], bias[:, 0], inner, quant.bits)
        left = left[:, size:] - errors @ upper[first : first + size, first + size :]
        parts.append((codes, scale, bias))
        mx.eval(parts[-1], left)
    codes, scales, biases = (mx.concatenate(list(p), axis=1) for p in zip(*parts, strict=True))
    return codes, scales, biases


def _round(
    block: mx.array, scale: mx.array, bias: mx.array, inner: mx.array, bits: int
) -> tuple[mx.array, mx.array]:
    """Round a group's columns in order; return codes, and errors divided by the pivots."""
    codes, errors = [], []
    for j in range(block.shape[1]):
        column = block[:, j]
        codes.append(_nearest((column - bias) / mx.where(scale == 0, mx.inf, scale), bits))
        errors.append((column - (codes[-1] * scale + bias)) / inner[j, j])
        block = block - errors[-1][:, None] * inner[j]
    return mx.stack(codes, axis=1), mx.stack(errors, axis=1)


def _nearest(codes: mx.array, bits: int) -> mx.array:
    return mx.clip(mx.round(codes), 0, (1 << bits) - 1)


def _restored(found: Fit) -> mx.array:
    codes, scales, biases = found
    grouped = codes.reshape(*scales.shape, -1)
    return (grouped * scales[..., None] + biases[..., None]).reshape(codes.shape)


def _refit(weights: mx.array, moments: mx.array, found: Fit, quant: Quant, dtype: mx.Dtype) -> Fit:
    """Fit all scales and biases of each row together, for the same codes."""
    codes, (rows, groups) = found[0], found[1].shape
    size = quant.group_size
    grouped = codes.reshape(rows, groups, size)

    def sums(products: mx.array) -> mx.array:
        """Sum `[..., columns]` by group, times codes and plain: `[..., 2 groups]`."""
        parts = products.reshape(-1, groups, size)
        return mx.concatenate([(parts * grouped).sum(-1), parts.sum(-1)], axis=-1)

    def line(group: int, values: mx.array) -> mx.array:
        own = slice(group * size, group * size + size)
        return sums(mx.broadcast_to(values[:, own] @ moments[own], codes.shape))

    ones = mx.ones((1, codes.shape[1]))
    lines = [line(group, values) for values in (codes, ones) for group in range(groups)]
    system = np.array(mx.stack(lines, axis=1)).astype(np.float64)
    np.einsum("...jj->...j", system)[:] *= 1 + RIDGE
    np.einsum("...jj->...j", system)[:] += 1e-12
    wanted = np.array(sums(weights @ moments))[..., None]
    solved = mx.array(np.linalg.solve(system, wanted)[..., 0].astype(np.float32))
    stored = solved.astype(dtype).astype(mx.float32)
    new = codes, stored[:, :groups], stored[:, groups:]
    less = _row_errors(weights, moments, new) < _row_errors(weights, moments, found)
    scales, biases = (
        mx.where(less[:, None], a, b) for a, b in zip(new[1:], found[1:], strict=True)
    )
    return codes, scales, biases


def _row_errors(weights: mx.array, moments: mx.array, found: Fit) -> mx.array:
    """Return D H D^T of each row."""
    off = weights - _restored(found)
    return ((off @ moments) * off).sum(-1)


def _sweep(weights: mx.array, moments: mx.array, found: Fit, quant: Quant, dtype: mx.Dtype) -> Fit:
    """Improve scale and bias, then the codes, of one group after the other."""
    parts, size = [], quant.group_size
    pull = (weights - _restored(found)) @ moments
    for group in range(found[1].shape[1]):
        own = slice(group * size, group * size + size)
        before = found[0][:, own], found[1][:, group], found[2][:, group]
        inner = moments[own, own]
        scale, bias = _rescale(pull[:, own], before, inner, dtype)
        moved = before[0] * (scale - before[1])[:, None] + (bias - before[2])[:, None]
        codes = _descend(pull[:, own] - moved @ inner, before[0], inner, scale, quant.bits)
        moved = moved + (codes - before[0]) * scale[:, None]
        pull = pull - moved @ moments[own]
        parts.append((codes, scale[:, None], bias[:, None]))
        mx.eval(parts[-1], pull)
    codes, scales, biases = (mx.concatenate(list(p), axis=1) for p in zip(*parts, strict=True))
    return codes, scales, biases


def _rescale(
    pull: mx.array, found: Fit, inner: mx.array, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Return the best scale and bias of a group, or the old ones if rounding makes them worse."""
    codes, scale, bias = found
    along = codes @ inner
    squares, cross, total = (along * codes).sum(-1), along.sum(-1), inner.sum()
    first, second = (pull * codes).sum(-1), pull.sum(-1)
    spread = squares * total - cross * cross
    known = spread > 1e-5 * squares * total
    change = (first * total - second * cross) / mx.where(known, spread, 1.0)
    new = (scale + mx.where(known, change, 0.0)).astype(dtype).astype(mx.float32)
    change = new - scale
    shifted = (bias + (second - change * cross) / total).astype(dtype).astype(mx.float32)
    shift = shifted - bias
    gain = 2 * (change * first + shift * second)
    gain = gain - change**2 * squares - shift * (2 * change * cross + shift * total)
    return mx.where(gain > 0, new, scale), mx.where(gain > 0, shifted, bias)


def _descend(
    near: mx.array, codes: mx.array, inner: mx.array, scale: mx.array, bits: int
) -> mx.array:
    """Choose each code of a group for the others."""
    chosen, steps = [], mx.where(scale == 0, mx.inf, scale)
    for j in range(codes.shape[1]):
        chosen.append(_nearest(codes[:, j] + near[:, j] / inner[j, j] / steps, bits))
        moved = (chosen[-1] - codes[:, j]) * scale
        near = near - moved[:, None] * inner[j]
    return mx.stack(chosen, axis=1)
