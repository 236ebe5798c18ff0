"""Records: activation rows as integer planes, factors and sums, as the decode kernels read them."""

from typing import Any

import numpy as np

from .arrays import Array, copy, serial
from .bounds import within
from .planes import CUT, LANES, PLANES, TOTAL_BITS, VECTOR_BYTES, WORD, split_columns
from .simd import leading_power, magnitude, no_inline

CODES, SCALES, BIASES, BITS, GROUP, KIND, HEIGHT, COLUMNS, SPAN, SLOTS, PRODUCT = range(11)
LINE = 64  # bytes of a cache line
LAST_BIT = np.float32(2.0 ** (1 - TOTAL_BITS))
# In bits of float32: the largest activation counts as the next power of two where it is near, since
# the highest plane rounds up.
NEAR = 1 << 17
# Bits of the limits of a group's largest activation: outside them it counts as 0 or as NaN.
TINY, HUGE = (int(np.float32(limit).view(np.int32)) for limit in (1e-29, 1e38))


@serial
def start_of(array: Array) -> Any:
    """Return an array's address, signed: numba adds signed and unsigned integers as floats."""
    return np.int64(array.ctypes.data)


@serial
def padded_groups(matrix: Array) -> int:
    """Return the number of factors (and of sums) of a record: groups, padded to whole vectors."""
    return (matrix[COLUMNS] // matrix[GROUP] + LANES - 1) // LANES * LANES


@serial
def plane_floats(columns: int) -> int:
    """Return the size of a record's planes, in float32."""
    return columns * PLANES * WORD // 32


@serial
def record_floats(matrix: Array) -> int:
    """Return the size of a matrix's record, in float32."""
    return plane_floats(matrix[COLUMNS]) + 2 * padded_groups(matrix)


@serial
def record_size(matrices: Array, forms: Array) -> int:
    """Return the float32 count of the largest record among matrices `forms`."""
    size = 0
    for n in forms:
        size = max(size, record_floats(matrices[n]))
    return size


@serial
def new_records(count: int, size: int) -> Array:
    """Allocate records `[count, size]`, aligned to cache lines: others load at half the speed."""
    room = np.empty(count * size + LINE // 4, np.float32)
    first = -start_of(room) % LINE // 4
    return room[first : first + count * size].reshape(count, size)


@serial
def _split(bits: int, x: int, inverse: Any, planes: int, words: int) -> int:
    if bits == 4:
        return split_columns(4, x, inverse, planes, words)
    if bits == 2:
        return split_columns(2, x, inverse, planes, words)
    return split_columns(8, x, inverse, planes, words)


@serial
def write_record(x: Array, matrix: Array, out: Array) -> None:
    """Write the record of activation row `x` `[columns]` to `out`, in `dot_rows`'s layout.

    A group with an infinity or a NaN makes every result NaN.
    """
    no_inline()
    bits, group, columns = matrix[BITS], matrix[GROUP], matrix[COLUMNS]
    within("activations", 0, columns, x.size)
    within("a record", 0, record_floats(matrix), out.size)
    groups, own, block = columns // group, group * bits // WORD, CUT * bits // WORD
    factors = plane_floats(columns)
    whole, sums = groups - groups % matrix[SPAN], factors + padded_groups(matrix)
    out[factors + groups : sums + padded_groups(matrix)] = np.float32(0)
    for g in range(groups):
        largest = np.int32(0)
        for value in x[g * group : (g + 1) * group]:
            largest = max(largest, magnitude(value))
        inverse, scale, total = np.float32(0), np.float32(0), 0
        if TINY < largest < HUGE:
            scale = leading_power(largest + NEAR) * LAST_BIT
            inverse = np.float32(1) / scale
        span = matrix[SPAN] if g < whole else 1
        words = min(own * span, VECTOR_BYTES * 8 // WORD)  # per vector, which may hold many groups
        first = (g - g % span) * group * PLANES
        for n in range(group // CUT):
            word = g % span * own + n * block
            place = first + word // words * PLANES * words * (WORD // bits) + word % words
            source = start_of(x) + 4 * (g * group + n * CUT)
            last = (PLANES * WORD // bits - 1) * words  # offset of the last code's lowest plane
            within("planes", place, last + CUT * bits // WORD, columns * PLANES)
            total += _split(bits, source, inverse, start_of(out) + place * (WORD // 8), words)
        out[factors + g], out[sums + g] = scale, np.float32(total) * scale
        if largest >= HUGE:
            out[factors + g] = out[sums + g] = np.float32(np.nan)


@serial
def write_records(
    h: Array, norm: Array, eps: float, matrices: Array, forms: Array, records: Array
) -> None:
    """Normalize rows `h` and write record `form * rows + row` of each form and row."""
    x = np.empty(h.shape[1], np.float32)
    for row in range(h.shape[0]):
        rms_norm(h[row], norm, eps, x)
        for form in range(forms.size):
            write_record(x, matrices[forms[form]], records[form * h.shape[0] + row])


@serial
def rms_norm(x: Array, weight: Array, eps: float, out: Array) -> None:
    """RMS-normalize `x` `[columns]` to `out`; copies if `weight` is empty."""
    if weight.size == 0:
        copy(x, out)
        return
    square = np.float32(0)
    for value in x:
        square += value * value
    factor = np.float32(1) / np.sqrt(square / np.float32(x.size) + np.float32(eps))
    for i in range(x.size):
        out[i] = x[i] * factor * weight[i]
