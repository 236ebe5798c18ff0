"""A GatedDeltaNet layer's sizes, its weights other than projections, and its state."""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import mlx.core as mx

from ...errors import FlashMoEError
from ..launch import LEAST_ELEMENTS, settled
from ..packed import Part, pack
from ..shapes import expect


@dataclass(frozen=True)
class Heads:
    """Head counts and sizes: `keys` heads of `key_dim`, `values` heads of `value_dim`."""

    keys: int
    values: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class MixerWeights:
    """A GatedDeltaNet layer's weights other than its projections.

    Attributes:
        heads: Hk, Hv, Dk, Dv.
        conv: `[2 Hk Dk + Hv Dv, taps, 1]` depthwise kernel over q, k and v.
        a_log: `[Hv]`.
        dt_bias: `[Hv]`.
        norm: `[Dv]`.
        norm_eps: epsilon of the output norm.
        qk_eps: epsilon of the q and k norm, added to the sum of squares.
    """

    heads: Heads
    conv: mx.array
    a_log: mx.array
    dt_bias: mx.array
    norm: mx.array
    norm_eps: float
    qk_eps: float = 1e-6

    @property
    def channels(self) -> int:
        """Channels of the convolution: q, k and v of all heads."""
        heads = self.heads
        return 2 * heads.keys * heads.key_dim + heads.values * heads.value_dim

    @property
    def projected(self) -> int:
        """Columns of the projections side by side: qkv, z, b and a."""
        return self.channels + self.heads.values * (self.heads.value_dim + 2)

    @cached_property
    def parts(self) -> list[Part]:
        """conv, a_log, dt_bias, norm and both epsilons in one buffer, for the step's kernel."""
        eps = epsilons(self.norm_eps, self.qk_eps)
        return pack([self.conv], [self.a_log], [self.dt_bias], [self.norm], [eps])

    def check(self) -> None:
        """Raise FlashMoEError unless the weights match the heads, by which kernels index them."""
        heads = self.heads
        if heads.values % heads.keys:
            raise FlashMoEError(
                f"{heads.values} value heads are not a multiple of {heads.keys} key heads."
            )
        expect("conv1d.weight", self.conv, (self.channels, self.conv.shape[1], 1))
        expect("A_log", self.a_log, (heads.values,))
        expect("dt_bias", self.dt_bias, (heads.values,))
        expect("norm.weight", self.norm, (heads.value_dim,))

    def check_cache(self, past: mx.array, state: mx.array, batch: int) -> None:
        """Raise FlashMoEError unless a layer's cache matches the weights and the batch."""
        heads, taps = self.heads, self.conv.shape[1]
        expect("a GatedDeltaNet layer's past inputs", past, (batch, taps - 1, self.channels))
        shape = batch, heads.values, heads.value_dim, heads.key_dim
        expect("a GatedDeltaNet layer's state", state, shape)


def check_rule(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, dtype: Any = None) -> None:
    """Raise FlashMoEError unless shapes are as in `reference.gated_delta`, and dtypes `dtype`.

    Decays g are `[B, T, Hv]`, or `[B, T, Hv, Dk]`: one for each column of the state.
    """
    (batch, tokens, value_heads, value_dim), (key_heads, key_dim) = v.shape, k.shape[2:]
    expect("queries", q, (batch, tokens, key_heads, key_dim), dtype)
    expect("keys", k, q.shape, dtype)
    expect("values", v, v.shape, dtype)
    expect("decays", g, v.shape[:3] if g.ndim == 3 else (*v.shape[:3], key_dim), dtype)
    expect("strengths", beta, v.shape[:3], dtype)
    shape = batch, value_heads, value_dim, key_dim
    expect("a GatedDeltaNet layer's state", state, shape, dtype)


class MixerState(NamedTuple):
    """A layer's state before some tokens, and which of these tokens count.

    Attributes:
        past: `[B, taps - 1, 2 Hk Dk + Hv Dv]` last inputs of the convolution, None for zeros.
        state: `[B, Hv, Dv, Dk]` float32, None for zeros.
        mask: `[B, T]` bool, False for padding.
        ends: `[B]` end of each row's tokens, None if all end at T.
    """

    past: mx.array | None
    state: mx.array | None
    mask: mx.array | None = None
    ends: mx.array | None = None

    def arrays(
        self, weights: MixerWeights, batch: int, dtype: mx.Dtype
    ) -> tuple[mx.array, mx.array]:
        """Return `past` (of `dtype` if None) and `state`, checked against the weights."""
        heads, past, state = weights.heads, self.past, self.state
        if past is None:
            past = mx.zeros((batch, weights.conv.shape[1] - 1, weights.channels), dtype)
        if state is None:
            state = mx.zeros((batch, heads.values, heads.value_dim, heads.key_dim))
        weights.check_cache(past, state, batch)
        return past, state


@cache
def epsilons(norm_eps: float, qk_eps: float) -> mx.array:
    """Return both, padded with zeros to `[LEAST_ELEMENTS]` float32, cached."""
    return settled(mx.array([norm_eps, qk_eps, *[0.0] * (LEAST_ELEMENTS - 2)]))
