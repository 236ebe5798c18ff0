"""Products of float32 matrices, and Cholesky's factor, in numba for CPUs.

Each element is summed in a fixed order, on one thread: callers run several experts at once. With
OpenBLAS results depend on the number of threads, and a resumed conversion must give the same bytes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ...custom_kernels.cpu.bounds import jit, within
from ...custom_kernels.cpu.simd import F32, MAX_LANES, address, constant, load, multiply_add, splat

Array = npt.NDArray[Any]
PANEL = 32  # columns of one panel; divides every group size
TILE = 8 if MAX_LANES == 16 else 2  # rows whose sums stay in registers


@intrinsic(prefer_literal=True)
def _add_tile(
    _context: Any, rows: Any, left: Any, across: Any, along: Any, panel: Any, count: Any,
    out: Any, stride: Any,
) -> tuple[Any, Callable[..., Any]] | None:  # fmt: skip
    """out[r, :PANEL] += sum over k of left[r, k] * panel[k, :PANEL].

    Args:
        rows: of `left` and `out`, a compile-time constant.
        left: pointer to float32; [r, k] lies at r * across + k * along.
        across: see left.
        along: see left.
        panel: pointer to `[count, PANEL]` float32.
        count: terms of each sum.
        out: pointer to float32 rows.
        stride: elements between rows of `out`.
    """
    if not isinstance(rows, types.IntegerLiteral):
        return None
    height, vector = rows.literal_value, ir.VectorType(F32, MAX_LANES)
    width = PANEL // MAX_LANES

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> None:
        _, left, across, along, panel, count, out, stride = args

        def at(pointer: Any, *offsets: Any) -> Any:
            for offset in offsets:
                pointer = builder.gep(pointer, [offset])
            return pointer

        def number(value: int) -> ir.Constant:
            return ir.Constant(count.type, value)

        sums = [cgutils.alloca_once(builder, vector) for _ in range(height * width)]
        for total in sums:
            builder.store(constant(vector, 0.0), total)
        with cgutils.for_range(builder, count) as loop:
            line = at(panel, builder.mul(loop.index, number(PANEL)))
            parts = [
                load(builder, at(line, number(v * MAX_LANES)), vector, 4) for v in range(width)
            ]
            column = at(left, builder.mul(loop.index, along))
            for r in range(height):
                value = builder.load(at(column, builder.mul(number(r), across)))
                wide = splat(builder, value, vector)
                for total, part in zip(sums[r * width : (r + 1) * width], parts, strict=True):
                    builder.store(multiply_add(builder, wide, part, builder.load(total)), total)
        for cell, total in enumerate(sums):
            r, v = divmod(cell, width)
            place = at(out, builder.mul(number(r), stride), number(v * MAX_LANES))
            value = builder.fadd(load(builder, place, vector, 4), builder.load(total))
            store = builder.store(value, builder.bitcast(place, vector.as_pointer()))
            store.align = 4

    arguments = (rows, left, types.intp, types.intp, panel, types.intp, out, types.intp)
    return types.void(*arguments), codegen


@jit(error_model="numpy")
def add_product(
    left: Array, start: int, across: int, along: int, rows: int, count: int,
    panel: Array, first: int, out: Array, place: int, stride: int,
) -> None:  # fmt: skip
    """Add `left @ panel` to `out`, both given by flat places in contiguous arrays.

    Args:
        left: float32; element [r, k] lies at start + r * across + k * along.
        start: see left.
        across: see left.
        along: see left.
        rows: of left and out.
        count: columns of left, rows of the panel.
        panel: float32, `[.., PANEL]`.
        first: the first row of the panel.
        out: float32; row r is PANEL elements from place + r * stride on.
        place: see out.
        stride: see out.
    """
    if rows == 0 or count == 0:
        return
    within("left", start, (rows - 1) * across + (count - 1) * along + 1, left.size)
    within("panel", first * PANEL, count * PANEL, panel.size)
    within("out", place, (rows - 1) * stride + PANEL, out.size)
    source = address(panel, first * PANEL)
    row = 0
    while row + TILE <= rows:
        a, c = address(left, start + row * across), address(out, place + row * stride)
        _add_tile(TILE, a, across, along, source, count, c, stride)
        row += TILE
    while row < rows:
        a, c = address(left, start + row * across), address(out, place + row * stride)
        _add_tile(1, a, across, along, source, count, c, stride)
        row += 1


@jit(error_model="numpy")
def panels_of(matrix: Array) -> Array:
    """Return `[n, columns]` as panels `[ceil(columns / PANEL), n, PANEL]`, padded with zeros."""
    n, columns = matrix.shape
    count = (columns + PANEL - 1) // PANEL
    out = np.zeros((count, n, PANEL), np.float32)
    for p in range(count):
        first = p * PANEL
        width = min(PANEL, columns - first)
        for k in range(n):
            for c in range(width):
                out[p, k, c] = matrix[k, first + c]
    return out


@jit(error_model="numpy")
def _times(left: Array, right: Array, out: Array) -> None:
    """Add `[m, n]` times panels `[p, n, PANEL]` to `[m, p * PANEL]`."""
    rows, n = left.shape
    width = out.shape[1]
    for p in range(len(right)):
        add_product(left, 0, n, 1, rows, n, right[p], 0, out, p * PANEL, width)


def product(left: Array, right: Array) -> Array:
    """Return `[m, n] @ [n, columns]`, float32."""
    split = panels_of(np.ascontiguousarray(right, np.float32))
    out = np.zeros((len(left), len(split) * PANEL), np.float32)
    _times(np.ascontiguousarray(left, np.float32), split, out)
    return np.ascontiguousarray(out[:, : right.shape[1]])


@jit(error_model="numpy")
def _cross(left: Array, right: Array, out: Array) -> None:
    """Add x^T y for panels `[p, n, PANEL]` of x and `[q, n, PANEL]` of y to `[.., q * PANEL]`."""
    count, n, _ = left.shape
    width = out.shape[1]
    for q in range(len(right)):
        for p in range(count):
            place = p * PANEL * width + q * PANEL
            add_product(left[p], 0, 1, PANEL, PANEL, n, right[q], 0, out, place, width)


def cross(left: Array, right: Array) -> Array:
    """Return `left.T @ right` for `[n, rows]` and `[n, columns]`, float32."""
    a, b = (panels_of(np.ascontiguousarray(x, np.float32)) for x in (left, right))
    out = np.zeros((len(a) * PANEL, len(b) * PANEL), np.float32)
    _cross(a, b, out)
    return np.ascontiguousarray(out[: left.shape[1], : right.shape[1]])


@jit(error_model="numpy")
def _corner(block: Array, out: Array) -> bool:
    """Write the upper R with R R^T = block; False if the block is not positive definite."""
    size = len(block)
    for j in range(size - 1, -1, -1):
        pivot = block[j, j]
        for k in range(j + 1, size):
            pivot -= out[j, k] * out[j, k]
        if not pivot > 0:
            return False
        out[j, j] = np.sqrt(pivot)
        for i in range(j):
            rest = block[i, j]
            for k in range(j + 1, size):
                rest -= out[i, k] * out[j, k]
            out[i, j] = rest / out[j, j]
    return True


@jit(error_model="numpy")
def solve_upper(rows: Array, factor: Array) -> None:
    """Overwrite `[m, n]` with the x of x R = rows, for the upper triangular R."""
    n = len(factor)
    for r in range(len(rows)):
        row = rows[r]
        for j in range(n):
            row[j] /= factor[j, j]
            for k in range(j + 1, n):
                row[k] -= row[j] * factor[j, k]


@jit(error_model="numpy")
def solve_lower(rows: Array, factor: Array) -> None:
    """Overwrite `[m, n]` with the x of x R^T = rows, for the upper triangular R."""
    lower = factor.T.copy()
    for r in range(len(rows)):
        row = rows[r]
        for j in range(len(factor) - 1, -1, -1):
            row[j] /= factor[j, j]
            for k in range(j):
                row[k] -= row[j] * lower[j, k]


@jit(error_model="numpy")
def _upper_factor(matrix: Array, out: Array) -> bool:
    """Write the upper R with R R^T = matrix, block column by block column from the right."""
    n = len(matrix)
    for block in range(n // PANEL - 1, -1, -1):
        first = block * PANEL
        known = first + PANEL
        panel = np.empty((n - known, PANEL), np.float32)  # minus the transpose of R's block row
        for k in range(n - known):
            for c in range(PANEL):
                panel[k, c] = -out[first + c, known + k]
        rest = matrix[:known, first:known].copy()
        add_product(out, known, n, 1, known, n - known, panel, 0, rest, 0, PANEL)
        corner = np.zeros((PANEL, PANEL), np.float32)
        if not _corner(rest[first:], corner):
            return False
        out[first:known, first:known] = corner
        solve_lower(rest[:first], corner)
        out[:first, first:known] = rest[:first]
    return True


def upper_factor(matrix: Array) -> Array:
    """Return the upper triangular R with R R^T = matrix, `[n, n]`; PANEL divides n.

    Raises:
        numpy.linalg.LinAlgError: the matrix is not positive definite.
    """
    out = np.zeros(matrix.shape, np.float32)
    if not _upper_factor(np.ascontiguousarray(matrix, np.float32), out):
        raise np.linalg.LinAlgError("the matrix is not positive definite")
    return out


def solve(rows: Array, factor: Array) -> Array:
    """Return x with x H = rows `[m, n]`, given `upper_factor(H)`."""
    out = np.array(rows, np.float32, order="C")
    solve_lower(out, factor)
    solve_upper(out, factor)
    return out
