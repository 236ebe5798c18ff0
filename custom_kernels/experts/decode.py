"""Routed and shared experts of a few tokens, on a GPU, in two launches."""

import functools
from collections.abc import Sequence

import mlx.core as mx

from ..launch import LEAST_ELEMENTS, SIMD, Kernel, is_cuda, settled
from ..linear import matvec
from ..linear.matvec import CHUNK
from ..packed import Part
from ..shapes import expect
from ..weights import QuantizedMatrix

WIDE_CHUNK = {2: 32, 4: 32, 8: 16}  # for NVIDIA's GPUs and many columns
WIDE = 3072  # columns
TILE = 4  # rows that share a lane's activations
MAX_SIMDGROUPS = 16  # per threadgroup that adds up experts
ADDING_LANES = 128

_PARTS = ("codes", "scales", "biases")
_gate_up = Kernel(
    "experts/gate_up",
    (
        "x", "slots", "gain", "eps",
        *(f"{m}_{p}" for m in ("gate", "up", "shared_gate", "shared_up") for p in _PARTS),
    ),
    ("hidden",),
    ("affine.metal",),
)  # fmt: skip
_down_combine = Kernel(
    "experts/down_combine",
    (
        "hidden", "slots", "weights", "residual",
        *_PARTS, *(f"shared_{p}" for p in _PARTS),
    ),
    ("y",),
    ("affine.metal",),
)  # fmt: skip
_add_terms = Kernel("experts/add_terms", ("terms", "residual"), ("y",))


def supports(gate: QuantizedMatrix, up: QuantizedMatrix, down: QuantizedMatrix) -> bool:
    """Return whether the kernels support these formats: gate and up must share theirs."""
    return (gate.bits, gate.group_size) == (up.bits, up.group_size) and all(
        matvec.supports(matrix.bits, matrix.group_size) for matrix in (gate, up, down)
    )


def expert_gate_up(
    x: mx.array,
    slots: mx.array,
    gate: QuantizedMatrix,
    up: QuantizedMatrix,
    shared: tuple[QuantizedMatrix, QuantizedMatrix] | None = None,
    norm: Sequence[mx.array | Part] | None = None,
) -> mx.array:
    """Compute silu(gate x) * up x for each token's experts, and for the shared expert.

    Args:
        x: `[..., H]`.
        slots: `[..., K]` uint32, the slot of each expert, or NONE.
        gate: `[S, I, ...]`.
        up: `[S, I, ...]`.
        shared: gate and up of the shared expert, `[Is, ...]` each.
        norm: gain `[H]` and epsilon `[1]` of an RMS norm applied to x first.

    Returns:
        `[..., K * I + Is]` in x's dtype, zero where the slot is NONE.
    """
    hidden, inner, top_k = x.shape[-1], gate.scales.shape[1], slots.shape[-1]
    others = shared or (gate, up)
    extra = others[0].scales.shape[0] if shared else 0
    expect("slots of experts", slots, (*x.shape[:-1], top_k), mx.uint32)
    for matrix in (gate, up):
        matrix.check("gate and up of the experts", (len(gate.codes), inner, hidden))
    for matrix in shared or ():
        matrix.check("gate and up of the shared expert", (extra, hidden))
    if norm is not None:
        expect("the norm's weight", norm[0], (hidden,))
    cuda = is_cuda()
    chunk = WIDE_CHUNK if cuda and hidden >= WIDE else CHUNK
    split = min(4, max(1, hidden // (SIMD * chunk[gate.bits]))) if cuda else 1
    units_each, tile = (1, TILE) if cuda else (4, 2)
    units = top_k * -(-inner // tile) + -(-extra // tile)
    (y,) = _gate_up(
        [x, slots, *(norm or (x, x)), *_arrays(gate, up, *others)],
        [((*x.shape[:-1], top_k * inner + extra), x.dtype)],
        (-(-units // units_each), x.size // hidden, 1),
        SIMD * split * units_each,
        T=x.dtype,
        S=gate.scales.dtype,
        H=hidden,
        I=inner,
        K=top_k,
        TILE=tile,
        SPLIT=split,
        UNITS=units_each,
        NORM=norm is not None,
        **_formats(gate, others[0], extra, chunk),
    )
    return y


def expert_down_combine(
    hidden: mx.array,
    slots: mx.array,
    weights: mx.array,
    down: QuantizedMatrix,
    shared: QuantizedMatrix | None = None,
    residual: mx.array | None = None,
    dtype: mx.Dtype = mx.float32,
    each: bool = False,
    adds_shared: bool = True,
) -> mx.array:
    """Apply each token's down projections and return their weighted sum.

    Args:
        hidden: `[..., K * I + Is]`, from `expert_gate_up`.
        slots: `[..., K]` uint32; the term of a NONE is zero.
        weights: `[..., K]`, the router's; with a shared expert `[..., K + 1]`, its weight last.
        down: `[S, H, ...]`.
        shared: down of the shared expert, `[H, ...]`.
        residual: `[..., H]` to add.
        dtype: of the result.
        each: return the terms of the sum, without residual.
        adds_shared: whether the shared expert's term is not zero.

    Returns:
        `[..., H]`; with `each`, `[..., K, H]` or `[..., K + 1, H]`.
    """
    height, inner = down.scales.shape[1], down.scales.shape[2] * down.group_size
    top_k, width = slots.shape[-1], hidden.shape[-1]
    other = shared or down
    extra, lead = width - top_k * inner, hidden.shape[:-1]
    expect("slots of experts", slots, (*lead, top_k), mx.uint32)
    expect("weights of experts", weights, (*lead, top_k + (shared is not None)))
    down.check("down of the experts", (len(down.codes), height, inner))
    if shared:
        other.check("down of the shared expert", (height, extra))
    else:
        expect("hidden states of experts", hidden, (*lead, top_k * inner))
    if residual is not None:
        expect("the residual", residual, (*lead, height))
    terms = top_k + (extra > 0)
    simdgroups = min(terms, MAX_SIMDGROUPS)
    arrays = [hidden, slots, weights, hidden if residual is None else residual]
    (y,) = _down_combine(
        [*arrays, *_arrays(down, other)],
        [((*lead, terms, height) if each else (*lead, height), dtype)],
        (-(-height // TILE), hidden.size // width, 1),
        SIMD * simdgroups,
        T=hidden.dtype if residual is None else residual.dtype,
        S=down.scales.dtype,
        Y=dtype,
        H=height,
        I=inner,
        K=top_k,
        TILE=TILE,
        SIMDGROUPS=simdgroups,
        RESIDUAL=residual is not None,
        EACH=each,
        ADD_SHARED=adds_shared,
        **_formats(down, other, extra, CHUNK),
    )
    return y


def expert_outputs(x: mx.array, slots: mx.array, experts: Sequence[QuantizedMatrix]) -> mx.array:
    """Return each chosen expert's output, unweighted, for a few tokens, on a GPU.

    Args:
        x: `[N, H]`.
        slots: `[N, K]` uint32; the output of a NONE is zero.
        experts: gate, up and down, `[S, out, ...]` each.

    Returns:
        `[N, K, H]` in x's dtype.
    """
    gate, up, down = experts
    count = slots.size
    hidden = expert_gate_up(x, slots, gate, up).reshape(count, -1)
    # Each assignment is a token of its own with one expert of weight 1.
    ones = _ones(count, x.dtype)
    y = expert_down_combine(hidden, slots.reshape(count, 1), ones, down, dtype=x.dtype)
    return y.reshape(*slots.shape, -1)


@functools.cache
def _ones(count: int, dtype: mx.Dtype) -> mx.array:
    """Return ones `[count, 1]`, the start of a larger array: see LEAST_ELEMENTS."""
    return settled(mx.ones((count + LEAST_ELEMENTS, 1), dtype))[:count]


def _arrays(*matrices: QuantizedMatrix) -> list[mx.array | Part]:
    return [array for matrix in matrices for array in matrix.bound]


def _formats(
    matrix: QuantizedMatrix, shared: QuantizedMatrix, extra: int, chunk: dict[int, int]
) -> dict[str, int]:
    return {
        "BITS": matrix.bits,
        "GROUP": matrix.group_size,
        "CHUNK": chunk[matrix.bits],
        "SHARED": extra,
        "SHARED_BITS": shared.bits,
        "SHARED_GROUP": shared.group_size,
        "SHARED_CHUNK": chunk[shared.bits],
    }


def expert_mlp_by_kernels(
    x: mx.array,
    slots: mx.array,
    weights: mx.array,
    experts: Sequence[QuantizedMatrix],
    shared: Sequence[QuantizedMatrix] | None,
    *,
    norm: Sequence[mx.array | Part] | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """Run a whole mixture for a few tokens: `[..., H]` to `[..., H]` in x's dtype.

    Args:
        x: `[..., H]`.
        slots: `[..., K]` uint32.
        weights: `[..., K]`, the router's; with a shared expert `[..., K + 1]`, its weight last.
        experts: gate, up and down, `[S, out, ...]` each.
        shared: gate, up and down of the shared expert, `[out, ...]` each.
        norm: gain and epsilon of an RMS norm applied to x first.
        residual: `[..., H]` to add.
    """
    gate, up, down = experts
    hidden = expert_gate_up(x, slots, gate, up, (shared[0], shared[1]) if shared else None, norm)
    other = shared[2] if shared else None
    return expert_down_combine(hidden, slots, weights, down, other, residual, x.dtype)


def expert_terms(
    x: mx.array,
    slots: mx.array,
    weights: mx.array,
    experts: Sequence[QuantizedMatrix],
    shared: Sequence[QuantizedMatrix],
    *,
    norm: Sequence[mx.array | Part] | None = None,
    adds_shared: bool,
) -> mx.array:
    """Return the terms that `expert_mlp_by_kernels` adds up: `[..., K + 1, H]` float32.

    Where several machines share the experts, each computes its own, and `add_terms` gives the sum
    of one machine to the bit.

    Args:
        x: `[..., H]`.
        slots: `[..., K]` uint32; the term of a NONE is zero.
        weights: `[..., K + 1]`, the router's and the shared expert's.
        experts: gate, up and down, `[S, out, ...]` each.
        shared: gate, up and down of the shared expert, `[out, ...]` each.
        norm: gain and epsilon of an RMS norm applied to x first.
        adds_shared: whether the shared expert's term, the last one, is not zero.
    """
    gate, up, down = experts
    hidden = expert_gate_up(x, slots, gate, up, (shared[0], shared[1]), norm)
    return expert_down_combine(
        hidden, slots, weights, down, shared[2], each=True, adds_shared=adds_shared
    )


def add_terms(terms: mx.array, residual: mx.array) -> mx.array:
    """Add up `[..., K, H]` float32 and the residual `[..., H]`, in its dtype and this order."""
    *lead, width, hidden = terms.shape
    expect("the residual", residual, (*lead, hidden))
    expect("terms of experts", terms, (*lead, width, hidden), mx.float32)
    (y,) = _add_terms(
        [terms, residual],
        [(residual.shape, residual.dtype)],
        (-(-hidden // ADDING_LANES), residual.size // hidden, 1),
        ADDING_LANES,
        T=residual.dtype,
        H=hidden,
        WIDTH=width,
    )
    return y
