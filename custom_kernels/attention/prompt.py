"""Attention to all keys that a cache returns, for any number of tokens."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention

from ..device import cpu_kernels
from ..op import Op

MIN_TOKENS = 2  # two queries over 64 keys are 3 times as fast as by MLX; one is a decoding step


@Op
def attention(
    queries: mx.array, keys: Any, values: Any, scale: float, mask: Any = None, cache: Any = None
) -> mx.array:
    """Return `[B, heads, T, D]`: the queries' attention to what the cache returned.

    Args:
        queries: `[B, heads, T, D]`.
        keys: `[B, key heads, S, D]`, or what a quantized cache has for them.
        values: like `keys`.
        scale: of the products.
        mask: as for mlx-lm's `scaled_dot_product_attention`.
        cache: where keys and values come from.
    """
    return scaled_dot_product_attention(queries, keys, values, cache=cache, scale=scale, mask=mask)


@attention.register
def _by_cpu(
    queries: mx.array, keys: Any, values: Any, scale: float, mask: Any = None, cache: Any = None
) -> mx.array | None:
    if queries.shape[2] < MIN_TOKENS or hasattr(cache, "bits") or not cpu_kernels(queries):
        return None
    from ..cpu import attention  # needs numba

    return attention.attention(queries, keys, values, scale, mask)
