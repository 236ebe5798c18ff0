"""Quantized matrices times a few activation rows, for decode.

A matrix is a row of numbers (`numbers_of`), so one compiled function takes any mix of formats. An
activation row is a *record* of float32: planes of its integers, then a factor per
group, then a sum per group. Rows share the unpacking of weights, but each row's results are
independent of the others.
"""

import functools
from math import prod
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numba import prange, types

from ..shapes import expect, expect_quantized
from ..weights import QuantizedMatrix, Shared
from .arrays import FAST, Array, compiled, copy, scale_kind, serial, silu, use_threads, view, widen
from .bounds import CHECKED, inside, within
from .call import FunctionByAddress, caller
from .dot import (
    MAX_ROWS,
    TILE,
    add_lanes,
    dot_block,
    dot_rest,
    dot_rows,
    span_of,
    start_sums,
)
from .planes import LANES, PLANES, WORD
from .prefill import UNIT
from .records import (
    BIASES,
    BITS,
    CODES,
    COLUMNS,
    GROUP,
    HEIGHT,
    KIND,
    PRODUCT,
    SCALES,
    SLOTS,
    new_records,
    padded_groups,
    plane_floats,
    record_floats,
    record_size,
    start_of,
    write_records,
)

Arrays: TypeAlias = tuple[Array, ...]
Norm: TypeAlias = tuple[Array, float]  # weight and epsilon of an RMS norm


def numbers_of(matrix: QuantizedMatrix) -> Array:
    """Return a matrix as the kernels read it: addresses, format and sizes, `[11]` int64."""
    expect_quantized("a matrix", *matrix.arrays, matrix.bits, matrix.group_size)
    mx.eval(matrix.arrays)
    addresses = [view(a).ctypes.data for a in matrix.arrays]
    *lead, height, columns = matrix.shape
    kind, span = scale_kind(matrix.scales), span_of(matrix.bits, matrix.group_size)
    sizes = matrix.bits, matrix.group_size, kind, height, columns, span, prod(lead)
    product = product_of(matrix.bits, matrix.group_size).address
    return np.array([*addresses, *sizes, product], np.int64)


_INTEGERS, _TABLE = types.int64[::1], types.int64[:, ::1]
_PRODUCT = types.void(
    _INTEGERS, types.int64, types.int64, types.int64, _INTEGERS, types.float32[:, ::1]
)
_run_product = caller(_PRODUCT)


@functools.cache
def product_of(bits: int, group: int) -> FunctionByAddress:
    """Make the function that multiplies a few weight rows by a few records, in one format."""
    span = span_of(bits, group)
    step_bytes, record_bytes = group * bits // 8 * span, group * span * PLANES * WORD // 8

    def product(matrix: Array, slot: int, first: int, last: int, table: Array, out: Array) -> None:
        """Multiply weight rows `first` to `last` of a slot: `out` `[rows, last - first]`.

        `table` holds at most MAX_ROWS record addresses.
        """
        columns, height, rows = matrix[COLUMNS], last - first, table.size
        groups, width, planes = columns // group, padded_groups(matrix), plane_floats(columns)
        top, row_bytes = slot * matrix[HEIGHT] + first, columns * bits // 8
        within("slots", slot, 1, matrix[SLOTS])
        within("weight rows", first, height, matrix[HEIGHT])
        within("rows at a time", 0, rows, MAX_ROWS)
        wide = np.empty(2 * height * groups + LANES, np.float32)
        widen(matrix[KIND], matrix[SCALES], top * groups, wide[: height * groups])
        widen(matrix[KIND], matrix[BIASES], top * groups, wide[height * groups : -LANES])
        wide[-LANES:] = np.float32(0)
        codes, biases = matrix[CODES] + top * row_bytes, height * groups * 4
        if rows == 1:
            record = table[0], table[0] + planes * 4, table[0] + (planes + width) * 4
            for row in range(0, height, TILE):
                scales = start_of(wide)
                dot_rows(
                    bits, group, codes, scales, scales + biases, record, groups,
                    (row, height - 1), start_of(out),
                )  # fmt: skip
        else:
            sums = new_records(height * rows, LANES)
            place = start_of(sums)
            for row in range(height):
                for r in range(rows):
                    totals = table[r] + (planes + width) * 4
                    start_sums(start_of(wide) + biases + row * groups * 4, totals, groups, place)
                    place += LANES * 4
            # Only a block of several records fits the L1 cache: use it for TILE weight rows.
            for tile in range(0, height, TILE):
                for block in range(0, groups - groups % span, LANES):
                    steps, step = min(LANES, groups - block) // span, block // span
                    offsets = step * record_bytes, (planes + block) * 4
                    for row in range(tile, min(height, tile + TILE)):
                        here = codes + row * row_bytes + step * step_bytes
                        scale = start_of(wide) + (row * groups + block) * 4
                        place = start_of(sums) + row * rows * LANES * 4
                        dot_block(
                            bits, group, here, scale, start_of(table), offsets, rows, steps, place
                        )
            for row in range(height):
                for r in range(rows):
                    out[r, row] = add_lanes(start_of(sums) + (row * rows + r) * LANES * 4)
        left = groups % span  # groups that do not fill a vector
        whole = groups - left
        if left:
            for row in range(height):
                for r in range(rows):
                    out[r, row] += dot_rest(
                        bits, group,
                        codes + row * row_bytes + whole * group * bits // 8,
                        start_of(wide) + (row * groups + whole) * 4,
                        table[r] + whole * group * PLANES * WORD // 8,
                        table[r] + (planes + whole) * 4, left,
                    )  # fmt: skip

    return FunctionByAddress(_PRODUCT, product, **FAST)


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
    within("numbers of a record", 0, record_floats(matrix), records.shape[1])
    within("sources", job[START], job[ROWS], sources.size)
    for row in range(job[START], job[START] + job[ROWS], MAX_ROWS):
        end = min(job[START] + job[ROWS], row + MAX_ROWS)
        y = np.empty((end - row, bottom - top), np.float32)
        table = _find(records, job[RECORD], sources[row:end])
        _run_product(matrix[PRODUCT], (matrix, job[SLOT], top, bottom, table, y))
        if job[SECOND] >= 0:
            second, table = np.empty_like(y), _find(records, job[OTHER], sources[row:end])
            other = matrices[job[SECOND]]
            _run_product(other[PRODUCT], (other, job[SLOT], top, bottom, table, second))
            for r in range(end - row):
                for i in range(bottom - top):
                    y[r, i] = silu(y[r, i]) * second[r, i]
        for r in range(end - row):
            place = job[PLACE] + targets[row + r] * matrix[HEIGHT]
            within("outputs", place + top, bottom - top, out.size)
            copy(y[r], out[place + top : place + bottom])


_UNIT = types.void(
    types.int64, _TABLE, _TABLE, types.float32[:, ::1], _INTEGERS, _INTEGERS, types.float32[::1]
)
UNIT_OF_WORK = FunctionByAddress(_UNIT, _unit, **FAST)
run_unit = caller(_UNIT)  # arguments: UNIT_OF_WORK's address, then those of `_unit`


@compiled
def run_jobs(
    run: int, units: int, jobs: Array, matrices: Array, records: Array, sources: Array,
    targets: Array, out: Array,
) -> None:  # fmt: skip
    """Run all units of a job table on all threads; the only parallel loop of these kernels."""
    for unit in prange(units):
        run_unit(run, (unit, jobs, matrices, records, sources, targets, out))


@serial
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
    run_jobs(run, units, jobs, matrices, records, rows, rows, out)


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
