"""View the bytes of checkpoint files as MLX arrays, and arrays as bytes."""

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .read import Bytes

FLOATS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
# MLX has no 8-bit floats: uint8 carries their bits.
DTYPES = FLOATS | {
    "U8": mx.uint8, "I8": mx.int8, "F8_E4M3": mx.uint8, "BOOL": mx.bool_, "U16": mx.uint16,
    "I16": mx.int16, "U32": mx.uint32, "I32": mx.int32, "U64": mx.uint64, "I64": mx.int64,
}  # fmt: skip
# NumPy has no bfloat16: uint16 carries its bits.
NUMPY: dict[str, npt.DTypeLike] = {
    "BF16": np.uint16, "F16": np.float16, "F32": np.float32, "U32": np.uint32, "U8": np.uint8,
    "I8": np.int8, "F8_E4M3": np.uint8, "BOOL": np.bool_, "U16": np.uint16, "I16": np.int16,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64,
}  # fmt: skip


def as_array(data: Bytes, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """Copy raw bytes into an MLX array of a safetensors dtype, one of DTYPES."""
    array = mx.array(data.view(NUMPY[dtype]).reshape(shape))
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def as_bytes(array: mx.array) -> memoryview:
    """View the bytes of an evaluated, row-contiguous array."""
    exporter: Any = array  # its type stubs omit the buffer protocol
    return memoryview(exporter).cast("B")
