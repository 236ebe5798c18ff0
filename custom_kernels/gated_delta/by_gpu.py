"""GatedDeltaNet between its projections on a GPU: one launch in decode, three in prefill."""

import mlx.core as mx

from ..autotune import prefers_custom
from ..case import NAMES
from .cases import (
    GatedDeltaNormCase,
    GatedDeltaPrepareCase,
    GatedDeltaScanCase,
    GatedDeltaStepCase,
)
from .naive import Result, last_inputs, mix, split
from .prepare import gated_norm, prepare
from .scan import scan
from .step import LEAST_KEY_DIM, step
from .weights import MixerState, MixerWeights

# Tokens of the prefill cases; MLX's own scan is too slow for more.
TRIED_SCAN, TRIED_TOKENS = 64, 1024


def mix_joined(projected: mx.array, weights: MixerWeights, before: MixerState) -> Result:
    """Compute `naive.mix` from the joined projections.

    Args:
        projected: `[B, T, 2 Hk Dk + Hv Dv + Hv Dv + Hv + Hv]`: qkv, z, b and a.
        weights: the layer's.
        before: state before the tokens.

    Returns:
        y `[B, T, Hv Dv]`, the new `past` and the new `state`.
    """
    (batch, tokens, _), mask, ends = projected.shape, before.mask, before.ends
    past, state = before.arrays(weights, batch, projected.dtype)
    if weights.heads.key_dim >= LEAST_KEY_DIM:
        if tokens == 1 and mask is None and ends is None:
            if prefers_custom(GatedDeltaStepCase(*_sizes(projected, weights), batch)):
                return step(projected, weights, past, state)
        elif _wants_prefill(projected, weights):
            q, k, v, g, beta = prepare(projected, weights, past, mask)
            y, state = scan(q, k, v, g, beta, state, mask)
            qkv = projected[..., : weights.channels]
            if mask is not None:
                qkv = mx.where(mask[..., None], qkv, 0)
            return gated_norm(y, projected, weights), last_inputs(past, qkv, ends), state
    qkv, z, b, a = split(projected, weights.heads)
    return mix(qkv, z, b, a, weights, MixerState(past, state, mask, ends))


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
