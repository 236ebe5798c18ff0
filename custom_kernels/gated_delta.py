"""Gated delta rule, the recurrent core of Qwen3.5's linear attention."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from flashmoe_mlx.custom_kernels.executor import cpu_kernels


@partial(mx.compile, shapeless=True)
def decay(a_log: mx.array, a: mx.array, dt_bias: mx.array) -> mx.array:
    """Return the per-head decay g = exp(-exp(A_log) softplus(a + dt_bias)), float32.

    Args:
        a_log: `[Hv]`.
        a: `[B, T, Hv]`.
        dt_bias: `[Hv]`.
    """
    return mx.exp(-mx.exp(a_log.astype(mx.float32)) * nn.softplus(a + dt_bias))


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
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Scan the gated delta rule over T tokens; shapes and rule as in `reference.gated_delta`.

    Args:
        q: `[B, T, Hk, Dk]`.
        k: `[B, T, Hk, Dk]`.
        v: `[B, T, Hv, Dv]`.
        g: `[B, T, Hv]` float32.
        beta: `[B, T, Hv]`.
        state: `[B, Hv, Dv, Dk]` float32, or None for zeros.
        mask: `[B, T]` bool, False for padding.

    Returns:
        y `[B, T, Hv, Dv]` in q's dtype and the final state `[B, Hv, Dv, Dk]` float32.
    """
    batch, tokens, key_heads, key_dim = k.shape
    value_heads, value_dim = v.shape[2:]
    if state is None:
        state = mx.zeros((batch, value_heads, value_dim, key_dim), dtype=mx.float32)
    if kernels := cpu_kernels(q):
        return kernels.gated_delta(q, k, v, g, beta, state, mask)
    if (repeat := value_heads // key_heads) > 1:
        q, k = mx.repeat(q, repeat, axis=2), mx.repeat(k, repeat, axis=2)
    outputs = []
    for t in range(tokens):
        y, new = _step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state)
        outputs.append(y.astype(q.dtype))
        # Read each state before the next is made, or all states of a long prompt live at once.
        new = mx.depends(new, y)
        state = new if mask is None else mx.where(mask[:, t, None, None, None], new, state)
    return mx.stack(outputs, axis=1), state
