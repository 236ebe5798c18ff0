"""A quantized matrix times a few vectors, on a GPU."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ...errors import FlashMoEError
from ..launch import SIMD, Kernel, is_cuda
from ..packed import Part
from ..shapes import expect, expect_quantized

BITS = (2, 4, 8)
GROUP_SIZES = (32, 64, 128)
MAX_TOKENS = 4  # activation rows: the kernel reads the weights once per row
# Columns per lane and step, by bits: Apple's from MLX's own kernels, NVIDIA's measured.
CHUNK = {2: 16, 4: 16, 8: 8}
CUDA_CHUNK = {2: 32, 4: 16, 8: 16}
TILE = 4  # rows per unit

_kernel = Kernel(
    "linear/dequant_matvec",
    ("x", "codes", "scales", "biases", "gain", "eps", "residual"),
    ("y",),
    ("affine.metal",),
)
_naive_kernel = Kernel("linear/naive_matvec", ("x", "codes", "scales", "biases"), ("y",))


def supports(bits: int, group_size: int) -> bool:
    """Return whether the kernels support this format."""
    return bits in BITS and group_size in GROUP_SIZES


def dequant_matvec(
    x: mx.array,
    codes: mx.array | Part,
    scales: mx.array | Part,
    biases: mx.array | Part,
    bits: int,
    *,
    norm: Sequence[mx.array | Part] | None = None,
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
    """Return a launch's constants.

    NVIDIA GPUs have more simdgroups than most matrices have rows, so four share a unit's columns.
    """
    chunk = (CUDA_CHUNK if cuda else CHUNK)[bits]
    split = min(4, max(1, columns // (SIMD * chunk))) if cuda else 1
    return {"CHUNK": chunk, "TILE": TILE, "SPLIT": split, "UNITS": 1 if cuda else 2}


def naive_matvec(
    x: mx.array, codes: mx.array, scales: mx.array, biases: mx.array, bits: int
) -> mx.array:
    """Compute `dequant_matvec`, dequantizing each weight first: a baseline for benchmarks."""
    return _launch(_naive_kernel, [x, codes, scales, biases], bits, x.dtype)


def _launch(
    kernel: Kernel, arrays: list[Any], bits: int, dtype: mx.Dtype, **flags: bool
) -> mx.array:
    x, codes, scales, biases = arrays[:4]
    rows, columns = scales.shape[0], x.shape[-1]
    group = columns // scales.shape[1]
    if group not in GROUP_SIZES:
        raise FlashMoEError(f"groups of {group} columns, but this layer takes {GROUP_SIZES}.")
    expect("codes", codes, (rows, columns * bits // 32))
    expect_quantized("a matrix", codes, scales, biases, bits, group)
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
