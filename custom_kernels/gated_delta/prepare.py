"""The ops before and after the gated delta rule over many tokens, on a GPU."""

import mlx.core as mx

from ..launch import SIMD, Kernel
from ..shapes import expect
from .step import check_heads, head_constants
from .weights import MixerWeights, epsilons

SIMDGROUPS = 4  # per threadgroup
TOKENS = 4  # per simdgroup: more would share reads, but take more registers

_prepare = Kernel(
    "gated_delta/prepare",
    ("projected", "conv", "a_log", "dt_bias", "eps", "past", "mask"),
    ("q", "k", "v", "g", "beta"),
    ("gated_delta/common.metal",),
)
_norm = Kernel(
    "gated_delta/norm",
    ("y", "projected", "norm", "eps"),
    ("out",),
    ("gated_delta/common.metal",),
)


def prepare(
    projected: mx.array,
    weights: MixerWeights,
    past: mx.array,
    mask: mx.array | None = None,
    tokens: int = TOKENS,
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
    """Convolve, normalize q and k, and compute the gates of T tokens, as in `naive.mix`.

    Args:
        projected: `[B, T, 2 Hk Dk + Hv Dv + Hv Dv + Hv + Hv]`, qkv, z, b and a side by side.
        weights: the layer's.
        past: `[B, taps - 1, 2 Hk Dk + Hv Dv]` last inputs of the convolution.
        mask: `[B, T]` bool; the convolution reads zeros where it is False.
        tokens: tokens per simdgroup, up to 32.

    Returns:
        q and k `[B, T, Hk, Dk]` and v `[B, T, Hv, Dv]` in projected's dtype, g and beta
        `[B, T, Hv]` float32: the arguments of `scan`.
    """
    heads, taps, (batch, length, _) = weights.heads, weights.conv.shape[1], projected.shape
    check_heads(heads, taps)
    weights.check()
    expect("projections", projected, (batch, length, weights.projected))
    expect("past inputs", past, (batch, taps - 1, weights.channels))
    if mask is not None:
        expect("the mask", mask, (batch, length), mx.bool_)
    keys = batch, length, heads.keys, heads.key_dim
    values = batch, length, heads.values, heads.value_dim
    eps = epsilons(weights.norm_eps, weights.qk_eps)
    arrays = [projected, weights.conv, weights.a_log, weights.dt_bias, eps, past]
    q, k, v, g, beta = _prepare(
        [*arrays, past if mask is None else mask],
        [
            (keys, projected.dtype),
            (keys, projected.dtype),
            (values, projected.dtype),
            (values[:3], mx.float32),
            (values[:3], mx.float32),
        ],
        (2 * heads.keys + heads.values, -(-length // (tokens * SIMDGROUPS)), batch),
        SIMD * SIMDGROUPS,
        T=projected.dtype,
        TAPS=taps,
        TOKENS=tokens,
        SIMDGROUPS=SIMDGROUPS,
        MASK=mask is not None,
        **head_constants(heads),
    )
    return q, k, v, g, beta


def gated_norm(y: mx.array, projected: mx.array, weights: MixerWeights) -> mx.array:
    """Normalize the rule's output and gate it: y * rsqrt(mean y^2 + eps) * norm * silu(z).

    Args:
        y: `[B, T, Hv, Dv]`.
        projected: `[B, T, 2 Hk Dk + Hv Dv + Hv Dv + Hv + Hv]`, qkv, z, b and a side by side.
        weights: the layer's.

    Returns:
        `[B, T, Hv Dv]` in projected's dtype.
    """
    heads, (batch, length, _) = weights.heads, projected.shape
    check_heads(heads)
    weights.check()
    expect("projections", projected, (batch, length, weights.projected))
    expect("the rule's outputs", y, (batch, length, heads.values, heads.value_dim))
    (out,) = _norm(
        [y, projected, weights.norm, epsilons(weights.norm_eps, weights.qk_eps)],
        [((batch, length, heads.values * heads.value_dim), projected.dtype)],
        (heads.values, -(-length // SIMDGROUPS), batch),
        SIMD * SIMDGROUPS,
        T=projected.dtype,
        SIMDGROUPS=SIMDGROUPS,
        **head_constants(heads),
    )
    return out
