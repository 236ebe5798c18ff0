"""Attention over all keys of a cache, for any number of tokens."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention

from ..device import cpu_kernels
from ..op import Op


@Op
def attention(
    queries: mx.array, keys: Any, values: Any, scale: float, mask: Any = None, cache: Any = None
) -> mx.array:
    """Compute mlx-lm's `scaled_dot_product_attention`, `[B, heads, T, D]`.

    Args:
        queries: `[B, heads, T, D]`.
        keys: `[B, key heads, S, D]`, or a quantized cache's form of it.
        values: like `keys`.
        scale: factor of the scores.
        mask: as in mlx-lm.
        cache: source of keys and values.
    """
    return scaled_dot_product_attention(queries, keys, values, cache=cache, scale=scale, mask=mask)


@attention.register
def _by_cpu(
    queries: mx.array, keys: Any, values: Any, scale: float, mask: Any = None, cache: Any = None
) -> mx.array | None:
    if hasattr(cache, "bits") or not cpu_kernels(queries):
        return None
    from ..cpu import attention  # needs numba

    return attention.attention(queries, keys, values, scale, mask)
