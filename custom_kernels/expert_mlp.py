"""Routed experts: SwiGLU over experts that sit in slots of quantised weight banks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels import reference
from flashmoe_mlx.custom_kernels.bank import Bank
from flashmoe_mlx.custom_kernels.choice import prefers_custom
from flashmoe_mlx.custom_kernels.dequantize import dequantize
from flashmoe_mlx.custom_kernels.executor import cpu_kernels, on_gpu
from flashmoe_mlx.custom_kernels.gpu import is_cuda, rounds_products
from flashmoe_mlx.custom_kernels.linear import swiglu
from flashmoe_mlx.custom_kernels.trial import DTYPES, NAMES, random_quantised

DEQUANTISED_BYTES = 1 << 30  # of one projection's experts at a time
LEAST_ROWS = 8  # per expert, below which it is quicker to multiply by the codes
# Where MLX begins to multiply otherwise, and so to round otherwise: on NVIDIA's GPUs with so many
# pairs of row and expert; on Apple's with so many for each slot of the bank, if told their order.
LEAST_PAIRS, LEAST_PER_SLOT = 8, 4
MOST_TRIED_ROWS = 64  # per expert


class Routed(NamedTuple):
    """How a layer's tokens were routed; what decides how to multiply.

    Attributes:
        pairs: of token and expert.
        experts: distinct ones among them.
        of: experts that the layer has.
    """

    pairs: int
    experts: int
    of: int


def routed(ids: np.ndarray, of: int) -> Routed:
    """Count pairs and experts in all expert ids of a layer of `of` experts."""
    return Routed(ids.size, int(np.count_nonzero(np.bincount(ids.reshape(-1)))), of)


def expert_mlp(
    x: mx.array,
    tokens: np.ndarray,
    slots: np.ndarray,
    gate: Bank,
    up: Bank,
    down: Bank,
    part_of: Routed,
) -> mx.array:
    """Run one expert per row: down(silu(gate x) * up x).

    A row's result depends on the row and on `part_of`, and not on which other rows come along.

    Args:
        x: `[N, H]`.
        tokens: `[rows]` integers, the place in x of each row.
        slots: `[rows]` integers, the slot of each row's expert, ascending.
        gate: the gate projections.
        up: the up projections.
        down: the down projections.
        part_of: all rows of the layer, if these are some of them.

    Returns:
        `[rows, H]` in x's dtype.
    """
    banks = gate, up, down
    kernels = cpu_kernels(x)
    if kernels and all(kernels.supports(b.bits, b.group_size, b.scales) for b in banks):
        return mx.array(kernels.mlp(kernels.rows(x)[tokens], *(b.packed for b in banks), slots))
    if on_gpu(x) and _wants_grouped(x, part_of, banks):
        return _grouped(x, tokens, slots, banks)
    return _gathered(x, tokens, slots, banks, part_of)


def ascending(slots: np.ndarray) -> np.ndarray:
    """Return the stable order that sorts small non-negative numbers."""
    # numpy sorts 16-bit integers by radix, ten times faster than longer ones.
    return np.argsort(slots.astype(np.uint16), kind="stable")


def inverted(order: np.ndarray) -> np.ndarray:
    """Return the permutation that undoes one, uint32."""
    inverse = np.empty(len(order), np.uint32)
    inverse[order] = np.arange(len(order))
    return inverse


def _gathered(
    x: mx.array,
    tokens: np.ndarray,
    slots: np.ndarray,
    banks: tuple[Bank, Bank, Bank],
    part_of: Routed,
) -> mx.array:
    """Multiply row by row, by codes as they are; repeat the last until all parts go one way."""
    in_order = not is_cuda() and part_of.pairs >= LEAST_PER_SLOT * max(part_of.of, 4)
    least = LEAST_PER_SLOT * max(len(banks[0].codes), 4) if in_order else LEAST_PAIRS
    padding = max(0, min(least, part_of.pairs) - len(slots))
    index, places = _together(*(np.pad(a, (0, padding), "edge") for a in (slots, tokens)))

    def multiply(x: mx.array, bank: Bank) -> mx.array:
        return mx.gather_qmm(
            x,
            bank.codes,
            bank.scales,
            bank.biases,
            rhs_indices=index,
            transpose=True,
            group_size=bank.group_size,
            bits=bank.bits,
            sorted_indices=in_order,
        )

    gate, up, down = banks
    rows = x[places][:, None, :]
    y = multiply(swiglu(multiply(rows, gate), multiply(rows, up)), down).squeeze(1)
    return y[: len(tokens)] if padding else y


def _grouped(
    x: mx.array, tokens: np.ndarray, slots: np.ndarray, banks: tuple[Bank, Bank, Bank]
) -> mx.array:
    """Dequantise the experts in use and multiply those with about as many rows in one batch."""
    starts = np.flatnonzero(np.diff(slots, prepend=-1))
    counts = np.diff(starts, append=len(slots))
    most = max(1, DEQUANTISED_BYTES // (banks[0].scales[0].size * banks[0].group_size * x.itemsize))
    where = np.empty(len(slots), np.uint32)
    batches: list[np.ndarray] = []
    done = 0
    for capacity, experts in _alike(counts, most):
        if len(experts) == 1:  # a batch of one would be multiplied otherwise
            experts = np.repeat(experts, 2)
        # What is left of a batch repeats the expert's last row.
        rows = np.minimum(np.arange(capacity), counts[experts, None] - 1) + starts[experts, None]
        where[rows] = done + np.arange(rows.size).reshape(rows.shape)
        done += rows.size
        batches += slots[starts[experts]], tokens[rows]
    index, *batches_there = _together(where, *batches)
    outputs = [
        _batched(x, rows, some, banks).reshape(-1, x.shape[-1])
        for some, rows in zip(batches_there[::2], batches_there[1::2], strict=True)
    ]
    together = mx.concatenate(outputs) if len(outputs) > 1 else outputs[0]
    return together[index]


def _together(*indices: np.ndarray) -> list[mx.array]:
    """Return integers as uint32 arrays, in one: CUDA takes long for each of the host's."""
    ends = np.cumsum([a.size for a in indices])
    whole = mx.array(np.concatenate([a.reshape(-1) for a in indices]).astype(np.uint32))
    parts = mx.split(whole, ends[:-1].tolist())
    return [part.reshape(a.shape) for part, a in zip(parts, indices, strict=True)]


def _alike(counts: np.ndarray, most: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a power of two and the places of up to `most` counts which that is room for.

    Powers of two, so that few shapes occur: libraries choose and GPUs record kernels by shape.
    """
    capacities = 1 << np.ceil(np.log2(np.maximum(counts, LEAST_ROWS))).astype(np.int64)
    for capacity in np.unique(capacities):
        experts = np.flatnonzero(capacities == capacity)
        for first in range(0, len(experts), most):
            yield int(capacity), experts[first : first + most]


def _batched(
    x: mx.array, tokens: mx.array, slots: mx.array, banks: tuple[Bank, Bank, Bank]
) -> mx.array:
    """Run experts on `[experts, rows]` tokens each: `[experts, rows, H]`."""
    gate, up, down = (dequantize(bank, slots, x.dtype).swapaxes(-1, -2) for bank in banks)
    rows = x[tokens]
    return swiglu(rows @ gate, rows @ up) @ down


def _wants_grouped(x: mx.array, part_of: Routed, banks: tuple[Bank, Bank, Bank]) -> bool:
    """Say whether rows enough share an expert, and the way over dequantised weights is faster."""
    rows = part_of.pairs // part_of.experts
    if rows < LEAST_ROWS or rounds_products(x):
        return False
    gate, up, down = banks
    if gate.bits != up.bits or len({bank.group_size for bank in banks}) > 1:
        return False
    trial = GroupedTrial(
        x.shape[-1],
        gate.scales.shape[1],
        gate.bits,
        gate.group_size,
        NAMES[x.dtype],
        NAMES[gate.scales.dtype],
        down.bits,
        rows=1 << min(rows, MOST_TRIED_ROWS).bit_length() - 1,
    )
    return prefers_custom(trial)


@dataclass(frozen=True)
class GroupedTrial:
    """Many rows through few experts, dequantised or gathered; see `trial.Trial`.

    Attributes:
        hidden: H.
        inner: I.
        bits: of gate and up.
        group_size: columns per scale.
        dtype: of activations.
        scale_dtype: of scales and biases.
        down_bits: of down.
        slots: experts.
        rows: per expert, on average.
    """

    op: ClassVar[str] = "grouped_experts"
    reads_values: ClassVar[bool] = True
    hidden: int
    inner: int
    bits: int
    group_size: int
    dtype: str
    scale_dtype: str
    down_bits: int
    slots: int = 32
    rows: int = MOST_TRIED_ROWS

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and biases, and of the rows before and after."""
        scales = 16 * DTYPES[self.scale_dtype].size / self.group_size
        bits = 2 * self.bits + self.down_bits + 3 * scales
        weights = int(self.slots * self.inner * self.hidden * bits / 8)
        return weights + 2 * self.slots * self.rows * self.hidden * DTYPES[self.dtype].size

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make rows, ascending slots, and codes, scales and biases of three projections."""
        keys = mx.random.split(mx.random.key(seed), 5)
        tokens = self.slots * self.rows
        x = mx.random.normal((tokens, self.hidden), key=keys[0]).astype(DTYPES[self.dtype])
        slots = mx.sort(mx.random.randint(0, self.slots, (tokens,), key=keys[1]))
        arrays = [x, slots]
        wide, tall = (self.inner, self.hidden), (self.hidden, self.inner)
        for key, shape, bits in zip(keys[2:], (wide, wide, tall), self._bits, strict=True):
            scale_dtype = DTYPES[self.scale_dtype]
            arrays += random_quantised(
                key, (self.slots, *shape), bits, self.group_size, scale_dtype
            )
        mx.eval(arrays)
        return arrays

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Dequantise, then multiply."""
        return [_grouped(*self._arguments(inputs))]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Multiply by mx.gather_qmm."""
        all_rows = Routed(self.slots * self.rows, self.slots, self.slots)
        x, tokens, slots, banks = self._arguments(inputs)
        return [_gathered(x, tokens, slots, banks, all_rows)]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        x, tokens, slots, banks = self._arguments(inputs)
        matrices = [
            np.array(reference.dequantize(b.codes, b.scales, b.biases, b.bits)) for b in banks
        ]
        rows = np.array(x.astype(mx.float32))[tokens]
        y = np.empty_like(rows)
        # By numpy: MLX multiplies float32 matrices in TF32 on NVIDIA's GPUs.
        for slot in np.unique(slots):
            gate, up, down = (matrix[slot].T for matrix in matrices)
            some = rows[slots == slot]
            gated = some @ gate
            y[slots == slot] = (gated / (1 + np.exp(-gated)) * (some @ up)) @ down
        return [mx.array(y)]

    @property
    def _bits(self) -> tuple[int, int, int]:
        return self.bits, self.bits, self.down_bits

    def _arguments(self, inputs: tuple[mx.array, ...]) -> tuple[Any, ...]:
        banks = tuple(
            Bank(*inputs[2 + 3 * i : 5 + 3 * i], bits, self.group_size)
            for i, bits in enumerate(self._bits)
        )
        return inputs[0], np.arange(len(inputs[0])), np.array(inputs[1]), banks
