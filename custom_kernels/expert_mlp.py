"""Routed experts: SwiGLU over experts that sit in slots of quantised weight banks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class Quantisation:
    """Affine quantisation of one projection: bits per weight, columns per scale and bias."""

    bits: int
    group_size: int


@partial(mx.compile, shapeless=True)
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


def expert_mlp(
    x: mx.array,
    slots: mx.array,
    banks: Sequence[mx.array],
    quantisation: Sequence[Quantisation],
) -> mx.array:
    """Run one expert per row.

    Args:
        x: `[rows, H]`.
        slots: `[rows]` uint32, the slot of each row's expert, ascending.
        banks: nine arrays `[S, out, packed]` (codes) or `[S, out, groups]` (scales, biases):
            gate, up, down, each codes, scales, biases.
        quantisation: of gate, up and down.

    Returns:
        `[rows, H]` in x's dtype.
    """

    def project(x: mx.array, index: int) -> mx.array:
        codes, scales, biases = banks[3 * index : 3 * index + 3]
        return mx.gather_qmm(
            x,
            codes,
            scales,
            biases,
            rhs_indices=slots,
            transpose=True,
            group_size=quantisation[index].group_size,
            bits=quantisation[index].bits,
            sorted_indices=True,
        )

    x = x[:, None, :]
    return project(_swiglu(project(x, 0), project(x, 1)), 2).squeeze(1)
