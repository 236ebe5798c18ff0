"""`compensate.compensated` in numba for CPUs: the same steps, one block of rows at a time.

Each runs on one thread: callers run several experts at once.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ...custom_kernels.cpu.bounds import jit
from .fit_cpu import fit_group, stored
from .products_cpu import PANEL, add_product, panels_of, solve_upper

Array = npt.NDArray[Any]
RIDGE = 1e-6  # relative; equal codes leave scales undetermined
ROWS = 32  # of one block: its rows stay in the core's cache while H passes through it


@jit(error_model="numpy")
def _round(target: Array, weights: Array, mixing: Array, scale: Any, bias: Any, most: Any,
           codes: Array, errors: Array) -> None:  # fmt: skip
    """Round one row's group column by column; each column absorbs the errors before it."""
    inverse = np.float32(0.0) if scale == 0 else np.float32(1.0) / scale
    for j in range(len(target)):
        code = np.rint((target[j] - bias) * inverse)
        code = min(max(code, np.float32(0.0)), most)
        error = target[j] - (code * scale + bias)
        codes[j], errors[j] = code, error + weights[j] - target[j]
        for k in range(j + 1, len(target)):
            target[k] += error * mixing[j, k]


@jit(error_model="numpy")
def mixing_of(factor: Array, size: int) -> Array:
    """Return what each column absorbs of the errors before it, `[columns, columns]`.

    Above a group's diagonal block: of errors of the weights of earlier groups. Within the block:
    of errors of the group's compensated weights.

    Args:
        factor: upper triangular R with R R^T = H.
        size: of a group.
    """
    out = factor.copy()
    for first in range(0, len(factor), size):
        end = first + size
        corner = factor[first:end, first:end].copy()
        above = factor[:first, first:end].copy()
        solve_upper(above, corner)
        out[:first, first:end] = above
        inner = np.eye(size, dtype=np.float32)
        solve_upper(inner, corner)
        for j in range(size):
            for k in range(size):
                out[first + j, first + k] = -inner[j, k] * corner[j, j]
    return out


@jit(error_model="numpy")
def _start(
    weights: Array, mixing: Array, panels: Array, importance: Array, bits: int, kind: int,
    shares: Array, steps: int, codes: Array, scales: Array, biases: Array, errors: Array,
) -> None:  # fmt: skip
    """GPTQ of a block of rows; writes codes, scales, biases, and errors of the weights."""
    rows, columns = weights.shape
    size = columns // scales.shape[1]
    most = np.float32((1 << bits) - 1)
    target, best = weights.copy(), np.empty(size, np.float32)
    for group in range(scales.shape[1]):
        first = group * size
        end = first + size
        inner = mixing[first:end, first:end]
        for p in range(first // PANEL, end // PANEL):
            add_product(
                errors, 0, columns, 1, rows, first, panels[p], 0, target, p * PANEL, columns
            )
        for r in range(rows):
            scale, bias = fit_group(
                target[r, first:end], importance[first:end], bits, kind, shares, steps,
                np.float32(0.0), np.float32(0.0), best,
            )  # fmt: skip
            scales[r, group], biases[r, group] = scale, bias
            _round(
                target[r, first:end], weights[r, first:end], inner, scale, bias, most,
                codes[r, first:end], errors[r, first:end],
            )  # fmt: skip


@jit(error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def _rescale(pull: Array, codes: Array, inner: Array, scale: Any, bias: Any, kind: int,
             along: Array) -> tuple[Any, Any, Any]:  # fmt: skip
    """Return the least-squares scale and bias for these codes, and by how much they improve.

    `along` receives the products of the codes with the group's moments.
    """
    size = len(codes)
    along[:] = np.float32(0.0)
    for j in range(size):
        for k in range(size):
            along[k] += codes[j] * inner[j, k]
    squares = cross = total = first = second = np.float32(0.0)
    for j in range(size):
        row = np.float32(0.0)
        for k in range(size):
            row += inner[j, k]
        total += row
        squares += codes[j] * along[j]
        cross += along[j]
        first += pull[j] * codes[j]
        second += pull[j]
    spread = squares * total - cross * cross
    change = np.float32(0.0)
    if spread > np.float32(1e-5) * squares * total:
        change = (first * total - second * cross) / spread
    new = stored(scale + change, kind)
    change = new - scale
    shifted = stored(bias + (second - change * cross) / total, kind)
    shift = shifted - bias
    gain = np.float32(2.0) * (change * first + shift * second)
    gain -= change * change * squares + shift * (np.float32(2.0) * change * cross + shift * total)
    return new, shifted, gain


@jit(error_model="numpy")
def _descend(pull: Array, codes: Array, inner: Array, scale: Any, most: Any) -> None:
    """Choose each code of a group for the others; updates `pull`."""
    for j in range(len(codes)):
        code = np.rint(codes[j] + pull[j] / (inner[j, j] * scale))
        code = min(max(code, np.float32(0.0)), most)
        if code != codes[j]:
            moved = (code - codes[j]) * scale
            codes[j] = code
            for k in range(len(codes)):
                pull[k] -= moved * inner[j, k]


@jit(error_model="numpy")
def _improve_group(pull: Array, codes: Array, inner: Array, sums: Array, scale: Any, bias: Any,
                   kind: int, most: Any, moved: Array) -> tuple[Any, Any]:  # fmt: skip
    """Improve one row's group; return scale and bias, and write minus the change of weights."""
    near, along = pull.copy(), np.empty(len(codes), np.float32)
    for j in range(len(codes)):
        moved[j] = codes[j] * scale + bias
    new, shifted, gain = _rescale(near, codes, inner, scale, bias, kind, along)
    if gain > 0:
        for j in range(len(codes)):
            near[j] -= (new - scale) * along[j] + (shifted - bias) * sums[j]
        scale, bias = new, shifted
    if scale != 0:
        _descend(near, codes, inner, scale, most)
    for j in range(len(codes)):
        moved[j] -= codes[j] * scale + bias
    return scale, bias


@jit(error_model="numpy")
def _corners(moments: Array, groups: int) -> Array:
    """Return the sums of the moments of each pair of groups."""
    size = len(moments) // groups
    out = np.zeros((groups, groups))
    for j in range(len(moments)):
        for k in range(len(moments)):
            out[j // size, k // size] += moments[j, k]
    return out


@jit(error_model="numpy")
def _solve_system(system: Array, right: Array) -> None:
    """Overwrite `right` with the solution of a positive definite system, and the system too."""
    n = len(right)
    for j in range(n):
        for k in range(j):
            share = system[j, k]
            right[j] -= share * right[k]
            for i in range(j, n):
                system[i, j] -= system[i, k] * share
        pivot = np.sqrt(max(system[j, j], 1e-30))
        right[j] /= pivot
        for i in range(j, n):
            system[i, j] /= pivot
    for j in range(n - 1, -1, -1):
        right[j] /= system[j, j]
        for k in range(j):
            right[k] -= system[j, k] * right[j]


@jit(error_model="numpy")
def _refit(
    panels: Array, corners: Array, kind: int, codes: Array, scales: Array,
    biases: Array, pull: Array,
) -> None:  # fmt: skip
    """Fit all scales and biases of each row together, for the same codes; updates `pull`.

    `corners` has the sum of each pair of groups' moments, `[groups, groups]`.
    """
    rows, columns = codes.shape
    groups = len(corners)
    size = columns // groups
    systems = np.zeros((rows, 2 * groups, 2 * groups))
    along = np.empty((rows, columns), np.float32)
    for group in range(groups):
        first = group * size
        along[:] = np.float32(0.0)
        for p in range(len(panels)):
            add_product(
                codes, first, columns, 1, rows, size, panels[p], first, along, p * PANEL, columns
            )
        for r in range(rows):
            for other in range(groups):
                both = plain = np.float32(0.0)
                for k in range(other * size, other * size + size):
                    both += along[r, k] * codes[r, k]
                    plain += along[r, k]
                systems[r, group, other] = both
                systems[r, groups + other, group] = plain
    moved = np.zeros((rows, columns), np.float32)
    for r in range(rows):
        _refit_row(systems[r], corners, kind, codes[r], scales[r], biases[r], pull[r], moved[r])
    for p in range(len(panels)):
        add_product(moved, 0, columns, 1, rows, columns, panels[p], 0, pull, p * PANEL, columns)


@jit(error_model="numpy")
def _refit_row(
    system: Array, corners: Array, kind: int, codes: Array, scales: Array, biases: Array,
    pull: Array, moved: Array,
) -> None:  # fmt: skip
    """Solve one row's system; write minus the change of its weights, if it improves."""
    groups = len(corners)
    size = len(codes) // groups
    right = np.zeros(2 * groups)
    for group in range(groups):
        system[groups + group, groups:] = corners[group]
        for k in range(group * size, group * size + size):
            right[group] += pull[k] * codes[k]
            right[groups + group] += pull[k]
    whole, solved = system.copy(), right.copy()
    for j in range(2 * groups):
        system[j, j] += RIDGE * system[j, j] + 1e-12
    _solve_system(system, solved)
    change = np.empty(2 * groups, np.float32)
    for group in range(groups):
        change[group] = stored(scales[group] + np.float32(solved[group]), kind) - scales[group]
        there = groups + group
        change[there] = stored(biases[group] + np.float32(solved[there]), kind) - biases[group]
    gain = 0.0
    for j in range(2 * groups):
        gain += 2 * change[j] * right[j] - change[j] * change[j] * whole[j, j]
        for k in range(j):
            gain -= 2 * change[j] * change[k] * whole[j, k]
    if gain > 0:
        for group in range(groups):
            scales[group] += change[group]
            biases[group] += change[groups + group]
            for k in range(group * size, group * size + size):
                moved[k] = -(codes[k] * change[group] + change[groups + group])


@jit(error_model="numpy")
def _sweep(
    moments: Array, panels: Array, kind: int, bits: int, codes: Array, scales: Array,
    biases: Array, pull: Array,
) -> None:  # fmt: skip
    """Improve scale, bias and codes of one group after the other; updates `pull`."""
    rows, columns = codes.shape
    size = columns // scales.shape[1]
    most = np.float32((1 << bits) - 1)
    moved = np.empty((rows, size), np.float32)
    for first in range(0, columns, size):
        end, group = first + size, first // size
        inner = moments[first:end, first:end].copy()
        sums = inner.sum(axis=0)
        for r in range(rows):
            scales[r, group], biases[r, group] = _improve_group(
                pull[r, first:end], codes[r, first:end], inner, sums, scales[r, group],
                biases[r, group], kind, most, moved[r],
            )  # fmt: skip
        for p in range(len(panels)):
            add_product(moved, 0, size, 1, rows, size, panels[p], first, pull, p * PANEL, columns)


@jit(error_model="numpy")
def _quantize_rows(
    weights: Array, moments: Array, panels: Array, corners: Array, mixing: Array,
    mixing_panels: Array, importance: Array, bits: int, kind: int, shares: Array, steps: int,
    sweeps: int, codes: Array, scales: Array, biases: Array,
) -> None:  # fmt: skip
    """Quantize a block of rows; see `compensated`."""
    rows, columns = weights.shape
    errors, pull = np.zeros((rows, columns), np.float32), np.zeros((rows, columns), np.float32)
    _start(
        weights, mixing, mixing_panels, importance, bits, kind, shares, steps, codes, scales,
        biases, errors,
    )  # fmt: skip
    for p in range(len(panels)):
        add_product(errors, 0, columns, 1, rows, columns, panels[p], 0, pull, p * PANEL, columns)
    _refit(panels, corners, kind, codes, scales, biases, pull)
    for _ in range(sweeps):
        _sweep(moments, panels, kind, bits, codes, scales, biases, pull)


def compensated(
    weights: Array, damped: Array, factor: Array, form: tuple[int, int, int], shares: Array,
    steps: int, sweeps: int,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Return codes `[rows, columns]`, scales and biases `[rows, groups]`, all float32.

    Args:
        weights: `[rows, columns]` float32.
        damped: H, `[columns, columns]`.
        factor: `products_cpu.upper_factor(damped)`.
        form: bits, group size, and the kind of scales and biases (see `fit_cpu`).
        shares: see `fit.STARTS`.
        steps: see `fit.STEPS`.
        sweeps: how often to improve.
    """
    bits, size, kind = form
    weights = np.ascontiguousarray(weights, np.float32)
    mixing, squares = mixing_of(factor, size), np.diag(factor) ** 2
    split = panels_of(damped), panels_of(mixing)
    corners = _corners(damped, len(damped) // size)
    codes = np.empty(weights.shape, np.float32)
    scales, biases = (np.empty((len(weights), len(damped) // size), np.float32) for _ in range(2))
    for first in range(0, len(weights), ROWS):
        own = slice(first, first + ROWS)
        _quantize_rows(
            weights[own], damped, split[0], corners, mixing, split[1], squares, bits, kind,
            shares, steps, sweeps, codes[own], scales[own], biases[own],
        )  # fmt: skip
    return codes, scales, biases
