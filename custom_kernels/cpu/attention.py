"""Attention over a prompt on a CPU, in blocks of queries, by numpy's BLAS.

On a CPU MLX's own op multiplies matrices many times slower and holds the scores of all queries
against all keys.
"""

import mlx.core as mx
import numpy as np

from ...errors import FlashMoEError
from ..shapes import expect, expect_count

BLOCK = 64  # queries: enough for BLAS, with few scores beyond the causal edge
SCORES = 1 << 22  # per block: 16 MiB in float32


@np.errstate(invalid="ignore", over="ignore")  # NaN passes through without a warning
def attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array:
    """Compute `mx.fast.scaled_dot_product_attention` in float32, eagerly.

    Args:
        q: `[B, Hq, T, D]` float32.
        k: `[B, Hkv, S, D]`, Hq a multiple of Hkv; the queries are the last T of S positions.
        v: `[B, Hkv, S, Dv]`.
        scale: factor of the scores.
        mask: "causal", None, or an array that broadcasts to `[B, Hq, T, S]`: bool, True where a
            query sees a key, or numbers to add to the scores.

    Returns:
        `[B, Hq, T, Dv]` float32.
    """
    queries, keys, values = (np.asarray(x.astype(mx.float32)) for x in (q, k, v))
    batch, heads, tokens, dim = queries.shape
    kv_heads, length = keys.shape[1:3]
    expect("the cache's keys", keys, (batch, kv_heads, length, dim))
    expect("the cache's values", values, (batch, kv_heads, length, values.shape[-1]))
    if not kv_heads or heads % kv_heads:
        raise FlashMoEError(f"{heads} query heads are not a multiple of {kv_heads} key heads.")
    expect_count("queries of a prompt", tokens, length)
    causal = isinstance(mask, str)
    shape = batch, heads, tokens, length
    seen = _as_numpy(mask, shape) if isinstance(mask, mx.array) else None
    repeat = heads // kv_heads
    block = min(BLOCK, max(1, SCORES // (repeat * length)))
    out = np.empty((batch, tokens, heads, values.shape[-1]), np.float32)
    for start in range(0, tokens, block):
        rows = slice(start, min(start + block, tokens))
        for b in range(batch):
            end = length - tokens + rows.stop if causal else _end(seen, b, rows, length)
            for head in range(kv_heads):
                group = slice(head * repeat, (head + 1) * repeat)
                few = queries[b, group, rows] * np.float32(scale)
                scores = few.reshape(-1, few.shape[-1]) @ keys[b, head, :end].T
                grouped = scores.reshape(repeat, -1, end)
                if causal:
                    _hide_later(grouped)
                elif seen is not None:
                    _apply(grouped, seen[b, group, rows, :end])
                y = _softmax_times(scores, values[b, head, :end])
                out[b, rows, group] = y.reshape(repeat, -1, y.shape[-1]).swapaxes(0, 1)
    return mx.array(out).transpose(0, 2, 1, 3)


def _as_numpy(mask: mx.array, shape: tuple[int, ...]) -> np.ndarray:
    """View a mask as a bool or float32 array of the shape of all scores."""
    kept = mask if mask.dtype == mx.bool_ else mask.astype(mx.float32)
    return np.broadcast_to(np.asarray(kept), shape)


def _end(seen: np.ndarray | None, b: int, rows: slice, length: int) -> int:
    """Return the end of the keys that a block of queries sees, so that parts equal the whole."""
    if seen is None or seen.dtype != np.bool_:
        return length
    of_block = seen[b, :, rows]
    if not of_block.any(axis=-1).all():  # a query that sees no key averages all values
        return length
    return int(np.flatnonzero(of_block.any(axis=(0, 1)))[-1]) + 1


def _hide_later(scores: np.ndarray) -> None:
    """Hide later keys from each query of `[repeat, n, end]`; the last query sees all keys."""
    n = scores.shape[1]
    later = np.triu(np.ones((n, n), np.bool_), 1)
    np.copyto(scores[:, :, -n:], np.finfo(np.float32).min, where=later)


def _apply(scores: np.ndarray, mask: np.ndarray) -> None:
    """Apply a mask of the scores' shape, in place."""
    if mask.dtype == np.bool_:
        # The lowest finite number, as in MLX: a query that sees no key averages all values.
        np.copyto(scores, np.finfo(np.float32).min, where=~mask)
    else:
        scores += mask


def _softmax_times(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return softmax(scores `[n, S]`) @ values `[S, Dv]`; overwrites the scores."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    y = scores @ values
    y /= scores.sum(axis=-1, keepdims=True)
    return y
