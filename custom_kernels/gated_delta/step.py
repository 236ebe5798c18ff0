"""GatedDeltaNet of one token per row, from the projections' outputs on, in one launch on a GPU."""

from functools import cache
from typing import TYPE_CHECKING

import mlx.core as mx

from ..launch import LEAST_ELEMENTS, Kernel, settled
from ..shapes import expect

if TYPE_CHECKING:
    from .weights import Heads, MixerWeights

LANES = 512  # of a threadgroup
ROW_LANES = 8  # lanes that hold a row of the state
LEAST_KEY_DIM = 8  # below it, arrays may be so small that Metal passes them as `constant`

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

    Computes as `gated_delta.mix` does, in float32 throughout.

    Args:
        projected: `[B, 1, 2 Hk Dk + Hv Dv + Hv Dv + Hv + Hv]`, qkv, z, b and a side by side.
        weights: the layer's.
        past: `[B, taps - 1, 2 Hk Dk + Hv Dv]` the convolution's last inputs.
        state: `[B, Hv, Dv, Dk]` float32.
        lanes: of a threadgroup: a multiple of 32, at least Dv.
        row_lanes: lanes that hold a row of the state, a power of two up to 32.

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
    eps = epsilons(weights.norm_eps, weights.qk_eps)
    arrays = [projected, weights.conv, weights.a_log, weights.dt_bias, weights.norm, eps]
    y, past, state = _kernel(
        [*arrays, past, state],
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
    """Raise ValueError for what the kernels do not take."""
    if heads.values % heads.keys:
        raise ValueError(f"{heads.values} value heads are no multiple of {heads.keys} key heads")
    if heads.key_dim < LEAST_KEY_DIM:
        raise ValueError(f"key_dim {heads.key_dim} is below {LEAST_KEY_DIM}: use MLX's ops")
    if taps < 2:
        raise ValueError(f"a convolution of {taps} tap has no past: use MLX's ops")


def head_constants(heads: "Heads") -> dict[str, int]:
    """Return the kernels' constants HK, HV, DK and DV."""
    return {"HK": heads.keys, "HV": heads.values, "DK": heads.key_dim, "DV": heads.value_dim}


def vector(columns: int) -> int:
    """Return how many of a row's numbers one access takes: 4 or 1."""
    return 1 if columns % 4 else 4


@cache
def epsilons(norm_eps: float, qk_eps: float) -> mx.array:
    """Return these two and zeros, `[LEAST_ELEMENTS]` float32, once per pair."""
    return settled(mx.array([norm_eps, qk_eps, *[0.0] * (LEAST_ELEMENTS - 2)]))
