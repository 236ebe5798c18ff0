"""GatedDeltaNet between its projections on a GPU: one launch in decoding, a scan in prefill."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels.choice import prefers_custom
from flashmoe_mlx.custom_kernels.gated_delta import MixerWeights, mix
from flashmoe_mlx.custom_kernels.gated_delta_step import LEAST_KEY_DIM, step
from flashmoe_mlx.custom_kernels.gated_delta_trials import GatedDeltaStepTrial
from flashmoe_mlx.custom_kernels.trial import NAMES


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
    if past is None:
        past = mx.zeros((batch, weights.conv.shape[1] - 1, channels), dtype=projected.dtype)
    if state is None:
        state = mx.zeros((batch, heads.values, heads.value_dim, heads.key_dim), dtype=mx.float32)
    one = tokens == 1 and mask is None and ends is None and heads.key_dim >= LEAST_KEY_DIM
    if one and prefers_custom(_step_trial(projected, weights)):
        return step(projected, weights, past, state)
    parts = mx.split(projected, [channels, channels + values, channels + values + heads.values], -1)
    return mix(*parts, weights, past, state, mask, ends)


def _step_trial(projected: mx.array, weights: MixerWeights) -> GatedDeltaStepTrial:
    heads = weights.heads
    return GatedDeltaStepTrial(
        heads.keys,
        heads.values,
        heads.key_dim,
        heads.value_dim,
        NAMES[projected.dtype],
        NAMES[weights.conv.dtype],
        projected.shape[0],
        1,
        weights.conv.shape[1],
    )
