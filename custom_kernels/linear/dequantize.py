"""Quantized matrices written out, for products with many rows, where each weight serves often."""

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


def dequantize(bank: QuantizedMatrix, dtype: mx.Dtype) -> mx.array:
    """Write out a matrix, by the faster of our kernel and MLX's op.

    Args:
        bank: `[out, in]` weights.
        dtype: of the result.

    Returns:
        `[out, in]`.
    """
    rows, groups = bank.scales.shape
    columns = groups * bank.group_size
    if supports(bank.bits, bank.group_size):
        case = DequantizeCase(
            rows, columns, bank.bits, bank.group_size, NAMES[dtype], NAMES[bank.scales.dtype]
        )
        if prefers_custom(case):
            return dequantize_by_kernel(bank, dtype)
    return dequantize_by_mlx(bank, dtype)


def dequantize_by_kernel(bank: QuantizedMatrix, dtype: mx.Dtype) -> mx.array:
    """Do what `dequantize` does in one launch."""
    rows, groups = bank.scales.shape
    bank.check("a matrix", bank.shape)
    columns = groups * bank.group_size
    (weights,) = _kernel(
        [bank.codes, bank.scales, bank.biases],
        [((rows, columns), dtype)],
        (-(-rows * columns // (8 * LANES)), 1, 1),
        LANES,
        T=dtype,
        S=bank.scales.dtype,
        BITS=bank.bits,
        GROUP=bank.group_size,
        MATRIX=rows * columns,
    )
    return weights


def dequantize_by_mlx(bank: QuantizedMatrix, dtype: mx.Dtype) -> mx.array:
    """Do what `dequantize` does with MLX's own op."""
    scales, biases = bank.scales, bank.biases
    if dtype == mx.float32:  # else MLX computes in the scales' dtype and widens the result
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    return mx.dequantize(
        bank.codes, scales, biases, group_size=bank.group_size, bits=bank.bits, dtype=dtype
    )


def matmul(x: mx.array, bank: QuantizedMatrix) -> mx.array:
    """Multiply many rows by one matrix, dequantized first: `[..., in]` to `[..., out]`."""
    return x @ dequantize(bank, x.dtype).T


def matmul_by_mlx(x: mx.array, bank: QuantizedMatrix) -> mx.array:
    """Do what `matmul` does with MLX's own op."""
    arrays = bank.codes, bank.scales, bank.biases
    return mx.quantized_matmul(x, *arrays, group_size=bank.group_size, bits=bank.bits)


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
        return [dequantize_by_kernel(self._bank(inputs), DTYPES[self.dtype])]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by mx.dequantize."""
        return [dequantize_by_mlx(self._bank(inputs), DTYPES[self.dtype])]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        codes, scales, biases = inputs
        return [reference.dequantize(codes, scales, biases, self.bits)]

    def _bank(self, inputs: tuple[mx.array, ...]) -> QuantizedMatrix:
        return QuantizedMatrix.of(inputs, self.bits, self.group_size)


@dataclass(frozen=True)
class MatmulCase(MatvecCase):
    """`matmul` at one shape; see `case.KernelCase`."""

    op: ClassVar[str] = "dequantized_matmul"
    tokens: int = 512

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Dequantize, then multiply."""
        return [matmul(inputs[0], self._bank(inputs))]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Multiply by mx.quantized_matmul."""
        return [matmul_by_mlx(inputs[0], self._bank(inputs))]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32, by numpy: MLX multiplies such matrices in TF32 on NVIDIA's GPUs."""
        x, codes, scales, biases = inputs
        matrix = np.array(reference.dequantize(codes, scales, biases, self.bits))
        return [mx.array(np.array(x.astype(mx.float32)) @ matrix.T)]

    def _bank(self, inputs: tuple[mx.array, ...]) -> QuantizedMatrix:
        return QuantizedMatrix.of(inputs[1:], self.bits, self.group_size)
