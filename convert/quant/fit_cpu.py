"""`fit` in numba for CPUs: the same search, one group at a time, on all cores."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from ...custom_kernels.cpu.bounds import jit
from ...custom_kernels.cpu.numba_cache import make_cache_safe

make_cache_safe()

Array = npt.NDArray[Any]
BFLOAT, HALF, FULL = range(3)  # storage dtypes of scales and biases
KINDS = {mx.bfloat16: BFLOAT, mx.float16: HALF, mx.float32: FULL}
I32, F32 = ir.IntType(32), ir.FloatType()
FAST = {"reassoc", "contract", "nsz", "arcp"}  # infinities and NaN keep their meaning


@intrinsic
def _to_bfloat(_context: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Round a float32 to bfloat16 (ties to even), as float32."""

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], I32)
        odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
        moved = builder.add(bits, builder.add(odd, I32(0x7FFF)))
        return builder.bitcast(builder.and_(moved, I32(0xFFFF0000)), F32)

    return types.float32(value), codegen


@intrinsic
def _to_half(_context: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Round a float32 to float16, as float32."""

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.fpext(builder.fptrunc(args[0], ir.HalfType()), F32)

    return types.float32(value), codegen


@jit(error_model="numpy")
def stored(x: Any, kind: int) -> Any:
    """Round a float32 to the storage dtype, as float32."""
    if kind == BFLOAT:
        return _to_bfloat(x)
    return _to_half(x) if kind == HALF else x


@jit(fastmath=FAST, error_model="numpy")
def _try(
    row: Array, weight: Array, scale: Any, bias: Any, most: Any, codes: Array
) -> tuple[Any, Any, Any, Any]:
    """Choose the nearest codes; return the error, and sums of code, code^2 and code * weight."""
    inverse = np.float32(0.0) if scale == 0 else np.float32(1.0) / scale
    error = first = second = cross = np.float32(0.0)
    for i in range(row.size):
        code = np.rint((row[i] - bias) * inverse)
        code = min(max(code, np.float32(0.0)), most)
        codes[i] = code
        off = row[i] - (code * scale + bias)
        error += weight[i] * off * off
        first += weight[i] * code
        second += weight[i] * code * code
        cross += weight[i] * code * row[i]
    return error, first, second, cross


@jit(error_model="numpy")
def fit_group(
    row: Array, some: Array, bits: int, kind: int, shares: Array, steps: int, start: Any,
    offset: Any, best: Array,
) -> tuple[Any, Any]:  # fmt: skip
    """Fit one group; return its scale and bias.

    Args:
        row: `[group size]` float32.
        some: weights of squared errors, `[group size]`.
        bits: per code.
        kind: BFLOAT, HALF or FULL.
        shares: see `fit.STARTS`.
        steps: see `fit.STEPS`.
        start: a scale to start from.
        offset: its bias.
        best: `[group size]` float32; receives the codes.
    """
    size = row.size
    most = np.float32((1 << bits) - 1)
    total = max(some.sum(), np.float32(1e-30))
    weight = some / total
    sum_of_weights = weight.sum()
    mean = np.float32(0.0)
    for i in range(size):
        mean += weight[i] * row[i]
    low, high = row.min(), row.max()
    now = np.empty(size, np.float32)
    best_scale, best_bias = start, offset
    least = _try(row, weight, best_scale, best_bias, most, best)[0]
    for share in shares:
        half = (high - low) / np.float32(2.0) * share
        scale = stored(np.float32(2.0) * half / most, kind)
        bias = stored((low + high) / np.float32(2.0) - half, kind)
        for _ in range(steps):
            error, first, second, cross = _try(row, weight, scale, bias, most, now)
            if error < least:
                least, best_scale, best_bias = error, scale, bias
                best[:] = now
            spread = second - first * first * (np.float32(2.0) - sum_of_weights)
            if spread <= np.float32(1e-12):
                break
            new = stored((cross - first * mean) / spread, kind)
            shifted = stored(mean - new * first, kind)
            if new == scale and shifted == bias:
                break
            scale, bias = new, shifted
    return best_scale, best_bias


@jit(parallel=True, error_model="numpy")
def fit_groups(
    rows: Array, counts: Array, bits: int, kind: int, shares: Array, steps: int,
    codes: Array, scales: Array, biases: Array,
) -> None:  # fmt: skip
    """Fit each group of `rows`; `scales` and `biases` hold the start, then the result.

    Args:
        rows: `[groups, group size]` float32.
        counts: weights of squared errors, of rows' shape or `[1, group size]`.
        bits: see `fit_group`.
        kind: see `fit_group`.
        shares: see `fit_group`.
        steps: see `fit_group`.
        codes: `[groups, group size]` uint8, written.
        scales: `[groups]` float32.
        biases: `[groups]` float32.
    """
    for g in prange(len(rows)):
        group: Any = np.int64(g)  # numba turns unsigned with signed into float
        best = np.empty(rows.shape[1], np.float32)
        scales[group], biases[group] = fit_group(
            rows[group], counts[min(group, len(counts) - 1)], bits, kind, shares, steps,
            scales[group], biases[group], best,
        )  # fmt: skip
        for i in range(len(best)):
            codes[group, i] = np.uint8(best[i])
