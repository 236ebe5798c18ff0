"""Quantized matmul and expert MLP on a CPU, by numba, for prefill.

MLX's own CPU quantized matmul reaches 1 GB/s in float32; these stay near memory bandwidth. They
take and return float32, on NumPy views of MLX arrays. Layouts as in `reference.py`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
from numba import prange, types

from ..shapes import expect, expect_below, expect_quantized
from .arrays import FAST, SCALE_TYPES, Array, compiled, scale_kind, use_threads, view, widen
from .arrays import rows as rows
from .bounds import CHECKED, inside, jit, within
from .call import FunctionByAddress, caller
from .simd import (
    HAS_PERMUTE,
    address,
    dot_tile,
    lanes_of,
    octets,
)

BITS = (2, 4, 8)
GROUP_SIZES = (32, 64, 128)
# Activation and weight rows of one tile: their sums fill the registers.
ROWS, TILE = 4, 4 if HAS_PERMUTE else 2
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


@functools.cache
def _split(bits: int, lanes: int) -> Callable[..., None]:
    phases = 8 // bits

    @jit(fastmath=True)
    def split(x: Array, out: Array, sums: Array) -> None:
        count, columns = x.shape
        rows, groups = out.shape[3], sums.shape[1]
        group = columns // groups
        for n in range(count):
            place = out[n // rows, :, :, n % rows]
            for chunk in range(place.shape[0]):
                for lane in range(lanes):
                    for phase in range(phases):
                        place[chunk, phase, lane] = x[n, (chunk * lanes + lane) * phases + phase]
            for g in range(groups):
                total = np.float32(0)
                for column in range(g * group, (g + 1) * group):
                    total += x[n, column]
                sums[n, g] = total

    return split


def split(x: Array, bits: int, group_size: int, rows: int) -> tuple[Array, Array]:
    """Lay activations out for `dot_tile`, and sum them per group for the biases.

    Args:
        x: `[count, columns]` float32; count is a multiple of `rows`.
        bits: bits per weight.
        group_size: columns per group.
        rows: activation rows per block.

    Returns:
        `[count / rows, chunks, 8 / bits, rows, lanes]` and `[count, groups]`.
    """
    count, columns = x.shape
    lanes = lanes_of(bits, group_size)
    shape = (count // rows, columns * bits // 8 // lanes, 8 // bits, rows, lanes)
    out, sums = np.empty(shape, np.float32), np.empty((count, columns // group_size), np.float32)
    _split(bits, lanes)(x, out, sums)
    return out, sums


_INTEGERS, _FLOATS = types.int64[::1], types.float32[:, ::1]
_UNIT = types.void(
    types.int64, _INTEGERS, _INTEGERS, _INTEGERS, types.float32[::1], _FLOATS, _FLOATS
)
_run_unit = caller(_UNIT)


@functools.cache
def _unit_of_work(bits: int, group_size: int, tile: int, rows: int) -> FunctionByAddress:
    """Make the function that multiplies `UNIT` weight rows of a slot, in one format."""

    def unit(
        number: int, weight: Array, slots: Array, starts: Array, x: Array, sums: Array, out: Array
    ) -> None:
        kind, codes, scales, biases, height, row_bytes, groups, count = (
            weight[0], weight[1], weight[2], weight[3], weight[4], weight[5], weight[6], weight[7]
        )  # fmt: skip
        units, block_size = (height + UNIT - 1) // UNIT, rows * row_bytes * 8 // bits
        run, top = number // units, number % units * UNIT
        within("slots", slots[run], 1, count)
        within("codes of a row", 0, groups * group_size * bits // 8, row_bytes)
        dots = np.empty((tile, rows), np.float32)
        wide = np.empty((2, tile, groups), np.float32)
        for row in range(top, min(height, top + UNIT), tile):
            within("weight rows", row, tile, height)
            first = slots[run] * height + row
            widen(kind, scales, first * groups, wide[0].reshape(-1))
            widen(kind, biases, first * groups, wide[1].reshape(-1))
            for block in range(starts[run], starts[run + 1]):
                within("activations", block * block_size, block_size, x.size)
                dot_tile(
                    bits,
                    group_size,
                    tile,
                    rows,
                    octets(codes + first * row_bytes),
                    address(wide, 0),
                    address(x, block * block_size),
                    groups,
                    address(dots, 0),
                )
                for w in range(tile):
                    for r in range(rows):
                        n = block * rows + r
                        bias = np.float32(0)
                        for g in range(groups):
                            bias += wide[1, w, g] * sums[n, g]
                        out[n, row + w] = dots[w, r] + bias

    return FunctionByAddress(_UNIT, unit, **FAST)


@compiled
def _matmul(
    run: int, units: int, weight: Array, slots: Array, starts: Array, x: Array, sums: Array,
    out: Array,
) -> None:  # fmt: skip
    for unit in prange(units):
        _run_unit(run, (unit, weight, slots, starts, x, sums, out))


@dataclass(frozen=True)
class Block:
    """Activation rows of one launch.

    Attributes:
        rows: rows multiplied at once, 1 or ROWS.
        chosen: activation rows, a slice or indices; each `rows` of them share a slot.
        slots: `[runs]`, the slot of each run.
        starts: `[runs + 1]`, start of each run, in units of `rows`.
    """

    rows: int
    chosen: slice | Array
    slots: Array
    starts: Array


@functools.lru_cache(maxsize=64)
def _one_matrix(count: int) -> tuple[Block, ...]:
    """Plan `count` rows of a single matrix: groups of ROWS, then single rows."""
    fours = count // ROWS
    slot, rest = np.zeros(1, np.int64), slice(fours * ROWS, count)
    blocks = (
        Block(ROWS, slice(0, fours * ROWS), slot, np.array([0, fours])),
        Block(1, rest, slot, np.array([0, rest.stop - rest.start])),
    )
    return tuple(block for block in blocks if block.starts[1])


def _many_matrices(slots: Array) -> tuple[Block, ...]:
    """Plan rows where row n uses slot `slots[n]` (ascending)."""
    begins = np.flatnonzero(np.diff(slots, prepend=-1))
    lengths = np.diff(begins, append=slots.size)
    place = np.arange(slots.size) - np.repeat(begins, lengths)
    fours = place < np.repeat(lengths - lengths % ROWS, lengths)
    blocks = []
    for chosen, together in ((np.flatnonzero(fours), ROWS), (np.flatnonzero(~fours), 1)):
        if chosen.size:
            units = slots[chosen[::together]]
            starts = np.flatnonzero(np.diff(units, prepend=-1))
            runs = units[starts], np.append(starts, units.size)
            whole = chosen.size == slots.size
            blocks.append(Block(together, slice(None) if whole else chosen, *runs))
    return tuple(blocks)


def plan(count: int, slots: Array | None = None) -> Sequence[Block]:
    """Plan launches for `count` rows of one matrix, or of ascending `slots` `[count]`."""
    return _one_matrix(count) if slots is None else _many_matrices(slots)


class Activations:
    """Activation rows to multiply by several matrices; each row's results are independent."""

    def __init__(self, x: Array, blocks: Sequence[Block]) -> None:
        """Take rows `[rows, in]` float32 and their `plan`."""
        self._x, self._blocks = x, blocks
        self._splits: dict[tuple[int, int], list[tuple[Array, Array]]] = {}

    def times(self, weight: Packed) -> Array:
        """Multiply each row by its matrix: `[rows, out]` float32."""
        expect("activations", self._x, (len(self._x), weight.columns), np.float32)
        slots, height = weight.codes.shape[:2]
        for block in self._blocks:
            expect_below("slots of experts", block.slots, slots)
        weight.check_addresses()
        bits, group_size = weight.bits, weight.group_size
        if (bits, group_size) not in self._splits:
            self._splits[bits, group_size] = [
                split(self._x[b.chosen], bits, group_size, b.rows) for b in self._blocks
            ]
        out = np.empty((self._x.shape[0], height), np.float32)
        for block, (x, sums) in zip(self._blocks, self._splits[bits, group_size], strict=True):
            scattered = not isinstance(block.chosen, slice)
            y = np.empty((sums.shape[0], height), np.float32) if scattered else out[block.chosen]
            tile = TILE if block.rows > 1 and height % TILE == 0 else 1
            use_threads(x.size * height)
            _matmul(
                _unit_of_work(bits, group_size, tile, block.rows).address,
                (height + UNIT - 1) // UNIT * block.slots.size,
                weight.numbers, block.slots, block.starts, x.reshape(-1), sums, y,
            )  # fmt: skip
            if scattered:
                out[block.chosen] = y
        return out


@compiled
def _swiglu(gate: Array, up: Array) -> None:
    for row in prange(gate.shape[0]):
        for column in range(gate.shape[1]):
            g = gate[row, column]
            gate[row, column] = g / (np.float32(1) + np.exp(-g)) * up[row, column]


def mlp(x: Array, gate: Packed, up: Packed, down: Packed, slots: Array | None = None) -> Array:
    """Run a SwiGLU expert on each row: `[rows, H]` float32 to `[rows, H]` float32.

    Args:
        x: `[rows, H]`.
        gate: `[S, I, ...]`.
        up: `[S, I, ...]`.
        down: `[S, H, ...]`.
        slots: `[rows]`, ascending; None if S is 1.
    """
    if slots is not None:
        expect_below("slots of experts", slots, len(gate.codes))
    blocks = plan(x.shape[0], slots)
    activations = Activations(x, blocks)
    hidden, up_hidden = activations.times(gate), activations.times(up)
    expect("gate and up", up_hidden, hidden.shape)
    use_threads(16 * hidden.size)
    _swiglu(hidden, up_hidden)
    return Activations(hidden, blocks).times(down)


def prepare(bits: int, group_size: int, dtype: mx.Dtype) -> None:
    """Compile the kernels of this format by running small matrices."""
    columns = max(group_size, 32)
    for height, count in ((TILE, 1), (TILE, ROWS), (1, ROWS)):  # each has a function of its own
        shapes = (height, columns * bits // 32), (height, columns // group_size)
        codes, scales = mx.zeros(shapes[0], dtype=mx.uint32), mx.zeros(shapes[1], dtype=dtype)
        mx.eval(codes, scales)
        if supports(bits, group_size, scales):
            weight = packed(codes, scales, scales, bits, group_size)
            y = Activations(np.zeros((count, columns), np.float32), plan(count)).times(weight)
            _swiglu(y, y)
