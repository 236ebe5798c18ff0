"""Routed experts: SwiGLU over experts that sit in slots of quantised weight banks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.executor import cpu_kernels
from flashmoe_mlx.custom_kernels.linear import swiglu


@dataclass(frozen=True)
class Bank:
    """One projection of the experts of a layer, affine-quantised.

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


def expert_mlp(x: mx.array, slots: np.ndarray, gate: Bank, up: Bank, down: Bank) -> mx.array:
    """Run one expert per row: down(silu(gate x) * up x).

    Args:
        x: `[rows, H]`.
        slots: `[rows]` integers, the slot of each row's expert, ascending.
        gate: the gate projections.
        up: the up projections.
        down: the down projections.

    Returns:
        `[rows, H]` in x's dtype.
    """
    banks = gate, up, down
    kernels = cpu_kernels(x)
    if kernels and all(kernels.supports(b.bits, b.group_size, b.scales) for b in banks):
        return mx.array(kernels.mlp(kernels.rows(x), *(b.packed for b in banks), slots))

    indices = mx.array(slots.astype(np.uint32))

    def project(x: mx.array, bank: Bank) -> mx.array:
        return mx.gather_qmm(
            x,
            bank.codes,
            bank.scales,
            bank.biases,
            rhs_indices=indices,
            transpose=True,
            group_size=bank.group_size,
            bits=bank.bits,
            sorted_indices=True,
        )

    x = x[:, None, :]
    return project(swiglu(project(x, gate), project(x, up)), down).squeeze(1)
