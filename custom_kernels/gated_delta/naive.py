"""GatedDeltaNet between its projections by MLX's ops: convolution, delta rule, gated norm."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ..device import cpu_kernels
from ..op import Op
from .weights import MixerWeights


@partial(mx.compile, shapeless=True)
def _decay(a_log: mx.array, a: mx.array, dt_bias: mx.array) -> mx.array:
    return mx.exp(-mx.exp(a_log.astype(mx.float32)) * nn.softplus(a + dt_bias))


@partial(mx.compile, shapeless=True)
def _gate(y: mx.array, z: mx.array) -> mx.array:
    return (nn.silu(z.astype(mx.float32)) * y.astype(mx.float32)).astype(z.dtype)


@mx.compile
def _step(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    new = state * g[..., None, None]
    error = v - (new * k[..., None, :]).sum(-1)
    new = new + k[..., None, :] * (error * beta[..., None])[..., None]
    return (new * q[..., None, :]).sum(-1), new


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Scan the gated delta rule over T tokens; rule as in `reference.gated_delta`.

    Args:
        q: `[B, T, Hk, Dk]`.
        k: `[B, T, Hk, Dk]`.
        v: `[B, T, Hv, Dv]`.
        g: `[B, T, Hv]` float32.
        beta: `[B, T, Hv]`.
        state: `[B, Hv, Dv, Dk]` float32.
        mask: `[B, T]` bool, False for padding.

    Returns:
        y `[B, T, Hv, Dv]` in q's dtype and the final state `[B, Hv, Dv, Dk]` float32.
    """
    if (repeat := v.shape[2] // k.shape[2]) > 1:
        q, k = mx.repeat(q, repeat, axis=2), mx.repeat(k, repeat, axis=2)
    outputs = []
    for t in range(q.shape[1]):
        y, new = _step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state)
        outputs.append(y.astype(q.dtype))
        # Read each state before the next is made, or all states of a long prompt live at once.
        new = mx.depends(new, y)
        state = new if mask is None else mx.where(mask[:, t, None, None, None], new, state)
    return mx.stack(outputs, axis=1), state


def or_zeros(
    past: mx.array | None,
    state: mx.array | None,
    weights: MixerWeights,
    batch: int,
    dtype: mx.Dtype,
) -> tuple[mx.array, mx.array]:
    """Return `past` and `state` as for `mix`, of zeros where they are None."""
    heads, (channels, taps, _) = weights.heads, weights.conv.shape
    if past is None:
        past = mx.zeros((batch, taps - 1, channels), dtype=dtype)
    if state is None:
        state = mx.zeros((batch, heads.values, heads.value_dim, heads.key_dim), dtype=mx.float32)
    weights.check_cache(past, state, batch)
    return past, state


def last_inputs(past: mx.array, qkv: mx.array, ends: mx.array | None) -> mx.array:
    """Return the convolution's last inputs after more have come.

    Args:
        past: `[B, taps - 1, channels]`.
        qkv: `[B, T, channels]`, what has come.
        ends: `[B]` where each row ends, None if all end at T.
    """
    keep = past.shape[1]
    if ends is None:
        return mx.contiguous(mx.concatenate([past, qkv[:, -keep:]], axis=1)[:, -keep:])
    places = (ends[:, None] + mx.arange(keep))[..., None]
    return mx.take_along_axis(mx.concatenate([past, qkv], axis=1), places, axis=1)


def windowed(
    qkv: mx.array,
    weights: MixerWeights,
    past: mx.array | None,
    state: mx.array | None,
    mask: mx.array | None,
    ends: mx.array | None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return `[B, taps - 1 + T, channels]`, what the convolution sees, the new past, the state.

    Arguments as for `mix`.
    """
    past, state = or_zeros(past, state, weights, qkv.shape[0], qkv.dtype)
    if mask is not None:
        qkv = mx.where(mask[..., None], qkv, 0)
    return mx.concatenate([past, qkv], axis=1), last_inputs(past, qkv, ends), state


@Op
def mix(
    qkv: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    weights: MixerWeights,
    past: mx.array | None,
    state: mx.array | None,
    mask: mx.array | None = None,
    ends: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Run a GatedDeltaNet layer between its input and output projections.

    Args:
        qkv: `[B, T, 2 Hk Dk + Hv Dv]` before the convolution.
        z: `[B, T, Hv Dv]` output gate.
        b: `[B, T, Hv]` write strength before its sigmoid.
        a: `[B, T, Hv]` decay input.
        weights: the layer's.
        past: `[B, taps - 1, 2 Hk Dk + Hv Dv]` the convolution's last inputs, None for zeros.
        state: `[B, Hv, Dv, Dk]` float32, None for zeros.
        mask: `[B, T]` bool, False for padding.
        ends: `[B]` where each row's tokens end, None if all end at T.

    Returns:
        y `[B, T, Hv Dv]`, the new `past` and the new `state`.
    """
    heads, (batch, tokens, width) = weights.heads, qkv.shape
    window, past, state = windowed(qkv, weights, past, state, mask, ends)
    qkv = nn.silu(mx.conv1d(window, weights.conv, groups=width))
    q, k, v = mx.split(qkv, [heads.keys * heads.key_dim, 2 * heads.keys * heads.key_dim], axis=-1)
    q = q.reshape(batch, tokens, heads.keys, heads.key_dim)
    k = k.reshape(batch, tokens, heads.keys, heads.key_dim)
    # rms_norm with eps / Dk is the l2 norm with eps, times sqrt(Dk).
    scale, eps = heads.key_dim**-0.5, weights.qk_eps / heads.key_dim
    y, state = gated_delta(
        scale**2 * mx.fast.rms_norm(q, None, eps),
        scale * mx.fast.rms_norm(k, None, eps),
        v.reshape(batch, tokens, heads.values, heads.value_dim),
        _decay(weights.a_log, a, weights.dt_bias),
        mx.sigmoid(b),
        state,
        mask,
    )
    y = _gate(mx.fast.rms_norm(y, weights.norm, weights.norm_eps), z.reshape(y.shape))
    return y.reshape(batch, tokens, -1), past, state


@mix.register
def _mix_by_cpu(
    qkv: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    weights: MixerWeights,
    past: mx.array | None,
    state: mx.array | None,
    mask: mx.array | None = None,
    ends: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array] | None:
    if not cpu_kernels(qkv):
        return None
    from ..cpu import gated_delta  # needs numba

    window, past, state = windowed(qkv, weights, past, state, mask, ends)
    y, state = gated_delta.mix(z, b, a, weights, window, state, mask)
    return y, past, state
