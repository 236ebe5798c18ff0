"""Routed experts: SwiGLU over experts that sit in slots of quantised weight banks."""

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.bank import Bank
from flashmoe_mlx.custom_kernels.executor import cpu_kernels
from flashmoe_mlx.custom_kernels.linear import swiglu


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
