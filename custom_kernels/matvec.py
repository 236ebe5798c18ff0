"""Quantised matrix times a few vectors, on a GPU."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import mlx.core as mx

from flashmoe_mlx.custom_kernels import reference
from flashmoe_mlx.custom_kernels.executor import cpu_steps
from flashmoe_mlx.custom_kernels.gpu import SIMD, Kernel, is_cuda, scalar
from flashmoe_mlx.custom_kernels.gpu import available as gpu_available
from flashmoe_mlx.custom_kernels.shapes import expect, expect_quantised
from flashmoe_mlx.custom_kernels.trial import DTYPES, random_quantised
from flashmoe_mlx.errors import FlashMoEError

BITS = (2, 4, 8)
GROUP_SIZES = (32, 64, 128)
MAX_TOKENS = 4  # rows of activations worth a kernel that reads the weights for each
# Columns that a lane takes at a time, by bits. Apple's as in MLX's own kernels; NVIDIA's measured.
CHUNK = {2: 16, 4: 16, 8: 8}
CUDA_CHUNK = {2: 32, 4: 16, 8: 16}
TILE = 4  # rows that a unit makes
NORM_EPS = 1e-6  # of trials

_kernel = Kernel(
    "dequant_matvec",
    ("x", "codes", "scales", "biases", "gain", "eps", "residual"),
    ("y",),
    ("affine.metal",),
)
_naive_kernel = Kernel("naive_matvec", ("x", "codes", "scales", "biases"), ("y",))


def supports(bits: int, group_size: int) -> bool:
    """Say whether the kernels take weights quantised so."""
    return bits in BITS and group_size in GROUP_SIZES


def dequant_matvec(
    x: mx.array,
    codes: mx.array,
    scales: mx.array,
    biases: mx.array,
    bits: int,
    *,
    norm: tuple[mx.array, mx.array] | None = None,
    residual: mx.array | None = None,
    dtype: mx.Dtype | None = None,
) -> mx.array:
    """Multiply: y = W x, or y = residual + W rms_norm(x).

    Args:
        x: `[..., columns]`.
        codes: `[rows, columns * bits / 32]` uint32.
        scales: `[rows, groups]`.
        biases: `[rows, groups]`.
        bits: 2, 4 or 8.
        norm: gain `[columns]` and epsilon `[1]` of an RMS norm to apply to x first.
        residual: `[..., rows]` to add.
        dtype: of the result; x's if None.

    Returns:
        `[..., rows]`.
    """
    if norm is not None:
        expect("the norm's weight", norm[0], x.shape[-1:])
    if residual is not None:
        expect("the residual", residual, (*x.shape[:-1], scales.shape[0]))
    gain, eps = norm or (x, x)
    arrays = [x, codes, scales, biases, gain, eps, x if residual is None else residual]
    flags = {"NORM": norm is not None, "RESIDUAL": residual is not None}
    return _launch(_kernel, arrays, bits, dtype or x.dtype, **flags)


def geometry(columns: int, bits: int, *, cuda: bool) -> dict[str, int]:
    """Return the constants of a launch.

    An NVIDIA GPU has more simdgroups than most matrices have rows, so four share a unit's columns.
    """
    chunk = (CUDA_CHUNK if cuda else CHUNK)[bits]
    split = min(4, max(1, columns // (SIMD * chunk))) if cuda else 1
    return {"CHUNK": chunk, "TILE": TILE, "SPLIT": split, "UNITS": 1 if cuda else 2}


def naive_matvec(
    x: mx.array, codes: mx.array, scales: mx.array, biases: mx.array, bits: int
) -> mx.array:
    """Multiply as `dequant_matvec` does, but dequantise each weight: a baseline for benchmarks."""
    return _launch(_naive_kernel, [x, codes, scales, biases], bits, x.dtype)


def _launch(
    kernel: Kernel, arrays: list[mx.array], bits: int, dtype: mx.Dtype, **flags: bool
) -> mx.array:
    x, codes, scales, biases = arrays[:4]
    rows, columns = scales.shape[0], x.shape[-1]
    group = columns // scales.shape[1]
    if group not in GROUP_SIZES:
        raise FlashMoEError(f"groups of {group} columns, but this layer takes {GROUP_SIZES}.")
    expect("codes", codes, (rows, columns * bits // 32))
    expect_quantised("a matrix", codes, scales, biases, bits, group)
    shape = geometry(columns, bits, cuda=is_cuda())
    (y,) = kernel(
        arrays,
        [((*x.shape[:-1], rows), dtype)],
        (-(-rows // (shape["TILE"] * shape["UNITS"])), x.size // columns, 1),
        SIMD * shape["SPLIT"] * shape["UNITS"],
        T=x.dtype,
        S=scales.dtype,
        Y=dtype,
        ROWS=rows,
        COLUMNS=columns,
        BITS=bits,
        GROUP=group,
        **shape,
        **flags,
    )
    return y


@dataclass(frozen=True)
class MatvecTrial:
    """`dequant_matvec` at one shape; see `trial.Trial`."""

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
        arrays = [x, *random_quantised(keys[1], shape, self.bits, self.group_size, scale_dtype)]
        mx.eval(arrays)
        return arrays

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernel: the GPU's, or numba's on a machine without one."""
        x, codes, scales, biases = inputs
        if not gpu_available() and (steps := cpu_steps(x)):
            if id(codes) not in self._cpu_weights:
                self._cpu_weights[id(codes)] = steps.matrices(inputs[1:], self.bits)
            return [steps.multiply(x, self._cpu_weights[id(codes)])]
        return [dequant_matvec(x, codes, scales, biases, self.bits)]

    @cached_property
    def _cpu_weights(self) -> dict[int, Any]:
        """What the CPU kernels know of each set of inputs, as they know it of a model's layers."""
        return {}

    def naive(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by the naive kernel."""
        x, codes, scales, biases = inputs
        return [naive_matvec(x, codes, scales, biases, self.bits)]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by mx.quantized_matmul."""
        x, codes, scales, biases = inputs
        group_size, bits = self.group_size, self.bits
        return [mx.quantized_matmul(x, codes, scales, biases, group_size=group_size, bits=bits)]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        x, codes, scales, biases = inputs
        return [x.astype(mx.float32) @ reference.dequantize(codes, scales, biases, self.bits).T]


@dataclass(frozen=True)
class NormedMatvecTrial(MatvecTrial):
    """`dequant_matvec` of a normalised input, which stock normalises in a launch of its own."""

    op: ClassVar[str] = "dequant_matvec_normed"

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make x, codes, scales, biases and the norm's gain."""
        gain = mx.random.normal((self.columns,), key=mx.random.key(seed + 1)) / 8 + 1
        return [*super().inputs(seed), gain.astype(DTYPES[self.dtype])]

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernel."""
        x, codes, scales, biases, gain = inputs
        norm = gain, scalar(NORM_EPS)
        return [dequant_matvec(x, codes, scales, biases, self.bits, norm=norm)]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by mx.fast.rms_norm and mx.quantized_matmul."""
        x, *arrays, gain = inputs
        return super().stock(mx.fast.rms_norm(x, gain, NORM_EPS), *arrays)

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        x, *arrays, gain = inputs
        x = x.astype(mx.float32)
        factor = mx.rsqrt((x * x).mean(-1, keepdims=True) + NORM_EPS)
        return super().reference(x * factor * gain.astype(mx.float32), *arrays)
