"""Routed experts: SwiGLU over experts that sit in slots of quantized weight banks."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from .. import reference
from ..autotune import prefers_custom
from ..case import DTYPES, NAMES, random_quantized
from ..device import cpu_kernels, on_gpu
from ..launch import is_cuda
from ..linear.linear import swiglu
from ..op import Op
from ..weights import QuantizedMatrix
from .tiles import cut, take_rows

# Where MLX begins to multiply otherwise, and so to round otherwise: on NVIDIA's GPUs with so many
# pairs of row and expert; on Apple's with so many for each slot of the bank, if told their order.
LEAST_ASSIGNMENTS, LEAST_PER_SLOT = 8, 4
# Rows of a tile: as many as MLX's kernels multiply at once, on NVIDIA's GPUs two kinds of them.
TILE_ROWS, FEW_ROWS, MANY_ROWS = 32, 16, 64
MOST_TRIED_ROWS = 64  # per expert
Banks = Sequence[QuantizedMatrix]  # gate, up and down


class Routed(NamedTuple):
    """How many rows a layer has; what decides how to multiply.

    Attributes:
        pairs: of token and expert.
        of: experts that the layer has.
    """

    pairs: int
    of: int


def cpu_experts(x: mx.array, banks: Banks) -> ModuleType | None:
    """Return the module of CPU kernels if they take such rows and experts, else None."""
    kernels = cpu_kernels(x)
    taken = kernels and all(kernels.supports(b.bits, b.group_size, b.scales) for b in banks)
    return kernels if taken else None


@Op
def expert_mlp(
    x: mx.array, tokens: mx.array, slots: mx.array, banks: Banks, part_of: Routed
) -> tuple[mx.array, mx.array]:
    """Run one expert per pair, down(silu(gate x) * up x), by MLX's products.

    A pair's result depends on its row and on `part_of`, and not on which others come along.

    Args:
        x: `[N, H]`.
        tokens: `[pairs]` uint32, the place in x of each pair.
        slots: `[pairs]` uint32, the slot of each pair's expert.
        banks: gate, up and down projections.
        part_of: all pairs of the layer, if these are some of them.

    Returns:
        `[rows, H]` in x's dtype, and `[pairs]` uint32, the row of each pair.
    """
    return _gathered(x, tokens, slots, banks, part_of)


@expert_mlp.register
def _expert_mlp_by_gpu(
    x: mx.array, tokens: mx.array, slots: mx.array, banks: Banks, part_of: Routed
) -> tuple[mx.array, mx.array] | None:
    if not on_gpu(x) or not _wants_tiles(x, part_of, banks):
        return None
    return _tiled(x, tokens, slots, banks, part_of)


def ascending(slots: np.ndarray) -> np.ndarray:
    """Return the stable order that sorts small non-negative numbers."""
    # numpy sorts 16-bit integers by radix, ten times faster than longer ones.
    return np.argsort(slots.astype(np.uint16), kind="stable")


def _tiled(
    x: mx.array, tokens: mx.array, slots: mx.array, banks: Banks, part_of: Routed
) -> tuple[mx.array, mx.array]:
    """Multiply tiles of rows that share an expert."""
    tiles = cut(slots, len(banks[0].codes), _tile_rows(part_of))
    y = _multiplied(take_rows(x, tokens, tiles), tiles.slots, banks)
    return y.reshape(-1, x.shape[-1]), tiles.places


def _gathered(
    x: mx.array, tokens: mx.array, slots: mx.array, banks: Banks, part_of: Routed
) -> tuple[mx.array, mx.array]:
    """Multiply row by row, slots ascending; repeat the last until all parts go one way."""
    in_order = not is_cuda() and part_of.pairs >= LEAST_PER_SLOT * max(part_of.of, 4)
    least = LEAST_PER_SLOT * max(len(banks[0].codes), 4) if in_order else LEAST_ASSIGNMENTS
    padding = max(0, min(least, part_of.pairs) - slots.size)
    order = mx.argsort(slots)
    places = mx.put_along_axis(slots, order, mx.arange(slots.size, dtype=mx.uint32), axis=0)
    if padding:
        order = mx.concatenate([order, mx.repeat(order[-1:], padding)])
    y = _multiplied(x[tokens[order]][:, None, :], slots[order], banks, in_order)
    return y.squeeze(1), places


def _multiplied(x: mx.array, slots: mx.array, banks: Banks, in_order: bool = False) -> mx.array:
    """Run `[slots, rows, H]` through the expert in each slot, in x's shape."""

    def multiply(x: mx.array, bank: QuantizedMatrix) -> mx.array:
        return mx.gather_qmm(
            x,
            bank.codes,
            bank.scales,
            bank.biases,
            rhs_indices=slots,
            transpose=True,
            group_size=bank.group_size,
            bits=bank.bits,
            sorted_indices=in_order,
        )

    gate, up, down = banks
    return multiply(swiglu(multiply(x, gate), multiply(x, up)), down)


def _tile_rows(part_of: Routed) -> int:
    """Return how many rows a tile has."""
    if not is_cuda():
        return TILE_ROWS
    return MANY_ROWS if part_of.pairs >= MANY_ROWS * part_of.of else FEW_ROWS


def _wants_tiles(x: mx.array, part_of: Routed, banks: Banks) -> bool:
    """Say whether tiles are faster, going by rows that an expert has on average."""
    gate, up, down = banks
    if gate.bits != up.bits or len({bank.group_size for bank in banks}) > 1:
        return False
    rows = min(max(1, part_of.pairs // part_of.of), MOST_TRIED_ROWS)
    case = TiledCase(
        x.shape[-1],
        gate.scales.shape[1],
        gate.bits,
        gate.group_size,
        NAMES[x.dtype],
        NAMES[gate.scales.dtype],
        down.bits,
        rows=1 << rows.bit_length() - 1,
    )
    return prefers_custom(case)


@dataclass(frozen=True)
class TiledCase:
    """Many rows through some experts, in tiles or row by row; see `case.KernelCase`.

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

    op: ClassVar[str] = "tiled_experts"
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
        """Make rows, slots, and codes, scales and biases of three projections."""
        keys = mx.random.split(mx.random.key(seed), 5)
        tokens = self.slots * self.rows
        x = mx.random.normal((tokens, self.hidden), key=keys[0]).astype(DTYPES[self.dtype])
        slots = mx.random.randint(0, self.slots, (tokens,), mx.uint32, key=keys[1])
        arrays = [x, slots]
        wide, tall = (self.inner, self.hidden), (self.hidden, self.inner)
        for key, shape, bits in zip(keys[2:], (wide, wide, tall), self._bits, strict=True):
            scale_dtype = DTYPES[self.scale_dtype]
            arrays += random_quantized(
                key, (self.slots, *shape), bits, self.group_size, scale_dtype
            )
        mx.eval(arrays)
        return arrays

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Multiply in tiles."""
        y, places = _tiled(*self._arguments(inputs))
        return [y[places]]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Multiply row by row."""
        y, places = _gathered(*self._arguments(inputs))
        return [y[places]]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        x, _, slots, banks, _ = self._arguments(inputs)
        matrices = [
            np.array(reference.dequantize(b.codes, b.scales, b.biases, b.bits)) for b in banks
        ]
        rows, of = np.array(x.astype(mx.float32)), np.array(slots)
        y = np.empty_like(rows)
        # By numpy: MLX multiplies float32 matrices in TF32 on NVIDIA's GPUs.
        for slot in np.unique(of):
            gate, up, down = (matrix[slot].T for matrix in matrices)
            some = rows[of == slot]
            gated = some @ gate
            y[of == slot] = (gated / (1 + np.exp(-gated)) * (some @ up)) @ down
        return [mx.array(y)]

    @property
    def _bits(self) -> tuple[int, int, int]:
        return self.bits, self.bits, self.down_bits

    def _arguments(self, inputs: tuple[mx.array, ...]) -> tuple[Any, ...]:
        x, slots, *arrays = inputs
        banks = tuple(
            QuantizedMatrix.of(arrays[3 * i : 3 * i + 3], bits, self.group_size)
            for i, bits in enumerate(self._bits)
        )
        tokens = mx.arange(len(x), dtype=mx.uint32)
        return x, tokens, slots, banks, Routed(len(x), self.slots)
