"""Products of float32 numpy matrices and Cholesky's factor, on the default device."""

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .codes import has_numba

Floats = npt.NDArray[np.float32]


def product(left: Floats, right: Floats) -> Floats:
    """Return `[m, n] @ [n, columns]`."""
    if has_numba():
        from . import products_cpu

        return products_cpu.product(left, right)
    return np.array(mx.array(left) @ mx.array(right))


def cross(left: Floats, right: Floats) -> Floats:
    """Return `left.T @ right` for `[n, rows]` and `[n, columns]`."""
    if has_numba():
        from . import products_cpu

        return products_cpu.cross(left, right)
    return np.array(mx.array(left).T @ mx.array(right))


def upper_factor(matrix: Floats) -> Floats:
    """Return the upper triangular R with R R^T = matrix, `[n, n]`; 32 divides n.

    Raises:
        numpy.linalg.LinAlgError: the matrix is not positive definite.
    """
    if has_numba():
        from . import products_cpu

        return products_cpu.upper_factor(matrix)
    lower = np.linalg.cholesky(matrix[::-1, ::-1].astype(np.float64))
    return lower[::-1, ::-1].astype(np.float32)


def solve(rows: Floats, factor: Floats) -> Floats:
    """Return x with x R R^T = rows `[m, n]`, for the upper triangular R."""
    if has_numba():
        from . import products_cpu

        return products_cpu.solve(rows, factor)
    wide: Any = factor.astype(np.float64)
    return np.linalg.solve(wide @ wide.T, rows.T).T.astype(np.float32)
