"""Quantized matrices times a few activation rows, for decode.

A matrix is a row of numbers (`numbers_of`), so one compiled function takes any mix of formats. An
activation row is a *record* of float32: `columns` that hold its integer halves, then a factor per
group, then a sum per group. Rows share the unpacking of weights, but each row's results are
independent of the others.
"""

from math import prod
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numba import prange, types

from ..shapes import expect, expect_quantized
from ..weights import QuantizedMatrix, Shared
from .arrays import FAST, Array, compiled, copy, scale_kind, serial, use_threads, view, widen
from .bounds import CHECKED, inside, within
from .call import FunctionByAddress, caller
from .dot import (
    LANES,
    MAX_ROWS,
    STEPS,
    TILE,
    add_lanes,
    dot_block,
    dot_rest,
    span_of,
    start_sums,
)
from .prefill import UNIT
from .records import (
    BIASES,
    BITS,
    CODES,
    COLUMNS,
    GROUP,
    HEIGHT,
    KIND,
    SCALES,
    SLOTS,
    SPAN,
    new_records,
    padded_groups,
    record_size,
    start_of,
    write_records,
)
from .simd import no_inline

Arrays: TypeAlias = tuple[Array, ...]
Norm: TypeAlias = tuple[Array, float]  # weight and epsilon of an RMS norm


def numbers_of(matrix: QuantizedMatrix) -> Array:
    """Return a matrix as the kernels read it: addresses, format and sizes, `[10]` int64."""
    expect_quantized("a matrix", *matrix.arrays, matrix.bits, matrix.group_size)
    mx.eval(matrix.arrays)
    addresses = [view(a).ctypes.data for a in matrix.arrays]
    *lead, height, columns = matrix.shape
    kind, span = scale_kind(matrix.scales), span_of(matrix.bits, matrix.group_size)
    form = matrix.bits, matrix.group_size, kind
    return np.array([*addresses, *form, height, columns, span, prod(lead)], np.int64)


def _sweep(bits: int, group: int) -> Any:
    """Make the product function of one format."""
    span = span_of(bits, group)
    step_bytes, step_floats = group * bits // 8 * span, group * span

    @serial
    def sweep(codes: int, scales: Array, table: Array, columns: int, sums: Array) -> None:
        """Add all whole steps of columns to the sums.

        Args:
            codes: address of the first weight row's codes.
            scales: `[weight rows, padded groups]` float32.
            table: `[rows]` addresses of records.
            columns: of the matrix.
            sums: `[weight rows, rows, LANES]`.
        """
        no_inline()
        height, rows, records = scales.shape[0], table.size, start_of(table)
        steps, row_bytes = columns // step_floats, columns * bits // 8
        blocks = (steps + STEPS - 1) // STEPS
        within("scales of a row", 0, blocks * STEPS * span, scales.shape[1])
        within("sums", 0, height * rows * LANES, sums.size)
        row_scales, row_sums = scales.shape[1] * 4, rows * LANES * 4
        if rows == 1:  # a single record fits the L1 cache
            for row in range(height):
                code, scale = codes + row * row_bytes, start_of(scales) + row * row_scales
                out = start_of(sums) + row * row_sums
                for step in range(0, steps, STEPS):
                    count = min(STEPS, steps - step)
                    offsets = step * step_floats * 4, (columns + step * span) * 4
                    here, scale_here = code + step * step_bytes, scale + step * span * 4
                    dot_block(bits, group, 1, here, scale_here, records, offsets, rows, count, out)
            return
        # With several records only a block fits: use it for TILE weight rows, which are prefetched.
        for first in range(0, height, TILE):
            last = min(height, first + TILE)
            for step in range(0, steps, STEPS):
                count = min(STEPS, steps - step)
                offsets = step * step_floats * 4, (columns + step * span) * 4
                for row in range(first, last):
                    here = codes + row * row_bytes + step * step_bytes
                    scale_here = start_of(scales) + row * row_scales + step * span * 4
                    out = start_of(sums) + row * row_sums
                    dot_block(bits, group, 0, here, scale_here, records, offsets, rows, count, out)

    return sweep


_sweep_2_32, _sweep_2_64, _sweep_2_128 = (_sweep(2, g) for g in (32, 64, 128))
_sweep_4_32, _sweep_4_64, _sweep_4_128 = (_sweep(4, g) for g in (32, 64, 128))
_sweep_8_32, _sweep_8_64, _sweep_8_128 = (_sweep(8, g) for g in (32, 64, 128))


@serial
def _add_products(
    bits: int, group: int, codes: int, scales: Array, table: Array, columns: int, sums: Array
) -> None:
    if bits == 4:
        if group == 64:
            _sweep_4_64(codes, scales, table, columns, sums)
        elif group == 32:
            _sweep_4_32(codes, scales, table, columns, sums)
        else:
            _sweep_4_128(codes, scales, table, columns, sums)
    elif bits == 2:
        if group == 64:
            _sweep_2_64(codes, scales, table, columns, sums)
        elif group == 32:
            _sweep_2_32(codes, scales, table, columns, sums)
        else:
            _sweep_2_128(codes, scales, table, columns, sums)
    elif group == 64:
        _sweep_8_64(codes, scales, table, columns, sums)
    elif group == 32:
        _sweep_8_32(codes, scales, table, columns, sums)
    else:
        _sweep_8_128(codes, scales, table, columns, sums)


@serial
def _rest(
    bits: int, group: int, codes: int, scales: int, planes: int, factors: int, groups: int
) -> Any:
    no_inline()
    if bits == 4:
        if group == 32:
            return dot_rest(4, 32, codes, scales, planes, factors, groups)
        return dot_rest(4, 64, codes, scales, planes, factors, groups)
    if bits == 2:
        if group == 32:
            return dot_rest(2, 32, codes, scales, planes, factors, groups)
        if group == 64:
            return dot_rest(2, 64, codes, scales, planes, factors, groups)
        return dot_rest(2, 128, codes, scales, planes, factors, groups)
    return dot_rest(8, 32, codes, scales, planes, factors, groups)


@serial
def _widened(matrix: Array, field: int, first: int, out: Array) -> None:
    """Write scales or biases of weight rows from `first` on to `out` `[rows, padded groups]`."""
    groups = matrix[COLUMNS] // matrix[GROUP]
    if groups == out.shape[1]:
        widen(matrix[KIND], matrix[field], first * groups, out.reshape(-1))
        return
    for row in range(out.shape[0]):
        widen(matrix[KIND], matrix[field], (first + row) * groups, out[row, :groups])
        out[row, groups:] = np.float32(0)


@serial
def times_rows(matrix: Array, slot: int, first: int, last: int, table: Array, out: Array) -> None:
    """Multiply weight rows `first` to `last` of a slot by records: `out` `[rows, last - first]`.

    `table` holds at most MAX_ROWS record addresses.
    """
    no_inline()
    bits, group, columns, span = matrix[BITS], matrix[GROUP], matrix[COLUMNS], matrix[SPAN]
    height, rows = last - first, table.size
    groups, width = columns // group, padded_groups(matrix)
    top, row_bytes = slot * matrix[HEIGHT] + first, columns * bits // 8
    within("slots", slot, 1, matrix[SLOTS])
    within("weight rows", first, height, matrix[HEIGHT])
    within("rows at a time", 0, rows, MAX_ROWS)
    wide = np.empty((2, height, width), np.float32)
    _widened(matrix, SCALES, top, wide[0])
    _widened(matrix, BIASES, top, wide[1])
    chunks = (groups + LANES - 1) // LANES
    within("biases of a row", 0, chunks * LANES, width)
    sums = new_records(height, rows * LANES).reshape(height, rows, LANES)
    place = start_of(sums)
    for row in range(height):
        biases = start_of(wide) + (height + row) * width * 4
        for r in range(rows):
            start_sums(biases, table[r] + (columns + width) * 4, chunks, place)
            place += LANES * 4
    codes = matrix[CODES] + top * row_bytes
    _add_products(bits, group, codes, wide[0], table, columns, sums)
    left = groups % span  # groups that do not fill a vector
    whole = groups - left
    for row in range(height):
        for r in range(rows):
            out[r, row] = add_lanes(start_of(sums) + (row * rows + r) * LANES * 4)
            if left:
                out[r, row] += _rest(
                    bits, group,
                    codes + row * row_bytes + whole * group * bits // 8,
                    start_of(wide) + (row * width + whole) * 4,
                    table[r] + whole * group * 4, table[r] + (columns + whole) * 4, left,
                )  # fmt: skip


@serial
def silu(x: Any) -> Any:
    """Return x * sigmoid(x)."""
    return x / (np.float32(1) + np.exp(-x))


# A job multiplies `ROWS` records by slot `SLOT` of matrix `FIRST`; with a `SECOND` matrix (else -1)
# it computes silu(first x) * second x. Row n reads record `RECORD + sources[START + n]` (`OTHER` +
# ... for the second matrix) and writes row `targets[START + n]` of the flat output, whose row 0 is
# at `PLACE`. `UNITS` counts the units of the jobs before it.
FIRST, SECOND, SLOT, RECORD, OTHER, START, ROWS, PLACE, UNITS = range(9)


@serial
def add_job(jobs: Array, n: int, matrices: Array, job: Any) -> int:
    """Write job `n`, its numbers `FIRST` to `PLACE`, and return the units up to its end."""
    first, second, slot, record, other, start, rows, place = job
    row = jobs[n]
    row[FIRST], row[SECOND], row[SLOT] = first, second, slot
    row[RECORD], row[OTHER] = record, other
    row[START], row[ROWS], row[PLACE] = start, rows, place
    units = (matrices[first, HEIGHT] + UNIT - 1) // UNIT
    jobs[n + 1, UNITS] = jobs[n, UNITS] + units
    return jobs[n + 1, UNITS]


@serial
def _find(records: Array, first: int, sources: Array) -> Array:
    """Return the addresses of records."""
    for source in sources:
        within("records", first + source, 1, records.shape[0])
    return start_of(records) + (first + sources) * (4 * records.shape[1])


def _unit(
    unit: int, jobs: Array, matrices: Array, records: Array, sources: Array, targets: Array,
    out: Array,
) -> None:  # fmt: skip
    """Compute one unit: `UNIT` weight rows of its job."""
    n = 0
    while jobs[n + 1, UNITS] <= unit:
        n += 1
    job, matrix = jobs[n], matrices[jobs[n, FIRST]]
    top = (unit - job[UNITS]) * UNIT
    bottom = min(matrix[HEIGHT], top + UNIT)
    within("numbers of a record", 0, matrix[COLUMNS] + 2 * padded_groups(matrix), records.shape[1])
    within("sources", job[START], job[ROWS], sources.size)
    for row in range(job[START], job[START] + job[ROWS], MAX_ROWS):
        end = min(job[START] + job[ROWS], row + MAX_ROWS)
        y = np.empty((end - row, bottom - top), np.float32)
        table = _find(records, job[RECORD], sources[row:end])
        times_rows(matrix, job[SLOT], top, bottom, table, y)
        if job[SECOND] >= 0:
            second, table = np.empty_like(y), _find(records, job[OTHER], sources[row:end])
            times_rows(matrices[job[SECOND]], job[SLOT], top, bottom, table, second)
            for r in range(end - row):
                for i in range(bottom - top):
                    y[r, i] = silu(y[r, i]) * second[r, i]
        for r in range(end - row):
            place = job[PLACE] + targets[row + r] * matrix[HEIGHT]
            within("outputs", place + top, bottom - top, out.size)
            copy(y[r], out[place + top : place + bottom])


_INTEGERS, _TABLE = types.int64[::1], types.int64[:, ::1]
_UNIT = types.void(
    types.int64, _TABLE, _TABLE, types.float32[:, ::1], _INTEGERS, _INTEGERS, types.float32[::1]
)
UNIT_OF_WORK = FunctionByAddress(_UNIT, _unit, **FAST)
run_unit = caller(_UNIT)  # arguments: UNIT_OF_WORK's address, then those of `_unit`


@compiled
def _project(
    run: int, h: Array, norm: Array, eps: float, matrices: Array, forms: Array, form_of: Array,
    out: Array,
) -> None:  # fmt: skip
    batch, count = h.shape[0], matrices.shape[0]
    records = new_records(forms.size * batch, record_size(matrices, forms))
    write_records(h, norm, eps, matrices, forms, records)
    jobs, rows = np.zeros((count + 1, UNITS + 1), np.int64), np.arange(batch)
    place, units = 0, 0
    for n in range(count):
        job = (n, -1, 0, form_of[n] * batch, 0, 0, batch, place)
        units = add_job(jobs, n, matrices, job)
        place += batch * matrices[n, HEIGHT]
    for unit in prange(units):
        run_unit(run, (unit, jobs, matrices, records, rows, rows, out))


class Group(Shared):
    """Matrices that share an input; kernels read them by address."""

    def __init__(self, *matrices: QuantizedMatrix) -> None:
        """Look up addresses and group the matrices that share a record."""
        self.matrices = matrices
        self.numbers = np.stack([numbers_of(m) for m in matrices])
        kinds = [(m.bits, m.group_size) for m in matrices]
        forms = sorted(set(kinds))
        self.forms = np.array([kinds.index(form) for form in forms])
        self.form_of = np.array([forms.index(kind) for kind in kinds])
        self.heights = [m.shape[-2] for m in matrices]
        self.arguments = self.numbers, self.forms, self.form_of

    def check_addresses(self) -> None:
        """With FLASHMOE_DEBUG_BOUNDS, raise IndexError if an address lies outside its array."""
        if not CHECKED:
            return
        for n, (matrix, row) in enumerate(zip(self.matrices, self.numbers.tolist(), strict=True)):
            weights = row[SLOTS] * row[HEIGHT] * row[COLUMNS]
            scales = weights // row[GROUP] * matrix.scales.itemsize
            sizes = weights * row[BITS] // 8, scales, scales
            for address, size, array in zip(row[: len(sizes)], sizes, matrix.arrays, strict=True):
                inside(f"matrix {n}", address, size, view(array))


NOTHING = np.zeros(0, np.float32)


def project(h: Array, group: Group, norm: Array = NOTHING, eps: float = 0.0) -> list[Array]:
    """Multiply rows `[rows, in]` by each matrix: one `[rows, out]` per matrix.

    Args:
        h: float32, C-contiguous.
        group: the matrices.
        norm: `[in]` weight of an RMS norm applied first.
        eps: of that norm.
    """
    for matrix in group.matrices:
        expect("hidden states", h, (len(h), matrix.shape[-1]), np.float32)
    if norm is not NOTHING:
        expect("the norm's weight", norm, h.shape[1:])
    group.check_addresses()
    ends = np.cumsum(group.heights) * len(h)
    out = np.empty(ends[-1], np.float32)
    use_threads(h.size * int(ends[-1]))
    _project(UNIT_OF_WORK.address, h, norm, eps, *group.arguments, out)
    return [part.reshape(len(h), -1) for part in np.split(out, ends[:-1])]
