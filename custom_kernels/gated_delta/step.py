"""GatedDeltaNet between its projections for one token per row, in one launch on a GPU."""

from typing import TYPE_CHECKING

import mlx.core as mx

from ..launch import Kernel
from ..shapes import expect

if TYPE_CHECKING:
    from .weights import Heads, MixerWeights

LANES = 512  # per threadgroup
ROW_LANES = 8  # lanes that share a row of the state
LEAST_KEY_DIM = 8  # Metal passes smaller arrays as `constant`

_kernel = Kernel(
    "gated_delta/step",
    ("projected", "conv", "a_log", "dt_bias", "norm", "eps", "past", "state"),
    ("y", "new_past", "new_state"),
    ("gated_delta/common.metal",),
)


def step(
    projected: mx.array,
    weights: "MixerWeights",
    past: mx.array,
    state: mx.array,
    lanes: int = LANES,
    row_lanes: int = ROW_LANES,
) -> tuple[mx.array, mx.array, mx.array]:
    """Run a GatedDeltaNet layer between its projections for one token.

    Computes `naive.mix` in float32 throughout.

    Args:
        projected: `[B, 1, 2 Hk Dk + Hv Dv + Hv Dv + Hv + Hv]`, qkv, z, b and a side by side.
        weights: the layer's.
        past: `[B, taps - 1, 2 Hk Dk + Hv Dv]` last inputs of the convolution.
        state: `[B, Hv, Dv, Dk]` float32.
        lanes: lanes per threadgroup, a multiple of 32, at least Dv.
        row_lanes: lanes that share a row of the state, a power of two up to 32.

    Returns:
        y `[B, 1, Hv Dv]` in projected's dtype, the new `past` and the new `state`.
    """
    heads, taps = weights.heads, weights.conv.shape[1]
    check_heads(heads, taps)
    if heads.value_dim > lanes:
        raise ValueError(f"value_dim {heads.value_dim} is more than {lanes} lanes: pass more lanes")
    batch = projected.shape[0]
    weights.check()
    weights.check_cache(past, state, batch)
    expect("projections", projected, (batch, 1, weights.projected))
    expect("a GatedDeltaNet layer's state", state, state.shape, mx.float32)
    y, past, state = _kernel(
        [projected, *weights.parts, past, state],
        [
            ((batch, 1, heads.values * heads.value_dim), projected.dtype),
            (past.shape, past.dtype),
            (state.shape, mx.float32),
        ],
        (heads.values, batch, 1),
        lanes,
        T=projected.dtype,
        P=past.dtype,
        TAPS=taps,
        LANES=lanes,
        ROW_LANES=row_lanes,
        VEC=vector(heads.key_dim),
        **head_constants(heads),
    )
    return y, past, state


def check_heads(heads: "Heads", taps: int = 2) -> None:
    """Raise ValueError for sizes that the kernels do not support."""
    if heads.values % heads.keys:
        raise ValueError(f"{heads.values} value heads are not a multiple of {heads.keys} key heads")
    if heads.key_dim < LEAST_KEY_DIM:
        raise ValueError(f"key_dim {heads.key_dim} is below {LEAST_KEY_DIM}: use MLX's ops")
    if taps < 2:
        raise ValueError(f"a convolution of {taps} tap has no past: use MLX's ops")


def head_constants(heads: "Heads") -> dict[str, int]:
    """Return the kernels' constants HK, HV, DK and DV."""
    return {"HK": heads.keys, "HV": heads.values, "DK": heads.key_dim, "DV": heads.value_dim}


def vector(columns: int) -> int:
    """Return the numbers per access to a row: 4 or 1."""
    return 1 if columns % 4 else 4
