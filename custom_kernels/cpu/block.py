"""Decode on a CPU, one token per row: takes MLX modules, runs blocks of compiled code.

A function returns None where its kernels do not apply: more than one token per row, or weights
that are not affine-quantized. Each module keeps its compiled block until its weights change.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from ..attention.step import AttentionHeads
from ..gated_delta.weights import Heads, MixerWeights
from ..weights import QuantizedMatrix, arrays_of, is_affine, remembered
from .arrays import Array, rows, view
from .attention_step import attend
from .attention_step import prepare as prepare_heads
from .decode import Group, Norm, project
from .gated_delta_step import DeltaBlock
from .moe import Batches, MoeBlock, Total
from .prefill import supports


def linear_step(
    x: mx.array,
    layers: Sequence[nn.Module],
    norm: nn.RMSNorm | None = None,
    residual: mx.array | None = None,
) -> list[mx.array] | None:
    """Apply linear layers to one token per row: `[..., 1, in]` to one `[..., 1, out]` per layer.

    Args:
        x: float32.
        layers: returns None unless all are quantized.
        norm: to apply to x first.
        residual: `[..., 1, out]` to add, with one layer only.
    """
    if x.ndim < 2 or x.shape[-2] != 1:
        return None
    group = _remember(layers[0], layers, lambda: Group(*map(QuantizedMatrix.of_layer, layers)))
    if group is None:
        return None
    outputs = project(rows(x), group) if norm is None else project(rows(x), group, *_norm(norm))
    if residual is not None:
        outputs[0] += rows(residual)
    return [mx.array(y.reshape(*x.shape[:-1], -1)) for y in outputs]


def attention_step(
    h: mx.array, inputs: Sequence[nn.Module], out: nn.Module, norm: nn.RMSNorm,
    head_norms: Sequence[nn.RMSNorm], heads: AttentionHeads, base: float, cache: KVCache,
) -> mx.array | None:  # fmt: skip
    """Run full attention on one token per row: h + layer(norm(h)), `[B, 1, H]`.

    Args:
        h: `[B, 1, H]` float32.
        inputs: the projections to queries and gates; to keys; and to values.
        out: the output projection.
        norm: the norm before the layer.
        head_norms: of queries and of keys.
        heads: sizes.
        base: base of RoPE.
        cache: receives the token's keys and values.
    """
    stored = cache.keys is None or cache.keys.dtype == cache.values.dtype == mx.float32
    group = _remember(inputs[0], inputs, lambda: Group(*map(QuantizedMatrix.of_layer, inputs)))
    after = _remember(out, [out], lambda: Group(QuantizedMatrix.of_layer(out)))
    if group is None or after is None or not stored:
        return None
    x, batch = rows(h), len(h)
    queries, keys, values = project(x, group, *_norm(norm))
    projected = queries.reshape(batch, heads.queries, 2 * heads.dim)
    keys, values = (part.reshape(batch, heads.keys, heads.dim) for part in (keys, values))
    norms = _norm(head_norms[0]), _norm(head_norms[1])
    queries, keys = prepare_heads(projected, keys, norms, heads, base, cache.offset)
    cache.update_and_fetch(*(mx.array(part[:, :, None]) for part in (keys, values)))
    mx.eval(cache.keys, cache.values)
    y = attend(queries, projected, view(cache.keys), view(cache.values), cache.offset)
    return mx.array((x + project(y.reshape(batch, -1), after)[0]).reshape(h.shape))


def delta_step(
    h: mx.array, inputs: Sequence[nn.Module], out: nn.Module, norm: nn.RMSNorm,
    weights: MixerWeights,
    past: mx.array, state: mx.array,
) -> tuple[mx.array, mx.array, mx.array] | None:  # fmt: skip
    """Run a GatedDeltaNet layer on one token per row.

    Args:
        h: `[B, 1, H]` float32.
        inputs: the projections to q, k and v; to z; to b; and to a.
        out: the output projection.
        norm: the norm before the layer.
        weights: all but the projections.
        past: `[B, taps - 1, channels]` the convolution's last inputs.
        state: `[B, Hv, Dv, Dk]`.

    Returns:
        h + layer(norm(h)), the new `past` and the new `state`.
    """
    if h.shape[1] != 1 or past.dtype != mx.float32 or state.dtype != mx.float32:
        return None
    layers = *inputs, out

    def make() -> DeltaBlock:
        qkv, z, b, a, after = map(QuantizedMatrix.of_layer, layers)
        return DeltaBlock((qkv, z, b, a), after, _norm(norm), weights)

    small = weights.conv, weights.a_log, weights.dt_bias, weights.norm, norm.weight
    block = _remember(out, layers, make, *small)
    if block is None:
        return None
    past, state = mx.contiguous(past), mx.contiguous(state)
    mx.eval(past, state)
    # Callers may hold the old state. MLX copies an array faster than it makes one of zeros.
    new_past, new_state = _scratch(past.shape), _scratch(state.shape)
    y = block(rows(h), view(past), view(state), new_past, new_state)
    return mx.array(y.reshape(h.shape)), mx.array(new_past), mx.array(new_state)


def moe_step(
    h: mx.array, router: nn.Module, switch: nn.Module, shared: Sequence[nn.Module],
    experts: Sequence[QuantizedMatrix], norm: nn.RMSNorm, top_k: int, renormalize: bool,
    batches: Batches, total: Total | None = None,
) -> mx.array | None:  # fmt: skip
    """Run a mixture of experts on one token per row: h + moe(norm(h)), `[B, 1, H]`.

    Args:
        h: `[B, 1, H]` float32.
        router: to one logit per expert.
        switch: to one number, whose sigmoid scales the shared expert.
        shared: gate, up and down of the shared expert.
        experts: gate, up and down of the routed experts.
        norm: the norm before the block.
        top_k: experts per row.
        renormalize: whether the chosen experts' scores sum to one.
        batches: loads experts, see `moe.Batches`.
        total: adds up outputs of several machines, see `moe.Total`.
    """
    if h.shape[1] != 1:
        return None
    layers = router, switch, *shared

    def make() -> MoeBlock:
        first, second, *rest = map(QuantizedMatrix.of_layer, layers)
        return MoeBlock(first, second, rest, experts, _norm(norm), top_k, renormalize)

    if not all(supports(b.bits, b.group_size, b.scales) for b in experts):
        return None
    arrays = [array for matrix in experts for array in matrix.arrays]
    block = _remember(router, layers, make, norm.weight, *arrays)
    if block is None:
        return None
    return mx.array(block(rows(h), batches, total).reshape(h.shape))


def router_logits(h: mx.array, router: nn.Module, norm: nn.RMSNorm) -> Array | None:
    """Return a router's logits of norm(h), `[B, experts]`.

    Args:
        h: `[B, 1, H]` float32.
        router: to one logit per expert; returns None unless it is quantized.
        norm: the norm before it.
    """
    if h.shape[1] != 1:
        return None
    group = _remember(norm, [router], lambda: Group(QuantizedMatrix.of_layer(router)))
    if group is None:
        return None
    return project(rows(h), group, *_norm(norm))[0]


def multiply(x: mx.array, group: Group) -> mx.array:
    """Multiply `[tokens, columns]` float32 by a group of one matrix: `[tokens, rows]`."""
    return mx.array(project(rows(x), group)[0])


_kept = threading.local()


def _scratch(shape: Sequence[int]) -> Array:
    """Return an array that this thread reuses: touching new memory takes longer than a copy."""
    if (known := getattr(_kept, str(len(shape)), None)) is None or known.shape != tuple(shape):
        known = np.empty(shape, np.float32)
        setattr(_kept, str(len(shape)), known)
    return known


def _is_quantized(layer: nn.Module) -> bool:
    return is_affine(layer) and supports(layer.bits, layer.group_size, layer.scales)


def _norm(norm: nn.RMSNorm) -> Norm:
    """Return a norm's weight as float32, a copy that the module keeps, and its epsilon."""
    weight = norm.weight
    copy = remembered(
        norm, "_as_float32", lambda: [weight], lambda: np.array(weight.astype(mx.float32))
    )
    assert copy is not None
    return copy, norm.eps


def _remember(
    owner: nn.Module, layers: Sequence[nn.Module], make: Callable[[], Any], *others: mx.array
) -> Any:
    """Return `make()`, kept for these weights; None unless all layers are quantized."""

    def weights() -> tuple[Any, ...]:
        return *arrays_of(layers), *others

    def made() -> Any:
        return make() if all(map(_is_quantized, layers)) else None

    return remembered(owner, "_step", weights, made)


def prepare(bits: int, group_size: int) -> None:
    """Compile the kernels by running small layers of one format."""
    size = group_size

    def layer(height: int) -> nn.Module:
        made = nn.QuantizedLinear(size, height, bias=False, group_size=group_size, bits=bits)
        made.eval()
        return made

    h, norm, gains = mx.zeros((1, 1, size)), nn.RMSNorm(size), mx.zeros(1)
    linear_step(h, [layer(size)], norm)
    conv, one_head = mx.zeros((3 * size, 4, 1)), Heads(1, 1, size, size)
    weights = MixerWeights(one_head, conv, gains, gains, h[0, 0], 1e-6)
    inputs = [layer(n) for n in (3 * size, size, 1, 1)]
    past, state = mx.zeros((1, 3, 3 * size)), mx.zeros((1, 1, size, size))
    delta_step(h, inputs, layer(size), norm, weights, past, state)
    one = layer(size)
    three = one.weight[None], one.scales[None], one.biases[None]
    expert, shared = QuantizedMatrix(*three, bits, group_size), [layer(size) for _ in range(3)]

    def batches(ids: Array) -> Iterator[tuple[Array, Array]]:
        yield np.arange(ids.size), ids.reshape(-1)

    moe_step(h, layer(1), layer(1), shared, [expert] * 3, norm, 1, True, batches)
    heads = AttentionHeads(1, 1, size, size)
    qkv, head_norms = [layer(n * size) for n in (2, 1, 1)], [nn.RMSNorm(size)] * 2
    # Last: the other process has compiled its kernels by now.
    attention_step(h, qkv, layer(size), norm, head_norms, heads, 1e4, KVCache())
