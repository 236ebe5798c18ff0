"""Checks of shapes and dtypes against the sizes by which kernels index."""

from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import FlashMoEError

FEW = 64  # numbers that Python checks faster than NumPy


def expect(name: str, array: Any, shape: tuple[int, ...], dtype: Any = None) -> None:
    """Raise FlashMoEError unless an MLX or NumPy array has this shape (and dtype, if given)."""
    if array.shape != shape or (dtype is not None and array.dtype != dtype):
        kind, wanted = ("", "") if dtype is None else map(_name, (array.dtype, dtype))
        raise FlashMoEError(
            f"{name}: {list(array.shape)}{kind}, but this layer takes {list(shape)}{wanted}. "
            "Pass arrays of this model's sizes; a cache works only with the model that made it."
        )


def _name(dtype: Any) -> str:
    return " " + getattr(dtype, "__name__", str(dtype)).removeprefix("mlx.core.")


def expect_count(name: str, number: int, most: int) -> None:
    """Raise FlashMoEError unless `number` is from 1 to `most`."""
    if not 1 <= number <= most:
        raise FlashMoEError(f"{name}: {number}, but this layer takes 1 to {most}.")


def expect_below(name: str, numbers: np.ndarray, limit: int) -> None:
    """Raise FlashMoEError unless all numbers (int64) are from 0 to `limit` - 1."""
    expect(name, numbers, (numbers.size,), np.int64)
    some = numbers.tolist() if numbers.size <= FEW else [int(numbers.min()), int(numbers.max())]
    if wrong := [number for number in some if not 0 <= number < limit]:
        raise FlashMoEError(
            f"{name}: {wrong[0]} is not one of 0 to {limit - 1}. Load the model again."
        )


def expect_quantized(
    name: str, codes: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> None:
    """Raise FlashMoEError unless codes, scales and biases match each other and their format.

    Args:
        name: in errors.
        codes: `[..., out, in * bits / 32]` uint32.
        scales: `[..., out, groups]`.
        biases: like `scales`.
        bits: bits per weight.
        group_size: columns per scale and bias.
    """
    *lead, words = codes.shape
    expect(f"{name}: codes", codes, (*lead, words), mx.uint32)
    groups = words * 32 // bits // group_size
    expect(f"{name}: scales", scales, (*lead, groups))
    expect(f"{name}: biases", biases, (*lead, groups), scales.dtype)
    if groups * group_size * bits != words * 32:
        raise FlashMoEError(
            f"{name}: a row of {words} words does not hold whole groups of {group_size} columns at "
            f"{bits} bits. Convert the checkpoint again."
        )
