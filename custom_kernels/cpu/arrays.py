"""Shared by all CPU kernels: how they compile, and MLX arrays as NumPy views."""

from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from numba import carray, config, set_num_threads

from ...errors import FlashMoEError
from .bounds import jit
from .simd import bfloat_to_f32, floats, half_to_f32, power_of_two, unsigned_shorts

ALL = 1 << 30  # multiply-adds: always worth all threads
Array = np.ndarray[Any, Any]
Function = TypeVar("Function", bound=Callable[..., Any])
F32_SCALES, BF16_SCALES, F16_SCALES = range(3)  # dtypes of scales and biases
SCALE_TYPES = mx.float32, mx.bfloat16, mx.float16
FAST: dict[str, Any] = {"fastmath": True, "error_model": "numpy"}


def compiled(function: Function) -> Function:
    """Compile a function and run its `prange` loops on all threads."""
    return jit(parallel=True, **FAST)(function)


def serial(function: Function) -> Function:
    """Compile a function that parallel ones call."""
    return jit(**FAST)(function)


def use_threads(work: int) -> None:
    """Use all threads for `work` multiply-adds, or one thread for less than about 0.1 ms of work.

    Waking threads costs 10 microseconds, and milliseconds while other programs hold the cores.
    """
    set_num_threads(config.NUMBA_NUM_THREADS if work > 1 << 20 else 1)


def scale_kind(scales: mx.array) -> int:
    """Return F32_SCALES, BF16_SCALES or F16_SCALES."""
    return SCALE_TYPES.index(scales.dtype)


def rows(x: mx.array) -> Array:
    """Evaluate float32 activations `[..., columns]` and view them as `[rows, columns]`.

    NumPy reshapes, because MLX would evaluate once more: 50 microseconds.
    """
    return np.ascontiguousarray(np.asarray(x)).reshape(-1, x.shape[-1])


def view(array: mx.array) -> Array:
    """View an evaluated row-contiguous MLX array; bfloat16 and float16 as uint16."""
    memory = memoryview(array)  # type: ignore[arg-type]
    if not memory.c_contiguous:
        raise FlashMoEError(
            f"{list(array.shape)} is not row-contiguous: pass mx.contiguous(array)."
        )
    if array.dtype in (mx.bfloat16, mx.float16):
        return np.frombuffer(memory.cast("B"), np.uint16).reshape(array.shape)
    return np.asarray(array)


@serial
def copy(source: Array, target: Array) -> None:
    """Copy a row; an array assignment would also compile the code of an error message."""
    for i in range(target.size):
        target[i] = source[i]


# exp(r) = 1 + r + r^2 (a0 + r (a1 + ...)) for |r| <= log(2) / 2, and log(2) in two parts.
_SERIES = tuple(np.float32(1 / n) for n in (2, 6, 24, 120, 720, 5040))
_LOG2_HIGH, _LOG2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_PER_LOG2, _HALF = np.float32(1.44269504), np.float32(0.5)
_LEAST, _MOST = np.float32(-87), np.float32(88)


@serial
def exp(x: Any) -> Any:
    """Return exp(x) for float32, to 2e-7 of its value: six times as fast as libm's in a loop."""
    x = min(max(x, _LEAST), _MOST)
    power = np.floor(x * _PER_LOG2 + _HALF)
    r = x - power * _LOG2_HIGH - power * _LOG2_LOW
    a0, a1, a2, a3, a4, a5 = _SERIES
    series = a0 + r * (a1 + r * (a2 + r * (a3 + r * (a4 + r * a5))))
    return (np.float32(1) + r + r * r * series) * power_of_two(np.int32(power))


@serial
def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + exp(-x)) for float32."""
    return np.float32(1) / (np.float32(1) + exp(-x))


@serial
def silu(x: Any) -> Any:
    """Return x * sigmoid(x) for float32."""
    return x * sigmoid(x)


@serial
def widen(kind: int, source: int, place: int, out: Array) -> None:
    """Write `out.size` scales or biases, from number `place` on, to `out` as float32.

    Args:
        kind: F32_SCALES, BF16_SCALES or F16_SCALES.
        source: address of the first one.
        place: number of values to skip.
        out: flat float32.
    """
    if kind == F32_SCALES:
        copy(carray(floats(source + 4 * place), out.size), out)
        return
    stored = carray(unsigned_shorts(source + 2 * place), out.size)
    if kind == BF16_SCALES:
        for i in range(out.size):
            out[i] = bfloat_to_f32(stored[i])
    else:
        for i in range(out.size):
            out[i] = half_to_f32(stored[i])
