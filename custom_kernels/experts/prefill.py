"""Routed experts of many tokens: SwiGLU over quantized experts in slots."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from .. import reference
from ..autotune import prefers_custom
from ..case import DTYPES, NAMES, random_quantized
from ..cuda import ahead
from ..device import cpu_kernels, on_gpu
from ..launch import is_cuda
from ..linear.linear import swiglu
from ..op import Op
from ..weights import QuantizedMatrix
from .tiles import cut, take_rows

# At these thresholds MLX switches kernels, which round differently: assignments on NVIDIA's GPUs,
# sorted assignments per slot on Apple's.
LEAST_ASSIGNMENTS, LEAST_PER_SLOT = 8, 4
# Rows of a tile, as MLX's kernels multiply at once; on NVIDIA's GPUs two kinds of kernels.
TILE_ROWS, FEW_ROWS, MANY_ROWS = 32, 16, 64
MOST_TRIED_ROWS = 64  # per expert
ExpertMatrices = Sequence[QuantizedMatrix]  # gate, up and down
Format = tuple[int, int, int, int]  # rows, columns, bits, group size


class Routed(NamedTuple):
    """Size of a layer's work, by which kernels are chosen.

    Attributes:
        assignments: token-expert assignments.
        experts: experts of the layer.
    """

    assignments: int
    experts: int


def cpu_experts(x: mx.array, matrices: ExpertMatrices) -> ModuleType | None:
    """Return the module of CPU kernels if they support these rows and experts, else None."""
    kernels = cpu_kernels(x)
    taken = kernels and all(kernels.supports(m.bits, m.group_size, m.scales) for m in matrices)
    return kernels if taken else None


def compile_ahead(matrices: Sequence[Format], dtype: str) -> None:
    """Start to compile what prompts will need, on NVIDIA: see `cuda.ahead`.

    Args:
        matrices: rows, columns, bits and group size of gate, up and down.
        dtype: of activations and scales.
    """
    if not is_cuda() or not on_gpu(mx.zeros(1, DTYPES[dtype])):
        return
    (inner, hidden, bits, group_size), _, (*_, down_bits, _) = matrices
    few, many = (
        TiledCase(hidden, inner, bits, group_size, dtype, dtype, down_bits, slots=2, rows=rows)
        for rows in (FEW_ROWS // 2, MOST_TRIED_ROWS)
    )
    ahead.start([few], later=[many])


@Op
def expert_mlp(
    x: mx.array, tokens: mx.array, slots: mx.array, matrices: ExpertMatrices, whole: Routed
) -> tuple[mx.array, mx.array]:
    """Run one expert per assignment, down(silu(gate x) * up x), by MLX's matmuls.

    A result depends on its row and on `whole`, not on the other assignments of the call.

    Args:
        x: `[N, H]`.
        tokens: `[assignments]` uint32, the row of x of each.
        slots: `[assignments]` uint32, the slot of each; or NONE, whose result is undefined.
        matrices: gate, up and down projections.
        whole: size of the layer's work, of which these assignments may be a part.

    Returns:
        `[rows, H]` in x's dtype, and `[assignments]` uint32, the row of each.
    """
    return _gathered(x, tokens, slots, matrices, whole)


@expert_mlp.register
def _expert_mlp_by_gpu(
    x: mx.array, tokens: mx.array, slots: mx.array, matrices: ExpertMatrices, whole: Routed
) -> tuple[mx.array, mx.array] | None:
    if not on_gpu(x) or not _wants_tiles(x, whole, matrices):
        return None
    return _tiled(x, tokens, slots, matrices, whole)


def ascending(slots: np.ndarray) -> np.ndarray:
    """Return the stable sort order of non-negative numbers below 65,536."""
    # numpy sorts 16-bit integers by radix, ten times faster than wider ones.
    return np.argsort(slots.astype(np.uint16), kind="stable")


def _tiled(
    x: mx.array, tokens: mx.array, slots: mx.array, matrices: ExpertMatrices, whole: Routed
) -> tuple[mx.array, mx.array]:
    """Multiply tiles of rows that share an expert."""
    tiles = cut(slots, len(matrices[0].codes), _tile_rows(whole))
    y = _multiplied(take_rows(x, tokens, tiles), tiles.slots, matrices)
    return y.reshape(-1, x.shape[-1]), tiles.places


def _gathered(
    x: mx.array, tokens: mx.array, slots: mx.array, matrices: ExpertMatrices, whole: Routed
) -> tuple[mx.array, mx.array]:
    """Multiply row by row, slots ascending; repeat the last row to stay with the whole's kernel."""
    in_order = not is_cuda() and whole.assignments >= LEAST_PER_SLOT * max(whole.experts, 4)
    least = LEAST_PER_SLOT * max(len(matrices[0].codes), 4) if in_order else LEAST_ASSIGNMENTS
    padding = max(0, min(least, whole.assignments) - slots.size)
    slots = mx.minimum(slots, len(matrices[0].codes) - 1)  # of NONE, any
    order = mx.argsort(slots)
    places = mx.put_along_axis(slots, order, mx.arange(slots.size, dtype=mx.uint32), axis=0)
    if padding:
        order = mx.concatenate([order, mx.repeat(order[-1:], padding)])
    y = _multiplied(x[tokens[order]][:, None, :], slots[order], matrices, in_order)
    return y.squeeze(1), places


def gather_matmul(
    x: mx.array, matrix: QuantizedMatrix, slots: mx.array, in_order: bool = False
) -> mx.array:
    """Multiply rows by the matrices in their slots, by MLX's op; see `mx.gather_qmm`."""
    return mx.gather_qmm(
        x,
        *matrix.arrays,
        rhs_indices=slots,
        transpose=True,
        group_size=matrix.group_size,
        bits=matrix.bits,
        sorted_indices=in_order,
    )


def _multiplied(
    x: mx.array, slots: mx.array, matrices: ExpertMatrices, in_order: bool = False
) -> mx.array:
    """Run `[slots, rows, H]` through the expert in each slot, in x's shape."""
    gate, up, down = matrices
    hidden = swiglu(*(gather_matmul(x, matrix, slots, in_order) for matrix in (gate, up)))
    return gather_matmul(hidden, down, slots, in_order)


def _tile_rows(whole: Routed) -> int:
    if not is_cuda():
        return TILE_ROWS
    return MANY_ROWS if whole.assignments >= MANY_ROWS * whole.experts else FEW_ROWS


def _wants_tiles(x: mx.array, whole: Routed, matrices: ExpertMatrices) -> bool:
    """Return whether tiles are faster, by average rows per expert."""
    gate, up, down = matrices
    if gate.bits != up.bits or len({matrix.group_size for matrix in matrices}) > 1:
        return False
    rows = min(max(1, whole.assignments // whole.experts), MOST_TRIED_ROWS)
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
        """Bytes of weights, scales and biases, and of input and output rows."""
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
        x, _, slots, experts, _ = self._arguments(inputs)
        matrices = [
            np.array(reference.dequantize(m.codes, m.scales, m.biases, m.bits)) for m in experts
        ]
        rows, slot_of = np.array(x.astype(mx.float32)), np.array(slots)
        y = np.empty_like(rows)
        # By numpy: MLX's float32 matmul uses TF32 on NVIDIA's GPUs.
        for slot in np.unique(slot_of):
            gate, up, down = (matrix[slot].T for matrix in matrices)
            some = rows[slot_of == slot]
            gated = some @ gate
            y[slot_of == slot] = (gated / (1 + np.exp(-gated)) * (some @ up)) @ down
        return [mx.array(y)]

    @property
    def _bits(self) -> tuple[int, int, int]:
        return self.bits, self.bits, self.down_bits

    def _arguments(self, inputs: tuple[mx.array, ...]) -> tuple[Any, ...]:
        x, slots, *arrays = inputs
        experts = tuple(
            QuantizedMatrix.of(arrays[3 * i : 3 * i + 3], bits, self.group_size)
            for i, bits in enumerate(self._bits)
        )
        tokens = mx.arange(len(x), dtype=mx.uint32)
        return x, tokens, slots, experts, Routed(len(x), self.slots)
