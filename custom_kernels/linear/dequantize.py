"""Dequantize whole matrices, for products with many rows, which reuse each weight."""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from .. import reference
from ..autotune import prefers_custom
from ..case import DTYPES, NAMES, random_quantized
from ..launch import Kernel
from ..weights import QuantizedMatrix
from .cases import MatvecCase
from .matvec import supports

LANES = 256
_kernel = Kernel("linear/dequantize", ("codes", "scales", "biases"), ("weights",), ("write.metal",))


def dequantize(matrix: QuantizedMatrix, dtype: mx.Dtype) -> mx.array:
    """Dequantize `[out, in]` weights to `dtype`, by the faster of our kernel and MLX's op."""
    if supports(matrix.bits, matrix.group_size):
        dtypes = NAMES[dtype], NAMES[matrix.scales.dtype]
        rows, columns = matrix.shape
        case = DequantizeCase(rows, columns, matrix.bits, matrix.group_size, *dtypes)
        if prefers_custom(case):
            return dequantize_by_kernel(matrix, dtype)
    return dequantize_by_mlx(matrix, dtype)


def dequantize_by_kernel(matrix: QuantizedMatrix, dtype: mx.Dtype) -> mx.array:
    """Compute `dequantize` in one launch."""
    matrix.check("a matrix", matrix.shape)
    rows, columns = matrix.shape
    (weights,) = _kernel(
        matrix.bound,
        [((rows, columns), dtype)],
        (-(-rows * columns // (8 * LANES)), 1, 1),
        LANES,
        T=dtype,
        S=matrix.scales.dtype,
        BITS=matrix.bits,
        GROUP=matrix.group_size,
        MATRIX=rows * columns,
    )
    return weights


def dequantize_by_mlx(matrix: QuantizedMatrix, dtype: mx.Dtype) -> mx.array:
    """Compute `dequantize` by MLX's own op."""
    codes, scales, biases = matrix.arrays
    if dtype == mx.float32:  # else MLX computes in the scales' dtype and widens the result
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    return mx.dequantize(
        codes, scales, biases, group_size=matrix.group_size, bits=matrix.bits, dtype=dtype
    )


def matmul(x: mx.array, matrix: QuantizedMatrix) -> mx.array:
    """Multiply many rows by a matrix, dequantized first: `[..., in]` to `[..., out]`."""
    return x @ dequantize(matrix, x.dtype).T


def matmul_by_mlx(x: mx.array, matrix: QuantizedMatrix) -> mx.array:
    """Compute `matmul` by MLX's own op."""
    return mx.quantized_matmul(x, *matrix.arrays, group_size=matrix.group_size, bits=matrix.bits)


@dataclass(frozen=True)
class DequantizeCase:
    """`dequantize` of one matrix; see `case.KernelCase`."""

    op: ClassVar[str] = "dequantize"
    rows: int
    columns: int
    bits: int
    group_size: int
    dtype: str
    scale_dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and biases read, and of weights written."""
        read = self.bits / 8 + 2 * DTYPES[self.scale_dtype].size / self.group_size
        per_weight = read + DTYPES[self.dtype].size
        return int(self.rows * self.columns * per_weight)

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make codes, scales and biases."""
        shape, dtype = (self.rows, self.columns), DTYPES[self.scale_dtype]
        arrays = random_quantized(mx.random.key(seed), shape, self.bits, self.group_size, dtype)
        mx.eval(arrays)
        return arrays

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernel."""
        return [dequantize_by_kernel(self._matrix(inputs), DTYPES[self.dtype])]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by mx.dequantize."""
        return [dequantize_by_mlx(self._matrix(inputs), DTYPES[self.dtype])]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        return [reference.dequantize(*self._matrix(inputs).arrays, self.bits)]

    def _matrix(self, inputs: tuple[mx.array, ...]) -> QuantizedMatrix:
        return QuantizedMatrix.of(inputs, self.bits, self.group_size)


@dataclass(frozen=True)
class MatmulCase(MatvecCase):
    """`matmul` at one shape; see `case.KernelCase`."""

    op: ClassVar[str] = "dequantized_matmul"
    tokens: int = 512

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Dequantize, then multiply."""
        return [matmul(*self._matrix(inputs))]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Multiply by mx.quantized_matmul."""
        return [matmul_by_mlx(*self._matrix(inputs))]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32, by numpy: MLX's matmul uses TF32 on NVIDIA's GPUs."""
        x, matrix = self._matrix(inputs)
        weights = np.array(reference.dequantize(*matrix.arrays, self.bits))
        return [mx.array(np.array(x.astype(mx.float32)) @ weights.T)]
