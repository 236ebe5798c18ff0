"""Record the exact text and geometry of the Metal kernels that a function would launch."""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import BenchError

UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
Triple = tuple[int, int, int]
ShapeFlags = tuple[bool, bool, bool]


@dataclass(frozen=True)
class Array:
    """One input: its bytes in memory from the first element on; strides in items."""

    data: bytes
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: mx.Dtype


@dataclass(frozen=True)
class Output:
    """Shape and type of one output."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel, as MLX would pass it to Metal."""

    name: str
    source: str
    grid: Triple
    threadgroup: Triple
    shape_flags: tuple[ShapeFlags, ...]  # per input: takes shape, strides, ndim
    inputs: tuple[Array, ...]
    outputs: tuple[Output, ...]
    init_value: float | None = None


def array_bytes(x: mx.array, contiguous: bool = True) -> Array:
    """Copy an array from MLX, row-contiguous unless the kernel takes strides as they are."""
    unsigned = UNSIGNED[x.dtype.size]
    bits = x if x.dtype == unsigned else x.view(unsigned) if x.ndim else x.reshape(1).view(unsigned)
    values = np.asarray(bits).reshape(x.shape) if not x.ndim else np.asarray(bits)
    if contiguous or values.flags.c_contiguous or not values.size:
        values = np.ascontiguousarray(values).reshape(x.shape)
    steps = tuple(s // x.dtype.size for s in values.strides)
    if min(steps, default=0) < 0:
        raise BenchError("bench", f"negative strides {steps} are not supported")
    span = sum((n - 1) * s for n, s in zip(values.shape, values.strides, strict=True))
    size = (span + x.dtype.size) if values.size else 0
    return Array(ctypes.string_at(values.ctypes.data, size), tuple(x.shape), steps, x.dtype)


def to_mx(data: bytes, output: Output) -> mx.array:
    """Make an MLX array from raw bytes."""
    unsigned = np.frombuffer(data, dtype=f"u{output.dtype.size}")
    return mx.array(unsigned).view(output.dtype).reshape(output.shape)


def _constants(messages: list[dict[str, Any]], arrays: tuple[mx.array, ...]) -> dict[str, mx.array]:
    known: dict[str, mx.array] = {}
    for message in messages:
        if message["type"] == "inputs":
            known |= {item[0]: x for item, x in zip(message["inputs"], arrays, strict=True)}
        elif message["type"] == "constants":
            known |= dict(message["constants"])
    return known


def _launch(message: dict[str, Any], known: dict[str, mx.array]) -> Launch:
    arguments = message["arguments"]
    if len(arguments) < 10 or not isinstance(arguments[1], str) or "kernel" not in arguments[1]:
        raise BenchError("record", f"MLX gave no Metal source; its arguments are {arguments!r}")
    name, source, *numbers = arguments[:8]
    flags, contiguous = arguments[8], arguments[9]
    inputs = []
    for item, *_ in message["inputs"]:
        if item not in known:
            raise BenchError("record", "f computes an input of the kernel: use metal_on_cpu")
        inputs.append(array_bytes(known[item], contiguous))
    outputs = tuple(Output(tuple(shape), dtype) for _, shape, dtype in message["outputs"])
    grid, group = tuple(numbers[:3]), tuple(numbers[3:])
    return Launch(name, source, grid, group, tuple(flags), tuple(inputs), outputs)


def record(
    f: Callable[..., Any], *arrays: mx.array, init_value: float | None = None
) -> list[Launch]:
    """Trace f without running it and return the kernels it would launch, in order.

    The inputs of each kernel must be inputs of f or constants. MLX does not export `init_value`.

    Raises:
        BenchError: when MLX records no kernel, or one without source.
    """
    messages: list[dict[str, Any]] = []
    mx.export_function(messages.append, f, *arrays)
    kernels = [m for m in messages if m.get("name") == "CustomKernel"]
    if not kernels:
        raise BenchError("record", "MLX recorded no Metal kernel: has its export format changed?")
    known = _constants(messages, arrays)
    return [replace(_launch(m, known), init_value=init_value) for m in kernels]
