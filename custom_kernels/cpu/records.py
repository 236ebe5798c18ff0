"""Activation rows as the decode kernels read them: a record of integer halves, factors and sums."""

from typing import Any

import numpy as np

from .arrays import Array, copy, serial
from .bounds import within
from .dot import CUT, HALF_BITS, STEPS, VECTOR_BYTES, cut_columns
from .simd import keep_apart, leading_power, magnitude

CODES, SCALES, BIASES, BITS, GROUP, KIND, HEIGHT, COLUMNS, SPAN, SLOTS = range(10)
LINE = 64  # bytes of a cache line
LAST_BIT = np.float32(2.0 ** (2 - 2 * HALF_BITS))  # leaves a bit for the halves' signs
# Bits of the largest activation: one outside has no float32 scale, and counts as 0 or as NaN.
TINY, HUGE = (int(np.float32(limit).view(np.int32)) for limit in (1e-29, 1e38))


@serial
def start_of(array: Array) -> Any:
    """Return an array's address, signed: a sum of signed and unsigned integers is a float."""
    return np.int64(array.ctypes.data)


@serial
def places(matrix: Array) -> int:
    """Return how many factors, and sums, a record has: one a group, and zeros up to a block."""
    block = STEPS * matrix[SPAN]
    return (matrix[COLUMNS] // matrix[GROUP] + block - 1) // block * block


@serial
def record_size(matrices: Array, forms: Array) -> int:
    """Return how many float32 the largest record for the matrices numbered `forms` takes."""
    size = 0
    for n in forms:
        size = max(size, matrices[n, COLUMNS] + 2 * places(matrices[n]))
    return size


@serial
def new_records(count: int, size: int) -> Array:
    """Return room for records, `[count, size]`, at a cache line: other loads take twice as long."""
    room = np.empty(count * size + LINE // 4, np.float32)
    first = -start_of(room) % LINE // 4
    return room[first : first + count * size].reshape(count, size)


@serial
def _cut(bits: int, x: int, inverse: Any, planes: int, words: int) -> int:
    if bits == 4:
        return cut_columns(4, x, inverse, planes, words)
    if bits == 2:
        return cut_columns(2, x, inverse, planes, words)
    return cut_columns(8, x, inverse, planes, words)


@serial
def cut(x: Array, matrix: Array, out: Array) -> None:
    """Write the record of activation row `x` `[columns]` to `out`, as `dot_block` reads it.

    A group with an infinity or a NaN makes every result NaN.
    """
    keep_apart()
    bits, group, columns = matrix[BITS], matrix[GROUP], matrix[COLUMNS]
    within("activations", 0, columns, x.size)
    within("a record", 0, columns + 2 * places(matrix), out.size)
    groups, own, block = columns // group, group * bits // 16, CUT * bits // 16
    whole, sums = groups - groups % matrix[SPAN], columns + places(matrix)
    out[columns + groups : sums + places(matrix)] = np.float32(0)
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
            source = start_of(x) + 4 * (g * group + n * CUT)
            last = (32 // bits - 1) * words  # where the high halves of the last code in a word go
            within("halves", place, last + CUT * bits // 16, 2 * columns)
            total += _cut(bits, source, inverse, start_of(out) + 2 * place, words)
        out[columns + g], out[sums + g] = scale, np.float32(total) * scale
        if largest >= HUGE:
            out[columns + g] = out[sums + g] = np.float32(np.nan)


@serial
def cut_rows(
    h: Array, norm: Array, eps: float, matrices: Array, forms: Array, records: Array
) -> None:
    """Normalize rows `h` and cut each for every form: record `form * rows + row`."""
    x = np.empty(h.shape[1], np.float32)
    for row in range(h.shape[0]):
        rms_norm(h[row], norm, eps, x)
        for form in range(forms.size):
            cut(x, matrices[forms[form]], records[form * h.shape[0] + row])


@serial
def rms_norm(x: Array, weight: Array, eps: float, out: Array) -> None:
    """Normalize `x` `[columns]` to `out`; an empty weight copies."""
    if weight.size == 0:
        copy(x, out)
        return
    square = np.float32(0)
    for value in x:
        square += value * value
    factor = np.float32(1) / np.sqrt(square / np.float32(x.size) + np.float32(eps))
    for i in range(x.size):
        out[i] = x[i] * factor * weight[i]
