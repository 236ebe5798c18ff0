"""Routed experts: SwiGLU over experts that sit in slots of quantised weight banks."""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import reference
from flashmoe_mlx.custom_kernels.bank import Bank
from flashmoe_mlx.custom_kernels.choice import prefers_custom
from flashmoe_mlx.custom_kernels.executor import cpu_kernels, on_gpu
from flashmoe_mlx.custom_kernels.linear import swiglu
from flashmoe_mlx.custom_kernels.trial import DTYPES, NAMES, random_quantised

DEQUANTISED_BYTES = 1 << 30  # of one projection's experts at a time
LEAST_ROWS = 8  # per expert, below which it is quicker to multiply by the codes


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

    multiply = _grouped if on_gpu(x) and _wants_grouped(x, slots, gate) else _gathered
    hidden = swiglu(multiply(x, slots, gate), multiply(x, slots, up))
    return multiply(hidden, slots, down)


def ascending(slots: np.ndarray) -> np.ndarray:
    """Return the stable order that sorts small non-negative numbers."""
    # numpy sorts 16-bit integers by radix, ten times faster than longer ones.
    return np.argsort(slots.astype(np.uint16), kind="stable")


def inverted(order: np.ndarray) -> np.ndarray:
    """Return the permutation that undoes one."""
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse


def _gathered(x: mx.array, slots: np.ndarray, bank: Bank) -> mx.array:
    return mx.gather_qmm(
        x[:, None, :],
        bank.codes,
        bank.scales,
        bank.biases,
        rhs_indices=mx.array(slots.astype(np.uint32)),
        transpose=True,
        group_size=bank.group_size,
        bits=bank.bits,
        sorted_indices=True,
    ).squeeze(1)


def _grouped(x: mx.array, slots: np.ndarray, bank: Bank) -> mx.array:
    """Dequantise the experts in use and multiply each by its rows, some experts at a time."""
    starts = _is_first(slots)
    used, places = slots[starts], np.cumsum(starts) - 1
    per_expert = bank.scales.size // len(bank.scales) * bank.group_size * x.dtype.size
    step = max(1, DEQUANTISED_BYTES // per_expert)
    outputs = []
    for first in range(0, len(used), step):
        rows = np.flatnonzero((places >= first) & (places < first + step))
        index = mx.array((places[rows] - first).astype(np.uint32))
        chosen = _run(used[first : first + step])
        weights = mx.dequantize(
            bank.codes[chosen],
            bank.scales[chosen],
            bank.biases[chosen],
            group_size=bank.group_size,
            bits=bank.bits,
        ).astype(x.dtype)
        # Reshaped, not indexed: mx.gather_mm on CUDA takes the strides that indexing leaves for
        # those of a transposed matrix.
        part = mx.contiguous(x[int(rows[0]) : int(rows[-1]) + 1]).reshape(-1, 1, x.shape[-1])
        y = mx.gather_mm(part, weights.swapaxes(-1, -2), rhs_indices=index, sorted_indices=True)
        outputs.append(y.squeeze(1))
    return mx.concatenate(outputs) if len(outputs) > 1 else outputs[0]


def _is_first(slots: np.ndarray) -> np.ndarray:
    """Mark the first row of each of ascending slots."""
    return np.diff(slots, prepend=-1) != 0


def _run(slots: np.ndarray) -> slice | mx.array:
    """Return ascending slots as a slice, which costs no copy, if none is left out."""
    if slots[-1] - slots[0] == len(slots) - 1:
        return slice(int(slots[0]), int(slots[-1]) + 1)
    return mx.array(slots.astype(np.uint32))


def _wants_grouped(x: mx.array, slots: np.ndarray, bank: Bank) -> bool:
    """Say whether rows enough share an expert, and the way over dequantised weights is faster."""
    if len(slots) < LEAST_ROWS * np.count_nonzero(_is_first(slots)):
        return False
    return prefers_custom(
        GroupedTrial(
            x.shape[-1],
            bank.scales.shape[1],
            bank.bits,
            bank.group_size,
            NAMES[x.dtype],
            NAMES[bank.scales.dtype],
        )
    )


@dataclass(frozen=True)
class GroupedTrial:
    """Many rows through few experts, dequantised or gathered; see `trial.Trial`."""

    op: ClassVar[str] = "grouped_experts"
    reads_values: ClassVar[bool] = True
    columns: int
    rows: int
    bits: int
    group_size: int
    dtype: str
    scale_dtype: str
    slots: int = 32
    tokens: int = 2048

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and biases, and of the rows before and after."""
        scales = 16 * DTYPES[self.scale_dtype].size / self.group_size
        weights = self.slots * self.rows * self.columns * (self.bits + scales) / 8
        return int(weights) + self.tokens * (self.rows + self.columns) * DTYPES[self.dtype].size

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make rows, ascending slots, codes, scales and biases."""
        keys = mx.random.split(mx.random.key(seed), 3)
        x = mx.random.normal((self.tokens, self.columns), key=keys[0]).astype(DTYPES[self.dtype])
        slots = mx.sort(mx.random.randint(0, self.slots, (self.tokens,), key=keys[1]))
        shape, scale_dtype = (self.slots, self.rows, self.columns), DTYPES[self.scale_dtype]
        weights = random_quantised(keys[2], shape, self.bits, self.group_size, scale_dtype)
        arrays = [x, slots, *weights]
        mx.eval(arrays)
        return arrays

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Dequantise, then multiply."""
        return [_grouped(inputs[0], np.array(inputs[1]), self._bank(inputs))]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Multiply by mx.gather_qmm."""
        return [_gathered(inputs[0], np.array(inputs[1]), self._bank(inputs))]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        x, slots, *weight = inputs
        ends = np.searchsorted(np.array(slots), np.arange(1, self.slots))
        outputs = []
        # By numpy: MLX multiplies float32 matrices in TF32 on NVIDIA's GPUs.
        for slot, rows in enumerate(np.split(np.array(x.astype(mx.float32)), ends)):
            matrix = reference.dequantize(*(w[slot] for w in weight), self.bits)
            outputs.append(rows @ np.array(matrix).T)
        return [mx.array(np.concatenate(outputs))]

    def _bank(self, inputs: tuple[mx.array, ...]) -> Bank:
        return Bank(inputs[2], inputs[3], inputs[4], self.bits, self.group_size)
