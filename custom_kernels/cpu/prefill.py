"""Quantized matmul and expert MLP on a CPU, by numba, for prefill.

MLX's own CPU quantized matmul reaches 1 GB/s in float32; these stay near memory bandwidth. They
take and return float32, on NumPy views of MLX arrays. Layouts as in `reference.py`.
"""

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numba import prange, types

from ..shapes import expect, expect_below, expect_quantized
from .arrays import (
    FAST,
    SCALE_TYPES,
    Array,
    compiled,
    copy,
    scale_kind,
    silu,
    use_threads,
    view,
    widen,
)
from .arrays import rows as rows
from .bounds import CHECKED, inside, within
from .call import FunctionByAddress, caller
from .records import new_records, start_of
from .simd import MAX_LANES, add_tile, dequantize_row

BITS = (2, 4, 8)
GROUP_SIZES = (32, 64, 128)
# Activation and weight rows of one tile: their sums fill the registers.
ROWS, TILE = 4, MAX_LANES // 4
COLUMNS = 1024  # multiplied at once: a tile's weights and activations fit the L1 cache
FEW = 16  # activation rows that stay in the L1 cache, for one tile of weight rows after the other
UNIT = 32  # weight rows per unit of parallel work


@dataclass(frozen=True)
class Packed:
    """Quantized matrices in S slots as NumPy views; S is 1 for a single matrix.

    Attributes:
        codes: `[S, out, in * bits / 8]` uint8.
        scales: `[S, out, groups]` float32, or uint16 holding bfloat16 or float16.
        biases: like `scales`.
        bits: bits per weight.
        group_size: columns per scale and bias.
        kind: dtype of scales and biases: F32_SCALES, BF16_SCALES or F16_SCALES.
    """

    codes: Array
    scales: Array
    biases: Array
    bits: int
    group_size: int
    kind: int

    @cached_property
    def numbers(self) -> Array:
        """As the kernels read it: kind, three addresses, rows, bytes and groups of a row, S."""
        slots, height, row_bytes = self.codes.shape
        addresses = [array.ctypes.data for array in self.arrays]
        sizes = height, row_bytes, self.scales.shape[2], slots
        return np.array([self.kind, *addresses, *sizes], np.int64)

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        """Codes, scales and biases."""
        return self.codes, self.scales, self.biases

    @property
    def columns(self) -> int:
        """Columns of one matrix."""
        return self.codes.shape[2] * 8 // self.bits

    def check_addresses(self) -> None:
        """With FLASHMOE_DEBUG_BOUNDS, raise IndexError if an address lies outside its array."""
        if CHECKED:
            for address, array in zip(self.numbers[1:4].tolist(), self.arrays, strict=True):
                inside("a matrix", address, array.nbytes, array)


def supports(bits: int, group_size: int, scales: mx.array) -> bool:
    """Return whether the kernels support this format."""
    return bits in BITS and group_size in GROUP_SIZES and scales.dtype in SCALE_TYPES


def packed(codes: mx.array, scales: mx.array, biases: mx.array, bits: int, group: int) -> Packed:
    """View evaluated, row-contiguous MLX arrays without copying."""
    expect_quantized("a matrix", codes, scales, biases, bits, group)

    def slots(array: Array) -> Array:
        return array.reshape(-1, *array.shape[-2:])

    return Packed(
        slots(view(codes).view(np.uint8)),
        slots(view(scales)),
        slots(view(biases)),
        bits,
        group,
        scale_kind(scales),
    )


_INTEGERS, _FLOATS = types.int64[::1], types.float32[:, ::1]
_UNIT = types.void(types.int64, _INTEGERS, _INTEGERS, _INTEGERS, _FLOATS, _FLOATS)
_run_unit = caller(_UNIT)


@functools.cache
def _unit_of_work(bits: int, group_size: int) -> FunctionByAddress:
    """Make the function that multiplies `UNIT` weight rows of a slot, in one format."""
    block_groups = COLUMNS // group_size

    def unit(number: int, weight: Array, slots: Array, starts: Array, x: Array, out: Array) -> None:
        kind, codes, scales, biases, height, row_bytes, groups, count = (
            weight[0], weight[1], weight[2], weight[3], weight[4], weight[5], weight[6], weight[7]
        )  # fmt: skip
        units = (height + UNIT - 1) // UNIT
        run, top = number // units, number % units * UNIT
        within("slots", slots[run], 1, count)
        within("codes of a row", 0, groups * group_size * bits // 8, row_bytes)
        within("columns", 0, groups * group_size, x.shape[1])
        within("activations", starts[run], starts[run + 1] - starts[run], x.shape[0])
        bottom, columns = min(height, top + UNIT), x.shape[1]
        wide = np.empty((2, bottom - top, groups), np.float32)
        first = slots[run] * height + top
        widen(kind, scales, first * groups, wide[0].reshape(-1))
        widen(kind, biases, first * groups, wide[1].reshape(-1))
        n, count = starts[run], starts[run + 1] - starts[run]
        dense, at_once = new_records(UNIT, COLUMNS), UNIT if count > FEW else TILE
        sums = np.zeros((count + ROWS - 1, UNIT), np.float32)
        for start in range(0, groups, block_groups):
            some = min(block_groups, groups - start)
            for row in range(0, bottom - top, at_once):
                for w in range(row, min(bottom - top, row + at_once)):
                    code = codes + (first + w) * row_bytes + start * group_size * bits // 8
                    scale = start_of(wide) + (w * groups + start) * 4
                    bias = scale + (bottom - top) * groups * 4
                    place = start_of(dense) + (w - row) * COLUMNS * 4
                    dequantize_row(bits, group_size, code, scale, bias, some, place)
                for r in range(0, count, ROWS):
                    here = start_of(x) + ((n + r) * columns + start * group_size) * 4
                    for w in range(row, min(bottom - top, row + at_once), TILE):
                        place = start_of(dense) + (w - row) * COLUMNS * 4
                        add_tile(
                            ROWS, place, COLUMNS * 4, here, columns * 4,
                            min(ROWS, count - r) - 1, some * group_size // MAX_LANES,
                            start_of(sums) + (r * UNIT + w) * 4, UNIT * 4,
                        )  # fmt: skip
        for r in range(count):
            copy(sums[r, : bottom - top], out[n + r, top:bottom])

    return FunctionByAddress(_UNIT, unit, **FAST)


@compiled
def _matmul(
    run: int, units: int, weight: Array, slots: Array, starts: Array, x: Array, out: Array
) -> None:
    for unit in prange(units):
        _run_unit(run, (unit, weight, slots, starts, x, out))


class Runs(NamedTuple):
    """Activation rows that share a slot, one run after the other.

    Attributes:
        slots: `[runs]`.
        starts: `[runs + 1]`, first row of each run, then the number of rows.
    """

    slots: Array
    starts: Array


def runs(count: int, slots: Array | None) -> Runs:
    """Find the runs of `count` rows of one matrix, or of ascending `slots` `[count]`."""
    if slots is None:
        return Runs(np.zeros(1, np.int64), np.array([0, count]))
    starts = np.flatnonzero(np.diff(slots, prepend=slots[:1] - 1))
    return Runs(slots[starts].astype(np.int64), np.append(starts, count))


def times(x: Array, weight: Packed, where: Runs | None = None) -> Array:
    """Multiply each row by its matrix: `[rows, in]` to `[rows, out]`, float32.

    Each row's results are independent of the others.

    Args:
        x: `[rows, in]` float32.
        weight: the matrices.
        where: the slots of the rows; None if there is one matrix.
    """
    expect("activations", x, (len(x), weight.columns), np.float32)
    slots, height = weight.codes.shape[:2]
    where = where or runs(len(x), None)
    expect_below("slots of experts", where.slots, slots)
    weight.check_addresses()
    out = np.empty((len(x), height), np.float32)
    use_threads(x.size * height)
    _matmul(
        _unit_of_work(weight.bits, weight.group_size).address,
        (height + UNIT - 1) // UNIT * where.slots.size,
        weight.numbers, *where, x, out,
    )  # fmt: skip
    return out


@compiled
def _swiglu(gate: Array, up: Array) -> None:
    for row in prange(gate.shape[0]):
        for column in range(gate.shape[1]):
            gate[row, column] = silu(gate[row, column]) * up[row, column]


def mlp(x: Array, gate: Packed, up: Packed, down: Packed, slots: Array | None = None) -> Array:
    """Run a SwiGLU expert on each row: `[rows, H]` float32 to `[rows, H]` float32.

    Args:
        x: `[rows, H]`.
        gate: `[S, I, ...]`.
        up: `[S, I, ...]`.
        down: `[S, H, ...]`.
        slots: `[rows]`, ascending; None if S is 1.
    """
    where = runs(len(x), slots)
    hidden, up_hidden = times(x, gate, where), times(x, up, where)
    expect("gate and up", up_hidden, hidden.shape)
    use_threads(16 * hidden.size)
    _swiglu(hidden, up_hidden)
    return times(hidden, down, where)


def prepare(bits: int, group_size: int, dtype: mx.Dtype) -> None:
    """Compile the kernels of this format by running a small matrix."""
    shape = 1, group_size * bits // 32
    codes, scales = mx.zeros(shape, dtype=mx.uint32), mx.zeros((1, 1), dtype=dtype)
    mx.eval(codes, scales)
    if supports(bits, group_size, scales):
        x = np.zeros((1, group_size), np.float32)
        y = times(x, packed(codes, scales, scales, bits, group_size))
        _swiglu(y, y)
