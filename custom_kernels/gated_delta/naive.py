"""GatedDeltaNet between its projections by MLX's ops: convolution, delta rule, gated norm."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ..device import cpu_kernels
from ..op import Op
from .weights import Heads, MixerState, MixerWeights

Result = tuple[mx.array, mx.array, mx.array]


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
    """Scan the gated delta rule over T tokens; rule and shapes as in `reference.gated_delta`.

    Returns:
        y `[B, T, Hv, Dv]` in q's dtype and the final state `[B, Hv, Dv, Dk]` float32.
    """
    if (repeat := v.shape[2] // k.shape[2]) > 1:
        q, k = mx.repeat(q, repeat, axis=2), mx.repeat(k, repeat, axis=2)
    outputs = []
    for t in range(q.shape[1]):
        y, new = _step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state)
        outputs.append(y.astype(q.dtype))
        # Read each state before making the next, or all states of a long prompt live at once.
        new = mx.depends(new, y)
        state = new if mask is None else mx.where(mask[:, t, None, None, None], new, state)
    return mx.stack(outputs, axis=1), state


def last_inputs(past: mx.array, qkv: mx.array, ends: mx.array | None) -> mx.array:
    """Return the convolution's last inputs after some tokens.

    Args:
        past: `[B, taps - 1, channels]`, those before.
        qkv: `[B, T, channels]`, those of the tokens.
        ends: `[B]` end of each row, None if all end at T.
    """
    keep = past.shape[1]
    if ends is None:
        return mx.contiguous(mx.concatenate([past, qkv[:, -keep:]], axis=1)[:, -keep:])
    places = (ends[:, None] + mx.arange(keep))[..., None]
    return mx.take_along_axis(mx.concatenate([past, qkv], axis=1), places, axis=1)


def windowed(qkv: mx.array, weights: MixerWeights, before: MixerState) -> Result:
    """Return the convolution's window `[B, taps - 1 + T, channels]`, the new past, the state."""
    past, state = before.arrays(weights, qkv.shape[0], qkv.dtype)
    if before.mask is not None:
        qkv = mx.where(before.mask[..., None], qkv, 0)
    return mx.concatenate([past, qkv], axis=1), last_inputs(past, qkv, before.ends), state


def split(projected: mx.array, heads: Heads) -> list[mx.array]:
    """Split `[B, T, W]` into qkv, z, b and a."""
    values = heads.values * heads.value_dim
    channels = 2 * heads.keys * heads.key_dim + values
    ends = [channels, channels + values, channels + values + heads.values]
    return list(mx.split(projected, ends, axis=-1))


def split_heads(qkv: mx.array, heads: Heads) -> Result:
    """Split `[B, T, channels]` into q and k `[B, T, Hk, Dk]` and v `[B, T, Hv, Dv]`."""
    keys = heads.keys * heads.key_dim
    q, k, v = mx.split(qkv, [keys, 2 * keys], axis=-1)
    q, k = (t.reshape(*t.shape[:2], heads.keys, heads.key_dim) for t in (q, k))
    return q, k, v.reshape(*v.shape[:2], heads.values, heads.value_dim)


def convolved(window: mx.array, weights: MixerWeights) -> Result:
    """Convolve, apply SiLU and normalize: the window to q, k and v."""
    heads = weights.heads
    qkv = nn.silu(mx.conv1d(window, weights.conv, groups=window.shape[-1]))
    q, k, v = split_heads(qkv, heads)
    # rms_norm with eps / Dk is the l2 norm with eps, times sqrt(Dk).
    scale, eps = heads.key_dim**-0.5, weights.qk_eps / heads.key_dim
    return scale**2 * mx.fast.rms_norm(q, None, eps), scale * mx.fast.rms_norm(k, None, eps), v


@Op
def mix(
    qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, weights: MixerWeights, before: MixerState
) -> Result:
    """Run a GatedDeltaNet layer between its input and output projections.

    Args:
        qkv: `[B, T, 2 Hk Dk + Hv Dv]` before the convolution.
        z: `[B, T, Hv Dv]` output gate.
        b: `[B, T, Hv]` write strength before its sigmoid.
        a: `[B, T, Hv]` decay input.
        weights: the layer's.
        before: state before the tokens.

    Returns:
        y `[B, T, Hv Dv]`, the new `past` and the new `state`.
    """
    window, past, state = windowed(qkv, weights, before)
    g = _decay(weights.a_log, a, weights.dt_bias)
    y, state = gated_delta(*convolved(window, weights), g, mx.sigmoid(b), state, before.mask)
    y = _gate(mx.fast.rms_norm(y, weights.norm, weights.norm_eps), z.reshape(y.shape))
    return y.flatten(-2), past, state


@mix.register
def _mix_by_cpu(
    qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, weights: MixerWeights, before: MixerState
) -> Result | None:
    if not cpu_kernels(qkv):
        return None
    from ..cpu import gated_delta  # needs numba

    window, past, state = windowed(qkv, weights, before)
    y, state = gated_delta.mix(z, b, a, weights, window, state, before.mask)
    return y, past, state
