"""Quantized matrices, and what is remembered of them while they stay the same arrays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from .shapes import expect, expect_quantized

T = TypeVar("T")


@dataclass(frozen=True)
class QuantizedMatrix:
    """One projection of the experts of a layer, affine-quantized; or one matrix, without S.

    Attributes:
        codes: `[S, out, in * bits / 32]` uint32.
        scales: `[S, out, groups]`.
        biases: `[S, out, groups]`.
        bits: bits per weight.
        group_size: columns per scale and bias.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    @classmethod
    def of(cls, arrays: Sequence[mx.array], bits: int, group_size: int) -> "QuantizedMatrix":
        """Make one of codes, scales and biases, in this order."""
        codes, scales, biases = arrays
        return cls(codes, scales, biases, bits, group_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedMatrix":
        """Share the arrays: a store goes on writing experts into them."""
        return self

    @classmethod
    def of_layer(cls, layer: nn.Module) -> "QuantizedMatrix":
        """Take the weights of an `nn.QuantizedLinear`."""
        return cls(layer.weight, layer.scales, layer.biases, layer.bits, layer.group_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[S, out, in]`, or `[out, in]`."""
        return *self.codes.shape[:-1], self.codes.shape[-1] * 32 // self.bits

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """Codes, scales and biases."""
        return self.codes, self.scales, self.biases

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Compare the arrays with one another, and with the shape that a kernel takes.

        Raises:
            FlashMoEError: they do not belong together.
        """
        expect_quantized(name, self.codes, self.scales, self.biases, self.bits, self.group_size)
        expect(name, self, shape)

    @cached_property
    def packed(self) -> Any:
        """The same memory as the CPU kernels see it."""
        from .cpu import prefill

        return prefill.packed(self.codes, self.scales, self.biases, self.bits, self.group_size)


def arrays_of(layers: Sequence[nn.Module]) -> tuple[mx.array | None, ...]:
    """Return the codes, scales and biases of layers; None where one has none."""
    return tuple(layer.get(name) for layer in layers for name in ("weight", "scales", "biases"))


def same(known: Sequence[Any], now: Sequence[Any]) -> bool:
    """Say whether both hold the same objects."""
    return len(known) == len(now) and all(map(is_, known, now))


def remembered(
    owner: nn.Module,
    name: str,
    arrays: Callable[[], Sequence[Any]],
    make: Callable[[], T | None],
) -> T | None:
    """Return what `make` returned when the weights were the arrays that they are now.

    Args:
        owner: the module that keeps it.
        name: the attribute that it keeps it in.
        arrays: returns the weights; asked again after `make`, which may replace them.
        make: None is not remembered.
    """
    known: Any = getattr(owner, name, None)
    if known is not None and same(known[0], arrays()):
        return known[1]
    if (made := make()) is not None:
        setattr(owner, name, (tuple(arrays()), made))
    return made


def is_affine(layer: nn.Module) -> bool:
    """Say whether a layer is a plain affine-quantized matrix."""
    plain = type(layer) is nn.QuantizedLinear and layer.mode == "affine" and "bias" not in layer
    return plain and not layer.training
