"""The gated delta rule alone, for models whose GatedDeltaNet layers are mlx-lm's own."""

import mlx.core as mx
import numpy as np

from ..autotune import prefers_custom
from ..case import NAMES
from ..device import cpu_kernels, on_gpu
from .by_gpu import TRIED_SCAN
from .cases import GatedDeltaScanCase
from .scan import scan
from .step import LEAST_KEY_DIM

MOST_KEY_DIM = 256  # columns of the state; lanes hold them in registers


def rule_by_cpu(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array] | None:  # fmt: skip
    """Scan the rule by the CPU kernel, where it supports q; arguments as in `rule_by_gpu`."""
    if not cpu_kernels(q):
        return None
    from ..cpu import gated_delta  # needs numba

    mask = mx.ones(q.shape[:2], mx.bool_) if mask is None else mask
    tensors = [t.astype(mx.float32) for t in (q, k, v, g, beta, state)]
    inputs = [mx.contiguous(t) for t in (*tensors, mask)]
    mx.eval(inputs)
    y, final = gated_delta.gated_delta(*map(np.asarray, inputs))
    return mx.array(y).astype(q.dtype), mx.array(final)


def rule_by_gpu(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array] | None:  # fmt: skip
    """Scan the rule by the GPU kernel, where it supports the shapes and one decay per head.

    Args:
        q: `[B, T, Hk, Dk]`, as k.
        k: `[B, T, Hk, Dk]`.
        v: `[B, T, Hv, Dv]`.
        g: `[B, T, Hv]`, or `[B, T, Hv, Dk]`: a decay for each column of the state.
        beta: `[B, T, Hv]`.
        state: `[B, Hv, Dv, Dk]`.
        mask: `[B, T]` bool, False for padding.

    Returns:
        y `[B, T, Hv, Dv]` in q's dtype and the final state, or None: not supported.
    """
    (keys, key_dim), (values, value_dim) = k.shape[2:], v.shape[2:]
    if not on_gpu(q) or g.ndim > 3 or not LEAST_KEY_DIM <= key_dim <= MOST_KEY_DIM:
        return None
    sizes = keys, values, key_dim, value_dim, NAMES[q.dtype]
    if not prefers_custom(GatedDeltaScanCase(*sizes, tokens=TRIED_SCAN)):
        return None
    return scan(q, k, v, g, beta, state, mask)
