"""`mx.quantize` in numba for CPUs, bit for bit: vectorized, and on all cores."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from ...custom_kernels.cpu.bounds import jit, within
from ...custom_kernels.cpu.simd import F32, address, load

Array = npt.NDArray[Any]
BITS = 2, 4, 8  # their codes do not straddle words
# The integer dtype that carries a float dtype, and the shift that makes a float32 of it.
_CARRIERS = {mx.bfloat16: (mx.uint16, 16), mx.float32: (mx.uint32, 0)}
LANES = 32  # divides every group size
_BLOCK = 64  # groups per task
_ROUNDER = np.float32(3 << 22)  # adding it rounds (ties to even) into the lowest bits


def takes(dtype: mx.Dtype, bits: int) -> bool:
    """Whether `min_max` supports this dtype and these bits."""
    return dtype in _CARRIERS and bits in BITS


def min_max(weights: mx.array, group_size: int, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return `mx.quantize(weights, group_size, bits)`, for arguments that `takes` allows."""
    carrier, shift = _CARRIERS[weights.dtype]
    words = np.array(weights.view(carrier), copy=False).reshape(-1, group_size)
    packed = np.empty(weights.size * bits // 32, np.uint32)
    scales, biases = (np.empty(len(words), np.float32) for _ in range(2))
    _quantize(words, shift, bits, packed, scales, biases)
    *lead, columns = weights.shape
    groups = *lead, columns // group_size
    return (
        mx.array(packed).reshape(*lead, columns * bits // 32),
        mx.array(scales).reshape(groups).astype(weights.dtype),
        mx.array(biases).reshape(groups).astype(weights.dtype),
    )


def _extreme(name: str) -> Any:
    """Return a numba function: the extreme of LANES float32 at a pointer, none of them NaN.

    Hand-written because numba does not vectorize this loop.
    """

    @intrinsic
    def extreme(_context: Any, pointer: Any) -> tuple[Any, Callable[..., Any]]:
        def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
            values = load(builder, args[0], ir.VectorType(F32, LANES), 4)
            kind = ir.FunctionType(F32, [values.type])
            full = f"llvm.vector.reduce.{name}.v{LANES}f32"
            function = cgutils.get_or_insert_function(builder.module, kind, full)
            return builder.call(function, [values], fastmath=("nnan", "nsz"))

        return types.float32(pointer), codegen

    return extreme


_least, _greatest = _extreme("fmin"), _extreme("fmax")


@jit(parallel=True, error_model="numpy")
def _quantize(
    words: Array, shift: int, bits: int, packed: Array, scales: Array, biases: Array
) -> None:
    """Quantize each group, a row of `words`, with MLX's operations in MLX's order."""
    groups, size = words.shape
    each = size * bits // 32
    most, least = np.float32((1 << bits) - 1), np.float32(1e-7)
    for block in prange((groups + _BLOCK - 1) // _BLOCK):
        first = np.int64(block) * _BLOCK
        end = min(first + _BLOCK, groups)
        row, codes = np.empty(size, np.uint32), np.empty((_BLOCK, size), np.uint8)
        steps = np.empty(size, np.float32)
        values, rounded = row.view(np.float32), steps.view(np.uint32)
        for group in range(first, end):
            for i in range(size):
                row[i] = np.uint32(words[group, i]) << np.uint32(shift)
            low, high = np.float32(np.inf), np.float32(-np.inf)
            for i in range(0, size, LANES):
                within("values", i, LANES, size)
                some = address(values, i)
                low, high = min(low, _least(some)), max(high, _greatest(some))
            below = abs(low) > abs(high)
            scale = max((high - low) / most, least)
            scale = scale if below else -scale
            edge = low if below else high
            away, bias = np.rint(edge / scale), np.float32(0.0)
            if away != np.float32(0.0):
                scale, bias = edge / away, edge
            for i in range(size):
                away = (values[i] - bias) / scale
                steps[i] = min(max(away, np.float32(0.0)), most) + _ROUNDER
            for i in range(size):
                codes[group - first, i] = np.uint8(rounded[i])  # its lowest bits
            scales[group], biases[group] = scale, bias
        _pack(codes.reshape(-1), bits, packed[first * each : end * each])


@jit(error_model="numpy")
def _pack(codes: Array, bits: int, packed: Array) -> None:
    """Pack uint8 codes into words, first code lowest, by joining pairs, then pairs of pairs."""
    if bits == 8:
        packed[:] = codes.view(np.uint32)[: packed.size]
    elif bits == 4:
        eights = codes.view(np.uint64)
        for j in range(packed.size):
            x = eights[j]
            x = (x | x >> np.uint64(4)) & np.uint64(0x00FF00FF00FF00FF)
            x = (x | x >> np.uint64(8)) & np.uint64(0x0000FFFF0000FFFF)
            packed[j] = np.uint32(x | x >> np.uint64(16))
    else:
        eights, halves = codes.view(np.uint64), packed.view(np.uint16)
        for j in range(halves.size):
            x = eights[j]
            x = (x | x >> np.uint64(6)) & np.uint64(0x000F000F000F000F)
            x = (x | x >> np.uint64(12)) & np.uint64(0x000000FF000000FF)
            halves[j] = np.uint16(x | x >> np.uint64(24))
