"""Full attention between its projections for one token per row, on a CPU."""

from typing import Any

import mlx.core as mx
import numpy as np
from numba import prange

from ..attention.step import AttentionHeads
from ..shapes import expect, expect_count
from .arrays import Array, compiled, exp, serial, sigmoid, use_threads, view
from .decode import Norm
from .records import rms_norm

F32 = np.dtype(np.float32)


@serial
def _turn(x: Array, weight: Array, eps: float, turns: Array, out: Array) -> None:
    """RMS-normalize a head, then rotate elements i and i + half by angle i: cosines, sines."""
    rms_norm(x, weight, eps, out)
    half = turns.shape[1]
    for i in range(half):
        a, b = out[i], out[half + i]
        out[i] = a * turns[0, i] - b * turns[1, i]
        out[half + i] = b * turns[0, i] + a * turns[1, i]


@serial
def _prepare(
    projected: Array, new_keys: Array, norms: Any, turns: Array, queries: Array, keys: Array
) -> None:
    (weight, eps), (key_weight, key_eps) = norms
    dim = queries.shape[2]
    for b in range(queries.shape[0]):
        for head in range(queries.shape[1]):
            _turn(projected[b, head, :dim], weight, eps, turns, queries[b, head])
        for head in range(keys.shape[1]):
            _turn(new_keys[b, head], key_weight, key_eps, turns, keys[b, head])


def prepare(
    projected: Array,
    new_keys: Array,
    norms: tuple[Norm, Norm],
    heads: AttentionHeads,
    base: float,
    offset: int,
) -> tuple[Array, Array]:
    """Make one token's queries `[B, Hq, D]` and keys `[B, Hk, D]`: norm, then RoPE.

    Args:
        projected: `[B, Hq, 2 D]` float32: per head its queries and gate.
        new_keys: `[B, Hk, D]`.
        norms: of queries and keys: `[D]` weight and epsilon.
        heads: sizes.
        base: base of RoPE.
        offset: the token's position.
    """
    batch, dims = len(projected), heads.rope_dims
    expect("queries and gates", projected, (batch, heads.queries, 2 * heads.dim), F32)
    expect("keys", new_keys, (batch, heads.keys, heads.dim), F32)
    for weight, _ in norms:
        expect("the norm of queries and keys", weight, (heads.dim,), F32)
    angles = offset * base ** (-np.arange(0, dims, 2) / dims)  # float64, as in `reference.rope`
    turns = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    queries = np.empty((batch, heads.queries, heads.dim), np.float32)
    keys = np.empty(new_keys.shape, np.float32)
    _prepare(projected, new_keys, norms, turns, queries, keys)
    return queries, keys


@compiled
def _attend(
    queries: Array, projected: Array, keys: Array, values: Array, length: int, scale: float,
    out: Array,
) -> None:  # fmt: skip
    batch, heads, dim = queries.shape
    key_heads = keys.shape[1]
    repeat = heads // key_heads
    for unit in prange(batch * key_heads):
        b, key_head = unit // key_heads, unit % key_heads
        scores = np.empty((repeat, length), np.float32)
        for s in range(length):  # each key is read once for all of its queries
            for r in range(repeat):
                query, dot = queries[b, key_head * repeat + r], np.float32(0)
                for i in range(dim):
                    dot += query[i] * keys[b, key_head, s, i]
                scores[r, s] = dot * np.float32(scale)
        for r in range(repeat):
            largest, total = scores[r].max(), np.float32(0)
            for s in range(length):
                scores[r, s] = exp(scores[r, s] - largest)
                total += scores[r, s]
            for s in range(length):
                scores[r, s] /= total
            out[b, key_head * repeat + r] = np.float32(0)
        for s in range(length):
            for r in range(repeat):
                y, weight = out[b, key_head * repeat + r], scores[r, s]
                for i in range(dim):
                    y[i] += weight * values[b, key_head, s, i]
        for head in range(key_head * repeat, (key_head + 1) * repeat):
            for i in range(dim):
                out[b, head, i] *= sigmoid(projected[b, head, dim + i])


def attend(queries: Array, projected: Array, keys: Array, values: Array, length: int) -> Array:
    """Compute attention over a cache's keys and values, and apply the gates: `[B, Hq, D]`.

    Args:
        queries: `[B, Hq, D]` float32.
        projected: as for `prepare`, for the gates.
        keys: `[B, Hk, S, D]` float32, a whole buffer; Hq is a multiple of Hk.
        values: likewise.
        length: number of valid keys, at least 1.
    """
    batch, heads, dim = queries.shape
    expect("queries and gates", projected, (batch, heads, 2 * dim), F32)
    expect("the cache's keys", keys, (batch, *keys.shape[1:3], dim), F32)
    expect("the cache's values", values, keys.shape, F32)
    expect_count("keys of a step", length, keys.shape[2])
    out = np.empty_like(queries)
    use_threads(2 * batch * heads * length * dim)
    _attend(queries, projected, keys, values, length, dim**-0.5, out)
    return out


def compile_kernels() -> None:
    """Compile the kernels by running one head of each kind."""
    heads, weight = AttentionHeads(1, 1, 2, 2), np.ones(2, np.float32)
    projected, keys = np.zeros((1, 1, 4), np.float32), np.zeros((1, 1, 2), np.float32)
    cache = mx.zeros((1, 1, 1, 2))
    mx.eval(cache)
    queries, _ = prepare(projected, keys, ((weight, 1e-6), (weight, 1e-6)), heads, 1e4, 0)
    attend(queries, projected, view(cache), view(cache), 1)
