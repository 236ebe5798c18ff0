"""Quantised matrices of one shape, in slots."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from flashmoe_mlx.custom_kernels.shapes import expect, expect_quantised


@dataclass(frozen=True)
class Bank:
    """One projection of the experts of a layer, affine-quantised; or one matrix, without S.

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

    def __deepcopy__(self, memo: dict[int, Any]) -> "Bank":
        """Share the arrays: a store goes on writing experts into them."""
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """`[S, out, in]`, or `[out, in]`."""
        return *self.scales.shape[:-1], self.scales.shape[-1] * self.group_size

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Compare the arrays with one another, and with the shape that a kernel takes.

        Raises:
            FlashMoEError: they do not belong together.
        """
        expect_quantised(name, self.codes, self.scales, self.biases, self.bits, self.group_size)
        expect(name, self, shape)

    @cached_property
    def packed(self) -> Any:
        """The same memory as the CPU kernels see it."""
        from flashmoe_mlx.custom_kernels import cpu

        return cpu.packed(self.codes, self.scales, self.biases, self.bits, self.group_size)
