"""View the bytes of checkpoint files as MLX arrays, and arrays as bytes."""

from typing import Any

import mlx.core as mx
import numpy as np

from .read import Bytes

FLOATS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
# NumPy has no bfloat16: uint16 carries its bits.
_NUMPY = {
    "BF16": np.uint16, "F16": np.float16, "F32": np.float32, "U32": np.uint32, "U8": np.uint8,
}  # fmt: skip


def as_array(data: Bytes, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """Copy raw bytes into an MLX array of a safetensors dtype: BF16, F16, F32, U32 or U8."""
    array = mx.array(data.view(_NUMPY[dtype]).reshape(shape))
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def as_bytes(array: mx.array) -> memoryview:
    """View the bytes of an evaluated, row-contiguous array."""
    exporter: Any = array  # its type stubs omit the buffer protocol
    return memoryview(exporter).cast("B")
