"""Quantized matrices, and objects cached for as long as the weights stay the same arrays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import Any, Self, TypeVar

import mlx.core as mx
import mlx.nn as nn

from .launch import scalar
from .packed import Part, pack
from .shapes import expect, expect_quantized

T = TypeVar("T")
Three = tuple[mx.array | Part, mx.array | Part, mx.array | Part]


class Shared:
    """Holds arrays that a store writes, or addresses of arrays: a deep copy is the same object."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the object itself."""
        return self


@dataclass(frozen=True)
class QuantizedMatrix(Shared):
    """An affine-quantized matrix, or S of them in slots: one projection of a layer's experts.

    Attributes:
        codes: `[S, out, in * bits / 32]` uint32, or without S.
        scales: `[S, out, groups]`.
        biases: `[S, out, groups]`.
        bits: bits per weight.
        group_size: columns per scale and bias.
        parts: the three where they share a buffer, for GPU kernels.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int
    parts: Three | None = None

    @classmethod
    def of(cls, arrays: Sequence[mx.array | Part], bits: int, group_size: int) -> "QuantizedMatrix":
        """Take codes, scales and biases, in this order, or parts of a buffer that hold them."""
        codes, scales, biases = (x.array if isinstance(x, Part) else x for x in arrays)
        a, b, c = arrays
        parts = (a, b, c) if isinstance(a, Part) else None
        return cls(codes, scales, biases, bits, group_size, parts)

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

    @property
    def bound(self) -> Three:
        """Codes, scales and biases, as GPU kernels bind them."""
        return self.parts or self.arrays

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise FlashMoEError unless the arrays match each other and the shape a kernel takes.

        Args:
            name: in the error.
            shape: `[S, out, in]`, or `[out, in]`.
        """
        expect_quantized(name, self.codes, self.scales, self.biases, self.bits, self.group_size)
        expect(name, self, shape)

    @cached_property
    def packed(self) -> Any:
        """The same memory in the CPU kernels' form."""
        from .cpu import prefill

        return prefill.packed(self.codes, self.scales, self.biases, self.bits, self.group_size)


def arrays_of(layers: Sequence[nn.Module]) -> tuple[mx.array | None, ...]:
    """Return the codes, scales and biases of layers, None for each that is missing."""
    return tuple(layer.get(name) for layer in layers for name in ("weight", "scales", "biases"))


def same(known: Sequence[Any], now: Sequence[Any]) -> bool:
    """Return whether both hold the same objects."""
    return len(known) == len(now) and all(map(is_, known, now))


def remembered(
    owner: nn.Module,
    name: str,
    arrays: Callable[[], Sequence[Any]],
    make: Callable[[], T | None],
) -> T | None:
    """Return `make()`, cached for as long as the weights stay the same arrays.

    Args:
        owner: module that keeps the result.
        name: its attribute.
        arrays: returns the weights; called again after `make`, which may replace them.
        make: a result of None is not cached.
    """
    known: Any = getattr(owner, name, None)
    if known is not None and same(known[0], arrays()):
        return known[1]
    if (made := make()) is not None:
        setattr(owner, name, (tuple(arrays()), made))
    return made


def norm_parts(norm: nn.RMSNorm) -> Sequence[Part]:
    """Return a norm's gain `[H]` and its epsilon, `[LEAST_ELEMENTS]` float32, in one buffer."""
    parts = remembered(
        norm, "_parts", lambda: (norm.weight,), lambda: pack([norm.weight], [scalar(norm.eps)])
    )
    assert parts
    return parts


def is_affine(layer: nn.Module) -> bool:
    """Return whether a layer is a plain affine-quantized matrix."""
    plain = type(layer) is nn.QuantizedLinear and layer.mode == "affine" and "bias" not in layer
    return plain and not layer.training
