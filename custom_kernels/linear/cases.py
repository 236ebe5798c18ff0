"""Kernel cases of a quantized matrix times a few vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import mlx.core as mx

from .. import reference
from ..case import DTYPES, random_quantized
from ..cpu.entry import cpu_steps
from ..launch import available as gpu_available
from ..launch import scalar
from ..weights import QuantizedMatrix
from .matvec import dequant_matvec, naive_matvec

NORM_EPS = 1e-6


@dataclass(frozen=True)
class MatvecCase:
    """`dequant_matvec` at one shape; see `case.KernelCase`."""

    op: ClassVar[str] = "dequant_matvec"
    rows: int
    columns: int
    bits: int
    group_size: int
    dtype: str
    scale_dtype: str
    tokens: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales, biases and activations."""
        groups = 2 * self.columns // self.group_size * DTYPES[self.scale_dtype].size
        activations = self.tokens * (self.rows + self.columns) * DTYPES[self.dtype].size
        return self.rows * (self.columns * self.bits // 8 + groups) + activations

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make x, codes, scales, biases."""
        keys = mx.random.split(mx.random.key(seed), 2)
        x = mx.random.normal((self.tokens, self.columns), key=keys[0]).astype(DTYPES[self.dtype])
        shape = self.rows, self.columns
        scale_dtype = DTYPES[self.scale_dtype]
        arrays = [x, *random_quantized(keys[1], shape, self.bits, self.group_size, scale_dtype)]
        mx.eval(arrays)
        return arrays

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our GPU kernel, or by numba on a machine without a GPU."""
        x, matrix = self._matrix(inputs)
        if not gpu_available() and (steps := cpu_steps(x)):
            key = id(matrix.codes)
            if key not in self._cpu_weights:
                self._cpu_weights[key] = steps.Group(matrix)
            return [steps.multiply(x, self._cpu_weights[key])]
        return [dequant_matvec(x, *matrix.arrays, self.bits)]

    @cached_property
    def _cpu_weights(self) -> dict[int, Any]:
        """The CPU kernels' form of each set of inputs, cached as for a model's layers."""
        return {}

    def naive(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by the naive kernel."""
        x, matrix = self._matrix(inputs)
        return [naive_matvec(x, *matrix.arrays, self.bits)]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by mx.quantized_matmul."""
        x, matrix = self._matrix(inputs)
        group_size, bits = self.group_size, self.bits
        return [mx.quantized_matmul(x, *matrix.arrays, group_size=group_size, bits=bits)]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        x, matrix = self._matrix(inputs)
        return [x.astype(mx.float32) @ reference.dequantize(*matrix.arrays, self.bits).T]

    def _matrix(self, inputs: Sequence[mx.array]) -> tuple[mx.array, QuantizedMatrix]:
        return inputs[0], QuantizedMatrix.of(inputs[1:4], self.bits, self.group_size)


@dataclass(frozen=True)
class NormedMatvecCase(MatvecCase):
    """`dequant_matvec` of an RMS-normalized input; stock normalizes in a separate launch."""

    op: ClassVar[str] = "dequant_matvec_normed"

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make x, codes, scales, biases and the norm's gain."""
        gain = mx.random.normal((self.columns,), key=mx.random.key(seed + 1)) / 8 + 1
        return [*super().inputs(seed), gain.astype(DTYPES[self.dtype])]

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernel."""
        x, matrix = self._matrix(inputs)
        norm = inputs[4], scalar(NORM_EPS)
        return [dequant_matvec(x, *matrix.arrays, self.bits, norm=norm)]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by mx.fast.rms_norm and mx.quantized_matmul."""
        x, *arrays, gain = inputs
        return super().stock(mx.fast.rms_norm(x, gain, NORM_EPS), *arrays)

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        x, *arrays, gain = inputs
        return super().reference(reference.rms_norm(x, gain, NORM_EPS), *arrays)
