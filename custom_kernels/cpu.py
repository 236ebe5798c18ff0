"""CPU kernels by numba: quantised matmul, expert MLP, gated delta.

MLX's own CPU quantised matmul reaches 1 GB/s in float32; these stay near the memory's bandwidth.
They work on NumPy views of MLX arrays, float32 in and out. Layouts and rules as in `reference.py`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numba import config, njit, prange, set_num_threads

from flashmoe_mlx.custom_kernels.simd import address, dot_tile, lanes_of, to_f32

BITS = (2, 4, 8)
GROUP_SIZES = (32, 64, 128)
ROWS, TILE = 4, 4  # activation rows and weight rows that are multiplied at once
UNIT = 32  # weight rows per unit of parallel work

Array = np.ndarray[Any, Any]
_compiled = functools.partial(
    njit, parallel=True, cache=True, nogil=True, fastmath=True, error_model="numpy"
)


def _use_threads(work: int) -> None:
    """Use all threads for `work` multiply-adds, or one if that takes less than about 0.1 ms.

    Waking the others costs 10 microseconds, and milliseconds when other programs hold the cores.
    """
    set_num_threads(config.NUMBA_NUM_THREADS if work > 1 << 20 else 1)


@dataclass(frozen=True)
class Packed:
    """A quantised matrix, or a bank of them, as NumPy views.

    Attributes:
        codes: `[..., out, in * bits / 8]` uint8.
        scales: `[..., out, groups]` float32, or uint16 holding bfloat16.
        biases: like `scales`.
        bits: bits per weight.
        group_size: columns per scale and bias.
    """

    codes: Array
    scales: Array
    biases: Array
    bits: int
    group_size: int


def supports(bits: int, group_size: int, scales: mx.array) -> bool:
    """Say whether these kernels take such a matrix."""
    return bits in BITS and group_size in GROUP_SIZES and scales.dtype in (mx.float32, mx.bfloat16)


def rows(x: mx.array) -> Array:
    """Evaluate float32 activations `[..., columns]` and view them as `[rows, columns]`."""
    flat = mx.contiguous(x.reshape(-1, x.shape[-1]))
    mx.eval(flat)
    return np.asarray(flat)


def packed(codes: mx.array, scales: mx.array, biases: mx.array, bits: int, group: int) -> Packed:
    """View evaluated, row-contiguous MLX arrays; no byte is copied."""
    return Packed(
        view(codes).view(np.uint8), view(scales), view(biases), bits=bits, group_size=group
    )


def view(array: mx.array) -> Array:
    """View an evaluated row-contiguous MLX array; bfloat16 as uint16."""
    if array.dtype == mx.bfloat16:
        flat = np.frombuffer(memoryview(array).cast("B"), np.uint16)  # type: ignore[arg-type]
        return flat.reshape(array.shape)
    return np.asarray(array)


@njit(inline="always", fastmath=True)
def bias_dot(biases: Array, sums: Array) -> Any:
    """Sum bias times activation sum over the groups of one weight row."""
    total = np.float32(0)
    for group in range(biases.size):
        total += to_f32(biases[group]) * sums[group]
    return total


@functools.cache
def _split(bits: int, lanes: int) -> Callable[..., None]:
    phases = 8 // bits

    @njit(cache=True, nogil=True, fastmath=True)
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
    """Lay activations out as `dot_tile` takes them, and sum them per group for the biases.

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


@functools.cache
def _matmul(bits: int, group_size: int, tile: int, rows: int) -> Callable[..., None]:
    @_compiled()
    def matmul(
        codes: Array, scales: Array, biases: Array, slots: Array, starts: Array,
        x: Array, sums: Array, out: Array,
    ) -> None:  # fmt: skip
        _, height, row_bytes = codes.shape
        groups, block_size = scales.shape[2], x.size // x.shape[0]
        units = (height + UNIT - 1) // UNIT
        for unit in prange(units * slots.size):
            run = unit // units
            slot, top = slots[run], unit % units * UNIT
            dots = np.empty((tile, rows), np.float32)
            for row in range(top, min(height, top + UNIT), tile):
                for block in range(starts[run], starts[run + 1]):
                    dot_tile(
                        bits,
                        group_size,
                        tile,
                        rows,
                        address(codes, (slot * height + row) * row_bytes),
                        address(scales, (slot * height + row) * groups),
                        address(x, block * block_size),
                        groups,
                        address(dots, 0),
                    )
                    for w in range(tile):
                        for r in range(rows):
                            n = block * rows + r
                            out[n, row + w] = dots[w, r] + bias_dot(biases[slot, row + w], sums[n])

    return matmul


def matmul(x: Array, weight: Packed, slots: Array | None = None) -> Array:
    """Multiply each activation row by the quantised matrix in its slot of a bank.

    A row's result does not depend on the other rows.

    Args:
        x: `[rows, in]` float32.
        weight: one matrix, or with `slots` a bank of them.
        slots: `[rows]`, ascending.

    Returns:
        `[rows, out]` float32.
    """
    if slots is None:
        weight = Packed(
            weight.codes[None], weight.scales[None], weight.biases[None],
            weight.bits, weight.group_size,
        )  # fmt: skip
        slots = np.zeros(x.shape[0], np.int64)
    out = np.empty((x.shape[0], weight.codes.shape[1]), np.float32)
    begins = np.flatnonzero(np.diff(slots, prepend=-1))
    lengths = np.diff(begins, append=slots.size)
    # Rows that share a slot are taken four at a time, what is left over one by one.
    place = np.arange(slots.size) - np.repeat(begins, lengths)
    fours = place < np.repeat(lengths - lengths % ROWS, lengths)
    for chosen, rows in ((np.flatnonzero(fours), ROWS), (np.flatnonzero(~fours), 1)):
        if chosen.size:
            out[chosen] = _run(x[chosen], weight, slots[chosen], rows)
    return out


def _run(x: Array, weight: Packed, slots: Array, rows: int) -> Array:
    """Multiply rows of which each block of `rows` shares a slot."""
    bits, group_size = weight.bits, weight.group_size
    out = np.empty((x.shape[0], weight.codes.shape[1]), np.float32)
    tile = TILE if rows > 1 and out.shape[1] % TILE == 0 else 1
    blocks = slots[::rows]
    begins = np.flatnonzero(np.diff(blocks, prepend=-1))
    _use_threads(x.size * out.shape[1])
    _matmul(bits, group_size, tile, rows)(
        weight.codes, weight.scales, weight.biases,
        blocks[begins], np.append(begins, blocks.size),
        *split(x, bits, group_size, rows), out,
    )  # fmt: skip
    return out


@_compiled()
def _swiglu(gate: Array, up: Array) -> None:
    for row in prange(gate.shape[0]):
        for column in range(gate.shape[1]):
            g = gate[row, column]
            gate[row, column] = g / (np.float32(1) + np.exp(-g)) * up[row, column]


def expert_mlp(x: Array, slots: Array, gate: Packed, up: Packed, down: Packed) -> Array:
    """Run one SwiGLU expert per row: `[rows, H]` float32 to `[rows, H]` float32.

    Args:
        x: `[rows, H]`.
        slots: `[rows]`, ascending.
        gate: bank `[S, I, ...]`.
        up: bank `[S, I, ...]`.
        down: bank `[S, H, ...]`.
    """
    hidden = matmul(x, gate, slots)
    up_hidden = matmul(x, up, slots)
    _use_threads(16 * hidden.size)
    _swiglu(hidden, up_hidden)
    return matmul(hidden, down, slots)


@_compiled()
def _gated_delta(
    q: Array, k: Array, v: Array, g: Array, beta: Array, mask: Array, state: Array, y: Array
) -> None:
    batch, tokens, value_heads, value_dim = v.shape
    key_heads, key_dim = k.shape[2:]
    blocks = (value_dim + UNIT - 1) // UNIT
    for unit in prange(batch * value_heads * blocks):
        b, h = unit // blocks // value_heads, unit // blocks % value_heads
        first = unit % blocks * UNIT
        key_head = h // (value_heads // key_heads)
        for t in range(tokens):
            decay, strength = g[b, t, h], beta[b, t, h]
            key, query = k[b, t, key_head], q[b, t, key_head]
            for d in range(first, min(first + UNIT, value_dim)):
                row = state[b, h, d]
                known = np.float32(0)
                for i in range(key_dim):
                    known += row[i] * key[i]
                change = (v[b, t, h, d] - decay * known) * strength
                out = np.float32(0)
                for i in range(key_dim):
                    new = decay * row[i] + change * key[i]
                    out += new * query[i]
                    if mask[b, t]:
                        row[i] = new
                y[b, t, h, d] = out


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    mask: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Scan the gated delta rule; shapes as in `reference.gated_delta`, all float32."""
    if mask is None:
        mask = mx.ones(q.shape[:2], dtype=mx.bool_)
    inputs = [mx.contiguous(t) for t in (q, k, v, g, beta, mask)]
    mx.eval(inputs, state)
    views = [np.asarray(t) for t in inputs]
    final, y = np.array(state), np.empty(v.shape, np.float32)
    _use_threads(2 * y.size * q.shape[-1])
    _gated_delta(*views, final, y)
    return mx.array(y), mx.array(final)
