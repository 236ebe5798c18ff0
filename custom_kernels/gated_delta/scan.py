"""The gated delta rule over many tokens, on a GPU."""

from dataclasses import dataclass

import mlx.core as mx

from ..launch import SIMD, Kernel, is_cuda
from ..shapes import expect
from .step import LEAST_KEY_DIM, vector
from .weights import check_rule

MOST_MEMORY = 24 << 10  # bytes per threadgroup; Metal has 32 KiB

_kernel = Kernel(
    "gated_delta/scan",
    ("q", "k", "v", "g", "beta", "state", "mask"),
    ("y", "new_state"),
    ("gated_delta/common.metal",),
)


@dataclass(frozen=True)
class ScanShape:
    """Division of work among lanes.

    Attributes:
        row_lanes: lanes that share a row of the state, a power of two up to 32.
        rows: rows that these lanes hold, at most one per lane.
        simdgroups: simdgroups per threadgroup.
        tile: most tokens to prefetch, at most the lanes of a threadgroup.
    """

    row_lanes: int = 8
    rows: int = 2
    simdgroups: int = 4
    tile: int = 8


SHAPE = ScanShape()
CUDA_SHAPE = ScanShape(8, 1, 8, 8)  # fastest of eight measured


def scan(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    mask: mx.array | None = None,
    shape: ScanShape | None = None,
) -> tuple[mx.array, mx.array]:
    """Scan the gated delta rule over T tokens; rule as in `reference.gated_delta`.

    Args:
        q: `[B, T, Hk, Dk]` float32, bfloat16 or float16, as k, v, g and beta.
        k: `[B, T, Hk, Dk]`.
        v: `[B, T, Hv, Dv]`; Hv is a multiple of Hk.
        g: `[B, T, Hv]`.
        beta: `[B, T, Hv]`.
        state: `[B, Hv, Dv, Dk]` float32.
        mask: `[B, T]` bool, False for padding.
        shape: division of work, None for the device's default.

    Returns:
        y `[B, T, Hv, Dv]` in q's dtype, of masked tokens too, and the final state
        `[B, Hv, Dv, Dk]` float32.
    """
    key_heads, key_dim = k.shape[2:]
    batch, tokens, value_heads, value_dim = v.shape
    if not tokens:
        raise ValueError("scan needs at least one token")
    if value_heads % key_heads:
        raise ValueError(f"{value_heads} value heads are not a multiple of {key_heads} key heads")
    if key_dim < LEAST_KEY_DIM:
        raise ValueError(f"key_dim {key_dim} is below {LEAST_KEY_DIM}: use MLX's ops")
    check_rule(q, k, v, g, beta, state)
    expect("decays", g, (batch, tokens, value_heads))
    expect("a GatedDeltaNet layer's state", state, state.shape, mx.float32)
    if mask is not None:
        expect("the mask", mask, (batch, tokens), mx.bool_)
    shape = shape or (CUDA_SHAPE if is_cuda() else SHAPE)
    lanes = SIMD * shape.simdgroups
    block = lanes // shape.row_lanes * shape.rows
    y, final = _kernel(
        [q, k, v, g, beta, state, state if mask is None else mask],
        [(v.shape, q.dtype), (state.shape, mx.float32)],
        (-(-value_dim // block), value_heads, batch),
        lanes,
        QT=q.dtype,
        KT=k.dtype,
        VT=v.dtype,
        GT=g.dtype,
        BT=beta.dtype,
        HK=key_heads,
        HV=value_heads,
        DK=key_dim,
        DV=value_dim,
        MASK=mask is not None,
        ROW_LANES=shape.row_lanes,
        ROWS=shape.rows,
        SIMDGROUPS=shape.simdgroups,
        TILE=_tile(shape, key_dim, block),
        VEC=vector(key_dim),
    )
    return y, final


def _tile(shape: ScanShape, key_dim: int, block: int) -> int:
    """Return the tokens whose q, k, v, g, beta and mask fit a threadgroup's memory twice."""
    step = shape.row_lanes * vector(key_dim)
    token = 2 * 4 * (2 * -(-key_dim // step) * step + block + 3)
    if token > MOST_MEMORY:
        raise ValueError(f"key_dim {key_dim} takes more than {MOST_MEMORY} bytes per token")
    return min(shape.tile, MOST_MEMORY // token)
