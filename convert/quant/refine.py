"""Improve codes, scales and biases for the inputs of a matrix, alternately.

With D the error of the weights and H the moments of the inputs, the objective is D H D^T. For fixed
codes, the best scales and biases of a row solve a linear system. For fixed scales, coordinate
descent improves one code at a time. Each row keeps its best result.
"""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..plan.parts import Quant

ROUNDS = 2  # the second gains a fifth of the first's gain
RIDGE = 1e-6  # relative; equal codes leave scales undetermined

Floats = npt.NDArray[np.float32]
Fit = tuple[Floats, Floats, Floats]  # codes `[..., rows, columns]`, scales and biases, as floats


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
    best, least = found, _error(weights, moments, found)
    for _ in range(rounds):
        for improved in (_refit, _recode):
            new = improved(weights, moments, best, quant, dtype)
            error = _error(weights, moments, new)
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


def _error(weights: Floats, moments: Floats, found: Fit) -> Floats:
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
