"""Full attention between its projections for one token per row, in two launches on a GPU."""

from dataclasses import dataclass
from functools import cache, lru_cache
from math import tau
from threading import get_ident
from typing import ClassVar

import mlx.core as mx
import numpy as np

from .. import reference
from ..case import DTYPES, NAMES
from ..device import on_gpu
from ..launch import LEAST_ELEMENTS, SIMD, Kernel, scalar, settled
from ..shapes import expect

# Keys of the cases; longer caches go to stock, because one threadgroup per head is too few.
TRIED_KEYS = (500, 2000, 8000)
BLOCK = 256  # slots by which mlx-lm's caches grow
HEAD_DIMS = (32, 64, 128, 256)
LANES = 512  # per threadgroup, one per head
FLIGHT = 4  # keys that a team of lanes reads at once
ROPE_BASE, EPS = 1e7, 1e-6  # of the cases

_prepare = Kernel(
    "attention/prepare",
    ("projected", "q_norm", "k_norm", "eps", "turns", "offset"),
    ("queries", "keys"),
)
_attend = Kernel(
    "attention/step",
    ("queries", "projected", "keys", "values", "length"),
    ("y",),
    ("affine.metal", "gated_delta/common.metal"),
)


@dataclass(frozen=True)
class AttentionHeads:
    """Sizes of full attention.

    Attributes:
        queries: query heads Hq.
        keys: key and value heads Hk.
        dim: D, size of a head.
        rope_dims: elements of each head that RoPE rotates.
    """

    queries: int
    keys: int
    dim: int
    rope_dims: int

    @property
    def width(self) -> int:
        """Rows of the joined projection: queries and gates, keys, values."""
        return 2 * (self.queries + self.keys) * self.dim

    def supported(self) -> bool:
        """Return whether the kernels support these sizes."""
        turned = self.rope_dims % 2 == 0 and 0 < self.rope_dims <= self.dim
        return self.dim in HEAD_DIMS and self.queries % self.keys == 0 and turned


def prepare(
    projected: mx.array,
    heads: AttentionHeads,
    norms: tuple[mx.array, mx.array],
    eps: float,
    base: float,
    offset: mx.array,
) -> tuple[mx.array, mx.array]:
    """Make one token's queries and keys: norm, then RoPE.

    Args:
        projected: `[B, 1, 2 Hq D + 2 Hk D]`: per query head its queries and gate, keys, values.
        heads: sizes.
        norms: `[D]` weights of the queries' and the keys' RMS norm.
        eps: epsilon of both norms.
        base: base of RoPE.
        offset: int32, first element the token's position; see `integer`.

    Returns:
        queries `[B, Hq, D]` float32, scale folded in; keys `[B, Hk, 1, D]` in projected's dtype.
    """
    batch = projected.shape[0]
    expect("projections", projected, (batch, 1, heads.width))
    for norm in norms:
        expect("the norm of queries and keys", norm, (heads.dim,))
    expect("the offset", offset, offset.shape, mx.int32)
    queries, keys = _prepare(
        [projected, *norms, scalar(eps), turns(heads.rope_dims, base), offset],
        [
            ((batch, heads.queries, heads.dim), mx.float32),
            ((batch, heads.keys, 1, heads.dim), projected.dtype),
        ],
        (heads.queries + heads.keys, batch, 1),
        SIMD,
        T=projected.dtype,
        HQ=heads.queries,
        HK=heads.keys,
        D=heads.dim,
        DIMS=heads.rope_dims,
    )
    return queries, keys


def attend(
    queries: mx.array,
    projected: mx.array,
    heads: AttentionHeads,
    keys: mx.array,
    values: mx.array,
    length: mx.array,
    *,
    lanes: int = LANES,
    flight: int = FLIGHT,
) -> mx.array:
    """Compute attention over a cache's keys and values, and apply the output gate.

    Args:
        queries: `[B, Hq, D]` float32, scale folded in.
        projected: as for `prepare`, for the gates.
        heads: sizes.
        keys: `[B, Hk, S, D]`, a whole buffer.
        values: `[B, Hk, S, D]`.
        length: `[1]` int32, number of valid keys, at least 1.
        lanes: lanes per threadgroup, a multiple of 32, at least D.
        flight: keys that a team reads at once.

    Returns:
        `[B, 1, Hq D]` in projected's dtype.
    """
    batch = projected.shape[0]
    expect("queries", queries, (batch, heads.queries, heads.dim), mx.float32)
    expect("projections", projected, (batch, 1, heads.width))
    expect("the cache's keys", keys, (batch, heads.keys, keys.shape[2], heads.dim))
    expect("the cache's values", values, keys.shape)
    expect("the number of keys", length, length.shape, mx.int32)
    (y,) = _attend(
        [queries, projected, keys, values, length],
        [((batch, 1, heads.queries * heads.dim), projected.dtype)],
        (heads.queries, batch, 1),
        lanes,
        T=projected.dtype,
        KV=keys.dtype,
        HQ=heads.queries,
        HK=heads.keys,
        D=heads.dim,
        LANES=lanes,
        FLIGHT=flight,
    )
    return y


def integer(value: int) -> mx.array:
    """Return `[LEAST_ELEMENTS]` int32 filled with `value`, cached for all layers of a step."""
    return _integer(value, get_ident())


@lru_cache(maxsize=4)
def _integer(value: int, thread: int) -> mx.array:
    return mx.full(LEAST_ELEMENTS, value, dtype=mx.int32)


@cache
def turns(dims: int, base: float) -> mx.array:
    """Return `[dims / 2]` uint64: RoPE's turns per position of each element pair, times 2^64."""
    speeds = [base ** (-2 * i / dims) / tau for i in range(dims // 2)]
    return settled(mx.array(np.array([round(speed * 2**64) for speed in speeds], np.uint64)))


@dataclass(frozen=True)
class AttentionStepCase:
    """`prepare` and `attend` at one shape; see `case.KernelCase`. Outputs y and the new keys.

    Adding keys and values to the cache is left out: it is the same work for all.

    Attributes:
        heads: Hq.
        kv_heads: Hk.
        head_dim: D.
        rope_dims: of D.
        dtype: of activations, norms and cache.
        batch: B.
        keys: valid keys of the cache; later slots hold NaN.
        position: the token's.
    """

    op: ClassVar[str] = "attention_step"
    heads: int
    kv_heads: int
    head_dim: int
    rope_dims: int
    dtype: str
    batch: int = 1
    keys: int = TRIED_KEYS[0]
    position: int = TRIED_KEYS[0] - 1

    @property
    def _heads(self) -> AttentionHeads:
        return AttentionHeads(self.heads, self.kv_heads, self.head_dim, self.rope_dims)

    @property
    def nbytes(self) -> int:
        """Bytes of the projection, of keys and values, of y and the new keys."""
        cached = 2 * self.keys * self.kv_heads * self.head_dim
        row = self._heads.width + (self.heads + self.kv_heads) * self.head_dim
        return self.batch * (cached + row) * DTYPES[self.dtype].size

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make projected, both norms, keys, values, offset, length; scores have deviation 2."""
        key = iter(mx.random.split(mx.random.key(seed), 5))
        slots = -(-self.keys // BLOCK) * BLOCK
        cache = self.batch, self.kv_heads, slots, self.head_dim
        used = mx.arange(slots)[:, None] < self.keys
        arrays = [
            mx.random.normal((self.batch, 1, self._heads.width), key=next(key)),
            2 + mx.random.normal((self.head_dim,), key=next(key)) / 4,
            1 + mx.random.normal((self.head_dim,), key=next(key)) / 4,
            mx.where(used, mx.random.normal(cache, key=next(key)), mx.nan),
            mx.where(used, mx.random.normal(cache, key=next(key)), mx.nan),
        ]
        arrays = [array.astype(DTYPES[self.dtype]) for array in arrays]
        arrays += [mx.array([self.position], mx.int32), mx.array([self.keys], mx.int32)]
        mx.eval(arrays)
        return arrays

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernels."""
        projected, q_norm, k_norm, keys, values, offset, length = inputs
        heads = self._heads
        queries, new = prepare(projected, heads, (q_norm, k_norm), EPS, ROPE_BASE, offset)
        return [attend(queries, projected, heads, keys, values, length), new]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by MLX's own ops."""
        projected, q_norm, k_norm, keys, values, *_ = inputs
        queries, gate, new = self._split(projected)
        queries, new = (
            self._rope(mx.fast.rms_norm(x, weight, EPS).transpose(0, 2, 1, 3))
            for x, weight in ((queries, q_norm), (new, k_norm))
        )
        keys, values = keys[:, :, : self.keys], values[:, :, : self.keys]
        scale = self.head_dim**-0.5
        y = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale)
        y = y.transpose(0, 2, 1, 3).reshape(self.batch, 1, -1)
        return [y * mx.sigmoid(gate.reshape(self.batch, 1, -1)), new]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        projected, q_norm, k_norm, keys, values, *_ = inputs
        queries, gate, new = (x.astype(mx.float32) for x in self._split(projected))
        turned = self.rope_dims, ROPE_BASE, self.position
        queries = reference.rope(reference.rms_norm(queries, q_norm, EPS), *turned)
        new = reference.rope(reference.rms_norm(new, k_norm, EPS), *turned)
        queries = queries[:, 0] * self.head_dim**-0.5
        keys, values = keys[:, :, : self.keys], values[:, :, : self.keys]
        y = reference.attention(queries, keys, values) * mx.sigmoid(gate[:, 0])
        return [y.reshape(self.batch, 1, -1), new.transpose(0, 2, 1, 3)]

    def _split(self, projected: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return queries and gate `[B, 1, Hq, D]` and keys `[B, 1, Hk, D]`."""
        end = 2 * self.heads * self.head_dim
        both, keys, _ = mx.split(projected, [end, end + self.kv_heads * self.head_dim], axis=-1)
        queries, gate = mx.split(both.reshape(self.batch, 1, self.heads, -1), 2, axis=-1)
        return queries, gate, keys.reshape(self.batch, 1, self.kv_heads, -1)

    def _rope(self, x: mx.array) -> mx.array:
        return mx.fast.rope(
            x, self.rope_dims, traditional=False, base=ROPE_BASE, scale=1.0, offset=self.position
        )


def deciding_case(heads: AttentionHeads, x: mx.array, keys: int) -> AttentionStepCase | None:
    """Return the case whose verdict holds for steps of `x`; None off a GPU or for too many keys."""
    if not on_gpu(x):
        return None
    tried = next((most for most in TRIED_KEYS if keys <= most), None)
    if tried is None:
        return None
    sizes = heads.queries, heads.keys, heads.dim, heads.rope_dims
    return AttentionStepCase(*sizes, NAMES[x.dtype], len(x), tried)
