"""Kernel cases of the experts: gate and up, down and combine, and both together."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import mlx.core as mx

from .. import reference
from ..autotune import prefers_custom
from ..case import DTYPES, NAMES, random_quantized
from ..linear.dequantize import matmul_by_mlx
from ..linear.linear import swiglu
from ..linear.matvec import MAX_TOKENS
from ..weights import QuantizedMatrix
from .decode import (
    add_terms,
    expert_down_combine,
    expert_gate_up,
    expert_mlp_by_kernels,
    expert_outputs,
    expert_terms,
    supports,
)
from .prefill import gather_matmul
from .router import MAX_TOP_K, RouterCase


def wanted(
    x: mx.array, experts: list[QuantizedMatrix], shared: list[QuantizedMatrix], top_k: int
) -> bool:
    """Return whether to run a mixture on `[..., H]` tokens by router and expert kernels."""
    tokens = x.size // x.shape[-1]
    if tokens > MAX_TOKENS or top_k > MAX_TOP_K or not (supports(*experts) and supports(*shared)):
        return False
    gate, _, down = experts
    if x.dtype not in (gate.scales.dtype, mx.float32):
        return False  # stock widens the result
    slots, inner, _ = gate.scales.shape
    if len({m.group_size for m in (*experts, *shared)}) > 1 or shared[0].scales.shape[0] != inner:
        return False
    case = ExpertsCase(
        x.shape[-1],
        inner,
        min(slots, top_k + 1),
        top_k,
        gate.bits,
        gate.group_size,
        NAMES[x.dtype],
        NAMES[gate.scales.dtype],
        down.bits,
        shared[0].bits,
        tokens,
    )
    return prefers_custom(case) and prefers_custom(RouterCase(slots, top_k, "float32", tokens))


@dataclass(frozen=True)
class ExpertsCase:
    """Routed and shared experts of a few tokens; see `case.KernelCase`.

    Attributes:
        hidden: H.
        inner: I, of routed and shared experts.
        slots: S.
        top_k: K.
        bits: of gate and up.
        group_size: columns per scale.
        dtype: of activations.
        scale_dtype: of scales and biases.
        down_bits: of down; 0 for `bits`.
        shared_bits: of the shared expert.
        tokens: N.
    """

    op: ClassVar[str] = "expert_mlp"
    hidden: int
    inner: int
    slots: int
    top_k: int
    bits: int
    group_size: int
    dtype: str
    scale_dtype: str
    down_bits: int = 0
    shared_bits: int = 4
    tokens: int = 1

    @cached_property
    def _shapes(self) -> list[tuple[tuple[int, ...], int]]:
        """Shape and bits of gate, up and down, then of the shared expert's."""
        wide, tall = (self.inner, self.hidden), (self.hidden, self.inner)
        down_bits = self.down_bits or self.bits
        return [
            ((self.slots, *wide), self.bits),
            ((self.slots, *wide), self.bits),
            ((self.slots, *tall), down_bits),
            *((shape, self.shared_bits) for shape in (wide, wide, tall)),
        ]

    def _matrix_bytes(self, index: int) -> int:
        shape, bits = self._shapes[index]
        scales = 2 * DTYPES[self.scale_dtype].size * 8 / self.group_size
        times = 1 if index > 2 else min(self.slots, self.tokens * self.top_k)
        return int(times * shape[-1] * shape[-2] * (bits + scales) / 8)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of the experts in use."""
        return sum(map(self._matrix_bytes, self._used))

    _used: ClassVar[tuple[int, ...]] = (0, 1, 2, 3, 4, 5)

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make x, slots, weights with the shared one last, then codes, scales, biases of six."""
        keys = mx.random.split(mx.random.key(seed), 10)
        dtype, rows = DTYPES[self.dtype], self.tokens
        x = mx.random.normal((rows, self.hidden), key=keys[0]).astype(dtype)
        slots = mx.argsort(mx.random.uniform(shape=(rows, self.slots), key=keys[1]), axis=-1)
        slots = slots[:, : self.top_k].astype(mx.uint32)
        weights = mx.softmax(mx.random.normal((rows, self.top_k), key=keys[2]), axis=-1)
        shared = mx.sigmoid(mx.random.normal((rows, 1), key=keys[3]))
        arrays = [x, slots, mx.concatenate([weights, shared], axis=-1).astype(dtype)]
        for key, (shape, bits) in zip(keys[4:], self._shapes, strict=True):
            scale_dtype = DTYPES[self.scale_dtype]
            arrays += random_quantized(key, shape, bits, self.group_size, scale_dtype)
        mx.eval(arrays)
        return arrays

    def _matrices(self, inputs: tuple[mx.array, ...]) -> list[QuantizedMatrix]:
        return [
            QuantizedMatrix.of(inputs[3 + 3 * i : 6 + 3 * i], bits, self.group_size)
            for i, (_, bits) in enumerate(self._shapes)
        ]

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernels."""
        (x, slots, weights), matrices = inputs[:3], self._matrices(inputs)
        mixture = x, slots, weights, matrices[:3], matrices[3:]
        return [expert_mlp_by_kernels(*mixture, residual=x)]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by mx.gather_qmm and mx.quantized_matmul, as in mlx-lm."""
        return self._stock_combine(*self._stock_hidden(inputs), inputs)

    def _stock_hidden(self, inputs: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
        x, matrices = inputs[0], self._matrices(inputs)
        wide = x[:, None, None, :]
        gate, up = (gather_matmul(wide, matrix, inputs[1]) for matrix in matrices[:2])
        shared_gate, shared_up = (matmul_by_mlx(x, matrix) for matrix in matrices[3:5])
        return swiglu(gate, up), swiglu(shared_gate, shared_up)

    def _stock_combine(
        self, hidden: mx.array, shared: mx.array, inputs: tuple[mx.array, ...]
    ) -> list[mx.array]:
        x, slots, weights = inputs[:3]
        matrices = self._matrices(inputs)
        y = gather_matmul(hidden, matrices[2], slots).squeeze(-2)
        y = (y * weights[:, :-1, None]).sum(axis=-2)
        return [x + y + weights[:, -1:] * matmul_by_mlx(shared, matrices[5])]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        return self._reference_combine(*self._reference_hidden(inputs), inputs)

    def _reference_hidden(self, inputs: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
        x, slots, matrices = inputs[0].astype(mx.float32), inputs[1], self._matrices(inputs)
        gate, up = (
            (_dequantize(matrix, slots) @ x[:, None, :, None]).squeeze(-1)
            for matrix in matrices[:2]
        )
        shared_gate, shared_up = (x @ _dequantize(matrix).T for matrix in matrices[3:5])
        return gate * mx.sigmoid(gate) * up, shared_gate * mx.sigmoid(shared_gate) * shared_up

    def _reference_combine(
        self, hidden: mx.array, shared: mx.array, inputs: tuple[mx.array, ...]
    ) -> list[mx.array]:
        x, slots, weights = (
            t if t.dtype == mx.uint32 else t.astype(mx.float32) for t in inputs[:3]
        )
        matrices = self._matrices(inputs)
        y = (_dequantize(matrices[2], slots) @ hidden.astype(mx.float32)[..., None]).squeeze(-1)
        other = shared.astype(mx.float32) @ _dequantize(matrices[5]).T
        return [x + (y * weights[:, :-1, None]).sum(axis=-2) + weights[:, -1:] * other]


@dataclass(frozen=True)
class ExpertTermsCase(ExpertsCase):
    """A mixture shared by two machines: one has the experts in even slots, the other the rest."""

    op: ClassVar[str] = "expert_terms"

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Add up both machines' terms; the second one has the shared expert."""
        (x, slots, weights), matrices = inputs[:3], self._matrices(inputs)
        terms = [
            expert_terms(
                x,
                mx.where(slots % 2 == part, slots, reference.NONE).astype(mx.uint32),
                weights,
                matrices[:3],
                matrices[3:],
                adds_shared=bool(part),
            )
            for part in (0, 1)
        ]
        return [add_terms(terms[0] + terms[1], residual=x)]


@dataclass(frozen=True)
class ExpertOutputsCase(ExpertsCase):
    """The routed experts' outputs, unweighted, as mlx-lm's SwitchGLU returns them."""

    op: ClassVar[str] = "expert_outputs"
    _used: ClassVar[tuple[int, ...]] = (0, 1, 2)

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernels."""
        return [expert_outputs(inputs[0], inputs[1], self._matrices(inputs)[:3])]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by MLX's own ops."""
        x, slots, (gate, up, down, *_) = inputs[0], inputs[1], self._matrices(inputs)
        hidden = swiglu(*(gather_matmul(x[:, None, None, :], m, slots) for m in (gate, up)))
        return [gather_matmul(hidden, down, slots).squeeze(-2)]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        hidden, down = self._reference_hidden(inputs)[0], self._matrices(inputs)[2]
        return [(_dequantize(down, inputs[1]) @ hidden[..., None]).squeeze(-1)]


def wants_outputs(x: mx.array, experts: Sequence[QuantizedMatrix], top_k: int) -> bool:
    """Return whether to compute unweighted outputs of `[..., H]` tokens by the expert kernels."""
    tokens, (gate, _, down) = x.size // x.shape[-1], experts
    if tokens > MAX_TOKENS or not supports(*experts) or gate.group_size != down.group_size:
        return False
    if x.dtype not in (gate.scales.dtype, mx.float32):
        return False  # stock widens the result
    slots, inner, _ = gate.scales.shape
    dtypes = NAMES[x.dtype], NAMES[gate.scales.dtype]
    sizes = x.shape[-1], inner, min(slots, top_k + 1), top_k, gate.bits, gate.group_size
    return prefers_custom(ExpertOutputsCase(*sizes, *dtypes, down.bits, gate.bits, tokens))


@dataclass(frozen=True)
class ExpertGateUpCase(ExpertsCase):
    """The first half: silu(gate x) * up x."""

    op: ClassVar[str] = "expert_gate_up"
    _used: ClassVar[tuple[int, ...]] = (0, 1, 3, 4)

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernel."""
        gate, up, _, shared_gate, shared_up, _ = self._matrices(inputs)
        return [expert_gate_up(inputs[0], inputs[1], gate, up, (shared_gate, shared_up))]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by MLX's own ops."""
        return self._flat(*self._stock_hidden(inputs))

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        return self._flat(*self._reference_hidden(inputs))

    def _flat(self, hidden: mx.array, shared: mx.array) -> list[mx.array]:
        return [mx.concatenate([hidden.reshape(self.tokens, -1), shared], axis=-1)]


@dataclass(frozen=True)
class ExpertDownCase(ExpertsCase):
    """The second half: down, weighted sum, shared expert, residual."""

    op: ClassVar[str] = "expert_down_combine"
    _used: ClassVar[tuple[int, ...]] = (2, 5)

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Append the hidden activations `[tokens, K * I + I]`."""
        width = (self.top_k + 1) * self.inner
        hidden = mx.random.normal((self.tokens, width), key=mx.random.key(seed + 1))
        hidden = hidden.astype(DTYPES[self.dtype])
        mx.eval(hidden)
        return [*super().inputs(seed), hidden]

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernel."""
        x, slots, weights = inputs[:3]
        matrices, hidden = self._matrices(inputs), inputs[-1]
        others = matrices[5], x, x.dtype
        return [expert_down_combine(hidden, slots, weights, matrices[2], *others)]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by MLX's own ops."""
        hidden, shared = self._halves(inputs)
        return self._stock_combine(hidden[..., None, :], shared, inputs)

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        return self._reference_combine(*self._halves(inputs), inputs)

    def _halves(self, inputs: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
        routed, shared = mx.split(inputs[-1], [self.top_k * self.inner], axis=-1)
        return routed.reshape(self.tokens, self.top_k, self.inner), shared


def _dequantize(matrix: QuantizedMatrix, slots: mx.array | None = None) -> mx.array:
    codes, scales, biases = (a if slots is None else a[slots] for a in matrix.arrays)
    return reference.dequantize(codes, scales, biases, matrix.bits)
