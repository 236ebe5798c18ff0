"""Quantised matrices times a few activation rows, each row on its own: what decoding does.

A matrix is a row of numbers (`Matrix.numbers`), so that one compiled function takes every format
and any mix of formats. An activation row is a *record* of float32: `columns` that hold its
integer halves, then per group a scale and a sum.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from numba import prange

from flashmoe_mlx.custom_kernels.cpu import (
    UNIT,
    Array,
    compiled,
    scale_kind,
    serial,
    use_threads,
    view,
    widen,
)
from flashmoe_mlx.custom_kernels.cpu_dot import (
    CUT,
    HALF_BITS,
    VECTOR_BYTES,
    cut_columns,
    dot_row,
    span_of,
)
from flashmoe_mlx.custom_kernels.simd import keep_apart, leading_power, magnitude

CODES, SCALES, BIASES, BITS, GROUP, KIND, HEIGHT, COLUMNS, SPAN = range(9)
LAST_BIT = np.float32(2.0 ** (2 - 2 * HALF_BITS))  # leaves a bit for the halves' signs
# Bits of the largest activation: one outside has no float32 scale, and counts as 0 or as NaN.
TINY, HUGE = (int(np.float32(limit).view(np.int32)) for limit in (1e-29, 1e38))


@dataclass(frozen=True)
class Matrix:
    """A bank of affine-quantised matrices; a single matrix is a bank of one.

    Attributes:
        codes: `[S, out, in * bits / 32]` uint32 (or without S).
        scales: `[S, out, groups]` float32, bfloat16 or float16.
        biases: like `scales`.
        bits: 2, 4 or 8.
        group_size: 32, 64 or 128 columns per scale and bias.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    @property
    def height(self) -> int:
        """Rows of one matrix."""
        return self.codes.shape[-2]

    @property
    def columns(self) -> int:
        """Columns of one matrix."""
        return self.codes.shape[-1] * 32 // self.bits

    @cached_property
    def numbers(self) -> Array:
        """What the kernels read: three addresses, then the format and the sizes, `[9]` int64."""
        arrays = self.codes, self.scales, self.biases
        mx.eval(arrays)
        addresses = [view(a).ctypes.data for a in arrays]
        sizes = self.bits, self.group_size, scale_kind(self.scales), self.height, self.columns
        return np.array([*addresses, *sizes, span_of(self.bits, self.group_size)], np.int64)


@serial
def record_size(matrices: Array, forms: Array) -> int:
    """Return how many float32 the largest record for the matrices numbered `forms` takes."""
    size = 0
    for n in forms:
        size = max(size, matrices[n, COLUMNS] + 2 * (matrices[n, COLUMNS] // matrices[n, GROUP]))
    return size


@serial
def _cut(bits: int, x: int, inverse: float, planes: int, words: int) -> int:
    if bits == 4:
        return cut_columns(4, x, inverse, planes, words)
    if bits == 2:
        return cut_columns(2, x, inverse, planes, words)
    return cut_columns(8, x, inverse, planes, words)


@serial
def cut(x: Array, matrix: Array, out: Array) -> None:
    """Write the record of activation row `x` `[columns]` to `out`, as `dot_row` reads it.

    A group with an infinity or a NaN makes every result NaN.
    """
    keep_apart()
    bits, group, columns = matrix[BITS], matrix[GROUP], matrix[COLUMNS]
    groups, own, block = columns // group, group * bits // 16, CUT * bits // 16
    whole = groups - groups % matrix[SPAN]
    for g in range(groups):
        largest = np.int32(0)
        for value in x[g * group : (g + 1) * group]:
            largest = max(largest, magnitude(value))
        inverse, scale, total = np.float32(0), np.float32(0), 0
        if TINY < largest < HUGE:
            scale = leading_power(largest) * LAST_BIT
            inverse = np.float32(1) / scale
        span = matrix[SPAN] if g < whole else 1
        words = min(own * span, VECTOR_BYTES // 2)  # of a vector, which may hold several groups
        first = (g - g % span) * group * 2
        for n in range(group // CUT):
            word = g % span * own + n * block
            place = first + word // words * 2 * words * (16 // bits) + word % words
            source = x.ctypes.data + 4 * (g * group + n * CUT)
            total += _cut(bits, source, inverse, out.ctypes.data + 2 * place, words)
        out[columns + g], out[columns + groups + g] = scale, np.float32(total) * scale
        if largest >= HUGE:
            out[columns + g] = out[columns + groups + g] = np.float32(np.nan)


@serial
def cut_rows(
    h: Array, norm: Array, eps: float, matrices: Array, forms: Array, records: Array
) -> None:
    """Normalise rows `h` and cut each for every form: record `form * rows + row`."""
    x = np.empty(h.shape[1], np.float32)
    for row in range(h.shape[0]):
        rms_norm(h[row], norm, eps, x)
        for form in range(forms.size):
            cut(x, matrices[forms[form]], records[form * h.shape[0] + row])


@serial
def _dot(bits: int, group: int, codes: int, scales: int, planes: int, groups: int) -> Any:
    if bits == 4:
        if group == 64:
            return dot_row(4, 64, codes, scales, planes, groups)
        if group == 32:
            return dot_row(4, 32, codes, scales, planes, groups)
        return dot_row(4, 128, codes, scales, planes, groups)
    if bits == 2:
        if group == 64:
            return dot_row(2, 64, codes, scales, planes, groups)
        if group == 32:
            return dot_row(2, 32, codes, scales, planes, groups)
        return dot_row(2, 128, codes, scales, planes, groups)
    if group == 64:
        return dot_row(8, 64, codes, scales, planes, groups)
    if group == 32:
        return dot_row(8, 32, codes, scales, planes, groups)
    return dot_row(8, 128, codes, scales, planes, groups)


@serial
def times_rows(matrix: Array, slot: int, first: int, last: int, record: Array, out: Array) -> None:
    """Multiply weight rows `first` to `last` of a slot by a record, into `out[: last - first]`."""
    keep_apart()
    bits, group, kind = matrix[BITS], matrix[GROUP], matrix[KIND]
    columns, groups = matrix[COLUMNS], matrix[COLUMNS] // matrix[GROUP]
    row_bytes, planes = columns * bits // 8, record.ctypes.data
    factors, sums = record[columns : columns + groups], record[columns + groups :]
    scales = np.empty(groups, np.float32)
    for row in range(first, last):
        n = slot * matrix[HEIGHT] + row
        widen(kind, matrix[BIASES], n * groups, scales)
        bias = np.float32(0)
        for g in range(groups):
            bias += scales[g] * sums[g]
        widen(kind, matrix[SCALES], n * groups, scales)
        for g in range(groups):
            scales[g] *= factors[g]
        codes = matrix[CODES] + n * row_bytes
        out[row - first] = bias + _dot(bits, group, codes, scales.ctypes.data, planes, groups)


@serial
def rms_norm(x: Array, weight: Array, eps: float, out: Array) -> None:
    """Normalise `x` `[columns]` to `out`; an empty weight copies."""
    if weight.size == 0:
        out[:] = x
        return
    square = np.float32(0)
    for value in x:
        square += value * value
    factor = np.float32(1) / np.sqrt(square / np.float32(x.size) + np.float32(eps))
    for i in range(x.size):
        out[i] = x[i] * factor * weight[i]


@serial
def silu(x: Any) -> Any:
    """Return x * sigmoid(x)."""
    return x / (np.float32(1) + np.exp(-x))


# A job: multiply `ROWS` records, from number `RECORD` on, by slot `SLOT` of matrix `FIRST`. With a
# `SECOND` matrix (else -1) and its `OTHER` records it makes silu(first x) * second x. Results go
# to the flat output at `PLACE`, row after row. `UNITS` counts the units of the jobs before it.
FIRST, SECOND, SLOT, RECORD, OTHER, ROWS, PLACE, UNITS = range(8)


@serial
def add_job(jobs: Array, n: int, matrices: Array, job: Any) -> int:
    """Write job number `n` (all but its units) and return the units so far."""
    for field in range(UNITS):
        jobs[n, field] = job[field]
    units = (matrices[job[FIRST], HEIGHT] + UNIT - 1) // UNIT
    jobs[n + 1, UNITS] = jobs[n, UNITS] + units
    return jobs[n + 1, UNITS]


@serial
def run_unit(unit: int, jobs: Array, matrices: Array, records: Array, out: Array) -> None:
    """Do `UNIT` weight rows of the job that the unit belongs to."""
    keep_apart()
    n = 0
    while jobs[n + 1, UNITS] <= unit:
        n += 1
    job, matrix = jobs[n], matrices[jobs[n, FIRST]]
    top = (unit - job[UNITS]) * UNIT
    bottom = min(matrix[HEIGHT], top + UNIT)
    for row in range(job[ROWS]):
        place = job[PLACE] + row * matrix[HEIGHT]
        target, record = out[place + top : place + bottom], records[job[RECORD] + row]
        times_rows(matrix, job[SLOT], top, bottom, record, target)
        if job[SECOND] >= 0:
            second = np.empty(bottom - top, np.float32)
            record = records[job[OTHER] + row]
            times_rows(matrices[job[SECOND]], job[SLOT], top, bottom, record, second)
            for i in range(second.size):
                target[i] = silu(target[i]) * second[i]


@compiled
def _project(
    h: Array, norm: Array, eps: float, matrices: Array, forms: Array, form_of: Array, out: Array
) -> None:
    batch, count = h.shape[0], matrices.shape[0]
    records = np.empty((forms.size * batch, record_size(matrices, forms)), np.float32)
    cut_rows(h, norm, eps, matrices, forms, records)
    jobs = np.zeros((count + 1, UNITS + 1), np.int64)
    place, units = 0, 0
    for n in range(count):
        units = add_job(jobs, n, matrices, (n, -1, 0, form_of[n] * batch, 0, batch, place))
        place += batch * matrices[n, HEIGHT]
    for unit in prange(units):
        run_unit(unit, jobs, matrices, records, out)


class Group:
    """Matrices that take the same input."""

    def __init__(self, *matrices: Matrix) -> None:
        """Look up addresses and find which matrices can share a record."""
        self.matrices = matrices
        self.numbers = np.stack([m.numbers for m in matrices])
        kinds = [(m.bits, m.group_size) for m in matrices]
        forms = sorted(set(kinds))
        self.forms = np.array([kinds.index(form) for form in forms])
        self.form_of = np.array([forms.index(kind) for kind in kinds])
        self.heights = [m.height for m in matrices]
        self.arguments = self.numbers, self.forms, self.form_of

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Share it: a copy would hold the addresses of arrays that it does not keep."""
        return self


NOTHING = np.zeros(0, np.float32)


def project(h: Array, group: Group, norm: Array = NOTHING, eps: float = 0.0) -> list[Array]:
    """Multiply rows `[rows, in]` by each matrix: one `[rows, out]` per matrix.

    Args:
        h: float32, C-contiguous.
        group: the matrices.
        norm: `[in]` weight of an RMS norm that comes first.
        eps: of that norm.
    """
    ends = np.cumsum(group.heights) * len(h)
    out = np.empty(ends[-1], np.float32)
    use_threads(h.size * int(ends[-1]))
    _project(h, norm, eps, *group.arguments, out)
    return [part.reshape(len(h), -1) for part in np.split(out, ends[:-1])]
