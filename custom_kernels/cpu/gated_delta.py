"""GatedDeltaNet over a prompt on a CPU: convolution, gated delta rule, gated norm, by numba.

One call replaces round trips through MLX, which cost 0.1 ms each. Layouts as in `reference.py`.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from numba import prange

from ...errors import FlashMoEError
from ..gated_delta.weights import Heads, MixerWeights, check_rule
from ..shapes import expect
from .arrays import Array, compiled, copy, serial, silu, use_threads

ROWS = 32  # rows of the state per unit of parallel work


@serial
def convolve_head(past: Array, now: Array, weight: Array, first: int, out: Array) -> Any:
    """Convolve the channels from `first` on, apply SiLU, and return the sum of squares.

    Args:
        past: `[taps - 1, channels]` inputs.
        now: `[channels]`, the latest.
        weight: `[taps, channels]`.
        first: first channel.
        out: receives the results.
    """
    last, square = past.shape[0], np.float32(0)
    for i in range(out.size):
        out[i] = weight[last, first + i] * now[first + i]
    for tap in range(last):
        for i in range(out.size):
            out[i] += weight[tap, first + i] * past[tap, first + i]
    for i in range(out.size):
        out[i] = silu(out[i])
        square += out[i] * out[i]
    return square


@compiled
def _convolve(
    window: Array, weight: Array, q: Array, k: Array, v: Array, eps: float, scale: float
) -> None:
    """Convolve each head's channels, apply SiLU, normalize q to length `scale`, k to 1."""
    batch, tokens, key_heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    last = weight.shape[0] - 1
    heads = 2 * key_heads + value_heads
    for unit in prange(batch * tokens * heads):
        b, t, head = unit // heads // tokens, unit // heads % tokens, unit % heads
        if head < key_heads:
            out, first = q[b, t, head], head * key_dim
        elif head < 2 * key_heads:
            out, first = k[b, t, head - key_heads], head * key_dim
        else:
            index = head - 2 * key_heads
            out, first = v[b, t, index], 2 * key_heads * key_dim + index * value_dim
        square = convolve_head(window[b, t : t + last], window[b, t + last], weight, first, out)
        if head < 2 * key_heads:
            length = np.float32(scale) if head < key_heads else np.float32(1)
            factor = length / np.sqrt(square + np.float32(eps))
            for i in range(out.size):
                out[i] *= factor


@compiled
def _scan(
    q: Array, k: Array, v: Array, gates: tuple[Array, Array], mask: Array, state: Array,
    final: Array, y: Array,
) -> None:  # fmt: skip
    g, beta = gates
    batch, tokens, value_heads, value_dim = v.shape
    key_heads, key_dim = k.shape[2:]
    by_column = g.shape[3] > 1
    blocks = (value_dim + ROWS - 1) // ROWS
    for unit in prange(batch * value_heads * blocks):
        b, h = unit // blocks // value_heads, unit // blocks % value_heads
        first = unit % blocks * ROWS
        last = min(first + ROWS, value_dim)
        key_head = h // (value_heads // key_heads)
        for d in range(first, last):
            copy(state[b, h, d], final[b, h, d])
        for t in range(tokens):
            decays, strength = g[b, t, h], beta[b, t, h]
            key, query = k[b, t, key_head], q[b, t, key_head]
            decay = decays[0]
            for d in range(first, last):
                row = final[b, h, d]
                known = np.float32(0)
                if by_column:
                    for i in range(key_dim):
                        known += decays[i] * row[i] * key[i]
                    change = (v[b, t, h, d] - known) * strength
                    out = np.float32(0)
                    for i in range(key_dim):
                        new = decays[i] * row[i] + change * key[i]
                        out += new * query[i]
                        if mask[b, t]:
                            row[i] = new
                    y[b, t, h, d] = out
                    continue
                for i in range(key_dim):
                    known += row[i] * key[i]
                change = (v[b, t, h, d] - decay * known) * strength
                out = np.float32(0)
                for i in range(key_dim):
                    new = decay * row[i] + change * key[i]
                    out += new * query[i]
                    if mask[b, t]:
                        row[i] = new
                y[b, t, h, d] = out


@compiled
def _gated_norm(y: Array, z: Array, weight: Array, eps: float) -> None:
    batch, tokens, heads, width = y.shape
    for unit in prange(batch * tokens * heads):
        b, t, h = unit // heads // tokens, unit // heads % tokens, unit % heads
        row, gate = y[b, t, h], z[b, t, h]
        square = np.float32(0)
        for i in range(width):
            square += row[i] * row[i]
        factor = np.float32(1) / np.sqrt(square / np.float32(width) + np.float32(eps))
        for i in range(width):
            row[i] = row[i] * factor * weight[i] * silu(gate[i])


def gated_delta(
    q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, mask: Array | None
) -> tuple[Array, Array]:
    """Scan the gated delta rule; shapes as in `reference.gated_delta`, all float32.

    Decays g may also be `[B, T, Hv, Dk]`, one for each column of the state.
    """
    if mask is None:
        mask = np.ones(q.shape[:2], np.bool_)
    value_heads, key_heads = v.shape[2], k.shape[2]
    if not key_heads or value_heads % key_heads:
        raise FlashMoEError(
            f"{value_heads} value heads are not a multiple of {key_heads} key heads."
        )
    check_rule(q, k, v, g, beta, state, np.float32)
    decays = g.reshape(*v.shape[:3], -1)
    expect("the mask", mask, v.shape[:2], np.bool_)
    final, y = np.empty_like(state), np.empty_like(v)
    use_threads(2 * y.size * q.shape[-1])
    _scan(q, k, v, (decays, beta), mask, state, final, y)
    return y, final


def mix(
    z: mx.array, b: mx.array, a: mx.array, weights: MixerWeights, window: mx.array, state: mx.array,
    mask: mx.array | None,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """Compute `naive.mix` from the convolution's window `[B, taps - 1 + T, channels]` on."""
    heads, (batch, tokens, _) = weights.heads, z.shape
    arrays = [mx.contiguous(t) for t in (window, z, b, a, state)]
    fixed = [weights.conv, weights.a_log, weights.dt_bias, weights.norm]
    mx.eval(arrays, fixed, mask)
    past, gates, strength, shift, before = (np.asarray(t) for t in arrays)
    conv, a_log, dt_bias, norm = (np.asarray(t) for t in fixed)
    weights.check()
    shape = batch, tokens + conv.shape[1] - 1, weights.channels
    expect("the convolution's inputs", past, shape, np.float32)
    expect("output gates", gates, (batch, tokens, heads.values * heads.value_dim), np.float32)
    q, k = (np.empty((batch, tokens, heads.keys, heads.key_dim), np.float32) for _ in range(2))
    v = np.empty((batch, tokens, heads.values, heads.value_dim), np.float32)
    use_threads(16 * past.size)
    _convolve(
        past, np.ascontiguousarray(conv[..., 0].T), q, k, v, weights.qk_eps, heads.key_dim**-0.5
    )
    g = np.exp(-np.exp(a_log) * np.logaddexp(shift + dt_bias, np.float32(0)))
    beta = np.float32(1) / (np.float32(1) + np.exp(-strength))
    y, final = gated_delta(q, k, v, g, beta, before, None if mask is None else np.asarray(mask))
    use_threads(16 * y.size)
    _gated_norm(y, gates.reshape(y.shape), norm, weights.norm_eps)
    return mx.array(y.reshape(batch, tokens, -1)), mx.array(final)


def prepare() -> None:
    """Compile the kernels by running a layer of one head of each kind."""
    one = Heads(1, 1, 1, 1)
    weights = MixerWeights(one, mx.zeros((3, 4, 1)), mx.zeros(1), mx.zeros(1), mx.zeros(1), 1e-6)
    zero = mx.zeros((1, 1, 1))
    mix(zero, zero, zero, weights, mx.zeros((1, 4, 3)), mx.zeros((1, 1, 1, 1)), None)
