"""GatedDeltaNet between its projections on a GPU: one launch in decoding, three in prefill."""

import mlx.core as mx

from ..autotune import prefers_custom
from ..case import NAMES
from .cases import (
    GatedDeltaNormCase,
    GatedDeltaPrepareCase,
    GatedDeltaScanCase,
    GatedDeltaStepCase,
)
from .naive import last_inputs, mix, or_zeros
from .prepare import gated_norm, prepare
from .scan import scan
from .step import LEAST_KEY_DIM, step
from .weights import MixerWeights

# Prefill kernels are tried with so many tokens. MLX's own way of the scan is too slow for more.
TRIED_SCAN, TRIED_TOKENS = 64, 1024


def mix_joined(
    projected: mx.array,
    weights: MixerWeights,
    past: mx.array | None,
    state: mx.array | None,
    mask: mx.array | None = None,
    ends: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Do what `gated_delta.mix` does, from the projections side by side.

    Args:
        projected: `[B, T, 2 Hk Dk + Hv Dv + Hv Dv + Hv + Hv]`: qkv, z, b and a.
        weights: the layer's.
        past: `[B, taps - 1, 2 Hk Dk + Hv Dv]` the convolution's last inputs, None for zeros.
        state: `[B, Hv, Dv, Dk]` float32, None for zeros.
        mask: `[B, T]` bool, False for padding.
        ends: `[B]` where each row's tokens end, None if all end at T.

    Returns:
        y `[B, T, Hv Dv]`, the new `past` and the new `state`.
    """
    heads, (batch, tokens, _) = weights.heads, projected.shape
    channels, values = weights.conv.shape[0], heads.values * heads.value_dim
    past, state = or_zeros(past, state, weights, batch, projected.dtype)
    if heads.key_dim >= LEAST_KEY_DIM:
        if tokens == 1 and mask is None and ends is None:
            if prefers_custom(GatedDeltaStepCase(*_sizes(projected, weights), batch)):
                return step(projected, weights, past, state)
        elif _wants_prefill(projected, weights):
            q, k, v, g, beta = prepare(projected, weights, past, mask)
            y, state = scan(q, k, v, g, beta, state, mask)
            qkv = projected[..., :channels]
            past = last_inputs(
                past, qkv if mask is None else mx.where(mask[..., None], qkv, 0), ends
            )
            return gated_norm(y, projected, weights), past, state
    ends_of = [channels, channels + values, channels + values + heads.values]
    qkv, z, b, a = mx.split(projected, ends_of, -1)
    return mix(qkv, z, b, a, weights, past, state, mask, ends)


def _sizes(projected: mx.array, weights: MixerWeights) -> tuple[int, int, int, int, str, str]:
    heads = weights.heads
    sizes = heads.keys, heads.values, heads.key_dim, heads.value_dim
    return *sizes, NAMES[projected.dtype], NAMES[weights.conv.dtype]


def _wants_prefill(projected: mx.array, weights: MixerWeights) -> bool:
    sizes = *_sizes(projected, weights), 1
    return (
        prefers_custom(GatedDeltaScanCase(*sizes, TRIED_SCAN))
        and prefers_custom(GatedDeltaPrepareCase(*sizes, TRIED_TOKENS))
        and prefers_custom(GatedDeltaNormCase(*sizes, TRIED_TOKENS))
    )
