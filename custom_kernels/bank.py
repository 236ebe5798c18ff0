"""Quantised matrices of one shape, in slots."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx


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

    @cached_property
    def packed(self) -> Any:
        """The same memory as the CPU kernels see it."""
        from flashmoe_mlx.custom_kernels import cpu

        return cpu.packed(self.codes, self.scales, self.biases, self.bits, self.group_size)
